"""What is kept of the scores of one query and one feed: of bounded size however many there are, and exact to merge.

Legend: N scores, K the largest of them, B bins. A positive score is m · 2^e with m in [½, 1).

- Bins cut every octave [2^(e−1), 2^e) into `SLICES` equal parts. Their borders are short binary fractions, so that a
  score is in one bin beyond doubt, and the number of scores at or above a border is exact.
- Sums are whole numbers of 2^(e − `BITS`), e that of the bin's octave. Whole numbers add up to the same in any order,
  so `merge` commutes and associates to the last bit. A float32 is held exactly, a float64 to 2^−`BITS` of itself.
- The K largest are kept as they are, with their sequences; ties go to the lower sequence id.

Cost: 16 bytes a bin and 16 a kept score; O(N) to add N scores and O(B + K log K) to merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

SLICES = 16
BITS = 31  # 2^32 scores in one bin fit an int64
LOWEST, HIGHEST = -125, 128  # exponents e of float32; smaller ones share the lowest bin
BINS = (HIGHEST - LOWEST + 1) * SLICES
_BLOCK = 1 << 21  # whose whole numbers add up in a float64 without rounding

_EXPONENTS_B = LOWEST + np.arange(BINS) // SLICES
BORDERS_B = np.ldexp(0.5 + np.arange(BINS) % SLICES / (2 * SLICES), _EXPONENTS_B)
"""The lower border of each bin."""


def _no_bins() -> np.ndarray:
    return np.zeros(BINS, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ScoreSummary:
    """The distribution of N scores; a value with `merge`.

    Attributes:
        capacity: How many of the largest are kept, if there are as many.
        count: N.
        positive: Scores above 0.
        negative: Scores below 0.
        counts_B: Positive scores in each bin.
        units_B: Their sums, in units of 2^(e − `BITS`).
        largest_K: The largest scores, descending; whatever their sign.
        ids_K: Their sequences.
    """

    capacity: int
    count: int = 0
    positive: int = 0
    negative: int = 0
    counts_B: np.ndarray = field(default_factory=_no_bins)
    units_B: np.ndarray = field(default_factory=_no_bins)
    largest_K: np.ndarray = field(default_factory=lambda: np.empty(0))
    ids_K: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        assert self.capacity >= 1

    def add(self, values_N: np.ndarray, ids_N: np.ndarray) -> ScoreSummary:
        """The summary of these scores as well.

        Args:
            values_N: Scores, float32 or float64.
            ids_N: Their sequences, none of which was added before.

        Raises:
            ValueError: A score is not finite, or is 2^128 or more.
        """
        values_N = np.asarray(values_N, dtype=np.float64)
        if not np.isfinite(values_N).all() or (values_N >= 2.0**HIGHEST).any():
            raise ValueError("a score is not finite or above the range of float32")
        counts_B, units_B = self.counts_B.copy(), self.units_B.copy()
        positive_P = values_N[values_N > 0]
        for start in range(0, len(positive_P), _BLOCK):
            bins_P, units_P = _binned(positive_P[start : start + _BLOCK])
            counts_B += np.bincount(bins_P, minlength=BINS)
            units_B += np.bincount(bins_P, weights=units_P, minlength=BINS).astype(np.int64)
        least = self.largest_K[-1] if len(self.largest_K) == self.capacity else -np.inf
        high_N = values_N >= least
        largest_K, ids_K = self._largest(values_N[high_N], np.asarray(ids_N, dtype=np.int64)[high_N])
        return ScoreSummary(
            self.capacity,
            self.count + len(values_N),
            self.positive + len(positive_P),
            self.negative + int(np.count_nonzero(values_N < 0)),
            counts_B,
            units_B,
            largest_K,
            ids_K,
        )

    def merge(self, other: ScoreSummary) -> ScoreSummary:
        """The summary of the scores of both.

        Raises:
            ValueError: They keep different numbers of the largest.
        """
        if self.capacity != other.capacity:
            raise ValueError(f"summaries that keep {self.capacity} and {other.capacity} scores do not merge")
        largest_K, ids_K = self._largest(other.largest_K, other.ids_K)
        return ScoreSummary(
            self.capacity,
            self.count + other.count,
            self.positive + other.positive,
            self.negative + other.negative,
            self.counts_B + other.counts_B,
            self.units_B + other.units_B,
            largest_K,
            ids_K,
        )

    def _largest(self, values_N: np.ndarray, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The head of those that are kept and of some more."""
        if len(values_N) > self.capacity:
            least = np.partition(values_N, -self.capacity)[-self.capacity]
            values_N, ids_N = values_N[values_N >= least], ids_N[values_N >= least]
        values_N, ids_N = np.concatenate([self.largest_K, values_N]), np.concatenate([self.ids_K, ids_N])
        order = np.lexsort((ids_N, -values_N))[: self.capacity]
        return values_N[order], ids_N[order]

    @property
    def sum_positive(self) -> float:
        """The sum of the positive scores."""
        return math.fsum(_sums(self.units_B))

    def at_least(self, threshold: float) -> float:
        """How many scores reach a positive threshold.

        Exact above the smallest score kept and at borders of bins; elsewhere scores are taken to be spread evenly over
        their bin.
        """
        kept = float(np.count_nonzero(self.largest_K >= threshold))
        if len(self.largest_K) == self.count or threshold > self.largest_K[-1]:
            return kept
        bin_ = int(np.searchsorted(BORDERS_B, threshold, side="right")) - 1
        if bin_ < 0:
            return float(self.positive)
        above = int(self.counts_B[bin_ + 1 :].sum())
        upper = BORDERS_B[bin_ + 1] if bin_ + 1 < BINS else 2.0**HIGHEST
        inside = (upper - threshold) / (upper - BORDERS_B[bin_])
        return max(kept, above + float(inside * self.counts_B[bin_]))

    def share_of_largest(self, count: int) -> float:
        """Σ of the positive scores among the `count` largest, as a share of Σ of all positive ones.

        Exact as far as scores are kept, and at borders of bins. Elsewhere the scores of a bin are taken at their mean,
        which is low by at most 1/`SLICES` of what is taken of that bin; 0 where nothing is positive.
        """
        total = self.sum_positive
        if total == 0 or count <= 0:
            return 0.0
        if count >= self.positive:
            return 1.0
        kept = math.fsum(np.maximum(self.largest_K[:count], 0.0))
        if count <= len(self.largest_K):
            return min(1.0, kept / total)
        counts_B, sums_B = self.counts_B[::-1], _sums(self.units_B)[::-1]
        reached_B = np.cumsum(counts_B)
        whole = int(np.searchsorted(reached_B, count, side="right"))
        before = int(reached_B[whole - 1]) if whole else 0
        part = (count - before) / int(counts_B[whole]) * sums_B[whole]
        return max(kept, math.fsum(sums_B[:whole]) + part) / total

    def survival(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """The fraction of all N scores that reach each of at most `points` positive influences.

        Returns:
            Influences, ascending, and the fractions, descending; every pair is exact. Half of the points are borders of
            bins, evenly spread over their logarithm, the other half are kept scores with ranks spread likewise.
        """
        kept_K = self.largest_K[self.largest_K > 0]
        if len(kept_K) < self.positive:
            kept_K = kept_K[kept_K > kept_K[-1]]  # more scores may equal the smallest of them
        ranks = np.geomspace(1, len(kept_K), points // 2).round() if len(kept_K) else np.empty(0)
        exact = np.unique(kept_K[ranks.astype(np.int64) - 1])
        reached = len(kept_K) - np.searchsorted(kept_K[::-1], exact, side="left")
        if len(kept_K) == self.positive:
            return exact, reached / max(1, self.count)
        filled = np.flatnonzero(self.counts_B)
        last = filled[-1] if not len(kept_K) else int(np.searchsorted(BORDERS_B, kept_K[-1], side="right")) - 1
        borders = np.unique(np.linspace(filled[0], last, points // 2).round().astype(np.int64))
        suffix_B = np.cumsum(self.counts_B[::-1])[::-1]
        influences = np.concatenate([BORDERS_B[borders], exact])
        fractions = np.concatenate([suffix_B[borders], reached]) / self.count
        influences, places = np.unique(influences, return_index=True)
        return influences, fractions[places]


def _binned(positive_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of each positive score, and the score in units of the bin's octave."""
    _, exponents_P = np.frexp(positive_P)
    exponents_P = np.maximum(exponents_P, LOWEST)
    mantissas_P = np.ldexp(positive_P, -exponents_P)
    slices_P = np.maximum((mantissas_P - 0.5) * (2 * SLICES), 0).astype(np.int64)
    return (exponents_P - LOWEST) * SLICES + slices_P, np.rint(np.ldexp(mantissas_P, BITS))


def _sums(units_B: np.ndarray) -> np.ndarray:
    return np.ldexp(units_B.astype(np.float64), _EXPONENTS_B - BITS)
