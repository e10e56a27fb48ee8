"""Stage `covariance`: the factors A and S of every tracked layer, summed by replicas and merged layer by layer."""

from __future__ import annotations

from actors.factors import covariance_bundles, load_selection
from actors.reduction import merge_covariance
from actors.tasks import GroupTask
from pipelines.stages.grouped import GroupTotals, discard_parts, run_groups
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `activation/<group>.safetensors` and `gradient/<layer>.safetensors` (means) and `rows.json`."""
    output, factors = context.artifact, context.config.factors
    if output.exists("merged.json"):
        totals = GroupTotals(**output.read_json("merged.json"))
    else:
        totals = run_groups(
            context,
            "covariance",
            "covariance",
            lambda group, ids: GroupTask(
                output, group, ids, context.inputs["sequences"], factors.labels, factors.seed, factors.blocks
            ),
        )
        layers = load_selection(context.inputs["layers"]).layers
        arguments = [
            (output, totals.groups, number, bundle, totals.rows)
            for number, bundle in enumerate(covariance_bundles(layers))
        ]
        for _ in context.cluster.map(merge_covariance, arguments):
            pass
        output.write_json("merged.json", vars(totals))
    discard_parts(output)
    return StageResult(totals.counts(), totals.extra())
