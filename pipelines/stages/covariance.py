"""Stage `covariance`: the factors A and S of every tracked layer, summed by replicas and merged layer by layer."""

from __future__ import annotations

from actors.errors import ConfigError
from actors.factors import covariance_bundles, load_selection
from actors.reduction import merge_covariance, merge_covariance_bytes
from actors.tasks import GroupTask
from influence.cost import factor_sizes
from influence.eigenbasis import check_decomposable
from influence.passes import covariance_bytes
from pipelines.stages.grouped import Bundled, GroupTotals, Merge, Part, Statistic, run_statistic
from pipelines.steps import StageContext, StageResult

COVARIANCE = Statistic("covariance", covariance_bytes, covariance_bundles)


def run(context: StageContext) -> StageResult:
    """Write `activation/<group>.safetensors` and `gradient/<layer>.safetensors` (means), and `merged.json`.

    Raises:
        ConfigError: if a factor is too large to be decomposed, or for `cluster.memory_per_rank`.
    """
    config, output, sequences = context.config, context.artifact, context.inputs["sequences"]
    blocks = config.factors.blocks
    for name, size in factor_sizes(load_selection(context.inputs["layers"]).layers).items():
        try:
            check_decomposable(name, size, blocks)
        except ValueError as error:
            raise ConfigError(str(error)) from error

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
            blocks,
            excluded=part.excluded,
        )

    def merge(totals: GroupTotals, bundles: Bundled) -> Merge:
        found = list(bundles)
        memory = [merge_covariance_bytes(layers, blocks) for _, layers in found]
        return merge_covariance, [(parts, layers, blocks, totals.rows) for parts, layers in found], memory

    return run_statistic(context, COVARIANCE, task, merge)
