"""Step `block_factors`: block-diagonal covariance factors against whole ones: scores, bytes, seconds (Figure 30).

With O blocks a factor of size M takes M²/O numbers and its eigendecompositions cost 1/O² of what the whole one's does
(Appendix A). Scores are of full rank, by the real steps on every sequence; gradients and candidates are shared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.factors import numbered
from actors.store import Artifact
from conf.schema import RunConfig, Solver
from influence.eigenbasis import eigenbasis
from pipelines.runner import StageOutcome
from pipelines.steps import StageContext, StageResult, Step
from pipelines.validation.language.ranks import doublings
from pipelines.validation.language.variants import agreement, file_bytes, identity, read_scores, run_variants, seconds

VERSION = 1
WHOLE = "1"
FACTORS = ("activation/", "gradient/")
STEPS = ("covariance", "eigenbasis", "correction", "scores")
REPEATS = 3  # timings of the eigendecompositions, of which the shortest counts


def step(config: RunConfig) -> Step:
    """The step, which depends on no other: what it needs of a trace it runs itself."""
    return Step("block_factors", "block_factors", (), {"version": VERSION, "variants": identity(variants(config))}, run)


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """EK-FAC with each number of blocks that is compared: 1, 2, 4 ... up to `validation.largest_blocks`."""
    queries = replace(config.queries, rank="full", fidelity=None)
    return {
        str(blocks): replace(
            config, queries=queries, factors=replace(config.factors, blocks=blocks, solver=Solver.ekfac)
        )
        for blocks in doublings(config.validation.largest_blocks)
    }


def run(context: StageContext) -> StageResult:
    """Write `block_factors.json`.

    It holds `queries`, the number of `sequences`, and a list of `variants`, each with

    - `blocks`, and `pearson`: correlation with the scores of whole factors over all sequences: `mean`, `interval`,
      `minimum`, `by_query`;
    - `bytes` of the artifacts `covariance` (A and S), `eigenbasis` (their bases and eigenvalues) and `correction`;
    - `relative_bytes`: of covariance and eigenbasis together, to those of whole factors;
    - `decomposition_seconds`: CPU time of the eigendecompositions alone, in one process; and `seconds` by step, the
      clock's, with all that surrounds them.
    """
    configs = variants(context.config)
    outcomes = run_variants(configs, cluster=context.cluster)
    results = summarise(outcomes)
    context.artifact.write_json("block_factors.json", results)
    return StageResult({"variants": len(configs), "sequences": results["sequences"]})


def summarise(outcomes: Mapping[str, Mapping[str, StageOutcome]]) -> dict[str, Any]:
    """Compare finished variants with the one of a single block; times eigendecompositions."""
    whole = read_scores(outcomes[WHOLE]["scores"].artifact)
    query_ids = [record["query_id"] for record in outcomes[WHOLE]["scores"].artifact.read_json("queries.json")]
    rows = []
    for name, found in outcomes.items():
        size = {step: file_bytes(found[step].artifact, *FACTORS) for step in ("covariance", "eigenbasis")}
        scores = read_scores(found["scores"].artifact)
        rows.append(
            {
                "blocks": int(name),
                "pearson": agreement(scores.scores_QN, whole.scores_QN, query_ids),
                "bytes": size | {"correction": file_bytes(found["correction"].artifact, "layers/")},
                "decomposition_seconds": decomposition_seconds(found["covariance"].artifact),
                "seconds": seconds(found, *STEPS),
            }
        )
    largest = sum(rows[0]["bytes"][step] for step in ("covariance", "eigenbasis"))
    for row in rows:
        row["relative_bytes"] = (row["bytes"]["covariance"] + row["bytes"]["eigenbasis"]) / largest
    return {"queries": query_ids, "sequences": len(whole.sequence_ids_N), "variants": rows}


def decomposition_seconds(covariance: Artifact) -> float:
    """CPU time of the eigendecompositions of all factors in this process, without reading or writing.

    Not the clock's, which on a shared machine counts what others do: the larger the matrix, the more often.
    """
    names = [name for name in covariance.list() if name.startswith(FACTORS)]
    total = 0.0
    for name in names:
        blocks = numbered(covariance.read_tensors(name), "mean")
        total += min(_timed(name, blocks) for _ in range(REPEATS))
    return total


def _timed(name: str, blocks: Any) -> float:
    started = time.process_time()
    eigenbasis(name, blocks)
    return time.process_time() - started
