"""Step `ranks`: how much of the scores low-rank queries keep, and what they cost (Figure 3).

The same queries at rank 1, 2, 4 ... and at the fidelity setting are scored by the real steps on every sequence, and
compared with scores of full-rank queries. All variants share factors and gradients, which are fitted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from conf.schema import RunConfig
from pipelines.runner import StageOutcome
from pipelines.steps import StageContext, StageResult, Step
from pipelines.validation.language.variants import agreement, file_bytes, identity, read_scores, run_variants, seconds

VERSION = 1
FULL = "full"
FIDELITIES = (0.99, 0.999)
STEPS = ("ihvp", "queries", "scores")


def step(config: RunConfig) -> Step:
    """The step, which depends on no other: what it needs of a trace it runs itself."""
    what = {"version": VERSION, "variants": identity(variants(config))}
    return Step("ranks", "ranks", (), what, run)


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """The runs that are compared: `full`, `rank 1`, `rank 2` ... (`validation.largest_rank`), `fidelity 0.99` ..."""
    settings: dict[str, dict[str, Any]] = {FULL: {"rank": FULL, "fidelity": None}}
    for rank in doublings(config.validation.largest_rank):
        settings[f"rank {rank}"] = {"rank": str(rank), "fidelity": None}
    for fidelity in FIDELITIES:
        settings[f"fidelity {fidelity:g}"] = {"fidelity": fidelity}
    return {name: replace(config, queries=replace(config.queries, **changes)) for name, changes in settings.items()}


def doublings(largest: int) -> Iterator[int]:
    """1, 2, 4 ... that are not above `largest`."""
    number = 1
    while number <= largest:
        yield number
        number *= 2


def run(context: StageContext) -> StageResult:
    """Write `ranks.json`, and `ranks.safetensors` with the scores of every variant, [queries, sequences].

    `ranks.json` holds, in the order of the tensors, `queries` and the number of `sequences`; of the full-rank queries
    the `bytes` that the scan reads and `seconds` by step; and a list of `variants`, each with

    - `name`, and `rank` or `fidelity` (the other is null), `mean_rank`: ranks a layer and query;
    - `pearson`: correlation with full-rank scores over all sequences: `mean`, `interval`, `minimum`, `by_query`;
    - `predicted`: the mean over queries of the correlation that singular values predict;
    - `bytes`, `relative_bytes` to those of full-rank queries, and `seconds`.
    """
    configs = variants(context.config)
    outcomes = run_variants(configs, cluster=context.cluster)
    results, tensors = summarise(configs, outcomes)
    context.artifact.write_tensors("ranks.safetensors", tensors)
    context.artifact.write_json("ranks.json", results)
    return StageResult({"variants": len(configs) - 1, "sequences": results["sequences"]})


def summarise(
    configs: Mapping[str, RunConfig], outcomes: Mapping[str, Mapping[str, StageOutcome]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compare finished variants with the one that is called `full`: the content of both files."""
    scores = {name: read_scores(found["scores"].artifact) for name, found in outcomes.items()}
    records = outcomes[FULL]["scores"].artifact.read_json("queries.json")
    query_ids = [record["query_id"] for record in records]
    full_bytes = file_bytes(outcomes[FULL]["queries"].artifact, "layers/")
    rows = []
    for name in [name for name in configs if name != FULL]:
        settings, found = configs[name].queries, outcomes[name]
        allotted = found["queries"].artifact.read_json("queries.json")
        size = file_bytes(found["queries"].artifact, "layers/")
        rows.append(
            {
                "name": name,
                "rank": int(settings.rank) if settings.fidelity is None else None,
                "fidelity": settings.fidelity,
                "mean_rank": found["queries"].extra["mean_rank"],
                "pearson": agreement(scores[name].scores_QN, scores[FULL].scores_QN, query_ids),
                "predicted": sum(query["predicted_fidelity"] for query in allotted) / len(allotted),
                "bytes": size,
                "relative_bytes": size / full_bytes,
                "seconds": seconds(found, *STEPS),
            }
        )
    full = {"bytes": full_bytes, "seconds": seconds(outcomes[FULL], *STEPS)}
    size = len(scores[FULL].sequence_ids_N)
    tensors = {name: torch.from_numpy(found.scores_QN).float() for name, found in scores.items()}
    return {"queries": query_ids, "sequences": size, "full": full, "variants": rows}, tensors
