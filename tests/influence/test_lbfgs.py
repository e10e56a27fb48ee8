"""L-BFGS from gradients: the minimum of a quadratic, of something curved, from steps that are far too long."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence.lbfgs import Descended, descend


def quadratic(size: int = 40, condition: float = 1e4) -> tuple[Tensor, Tensor, Tensor]:
    """An ill-conditioned matrix, one that resembles it, and a right-hand side."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    noise = torch.rand(size, generator=generator, dtype=torch.float64) * 2 + 0.2
    right = torch.randn(size, generator=generator, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, basis @ torch.diag(1 / (values * noise)) @ basis.T, right


def test_the_minimum_of_a_quadratic_is_found_with_few_gradients():
    matrix, inverse, right = quadratic()
    expected = -torch.linalg.solve(matrix, right)
    found = descend(lambda x: matrix @ x + right, lambda g: inverse @ g, torch.zeros(40, dtype=torch.float64), 60, 1e-9)
    assert found.evaluations < 60
    assert found.error <= 1e-9
    torch.testing.assert_close(found.position_P, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_the_error_is_the_gradient_that_is_left_in_the_norm_of_the_metric():
    """Where the metric is the matrix itself, it is the relative error of the position in the norm of the matrix."""
    matrix, _, right = quadratic(condition=100)
    exact = torch.linalg.inv(matrix)
    expected = -exact @ right
    found = descend(lambda x: matrix @ x + right, lambda g: exact @ g, torch.zeros(40, dtype=torch.float64), 2, 0.0)
    off = found.position_P - expected
    assert found.error == pytest.approx(float((off @ matrix @ off / (expected @ matrix @ expected)).sqrt()))
    nothing = descend(lambda x: matrix @ x + right, lambda g: exact @ g, torch.zeros(40, dtype=torch.float64), 1, 0.0)
    assert nothing.error == 1
    assert not bool(nothing.position_P.any())


@pytest.mark.parametrize("evaluations", [7, 20, 45])
def test_where_it_was_earlier_is_where_fewer_gradients_lead(evaluations: int):
    matrix, inverse, right = quadratic()

    def descended(most: int) -> Descended:
        start = torch.zeros(40, dtype=torch.float64)
        return descend(lambda x: matrix @ x + right, lambda g: inverse @ g, start, most, 0.0)

    found = descended(evaluations)
    counts = [count for count in range(1, evaluations) if torch.equal(descended(count).position_P, found.earlier_P)]
    assert found.evaluations / 4 - 2 <= min(counts) <= found.evaluations / 2


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_curved_objectives_are_minimised_from_a_metric_of_the_wrong_scale(scale: float):
    """log cosh along ill-conditioned axes; its gradient saturates, so that steps that are too long are of no use."""
    matrix, _, right = quadratic(size=12, condition=50)
    root = torch.linalg.cholesky(matrix).T
    offset = torch.linalg.solve(root.T, right)

    def gradient(x: Tensor) -> Tensor:
        return root.T @ torch.tanh(root @ x + offset)

    found = descend(gradient, lambda g: scale * g, torch.zeros(12, dtype=torch.float64), 400, 1e-8)
    expected = -torch.linalg.solve(root, offset)
    torch.testing.assert_close(found.position_P, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_no_number_ends_the_descent_where_it_was():
    start = torch.ones(3, dtype=torch.float64)
    found = descend(lambda x: torch.ones_like(x) if x is start else x * torch.nan, lambda g: g, start, 50, 0.0)
    assert found.error == 1
    assert found.position_P is start
    assert found.earlier_P is start
