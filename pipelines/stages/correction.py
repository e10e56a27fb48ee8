"""Stage `correction`: the eigenvalues Λ of EK-FAC in the eigenbasis, summed by replicas and merged layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actors.factors import correction_bundles
from actors.reduction import merge_correction, merge_correction_bytes
from actors.store import Artifact
from actors.tasks import GroupTask
from influence.passes import correction_bytes
from pipelines.stages.grouped import Bundled, GroupTotals, Merge, MergeOf, Part, Statistic, TaskOf, run_statistic
from pipelines.steps import StageContext, StageResult

CORRECTION = Statistic("correction", correction_bytes, correction_bundles)


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` with Λ, the mean over sequences, and `merged.json`."""
    bases = context.inputs["eigenbasis"]
    return run_statistic(context, CORRECTION, task_of(context, lambda _group: bases), merge_of(context))


def task_of(context: StageContext, bases_of: Callable[[int], Artifact]) -> TaskOf:
    """What is asked of a replica for a part; the eigenbasis is that of its group."""
    config, sequences = context.config, context.inputs["sequences"]

    def task(part: Part) -> GroupTask:
        return GroupTask(
            context.artifact,
            part.folder,
            part.group,
            part.layers,
            part.sequence_ids,
            sequences,
            config.factors.labels,
            config.seed,
            bases=bases_of(part.group),
            excluded=part.excluded,
        )

    return task


def merge_of(context: StageContext) -> MergeOf:
    """How the parts become means."""
    dtype = getattr(torch, context.config.scan.sum_dtype.name)

    def merge(totals: GroupTotals, bundles: Bundled) -> Merge:
        found = list(bundles)
        memory = [merge_correction_bytes(layers) for _, layers in found]
        return merge_correction, [(parts, layers, totals.sequences, dtype) for parts, layers in found], memory

    return merge
