"""Means over queries with intervals, correlations, and lines through the origin.

Legend: Q queries, P points (sequences), S subsets, R resamples. All in float64, all of plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 1000


def over_queries(values_Q: Sequence[float] | np.ndarray, query_ids: Sequence[str]) -> dict[str, Any]:
    """The mean over queries with its 95 % interval: `mean`, `interval`, `by_query`.

    The interval is Student's t over the queries: it says how far another draw of queries would move the mean. Queries
    without a value (NaN) are left out; with fewer than two the interval is None.
    """
    by_query = {name: _number(value) for name, value in zip(query_ids, values_Q, strict=True)}
    known = np.asarray([value for value in by_query.values() if value is not None])
    return {"mean": _number(known.mean()) if len(known) else None, "interval": interval(known), "by_query": by_query}


def interval(values: np.ndarray) -> list[float] | None:
    """Student's 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def correlations(left_QP: np.ndarray, right_QP: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row, [Q]; NaN where a row is constant or not finite."""
    left, right = (each - each.mean(-1, keepdims=True) for each in (left_QP, right_QP))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (left * right).sum(-1) / np.sqrt((left**2).sum(-1) * (right**2).sum(-1))


def rank_correlations(left_QP: np.ndarray, right_QP: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row, [Q]; ties share their mean rank."""
    return correlations(stats.rankdata(left_QP, axis=-1), stats.rankdata(right_QP, axis=-1))


def compared(estimate_QP: np.ndarray, measured_QP: np.ndarray, query_ids: Sequence[str]) -> dict[str, Any]:
    """Correlations of a method's scores with what was measured, by query, with `spearman` beside Pearson's."""
    return over_queries(correlations(estimate_QP, measured_QP), query_ids) | {
        "spearman": over_queries(rank_correlations(estimate_QP, measured_QP), query_ids)
    }


def line(predicted_QP: np.ndarray, measured_QP: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The line through the origin, measured = slope · predicted, and the correlation of all pairs, with intervals.

    The slope is the median over queries of Σ_p x y / Σ_p x², so that no query outweighs the others by its size; the
    correlation is Pearson's of all pairs. The bootstrap draws sequences, so that pairs of one stay together.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, predicted_QP.shape[1], (RESAMPLES, predicted_QP.shape[1]))
    slopes = [_slope(predicted_QP[:, chosen], measured_QP[:, chosen]) for chosen in draws]
    found = [_pooled(predicted_QP[:, chosen], measured_QP[:, chosen]) for chosen in draws]
    return {
        "slope": _number(_slope(predicted_QP, measured_QP)),
        "slope_interval": _percentiles(slopes),
        "correlation": _number(_pooled(predicted_QP, measured_QP)),
        "correlation_interval": _percentiles(found),
    }


def by_subsets(
    predicted_QS: np.ndarray,
    measured_QS: np.ndarray,
    query_ids: Sequence[str],
    reference_QS: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman's correlation over subsets, by query and its mean; the interval resamples subsets and queries.

    With a reference, all of it is of the difference to the reference's correlation, on the same subsets and queries.
    """
    generator = np.random.default_rng(seed)
    queries, subsets = predicted_QS.shape
    means = []
    for _ in range(RESAMPLES):
        chosen_S, chosen_Q = generator.integers(0, subsets, subsets), generator.integers(0, queries, queries)
        rows = np.ix_(chosen_Q, chosen_S)
        found_Q = _over(predicted_QS[rows], measured_QS[rows], None if reference_QS is None else reference_QS[rows])
        means.append(float(found_Q[np.isfinite(found_Q)].mean()) if np.isfinite(found_Q).any() else np.nan)
    found = over_queries(_over(predicted_QS, measured_QS, reference_QS), query_ids)
    return found | {"interval": _percentiles(means)}


def _over(predicted_QS: np.ndarray, measured_QS: np.ndarray, reference_QS: np.ndarray | None) -> np.ndarray:
    found_Q = rank_correlations(predicted_QS, measured_QS)
    return found_Q if reference_QS is None else found_Q - rank_correlations(reference_QS, measured_QS)


def _slope(x_QP: np.ndarray, y_QP: np.ndarray) -> float:
    squares_Q = (x_QP**2).sum(1)
    sloped = squares_Q > 0  # what nothing is predicted for has no slope
    return float(np.median((x_QP * y_QP).sum(1)[sloped] / squares_Q[sloped])) if sloped.any() else np.nan


def _pooled(x_QP: np.ndarray, y_QP: np.ndarray) -> float:
    return float(correlations(x_QP.reshape(1, -1), y_QP.reshape(1, -1))[0])


def _percentiles(values: Sequence[float]) -> list[float] | None:
    known = np.asarray(values)[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
