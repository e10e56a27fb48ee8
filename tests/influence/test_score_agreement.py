"""Correlations of scores against scipy, intervals, and samples that are disjoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from influence.score_agreement import (
    correlations,
    disjoint,
    halvings,
    mean_interval,
    rank_correlations,
    size_agreement,
)


def scores(seed: int) -> torch.Tensor:
    found = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found[:, 5] = found[:, 6]  # ties
    return found


def test_correlations_are_those_of_scipy():
    first, second = scores(0), scores(0) + scores(1)
    for found, of in ((correlations, stats.pearsonr), (rank_correlations, stats.spearmanr)):
        expected = [of(x.numpy(), y.numpy()).statistic for x, y in zip(first, second, strict=True)]
        np.testing.assert_allclose(found(first, second).numpy(), expected, rtol=1e-12)


def test_correlations_that_are_not_defined_are_nan():
    first, second = scores(0), scores(1)
    first[0], second[1, 3] = 1.0, math.nan
    for found in (correlations(first, second), rank_correlations(first, second)):
        assert torch.isnan(found).tolist() == [True, True, False, False]


def test_intervals_are_those_of_students_t():
    values = [0.2, 0.5, math.nan, 0.4, 0.3]
    found = mean_interval(values)
    defined = np.array([0.2, 0.5, 0.4, 0.3])
    expected = stats.t.interval(0.95, 3, defined.mean(), stats.sem(defined))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.mean, found.count) == (pytest.approx(0.35), 4)
    assert found.as_json()["values"] == [0.2, 0.5, None, 0.4, 0.3]


def test_intervals_end_where_no_correlation_can_lie():
    assert mean_interval([0.99, 0.2]).high == 1.0
    assert mean_interval([0.99, 0.2]).low == -1.0
    assert mean_interval([0.99, 0.2], largest=2.0).high == 2.0


@pytest.mark.parametrize(("values", "count"), [([], 0), ([math.nan], 0), ([0.3], 1)])
def test_few_values_have_no_interval(values: list[float], count: int):
    found = mean_interval(values).as_json()
    assert (found["low"], found["high"], found["count"]) == (None, None, count)
    json.dumps(found, allow_nan=False)


def test_samples_are_disjoint_and_lie_in_one_another():
    larger, smaller = disjoint(20, 41, seed=3), disjoint(7, 41, seed=3)
    for first, second in (larger, smaller):
        assert not set(first.tolist()) & set(second.tolist())
    for whole, part in zip(larger, smaller, strict=True):
        assert set(part.tolist()) < set(whole.tolist())
        assert part.tolist() == sorted(part.tolist())
    assert not torch.equal(disjoint(7, 41, seed=4)[0], smaller[0])
    with pytest.raises(ValueError, match="two disjoint samples of 21 do not fit into 41"):
        disjoint(21, 41, 0)


def test_sizes_halve():
    assert halvings(721) == [360, 180, 90, 45, 22]
    assert halvings(9) == [4]
    with pytest.raises(ValueError, match="no disjoint halves"):
        halvings(1)


def test_agreement_of_a_size_compares_fits_with_each_other_and_with_the_full_one():
    first, second, full = scores(0), scores(0) + 0.5 * scores(1), scores(0) + 0.1 * scores(2)
    found = size_agreement(12, first, second, full)
    assert found.size == 12
    assert found.between.values == tuple(correlations(first, second).tolist())
    both = (correlations(first, full) + correlations(second, full)) / 2
    assert found.with_full.values == tuple(both.tolist())
