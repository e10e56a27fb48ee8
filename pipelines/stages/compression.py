"""Stage `queries`: ranks spread over layers, queries packed for the scan, and the fidelity that this measured."""

from __future__ import annotations

import logging

import torch

from actors.factors import layer_file, load_selection, save_selection
from actors.reduction import allot, compress
from actors.tasks import Done, FidelityTask
from influence.layers import LayerSelection
from influence.scoring import DENSE_COPIES
from pipelines.stages.agreement import agreement, sample_of, shown, summary
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` (left, right, owner or dense), `queries.json`, `fidelity.json`."""
    output, config = context.artifact, context.config
    selection = load_selection(context.inputs["layers"])
    names = [layer.name for layer in selection.layers]
    records = context.inputs["gradients"].read_json("queries.json")
    full = config.queries.rank == "full" and config.queries.fidelity is None
    allotted = _ranks(context, names, len(records), full)
    open_names = [name for name in names if not output.exists(layer_file(name))]
    arguments = [
        (output, context.inputs["ihvp"], name, [entry["ranks"].get(name, 0) for entry in allotted])
        for name in open_names
    ]
    for _ in context.cluster.map(compress, arguments):
        pass
    save_selection(output, selection)
    output.write_json("queries.json", [record | entry for record, entry in zip(records, allotted, strict=True)])
    measured = {} if full or config.queries.fidelity_sample == 0 else _fidelity(context, selection, records)
    output.write_json("fidelity.json", measured)
    _warn(measured, config.queries.fidelity)
    mean_rank = sum(sum(entry["ranks"].values()) for entry in allotted) / max(1, len(records) * len(names))
    return StageResult({"queries": len(records), "layers": len(names)}, {"mean_rank": mean_rank, "fidelity": measured})


def _ranks(context: StageContext, names: list[str], queries: int, full: bool) -> list[dict]:
    if full:
        return [{"ranks": {}, "predicted_fidelity": 1.0} for _ in range(queries)]
    wanted = context.config.queries
    rank = None if wanted.fidelity is not None else int(wanted.rank)
    ((_, found),) = context.cluster.map(allot, [(context.inputs["ihvp"], names, queries, rank, wanted.fidelity)])
    return found


def _fidelity(context: StageContext, selection: LayerSelection, records: list[dict]) -> dict:
    """Correlation of compressed with full scores of every query, on a seeded sample of the corpus."""
    config, sequences = context.config, context.inputs["sequences"]
    ids = sample_of(sequences, config.queries.fidelity_sample, config.seed)
    itemsize = getattr(torch, config.scan.sum_dtype.name).itemsize
    size = DENSE_COPIES * itemsize * sum(layer.columns * layer.outputs for layer in selection.layers)
    width = max(1, int(config.scan.dense_memory // size))
    factors = {name: context.inputs[name] for name in ("eigenbasis", "correction") if name in context.inputs}
    tasks = [
        FidelityTask(
            ids,
            sequences,
            context.artifact,
            context.inputs["gradients"],
            factors,
            config.factors.solver.name,
            config.factors.damping_factor,
            tuple(range(start, min(start + width, len(records)))),
        )
        for start in range(0, len(records), width)
    ]
    found: dict[str, float | None] = {}
    compared = len(ids)
    progress = context.progress("fidelity", len(records), "queries")

    def done(task: FidelityTask, report: Done) -> None:
        compressed, full = (torch.tensor(scores, dtype=torch.float64) for scores in report.result)  # type: ignore[attr-defined]
        nonlocal compared
        part = agreement(compressed, full, [records[query]["query_id"] for query in task.queries])
        found.update(part["pearson"])
        compared = min(compared, part["sample"])
        progress.advance(len(task.queries))

    context.cluster.pool.run("fidelity", tasks, done, lambda _running: None)
    progress.close()
    by_query = {record["query_id"]: found[record["query_id"]] for record in records}
    return {"sample": compared, "pearson": by_query} | summary(by_query)


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
