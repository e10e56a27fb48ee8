"""Two disjoint samples out of the run's own, in nested sizes, and the groups that their sums are formed over.

Sequences are taken in a seeded random order, not in that of the corpus: the first part of a corpus is no sample of
it. A smaller sample lies within the larger one of the same half, so that its sums are merged into those of that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from conf.schema import FactorsConfig
from influence.score_agreement import disjoint
from pipelines.stages.grouped import sample_groups

HALVES = 2
SIZES = 3  # each twice the one before
LEAST = 64  # sequences of the largest sample, where the run's own has twice as many
FEWEST = 32  # sequences of the run's own below which nothing is measured
MOST = 16_384  # sequences of the largest sample


@dataclass(frozen=True)
class Fit:
    """One fit.

    Attributes:
        half: 0 or 1.
        size: which of the sizes, 0 is the smallest.
        groups: numbers of the groups that it is fitted on, in their order.
    """

    half: int
    size: int
    groups: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Where its factors are."""
        return f"parts/fits/{self.half}-{self.size}"


@dataclass(frozen=True)
class Halves:
    """What is fitted on which sequences.

    Attributes:
        sizes: sequences of a fit, ascending.
        groups: sequence ids of each group, ascending; of the first half, then of the second.
        fits: both fits of each size, the smallest first.
    """

    sizes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    fits: tuple[Fit, ...]

    def of_size(self, size: int) -> tuple[Fit, ...]:
        """The two fits of a size."""
        return tuple(fit for fit in self.fits if fit.size == size)


def sizes_of(sample: int, share: float) -> tuple[int, ...]:
    """Sequences of each fit, ascending: a quarter, a half and all of the share; none where the sample is too small.

    Args:
        sample: sequences of the run's own sample.
        share: of it that each half takes; it takes `LEAST` where that is more, as far as the sample has two of it.
    """
    if sample < FEWEST or not share:
        return ()
    largest = min(sample // HALVES, MOST, max(round(share * sample), LEAST))
    return tuple(largest >> step for step in reversed(range(SIZES)))


def group_counts(sample: int, groups: int, sizes: Sequence[int]) -> list[list[int]]:
    """Into how many groups of about the size of the run's own each part of a half is cut, and the size of each.

    A part is what a size adds to the one before.
    """
    width = -(-sample // groups)
    parts = [size - before for before, size in zip((0, *sizes), sizes, strict=False)]
    return [[len(piece) for piece in np.array_split(np.arange(part), -(-part // width))] for part in parts]


def halves_of(corpus: int, factors: FactorsConfig) -> Halves:
    """The fits of a run.

    Args:
        corpus: number of sequences in the corpus.
        factors: samples, seed and groups, and the share of each half.
    """
    own = sample_groups(corpus, factors)
    sample = sum(map(len, own))
    sizes = sizes_of(sample, factors.convergence_share)
    counts = group_counts(sample, factors.groups, sizes)
    groups: list[tuple[int, ...]] = []
    found: list[Fit] = []
    samples = [disjoint(size, sample, factors.seed) for size in sizes]
    for half in range(HALVES):
        numbers: tuple[int, ...] = ()
        for size, (part, pieces) in enumerate(zip(_added([pair[half] for pair in samples]), counts, strict=True)):
            ids = _ids(own, part)
            numbers += tuple(range(len(groups), len(groups) + len(pieces)))
            groups += [tuple(ids[stop - count : stop]) for count, stop in zip(pieces, np.cumsum(pieces), strict=True)]
            found.append(Fit(half, size, numbers))
    return Halves(sizes, tuple(groups), tuple(sorted(found, key=lambda fit: (fit.size, fit.half))))


def _added(samples: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """What each sample has that the one before has not, ascending."""
    before = np.empty(0, np.int64)
    for sample in samples:
        yield np.setdiff1d(sample.numpy(), before)
        before = sample.numpy()


def _ids(own: Sequence[Sequence[int]], positions: np.ndarray) -> list[int]:
    """The sequences at these positions of the run's sample; they lie in ranges where it is the corpus."""
    if all(isinstance(group, range) for group in own):
        return positions.tolist()
    return np.concatenate([np.asarray(group) for group in own])[positions].tolist()
