"""Agreement beyond the samples at hand: of laws that are known, and of scores whose errors are."""

from __future__ import annotations

import math

import pytest
import torch

from influence.convergence import error_share, extrapolated, falling_rate, needed_size
from influence.score_agreement import correlations

SIZES = (32, 64, 128)


def agreement_at(size: int, level: float, power: float) -> float:
    return 1 / (1 + level * size**-power)


@pytest.mark.parametrize("power", [1.0, 0.6, 0.0])
def test_a_power_law_is_found_and_gone_on_with(power: float):
    curve = [agreement_at(size, 3.0, power) for size in SIZES]
    assert falling_rate(SIZES, curve) == pytest.approx(power)
    assert extrapolated(curve[-1], 128, 5000, power) == pytest.approx(agreement_at(5000, 3.0, power))
    assert extrapolated(curve[-1], 128, 128, power) == pytest.approx(curve[-1])


def test_errors_never_fall_faster_than_independent_ones():
    steep = [agreement_at(size, 100.0, 2.0) for size in SIZES]
    assert falling_rate(SIZES, steep) == 1
    assert falling_rate(SIZES, steep[::-1]) == 0  # fits that agree less the larger they are


@pytest.mark.parametrize("curve", [[None, None, 0.9], [-0.1, 0.0, 0.9], [1.0, 1.0, 1.0], [None, None, None]], ids=str)
def test_without_two_sizes_to_compare_errors_are_independent(curve: list[float | None]):
    assert falling_rate(SIZES, curve) == 1


def test_twice_the_sample_is_the_formula_of_spearman_and_brown():
    assert extrapolated(0.5, 10, 20) == pytest.approx(2 * 0.5 / (1 + 0.5))
    assert extrapolated(0.8, 10, 30) == pytest.approx(3 * 0.8 / (1 + 2 * 0.8))


def test_ends_of_the_scale():
    assert extrapolated(1.0, 10, 1000) == 1
    assert extrapolated(0.0, 10, 1000) == extrapolated(-0.5, 10, 1000) == 0
    assert math.isinf(error_share(-0.5))
    assert error_share(1 + 1e-12) == 0  # rounding


def test_the_size_that_is_needed_is_the_inverse():
    for power in (1.0, 0.5):
        size = needed_size(0.8, 100, 0.95, power)
        assert extrapolated(0.8, 100, size, power) == pytest.approx(0.95)
    assert needed_size(0.97, 100, 0.95) == 100
    assert math.isinf(needed_size(0.0, 100, 0.95))
    assert math.isinf(needed_size(0.8, 100, 0.95, 0.0))


def test_scores_with_independent_errors_agree_as_extrapolated():
    generator = torch.Generator().manual_seed(0)
    true_QP = torch.randn(40, 2000, generator=generator, dtype=torch.float64)

    def fit(size: int) -> torch.Tensor:
        errors = torch.randn(true_QP.shape, generator=generator, dtype=torch.float64)
        return true_QP + 4 * errors / size**0.5

    found = {size: float(correlations(fit(size), fit(size)).mean()) for size in (*SIZES, 2048)}
    rate = falling_rate(SIZES, [found[size] for size in SIZES])
    assert rate == pytest.approx(1, abs=0.05)
    assert extrapolated(found[128], 128, 2048, rate) == pytest.approx(found[2048], abs=0.002)
