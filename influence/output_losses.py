"""Losses L_y(ŷ, y) in terms of a model's outputs: gradient, Hessian, Bregman divergence, and labels of their model.

outputs_BC, outputs_BTC: outputs ŷ of B examples: C numbers or scores of C classes, at each of T positions if there are.
targets: y. A loss of an example is a *sum* over outputs and positions, never a mean (Equation 22). A tangent may
have further dimensions in front, [K, B, ..., C]: K vectors side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from influence.labels import IGNORED, inverse_cdf


class OutputLoss(Protocol):
    """A loss that is convex in the outputs, so that its Hessian H_ŷ there is positive semidefinite."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """L_y(ŷ, y) of each example, [B]."""
        ...

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇_ŷ L_y(ŷ, y), as the outputs."""
        ...

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """H_ŷ v, as the tangent v."""
        ...

    def divergence(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """The Bregman divergence (Equation 8) of each example, [B].

        D_L(ŷ, ŷˢ) = L(ŷ, y) − L(ŷˢ, y) − ∇L(ŷˢ, y)ᵀ(ŷ − ŷˢ).

        Args:
            outputs: ŷ.
            reference: ŷˢ, the outputs of the model that is studied.
            targets: y; of a sequence it only says which positions predict.
        """
        ...

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from the distribution that the outputs stand for, whose −log p is the loss."""
        ...


@dataclass(frozen=True)
class SquaredError:
    """L = ½‖ŷ − y‖², summed over outputs: −log p of a Gaussian of unit variance about ŷ, up to a constant. H_ŷ = 1.

    Losses without the half have twice the gradient and twice the Hessian: influences are the same without damping.
    """

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """½‖ŷ − y‖²."""
        return (outputs - targets).square().flatten(1).sum(1) / 2

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ŷ − y."""
        return outputs - targets

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """The tangent itself."""
        del outputs, targets
        return tangent

    def divergence(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """½‖ŷ − ŷˢ‖², whatever y is."""
        del targets
        return (outputs - reference).square().flatten(1).sum(1) / 2

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """ŷ with noise of unit variance."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=generator.device)
        return outputs + noise.to(outputs.device)


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """L = −Σ_t log p(y_t), p the softmax of the scores at position t. H_ŷ = diag(p) − p pᵀ, a block a position.

    Targets are int64 classes: [B] for scores [B, C], [B, T] for scores [B, T, C]; `IGNORED` (−100) where nothing is
    predicted, which enters nothing. Computed in float32, or in float64 for float64 scores.
    """

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """−Σ_t log p(y_t)."""
        logp = _log_softmax(outputs).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return -_by_example(logp.masked_fill(targets == IGNORED, 0.0))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The difference p − e_y at each position, zero where nothing is predicted."""
        grad = _log_softmax(outputs).exp_()
        grad.scatter_add_(-1, targets.clamp(min=0)[..., None], torch.full_like(grad[..., :1], -1.0))
        return grad.masked_fill_((targets == IGNORED)[..., None], 0.0).to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """The product p ⊙ (v − pᵀv) at each position, zero where nothing is predicted."""
        p = _log_softmax(outputs).exp_().masked_fill_((targets == IGNORED)[..., None], 0.0)
        tangent = tangent.to(p.dtype)
        mean = (p * tangent).sum(-1, keepdim=True)
        return (tangent - mean).mul_(p).to(outputs.dtype)

    def divergence(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Σ_t KL(p_s ‖ p): the scores' part of Equation 8 is linear and cancels, log-partition functions stay.

        With A the log-partition function, D = A(ŷ) − A(ŷˢ) − p_sᵀ(ŷ − ŷˢ) = Σ_c p_s (log p_s − log p).
        """
        logp, logp_s = _log_softmax(outputs), _log_softmax(reference)
        divergence = (logp_s.exp() * (logp_s - logp)).sum(-1)
        return _by_example(divergence.masked_fill(targets == IGNORED, 0.0))

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A class at each position, from the softmax."""
        rows = outputs.reshape(-1, outputs.shape[-1])
        uniforms = torch.rand(len(rows), generator=generator, dtype=torch.float64, device=generator.device)
        return inverse_cdf(rows, uniforms.to(rows.device)).reshape(outputs.shape[:-1])


def _log_softmax(scores: Tensor) -> Tensor:
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.log_softmax(scores, dim=-1, dtype=wide)


def _by_example(values: Tensor) -> Tensor:
    """[B] out of [B] or [B, T]."""
    return values if values.dim() == 1 else values.flatten(1).sum(1)
