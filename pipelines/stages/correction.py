"""Stage `correction`: the eigenvalues Λ of EK-FAC in the eigenbasis, summed by replicas and merged layer by layer."""

from __future__ import annotations

import torch

from actors.factors import correction_bundles, load_selection
from actors.reduction import merge_correction
from actors.tasks import GroupTask
from pipelines.stages.grouped import GroupTotals, discard_parts, run_groups
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` with Λ, the mean over sequences."""
    output, factors = context.artifact, context.config.factors
    if output.exists("merged.json"):
        totals = GroupTotals(**output.read_json("merged.json"))
    else:
        totals = run_groups(
            context,
            "correction",
            "correction",
            lambda group, ids: GroupTask(
                output,
                group,
                ids,
                context.inputs["sequences"],
                factors.labels,
                factors.seed,
                bases=context.inputs["eigenbasis"],
            ),
        )
        layers = load_selection(context.inputs["layers"]).layers
        dtype = getattr(torch, context.config.scan.sum_dtype.name)
        arguments = [
            (output, totals.groups, number, bundle, totals.sequences, dtype)
            for number, bundle in enumerate(correction_bundles(layers))
        ]
        for _ in context.cluster.map(merge_correction, arguments):
            pass
        output.write_json("merged.json", vars(totals))
    discard_parts(output)
    return StageResult(totals.counts(), totals.extra())
