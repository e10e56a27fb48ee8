"""Stage `ihvp`: preconditioned query gradients, one Ray task a layer, decomposed in the norm of scores."""

from __future__ import annotations

import torch

from actors.factors import layer_file, load_selection
from actors.reduction import precondition
from conf.schema import QueriesConfig
from pipelines.steps import StageContext, StageResult

SPARE_RANKS = 4  # a layer may take this many times the mean rank when ranks are spread over layers
LEAST_RANKS = 64
SPARE_ENERGY = 0.05  # of the energy that a fidelity allows to lose, what is dropped before ranks are spread


def kept(queries: QueriesConfig) -> tuple[int | None, float, bool]:
    """How much of each decomposition is kept: (most singular values, share of energy dropped, full matrices)."""
    if queries.fidelity is not None:
        return None, SPARE_ENERGY * (1 - queries.fidelity**2), False
    if queries.rank == "full":
        return None, 0.0, True
    return max(LEAST_RANKS, SPARE_RANKS * int(queries.rank)), 0.0, False


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors`: full matrices, or weighted singular value decompositions of every query."""
    output, config = context.artifact, context.config
    factors = {name: context.inputs[name] for name in ("eigenbasis", "correction") if name in context.inputs}
    gradients = context.inputs["gradients"]
    queries = len(gradients.read_json("queries.json"))
    layers = load_selection(context.inputs["layers"]).layers
    max_rank, residual, full = kept(config.queries)
    dtype = getattr(torch, config.scan.sum_dtype.name) if full else None
    open_layers = [layer for layer in layers if not output.exists(layer_file(layer.name))]
    progress = context.progress("ihvp", len(layers), "layers")
    progress.resume(len(layers) - len(open_layers))
    solver = (config.factors.solver.name, config.factors.damping_factor)
    more = (queries, max_rank, residual, dtype, context.inputs.get("refinement"))
    arguments = [(output, gradients, factors, layer, *solver, *more) for layer in open_layers]
    for _ in context.cluster.map(precondition, arguments):
        progress.advance(1)
    progress.close()
    return StageResult({"layers": len(layers), "queries": queries}, {})
