"""Stage `fidelity`: how well scores of compressed queries agree with those at full rank, on a sample of the corpus.

Nothing but the summary and the report depends on it: to measure it on more sequences computes no score again.
"""

from __future__ import annotations

import logging

import torch

from actors.factors import load_selection
from actors.tasks import Done, FidelityTask
from conf.schema import QueriesConfig
from influence.scoring import DENSE_COPIES
from pipelines.stages.agreement import agreement, sample_of, shown, summary
from pipelines.stages.compression import uncompressed
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)


def sample_size(queries: QueriesConfig) -> int:
    """Sequences to score both ways, as far as the corpus has them; none where nothing is compressed."""
    return 0 if uncompressed(queries) else queries.fidelity_sample


def run(context: StageContext) -> StageResult:
    """Write `fidelity.json`: the correlation of every query, or nothing where it is not to be measured."""
    measured = _measured(context) if sample_size(context.config.queries) else {}
    context.artifact.write_json("fidelity.json", measured)
    _warn(measured, context.config.queries.fidelity)
    return StageResult({"sample": measured.get("sample", 0)}, {"fidelity": measured})


def _measured(context: StageContext) -> dict:
    """Correlation of compressed with full scores of every query, on a seeded sample of the corpus."""
    records = context.inputs["gradients"].read_json("queries.json")
    found: dict[str, float | None] = {}
    compared = []
    progress = context.progress("fidelity", len(records), "queries")

    def done(task: FidelityTask, report: Done) -> None:
        compressed, full = (torch.tensor(scores, dtype=torch.float64) for scores in report.result)  # type: ignore[attr-defined]
        part = agreement(compressed, full, [records[query]["query_id"] for query in task.queries])
        found.update(part["pearson"])
        compared.append(part["sample"])
        progress.advance(len(task.queries))

    context.cluster.pool.run("fidelity", _tasks(context, len(records)), done, lambda _running: None)
    progress.close()
    by_query = {record["query_id"]: found[record["query_id"]] for record in records}
    return {"sample": min(compared), "pearson": by_query} | summary(by_query)


def _tasks(context: StageContext, queries: int) -> list[FidelityTask]:
    """As many queries a task as `scan.dense_memory` holds at full rank."""
    config, inputs = context.config, context.inputs
    ids = sample_of(inputs["sequences"], sample_size(config.queries), config.seed)
    factors = {name: inputs[name] for name in ("eigenbasis", "correction") if name in inputs}
    width = queries_at_full_rank(context)
    return [
        FidelityTask(
            ids,
            inputs["sequences"],
            inputs["queries"],
            inputs["gradients"],
            factors,
            config.factors.solver.name,
            config.factors.damping_factor,
            tuple(range(start, min(start + width, queries))),
            inputs.get("refinement"),
        )
        for start in range(0, queries, width)
    ]


def queries_at_full_rank(context: StageContext) -> int:
    """How many queries `scan.dense_memory` holds at full rank, at least one."""
    scan = context.config.scan
    numbers = sum(layer.columns * layer.outputs for layer in load_selection(context.inputs["layers"]).layers)
    size = DENSE_COPIES * getattr(torch, scan.sum_dtype.name).itemsize * numbers
    return max(1, int(scan.dense_memory // size))


def _warn(measured: dict, wanted: float | None) -> None:
    if not measured:
        return
    log.info(
        "fidelity: correlation with full-rank scores %s on average, %s at worst, on %d sequences",
        shown(measured["mean"]),
        shown(measured["minimum"]),
        measured["sample"],
    )
    if wanted is not None and measured["minimum"] is not None and measured["minimum"] < wanted:
        log.warning(
            "queries.fidelity=%s asked, %.5f measured at worst: ask for more, or take queries.rank=full",
            wanted,
            measured["minimum"],
        )
