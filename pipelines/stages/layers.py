"""Stage `layers`: which layers of the model are tracked, found by a replica that has loaded it."""

from __future__ import annotations

import logging

from actors.factors import save_selection
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)


def run(context: StageContext) -> StageResult:
    """Write `selection.json`: the tracked layers, and what is not tracked with the reason."""
    selection = context.cluster.pool.describe()
    save_selection(context.artifact, selection)
    log.info("%s", selection.describe())
    counts = {
        "layers": len(selection.layers),
        "tracked_parameters": selection.tracked_parameters,
        "total_parameters": selection.total_parameters,
    }
    return StageResult(counts, {"coverage": selection.coverage, "description": selection.describe()})
