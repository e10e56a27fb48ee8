"""How far methods are from exact solves, as a study: what there is to compare with where no response was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from influence.score_agreement import mean_interval
from pipelines.validation.correlation import compare
from pipelines.validation.results.statistics import UNSCALED, of_interval, slopes, statistic


def solved(scores: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Correlations of every other method's scores with those by the exact damped Gauss-Newton matrix.

    Args:
        scores: [Q, P] by method.

    Returns:
        The study; None without exact solves, or without anything beside them.
    """
    others = {name: scores_QP for name, scores_QP in scores.items() if name != "exact"}
    return with_truth(others, scores["exact"]) if "exact" in scores and others else None


def with_truth(scores: Mapping[str, Tensor], truth_QP: Tensor) -> dict[str, Any]:
    """Correlations, slopes and paired differences of methods, whatever the truth is.

    Args:
        scores: [Q, P] by method.
        truth_QP: what they estimate.

    Returns:
        `points`, `measurements`, `methods`: METHOD: {`pearson`: S, `spearman`: S, `slope`: S?}, `differences`.
    """
    found = compare(scores, truth_QP)
    methods = {
        name: {
            "pearson": statistic(record["pearson"]),
            "spearman": statistic(record["spearman"]),
            "slope": None if name in UNSCALED else of_interval(mean_interval(slopes(scores[name], truth_QP), 1e12)),
        }
        for name, record in found["methods"].items()
    }
    differences = {name: statistic(value) for name, value in found["differences"].items()}
    return found | {"methods": methods, "differences": differences}
