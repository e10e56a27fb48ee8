"""Stage `covariance`: the factors A and S of every tracked layer, summed by replicas and merged layer by layer."""

from __future__ import annotations

from actors.factors import covariance_bundles, load_selection
from actors.reduction import merge_covariance
from actors.tasks import GroupTask
from pipelines.stages.grouped import GroupTotals, Merge, run_statistic
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `activation/<group>.safetensors` and `gradient/<layer>.safetensors` (means), and `merged.json`."""
    config, output, sequences = context.config, context.artifact, context.inputs["sequences"]

    def task(group: int, ids: tuple[int, ...]) -> GroupTask:
        return GroupTask(output, group, ids, sequences, config.factors.labels, config.seed, config.factors.blocks)

    def merge(totals: GroupTotals) -> Merge:
        runs = covariance_bundles(load_selection(context.inputs["layers"]).layers)
        return merge_covariance, [
            (output, totals.groups, number, layers, totals.rows) for number, layers in enumerate(runs)
        ]

    return run_statistic(context, "covariance", task, merge)
