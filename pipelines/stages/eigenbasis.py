"""Stage `eigenbasis`: eigendecompositions of the covariance factors, one Ray task a factor, the costly ones first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.factors import load_selection
from actors.reduction import decompose, decompose_bytes
from influence.cost import factor_sizes
from influence.layers import TrackedLayer
from pipelines.stages.grouped import GroupTotals
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `activation/<group>.safetensors` and `gradient/<layer>.safetensors` (bases) and `tokens.json`."""
    output, covariance = context.artifact, context.inputs["covariance"]
    layers = load_selection(context.inputs["layers"]).layers
    sizes = factor_sizes(layers)
    open_factors = [name for name in sizes if not output.exists(f"{name}.safetensors")]
    open_factors.sort(key=lambda name: -sizes[name])
    dtype = getattr(torch, context.config.scan.sum_dtype.name)
    progress = context.progress("eigenbasis", len(sizes), "factors")
    progress.resume(len(sizes) - len(open_factors))
    arguments = [(output, covariance, name, dtype) for name in open_factors]
    memory = [decompose_bytes(sizes[name], context.config.factors.blocks) for name in open_factors]
    for _ in context.cluster.map(decompose, arguments, memory):
        progress.advance(1)
    progress.close()
    output.write_json("tokens.json", tokens_of(GroupTotals(**covariance.read_json("merged.json")), layers))
    return StageResult({"factors": len(sizes)}, {})


def tokens_of(totals: GroupTotals, layers: Sequence[TrackedLayer]) -> dict[str, float]:
    """The mean number of predicted (token, use) pairs of a sequence, T̄, by layer."""
    return {layer.name: totals.rows[f"gradient/{layer.name}"] / totals.sequences for layer in layers}
