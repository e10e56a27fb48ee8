"""The linear datamodeling score: do the scores of a subset's examples, added up, rank subsets as training on them does?

S subsets of the N training examples, R trainings on each, T test examples, B resamples of a bootstrap.

For a test example, the score is Spearman's correlation over subsets between Σ_{i ∈ subset} score_i and the measurement
of models trained on that subset, mean over R trainings (Ilyas et al. 2022; Park et al. 2023, Equation 8). It is then
averaged over test examples.

Three things are chance. Which examples are tested: `interval` resamples them, and holds the subsets and all trained
models. Which subsets were drawn: `interval_subsets` resamples those and holds the test examples; it matters more, since
all test examples share the subsets. What training does with the same subset: no interval has that, `Ceiling` has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from influence.score_agreement import finite, rank_correlations

RESAMPLES = 1000
SLICE = 100  # resamples at a time
SPLITS = 30  # divisions of the trainings into halves, at most
LEVEL = 0.95


def halves(size: int, count: int, seed: int) -> Tensor:
    """Numbers of the examples of `count` random halves of `size` examples, ascending: int64 [S, size // 2]."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 4)
    drawn = [torch.randperm(size, generator=generator)[: size // 2].sort().values for _ in range(count)]
    return torch.stack(drawn)


def predicted(scores_TN: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """Σ_{i ∈ subset} score_i, [T, S]."""
    return torch.stack([scores_TN[:, kept].sum(1) for kept in subsets], dim=1)


@dataclass(frozen=True)
class Datamodel:
    """How well one method's sums of scores rank subsets.

    Attributes:
        lds_T: of each test example; NaN where a measurement or a prediction is constant.
        by_tests: B means over resampled test examples.
        by_subsets: B means over resampled subsets.
    """

    lds_T: Tensor
    by_tests: np.ndarray
    by_subsets: np.ndarray

    @property
    def lds(self) -> float:
        """The mean over test examples."""
        return float(self.lds_T.nanmean())

    def as_json(self) -> dict[str, object]:
        """`lds` with both intervals."""
        intervals = {"interval": percentiles(self.by_tests), "interval_subsets": percentiles(self.by_subsets)}
        return {"lds": finite(self.lds), **intervals}

    def beyond(self, other: Datamodel) -> dict[str, object]:
        """By how much this method exceeds another, on the same test examples, subsets and resamples."""
        return {
            "mean": finite(self.lds - other.lds),
            "interval": percentiles(self.by_tests - other.by_tests),
            "interval_subsets": percentiles(self.by_subsets - other.by_subsets),
        }


def datamodel(predicted_TS: Tensor, measured_TS: Tensor, seed: int = 0) -> Datamodel:
    """The linear datamodeling score of predictions, with what is needed of it for intervals.

    Args:
        predicted_TS: sums of scores.
        measured_TS: measurements, mean over trainings.
        seed: of the resamples; the same for methods that are compared.
    """
    lds_T = rank_correlations(predicted_TS, measured_TS)
    tests, subsets = lds_T.shape[0], predicted_TS.shape[1]
    rng = np.random.default_rng([seed, 5])
    values_BT = lds_T.numpy()[rng.integers(tests, size=(RESAMPLES, tests))]
    counts_BS = rng.multinomial(subsets, np.full(subsets, 1 / subsets), size=RESAMPLES).astype(float)
    resampled = [
        _resampled(predicted_TS.numpy(), measured_TS.numpy(), counts_BS[start : start + SLICE])
        for start in range(0, RESAMPLES, SLICE)
    ]
    return Datamodel(lds_T, _means(values_BT), np.concatenate(resampled))


def _means(values_BT: np.ndarray) -> np.ndarray:
    """Means of what is defined, NaN where nothing is."""
    there = np.isfinite(values_BT)
    return np.where(there, values_BT, 0).sum(1) / np.where(there.any(1), there.sum(1), math.nan)


def _resampled(first_TS: np.ndarray, second_TS: np.ndarray, counts_BS: np.ndarray) -> np.ndarray:
    """The mean over tests of Spearman's correlation in which subset s counts c_s times, for each row of counts.

    The mean rank of a value in such a sample is Σ_j c_j ([x_j < x] + ½ [x_j = x]) + ½.
    """
    weights_B1S = (counts_BS / counts_BS.sum(1, keepdims=True))[:, None]

    def centred(values_TS: np.ndarray) -> np.ndarray:
        before_TSS = (values_TS[:, None, :] < values_TS[:, :, None]) + 0.5 * (
            values_TS[:, None, :] == values_TS[:, :, None]
        )
        ranks_BTS = np.einsum("tsj,bj->bts", before_TSS, counts_BS, optimize=True)
        return ranks_BTS - (weights_B1S * ranks_BTS).sum(-1, keepdims=True)

    first_BTS, second_BTS = centred(first_TS), centred(second_TS)
    covariance_BT = (weights_B1S * first_BTS * second_BTS).sum(-1)
    squared_BT = (weights_B1S * first_BTS**2).sum(-1) * (weights_B1S * second_BTS**2).sum(-1)
    defined_BT = squared_BT > 0
    return _means(np.where(defined_BT, covariance_BT / np.sqrt(np.where(defined_BT, squared_BT, 1)), math.nan))


def percentiles(values: np.ndarray) -> list[float | None]:
    """The 95 % interval of resampled means."""
    tail = (1 - LEVEL) / 2
    if not np.isfinite(values).any():
        return [None, None]
    return [float(value) for value in np.nanquantile(values, [tail, 1 - tail])]


# --- what chance in training leaves to be predicted -----------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """How well the mean of R trainings ranks subsets, judged by itself.

    Attributes:
        split_half_T: Spearman's correlation over subsets of the means of two disjoint sets of `each` trainings,
            averaged over ways to choose these.
        each: R // 2.
        retrainings: R.
        by_tests: B means of it over resampled test examples.
    """

    split_half_T: Tensor
    each: int
    retrainings: int
    by_tests: np.ndarray

    def as_json(self) -> dict[str, object]:
        """`split_half`, `seeds_each`, `reliability`, `ceiling` and its `interval`.

        The reliability of a mean over R follows from that over R // 2 by Spearman and Brown's formula, made for
        Pearson's correlation and used for ranks here. Its root is what the expected measurements themselves, and
        therefore the best conceivable scores, would reach. None where halves do not even correlate.
        """
        mean = float(self.split_half_T.nanmean())
        reliability = self._reliability(np.array([mean]))
        roots = np.sqrt(np.clip(self._reliability(self.by_tests), 0, None))
        return {
            "split_half": finite(mean),
            "seeds_each": self.each,
            "reliability": finite(float(reliability[0])),
            "ceiling": finite(math.sqrt(reliability[0])) if reliability[0] >= 0 else None,
            "interval": percentiles(roots),
        }

    def _reliability(self, correlation: np.ndarray) -> np.ndarray:
        times = self.retrainings / self.each
        return times * correlation / (1 + (times - 1) * correlation)


def ceiling(measured_SRT: Tensor, seed: int = 0) -> Ceiling | None:
    """What the chance of training leaves to be predicted; None with a single training a subset."""
    retrainings, tests = measured_SRT.shape[1:]
    each = retrainings // 2
    if not each:
        return None
    rng = np.random.default_rng([seed, 6])
    found = []
    for first, second in _splits(retrainings, each, rng):
        means = [measured_SRT[:, list(chosen)].mean(1).T for chosen in (first, second)]
        found.append(rank_correlations(*means))
    split_half_T = torch.stack(found).nanmean(0)
    by_tests = _means(split_half_T.numpy()[rng.integers(tests, size=(RESAMPLES, tests))])
    return Ceiling(split_half_T, each, retrainings, by_tests)


def _splits(total: int, each: int, rng: np.random.Generator) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint sets: all of them where they are few, else some by chance."""
    if math.comb(total, each) * math.comb(total - each, each) <= 2 * SPLITS:
        firsts = list(combinations(range(total), each))
        return [(a, b) for a in firsts for b in firsts if a < b and not set(a) & set(b)]
    orders = [rng.permutation(total).tolist() for _ in range(SPLITS)]
    return [(tuple(order[:each]), tuple(order[each : 2 * each])) for order in orders]
