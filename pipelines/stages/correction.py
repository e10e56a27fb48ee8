"""Stage `correction`: the eigenvalues Λ of EK-FAC in the eigenbasis, summed by replicas and merged layer by layer."""

from __future__ import annotations

import torch

from actors.factors import correction_bundles, load_selection
from actors.reduction import merge_correction
from actors.tasks import GroupTask
from pipelines.stages.grouped import GroupTotals, Merge, run_statistic
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` with Λ, the mean over sequences, and `merged.json`."""
    config, output, sequences = context.config, context.artifact, context.inputs["sequences"]
    bases, dtype = context.inputs["eigenbasis"], getattr(torch, config.scan.sum_dtype.name)

    def task(group: int, ids: tuple[int, ...]) -> GroupTask:
        return GroupTask(output, group, ids, sequences, config.factors.labels, config.seed, bases=bases)

    def merge(totals: GroupTotals) -> Merge:
        runs = correction_bundles(load_selection(context.inputs["layers"]).layers)
        return merge_correction, [
            (output, totals.groups, number, layers, totals.sequences, dtype) for number, layers in enumerate(runs)
        ]

    return run_statistic(context, "correction", task, merge)
