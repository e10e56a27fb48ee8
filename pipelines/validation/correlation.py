"""How well the scores of each method agree with what they estimate: measured responses, or the exact solution's scores.

scores_QP, truth_QP: P points on Q measurements. Correlations are those of the points of one measurement, averaged over
measurements, with a 95 % interval over these (Student's t, `influence.score_agreement.mean_interval`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from influence.score_agreement import correlations, mean_interval, rank_correlations

COMPARED = (
    ("ekfac", "identity"),
    ("ekfac", "kfac"),
    ("ekfac", "lissa"),
    ("ekfac_cg", "ekfac"),
    ("ekfac_cg", "lissa"),
    ("exact", "ekfac_cg"),
    ("exact", "ekfac"),
)


def compare(scores: Mapping[str, Tensor], truth_QP: Tensor) -> dict[str, Any]:
    """Agreement of every method with the truth, and differences between methods.

    Args:
        scores: [Q, P] by method.
        truth_QP: what they estimate.

    Returns:
        `measurements`, `points`; `methods`: by name, `pearson` and `spearman`; `differences`: by "first - second", the
        difference of their Pearson correlations, paired by measurement, which takes out what makes a measurement hard
        for both. Each is an `Interval` as JSON: mean, low, high, count, values by measurement.
    """
    pearson = {name: correlations(scores_QP, truth_QP) for name, scores_QP in scores.items()}
    methods = {
        name: {
            "pearson": mean_interval(values_Q).as_json(),
            "spearman": mean_interval(rank_correlations(scores[name], truth_QP)).as_json(),
        }
        for name, values_Q in pearson.items()
    }
    differences = {
        f"{first} - {second}": mean_interval(pearson[first] - pearson[second], largest=2.0).as_json()
        for first, second in COMPARED
        if first in pearson and second in pearson
    }
    measurements, points = truth_QP.shape
    return {"measurements": measurements, "points": points, "methods": methods, "differences": differences}
