"""Stage `correction`: the eigenvalues Λ of EK-FAC in the eigenbasis, summed by replicas and merged layer by layer."""

from __future__ import annotations

import torch

from actors.factors import correction_bundles
from actors.reduction import merge_correction, merge_correction_bytes
from actors.tasks import GroupTask
from influence.passes import correction_bytes
from pipelines.stages.grouped import Bundled, GroupTotals, Merge, Part, Statistic, run_statistic
from pipelines.steps import StageContext, StageResult

CORRECTION = Statistic("correction", correction_bytes, correction_bundles)


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` with Λ, the mean over sequences, and `merged.json`."""
    config, output, sequences = context.config, context.artifact, context.inputs["sequences"]
    bases, dtype = context.inputs["eigenbasis"], getattr(torch, config.scan.sum_dtype.name)

    def task(part: Part) -> GroupTask:
        return GroupTask(
            output,
            part.folder,
            part.group,
            part.layers,
            part.sequence_ids,
            sequences,
            config.factors.labels,
            config.seed,
            bases=bases,
            excluded=part.excluded,
        )

    def merge(totals: GroupTotals, bundles: Bundled) -> Merge:
        found = list(bundles)
        memory = [merge_correction_bytes(layers) for _, layers in found]
        return merge_correction, [(parts, layers, totals.sequences, dtype) for parts, layers in found], memory

    return run_statistic(context, CORRECTION, task, merge)
