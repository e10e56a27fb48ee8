"""Which sequences are fitted on: disjoint, nested, out of the run's own sample, in groups that do not grow."""

from __future__ import annotations

import pytest

from conf.schema import FactorsConfig
from pipelines.stages.grouped import sample_groups
from pipelines.stages.halves import MOST, Halves, group_counts, halves_of, sizes_of


@pytest.mark.parametrize(
    ("sample", "share", "expected"),
    [
        (10_000, 0.125, (312, 625, 1250)),
        (10_000, 0.5, (1250, 2500, 5000)),
        (600, 0.125, (18, 37, 75)),
        (200, 0.125, (16, 32, 64)),  # 25 would be few
        (100, 0.125, (12, 25, 50)),  # and there are no two of 64
        (32, 0.125, (4, 8, 16)),
        (31, 0.125, ()),
        (10_000, 0.0, ()),
        (10**7, 0.125, (MOST // 4, MOST // 2, MOST)),
    ],
)
def test_sizes(sample: int, share: float, expected: tuple[int, ...]):
    assert sizes_of(sample, share) == expected


def members(halves: Halves, half: int, size: int) -> list[int]:
    (fit,) = (fit for fit in halves.fits if (fit.half, fit.size) == (half, size))
    return [sequence for group in fit.groups for sequence in halves.groups[group]]


@pytest.mark.parametrize("samples", [None, 900, 5000])
def test_halves_are_disjoint_and_smaller_samples_lie_in_larger_ones(samples: int | None):
    corpus = 3000
    factors = FactorsConfig(samples=samples, convergence_share=0.25, groups=8, seed=3)
    halves = halves_of(corpus, factors)
    own = {sequence for group in sample_groups(corpus, factors) for sequence in group}
    largest = round(0.25 * len(own))
    assert halves.sizes == (largest // 4, largest // 2, largest)
    assert [(fit.size, fit.half) for fit in halves.fits] == [(size, half) for size in range(3) for half in range(2)]
    found: dict[int, list[set[int]]] = {
        half: [set(members(halves, half, size)) for size in range(3)] for half in (0, 1)
    }
    for half, samples_of in found.items():
        assert [len(sample) for sample in samples_of] == list(halves.sizes)
        assert [len(members(halves, half, size)) for size in range(3)] == list(halves.sizes)  # none twice
        assert samples_of[0] < samples_of[1] < samples_of[2] <= own
    assert not found[0][2] & found[1][2]
    assert max(map(len, halves.groups)) <= -(-len(own) // 8)
    assert all(list(group) == sorted(group) for group in halves.groups)
    assert sum(map(len, halves.groups)) == 2 * largest  # each sequence is in one group alone


def test_they_are_spread_over_the_corpus_and_drawn_by_the_seed():
    factors = FactorsConfig(samples=None, seed=0)
    halves = halves_of(4000, factors)
    for half in range(2):
        ids = members(halves, half, 2)
        assert 1700 < sum(ids) / len(ids) < 2300
    assert halves_of(4000, factors) == halves
    assert halves_of(4000, FactorsConfig(samples=None, seed=1)) != halves


def test_the_plan_counts_the_groups_that_are_summed():
    factors = FactorsConfig(samples=None, groups=4, convergence_share=0.5)
    halves = halves_of(1000, factors)
    counts = group_counts(1000, 4, halves.sizes)
    assert [len(group) for group in halves.groups] == 2 * [size for part in counts for size in part]
    assert [sum(part) for part in counts] == [125, 125, 250]
    assert max(size for part in counts for size in part) <= 250
