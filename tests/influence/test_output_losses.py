"""Losses in terms of outputs against autograd of their values, and Equation 8 as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence.labels import IGNORED
from influence.output_losses import OutputLoss, SoftmaxCrossEntropy, SquaredError


def _cases() -> dict[str, tuple[OutputLoss, Tensor, Tensor, Tensor]]:
    """Loss, outputs, reference outputs, targets."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequence = torch.tensor([[1, 4, IGNORED], [0, IGNORED, IGNORED], [3, 2, 2]])
    return {
        "squared error": (SquaredError(), normal(5, 3), normal(5, 3), normal(5, 3)),
        "softmax": (SoftmaxCrossEntropy(), normal(4, 3), normal(4, 3), torch.tensor([0, 2, 1, 1])),
        "softmax of sequences": (SoftmaxCrossEntropy(), normal(3, 3, 5), normal(3, 3, 5), sequence),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_hessian_are_those_of_the_value(name: str):
    loss, outputs, tangent, targets = CASES[name]

    def total(given: Tensor) -> Tensor:
        return loss.value(given, targets).sum()

    _, gradient = torch.autograd.functional.vjp(total, outputs)
    torch.testing.assert_close(loss.gradient(outputs, targets), gradient)
    _, product = torch.autograd.functional.hvp(total, outputs, tangent)
    torch.testing.assert_close(loss.hessian_product(outputs, targets, tangent), product)
    several = torch.stack([tangent, 2 * outputs])
    torch.testing.assert_close(loss.hessian_product(outputs, targets, several)[0], product)
    assert loss.value(outputs, targets).shape == outputs.shape[:1]


@pytest.mark.parametrize("name", CASES)
def test_divergence_is_equation_8(name: str):
    loss, outputs, reference, targets = CASES[name]
    linear = (loss.gradient(reference, targets) * (outputs - reference)).flatten(1).sum(1)
    expected = loss.value(outputs, targets) - loss.value(reference, targets) - linear
    found = loss.divergence(outputs, reference, targets)
    torch.testing.assert_close(found, expected)
    assert bool((found > 0).all())
    assert float(loss.divergence(reference, reference, targets).abs().max()) < 1e-15


def test_divergence_of_softmax_is_the_kl_divergence_of_the_reference_from_the_outputs():
    loss, outputs, reference, targets = CASES["softmax"]
    p, p_s = torch.softmax(outputs, -1), torch.softmax(reference, -1)
    torch.testing.assert_close(loss.divergence(outputs, reference, targets), (p_s * (p_s / p).log()).sum(-1))


def test_ignored_positions_count_for_nothing():
    loss, outputs, reference, targets = CASES["softmax of sequences"]
    other, ignored = outputs.clone(), targets == IGNORED
    other[ignored] += 5
    torch.testing.assert_close(loss.value(other, targets), loss.value(outputs, targets))
    torch.testing.assert_close(loss.divergence(other, reference, targets), loss.divergence(outputs, reference, targets))
    assert not loss.gradient(outputs, targets)[ignored].any()
    assert not loss.hessian_product(outputs, targets, reference)[ignored].any()


def test_samples_are_of_the_models_own_distribution():
    """Then the expected gradient is zero and its second moment the Hessian (Equation 11)."""
    generator, draws = torch.Generator().manual_seed(1), 40_000
    for name, tolerance in (("squared error", 0.03), ("softmax", 0.015)):
        loss, outputs, _, _ = CASES[name]
        output = outputs[:1].expand(draws, -1)
        gradients = loss.gradient(output, loss.sample(output, generator))
        hessian = loss.hessian_product(
            outputs[:1], outputs[:1].long()[:, 0], torch.eye(3, dtype=torch.float64)[:, None]
        )
        assert float(gradients.mean(0).abs().max()) < tolerance, name
        assert float((gradients.T @ gradients / draws - hessian[:, 0]).abs().max()) < tolerance, name
