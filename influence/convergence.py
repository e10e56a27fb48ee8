"""How agreement of two fits grows with the sample that each is fitted on, beyond the samples at hand.

r: correlation of the scores of two fits on disjoint samples of n sequences (`influence.score_agreement.correlations`).

The scores of each fit are taken as what endless data would give and an error of its own, of variance V relative to
theirs. Then r = 1 / (1 + V), and V = 1/r − 1 is the share of error in the scores. Errors of independent sequences
average out, V ∝ 1/n, for which r at another n is the formula of Spearman and Brown for a test of another length. Fits
on few tokens, compared with the width of the layers, were seen to gain less from more data than that. What V does
beyond the largest sample at hand is not known from it: taking it to fall on as slowly as it was seen to, and taking it
to fall as 1/n from there on, are the two ends of what is likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def error_share(correlation: float) -> float:
    """V = 1/r − 1: the variance of a fit's own error in the scores, relative to what two fits have in common."""
    return math.inf if correlation <= 0 else max(0.0, 1 / correlation - 1)


def falling_rate(sizes: Sequence[int], agreements: Sequence[float | None]) -> float:
    """The exponent p of V ∝ n^−p, fitted by least squares to log V over log n; from 0 to 1.

    Independent errors have 1. More is chance, and is not gone on with.

    Args:
        sizes: n, sequences a fit.
        agreements: r at each n, the mean over queries; None where it is not defined.

    Returns:
        p; 1 where fewer than two sizes have an error share that is above zero and finite.
    """
    known = {n: error_share(r) for n, r in zip(sizes, agreements, strict=True) if r is not None}
    points = [(math.log(n), math.log(share)) for n, share in known.items() if 0 < share < math.inf]
    if len(points) < 2:
        return 1.0
    middle, height = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - middle) ** 2 for x, _ in points)
    slope = sum((x - middle) * (y - height) for x, y in points) / spread
    return min(1.0, max(0.0, -slope))


def extrapolated(correlation: float, size: int, target: float, rate: float = 1.0) -> float:
    """The agreement r of two fits on `target` sequences each, from r at `size`: 1 / (1 + V (size / target)^p).

    Args:
        correlation: r at `size`; 0 and less stays 0, whatever the target.
        size: sequences a fit, n.
        target: sequences a fit to go on to.
        rate: p, `falling_rate`.
    """
    return 1 / (1 + error_share(correlation) * (size / target) ** rate)


def needed_size(correlation: float, size: int, wanted: float, rate: float = 1.0) -> float:
    """Sequences a fit from which r would reach `wanted`, the inverse of `extrapolated`; infinite where none would."""
    share, allowed = error_share(correlation), error_share(wanted)
    if share <= allowed:
        return float(size)
    if rate <= 0 or math.isinf(share):
        return math.inf
    return size * (share / allowed) ** (1 / rate)
