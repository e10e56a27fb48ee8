"""The summary of a stream of scores: exact against brute force, the same bits in whatever order it merges."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest

from influence.distribution import BINS, BORDERS_B, HIGHEST, LOWEST, ScoreSummary

ROWS = 3000
KEPT = 40


def scores(seed: int, rows: int = ROWS, kind: type = np.float32) -> np.ndarray:
    """Heavy on both sides, with ties and zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, rows).astype(kind)
    values[rng.integers(0, rows, rows // 20)] = 0
    values[rng.integers(0, rows, rows // 10)] = values[0]
    values[rng.integers(0, rows, 30)] = np.sort(values)[-KEPT]  # ties at the end of what is kept
    return values


def summary_of(values: np.ndarray, capacity: int = KEPT) -> ScoreSummary:
    return ScoreSummary(capacity).add(values, np.arange(len(values)))


def same(first: ScoreSummary, second: ScoreSummary) -> bool:
    names = first.__dataclass_fields__
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_shards_and_their_order_the_bits_are_the_same(seed: int, kind: type):
    rng, values = np.random.default_rng(seed), scores(seed, kind=kind)
    whole = summary_of(values)
    places = rng.permutation(ROWS)
    borders = np.sort(rng.integers(0, ROWS, rng.integers(1, 60)))
    parts = [ScoreSummary(KEPT).add(values[some], some) for some in np.split(places, borders)]
    parts = [parts[at] for at in rng.permutation(len(parts))]
    assert same(functools.reduce(ScoreSummary.merge, parts), whole)
    middle = len(parts) // 2  # and in another tree
    halves = [
        functools.reduce(ScoreSummary.merge, half, ScoreSummary(KEPT)) for half in (parts[:middle], parts[middle:])
    ]
    assert same(halves[1].merge(halves[0]), whole)
    streamed = ScoreSummary(KEPT)
    for some in np.array_split(places, 7):
        streamed = streamed.add(values[some], some)
    assert same(streamed, whole)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(4))
def test_counts_sums_and_the_largest_are_those_of_all_scores(seed: int, kind: type):
    values = scores(seed, kind=kind)
    summary = summary_of(values)
    assert (summary.count, summary.positive, summary.negative) == (ROWS, (values > 0).sum(), (values < 0).sum())
    exact = math.fsum(values[values > 0].astype(np.float64))
    tolerance = 0 if kind is np.float32 else 2**-31
    assert summary.sum_positive == pytest.approx(exact, rel=tolerance, abs=0)
    order = sorted(range(ROWS), key=lambda place: (-values[place], place))[:KEPT]
    assert summary.ids_K.tolist() == order
    assert summary.largest_K.tolist() == [float(values[place]) for place in order]
    expected = [((values >= low) & (values < high)).sum() for low, high in pairwise([*BORDERS_B, np.inf])]
    assert summary.counts_B.tolist() == expected


@pytest.mark.parametrize("capacity", [1, KEPT, ROWS, 2 * ROWS])
def test_shares_are_those_of_a_sort(capacity: int):
    values = scores(1)
    summary = summary_of(values, capacity)
    positive = np.maximum(np.sort(values.astype(np.float64))[::-1], 0)
    previous = 0.0
    for count in [*range(1, 200), *range(200, ROWS, 37), ROWS]:
        exact = positive[:count].sum() / positive.sum()
        share = summary.share_of_largest(count)
        assert share == pytest.approx(exact, rel=1e-12 if count <= capacity else 0.01)
        assert share >= previous - 1e-15
        previous = share
    assert summary.share_of_largest(int((values > 0).sum())) == 1.0
    assert summary.share_of_largest(0) == 0.0


def test_counts_above_a_threshold_are_exact_in_the_head_and_near_elsewhere():
    values = scores(2)
    summary = summary_of(values)
    for threshold in summary.largest_K[summary.largest_K > summary.largest_K[-1]]:
        assert summary.at_least(threshold) == (values >= threshold).sum()
    for border in BORDERS_B[summary.counts_B > 0]:
        assert summary.at_least(float(border)) == (values >= border).sum()
    for threshold in np.geomspace(1e-3, 5, 50):
        place = np.searchsorted(BORDERS_B, threshold, side="right")
        bounds = [(values >= border).sum() for border in BORDERS_B[[place, place - 1]]]
        assert bounds[0] <= summary.at_least(threshold) <= bounds[1]


@pytest.mark.parametrize("capacity", [1, 2, KEPT, 2 * ROWS])
@pytest.mark.parametrize("points", [2, 7, 400])
def test_a_survival_curve_is_exact_at_each_of_its_points(capacity: int, points: int):
    values = scores(3)
    influences, fractions = summary_of(values, capacity).survival(points)
    assert 1 <= len(influences) <= points
    assert (np.diff(influences) > 0).all()
    assert (np.diff(fractions) <= 0).all()
    assert fractions.tolist() == [(values >= influence).sum() / ROWS for influence in influences]
    if capacity > 1:
        assert influences[-1] == values.max()
    if capacity < ROWS and points > 2:
        assert fractions[0] == (values > 0).sum() / ROWS


def test_a_feed_without_positive_scores_has_no_curve_and_no_share():
    for values in (np.empty(0), np.array([-1.0, 0.0, -2.0])):
        summary = summary_of(values)
        assert summary.survival(10)[0].tolist() == []
        assert summary.sum_positive == summary.share_of_largest(2) == 0.0
        assert summary.at_least(0.5) == 0


def test_the_ends_of_the_range():
    tiny, least, most = 2.0**-140, 2.0 ** (LOWEST - 1), np.nextafter(2.0**HIGHEST, 0)
    summary = summary_of(np.array([tiny, least, most, 1.0]), 1)
    assert summary.counts_B[[0, BINS - 1]].tolist() == [2, 1]
    assert summary.sum_positive == pytest.approx(most, rel=2**-30)
    assert summary.at_least(1.0) == 2
    assert summary.at_least(tiny) == 4
    for wrong in (np.nan, np.inf, -np.inf, 2.0**HIGHEST):
        with pytest.raises(ValueError, match="not finite or above the range"):
            summary_of(np.array([1.0, wrong]))


def test_summaries_of_other_sizes_do_not_merge():
    with pytest.raises(ValueError, match="keep 3 and 4"):
        ScoreSummary(3).merge(ScoreSummary(4))
