"""Stage `covariance`: the factors A and S of every tracked layer, summed by replicas and merged layer by layer."""

from __future__ import annotations

from actors.errors import ConfigError
from actors.factors import covariance_bundles, load_selection
from actors.reduction import merge_covariance, merge_covariance_bytes
from actors.tasks import GroupTask
from influence.cost import factor_sizes
from influence.eigenbasis import check_decomposable
from influence.passes import covariance_bytes
from pipelines.stages.grouped import Bundled, GroupTotals, Merge, MergeOf, Part, Statistic, TaskOf, run_statistic
from pipelines.steps import StageContext, StageResult

COVARIANCE = Statistic("covariance", covariance_bytes, covariance_bundles)


def run(context: StageContext) -> StageResult:
    """Write `activation/<group>.safetensors` and `gradient/<layer>.safetensors` (means), and `merged.json`.

    Raises:
        ConfigError: if a factor is too large to be decomposed, or for `cluster.memory_per_rank`.
    """
    blocks = context.config.factors.blocks
    for name, size in factor_sizes(load_selection(context.inputs["layers"]).layers).items():
        try:
            check_decomposable(name, size, blocks)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return run_statistic(context, COVARIANCE, task_of(context), merge_of(context))


def task_of(context: StageContext) -> TaskOf:
    """What is asked of a replica for a part."""
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
            config.factors.blocks,
            excluded=part.excluded,
        )

    return task


def merge_of(context: StageContext) -> MergeOf:
    """How the parts become means."""
    blocks = context.config.factors.blocks

    def merge(totals: GroupTotals, bundles: Bundled) -> Merge:
        found = list(bundles)
        memory = [merge_covariance_bytes(layers, blocks) for _, layers in found]
        return merge_covariance, [(parts, layers, blocks, totals.rows) for parts, layers in found], memory

    return merge
