"""Stage `queries`: ranks spread over layers, and queries packed for the scan."""

from __future__ import annotations

from actors.factors import layer_file, load_selection, save_selection
from actors.reduction import allot, compress
from conf.schema import QueriesConfig
from pipelines.steps import StageContext, StageResult


def uncompressed(queries: QueriesConfig) -> bool:
    """Whether queries go to the scan at full rank."""
    return queries.rank == "full" and queries.fidelity is None


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` (left, right, owner or dense) and `queries.json`."""
    output = context.artifact
    selection = load_selection(context.inputs["layers"])
    names = [layer.name for layer in selection.layers]
    records = context.inputs["gradients"].read_json("queries.json")
    allotted = _ranks(context, names, len(records))
    open_names = [name for name in names if not output.exists(layer_file(name))]
    arguments = [
        (output, context.inputs["ihvp"], name, [entry["ranks"].get(name, 0) for entry in allotted])
        for name in open_names
    ]
    for _ in context.cluster.map(compress, arguments):
        pass
    save_selection(output, selection)
    output.write_json("queries.json", [record | entry for record, entry in zip(records, allotted, strict=True)])
    mean_rank = sum(sum(entry["ranks"].values()) for entry in allotted) / max(1, len(records) * len(names))
    return StageResult({"queries": len(records), "layers": len(names)}, {"mean_rank": mean_rank})


def _ranks(context: StageContext, names: list[str], queries: int) -> list[dict]:
    if uncompressed(context.config.queries):
        return [{"ranks": {}, "predicted_fidelity": 1.0} for _ in range(queries)]
    wanted = context.config.queries
    rank = None if wanted.fidelity is not None else int(wanted.rank)
    ((_, found),) = context.cluster.map(allot, [(context.inputs["ihvp"], names, queries, rank, wanted.fidelity)])
    return found
