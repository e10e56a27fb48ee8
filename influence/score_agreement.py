"""How well two ways to score agree, query by query; and two fits on disjoint samples, by the size of the samples.

first_QP, second_QP: scores of P sequences (examples) on Q queries (measurements).

Which sequences the factors are fitted on is chance. Two fits on disjoint samples of n share nothing but the model and
the distribution of sequences, so the correlation of their scores says how much of a score is left to that chance at n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from scipy.stats import t as student
from torch import Tensor

from influence.compression import pearson

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over measurements with its 95 % interval, and the values behind it.

    The interval is Student's t over the values: what another choice of as many measurements would give. It is cut off
    where no value can lie. A single value has no interval: `low` and `high` are NaN.
    """

    mean: float
    low: float
    high: float
    count: int
    values: tuple[float, ...]

    def as_json(self) -> dict[str, object]:
        """Plain numbers; None for what is not finite."""
        numbers = {name: finite(getattr(self, name)) for name in ("mean", "low", "high")}
        return {**numbers, "count": self.count, "values": [finite(value) for value in self.values]}


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return float(value) if math.isfinite(value) else None


def correlations(first_QP: Tensor, second_QP: Tensor) -> Tensor:
    """Pearson's correlation of each query's scores, [Q] float64; NaN where one of them is constant."""
    pairs = zip(first_QP, second_QP, strict=True)
    return torch.tensor([pearson(first_P, second_P) for first_P, second_P in pairs], dtype=torch.float64)


def rank_correlations(first_QP: Tensor, second_QP: Tensor) -> Tensor:
    """Spearman's correlation of each query's scores, ties at their mean rank."""
    return correlations(_ranks(first_QP), _ranks(second_QP))


def mean_interval(values: Sequence[float] | Tensor, largest: float = 1.0) -> Interval:
    """The mean of the values that are defined, with its interval.

    Args:
        values: one a measurement; NaN where it is not defined.
        largest: absolute value that none can exceed: 1 for correlations, 2 for their differences.
    """
    given = [float(value) for value in values]
    defined = np.array([value for value in given if math.isfinite(value)])
    if not len(defined):
        return Interval(math.nan, math.nan, math.nan, 0, tuple(given))
    mean = float(defined.mean())
    if len(defined) == 1:
        return Interval(mean, math.nan, math.nan, 1, tuple(given))
    half = float(student.ppf((1 + LEVEL) / 2, len(defined) - 1) * defined.std(ddof=1) / math.sqrt(len(defined)))
    return Interval(mean, max(mean - half, -largest), min(mean + half, largest), len(defined), tuple(given))


# --- by the size of the sample ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeAgreement:
    """What fits on samples of one size agree in.

    Attributes:
        size: sequences a fit.
        between: correlation of the scores of two fits on disjoint samples.
        with_full: correlation with the fit on everything, the mean of the two.
    """

    size: int
    between: Interval
    with_full: Interval

    def as_json(self) -> dict[str, object]:
        """One entry of a convergence curve."""
        return {"size": self.size, "between": self.between.as_json(), "with_full": self.with_full.as_json()}


def size_agreement(size: int, first_QP: Tensor, second_QP: Tensor, full_QP: Tensor) -> SizeAgreement:
    """Compare the scores of two fits on disjoint samples of `size` with each other and with those of the full fit."""
    with_full_Q = (correlations(first_QP, full_QP) + correlations(second_QP, full_QP)) / 2
    return SizeAgreement(size, mean_interval(correlations(first_QP, second_QP)), mean_interval(with_full_Q))


def halvings(total: int, smallest: int = 16) -> list[int]:
    """Sizes of samples of which two fit into `total`: N/2, N/4, ... down to `smallest`, or to one where N is smaller.

    Raises:
        ValueError: if there are fewer than two sequences.
    """
    if total < 2:
        raise ValueError(f"{total} sequences have no disjoint halves")
    sizes = [total // 2]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return sizes


def disjoint(size: int, total: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of two disjoint samples of `size` out of `total`, ascending; those of a smaller size lie within them."""
    if 2 * size > total:
        raise ValueError(f"two disjoint samples of {size} do not fit into {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    halves = order[: total // 2], order[total // 2 :]
    return halves[0][:size].sort().values, halves[1][:size].sort().values


def _ranks(scores_QP: Tensor) -> Tensor:
    """Ranks in each row; NaN throughout a row that has a score that is not finite."""
    scores = scores_QP.double().cpu().numpy()
    defined_Q = np.isfinite(scores).all(axis=1, keepdims=True)
    return torch.from_numpy(np.where(defined_Q, rankdata(scores, axis=1), math.nan))
