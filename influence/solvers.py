"""Inverse-curvature solvers behind one interface: fit once, apply often.

V_OI = (G + λ)⁻¹ applied to a gradient of one layer, in the layout of its weights [outputs, inputs (+ bias)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from influence.eigenbasis import BlockBasis


class NoCurvature(ValueError):
    """What was fitted for a layer is zero, so that there is no damping relative to it."""


@dataclass(frozen=True)
class LayerCurvature:
    """What was fitted for one layer.

    Attributes:
        activation: eigenbasis of A, I coordinates.
        gradient: eigenbasis of S, O coordinates.
        correction_OI: Λ, the mean over sequences of (Q_Sᵀ G Q_A)²; None where it was not fitted.
        tokens_per_sequence: mean number of predicted (token, use) pairs a sequence.
    """

    activation: BlockBasis
    gradient: BlockBasis
    correction_OI: Tensor | None
    tokens_per_sequence: float


@dataclass(frozen=True)
class SolverState:
    """A fitted solver: the basis it works in, the eigenvalues there, and the damping.

    `basis` is None for the identity, whose inverse is the identity in any basis.
    """

    activation: BlockBasis | None
    gradient: BlockBasis | None
    eigenvalues_OI: Tensor | None
    damping: float

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> SolverState:
        """The same solver in another type or on another device."""

        def moved(basis: BlockBasis | None) -> BlockBasis | None:
            return None if basis is None else basis.to(dtype, device)

        values = self.eigenvalues_OI
        values = None if values is None else values.to(device=device, dtype=dtype)
        return SolverState(moved(self.activation), moved(self.gradient), values, self.damping)

    def rotate(self, gradient_OI: Tensor) -> Tensor:
        """Q_Sᵀ G Q_A."""
        if self.activation is None or self.gradient is None:
            return gradient_OI
        return self.gradient.rotate(self.activation.rotate(gradient_OI).T).T

    def unrotate(self, rotated_OI: Tensor) -> Tensor:
        """Q_S X Q_Aᵀ."""
        if self.activation is None or self.gradient is None:
            return rotated_OI
        return self.gradient.unrotate(self.activation.unrotate(rotated_OI).T).T


class Solver(Protocol):
    """How a gradient is preconditioned."""

    @property
    def name(self) -> str:
        """As in the config."""
        ...

    @property
    def needs_covariance(self) -> bool:
        """Whether A and S are fitted for it."""
        ...

    @property
    def needs_correction(self) -> bool:
        """Whether Λ is fitted for it."""
        ...

    @property
    def refined(self) -> bool:
        """Whether its answers are refined by conjugate gradients on exact Gauss-Newton products."""
        ...

    def fit(self, curvature: LayerCurvature | None, damping_factor: float) -> SolverState:
        """Prepare the inverse of one layer's curvature."""
        ...


def apply(state: SolverState, gradient_OI: Tensor) -> Tensor:
    """The damped inverse-curvature-vector product of one layer (Equation 21).

    V = Q_S [ (Q_Sᵀ G Q_A) / (Λ + λ) ] Q_Aᵀ, elementwise division; I²O + IO² multiply-adds twice.

    Args:
        state: the fitted solver.
        gradient_OI: a gradient in the layout of the weights.
    """
    return state.unrotate(apply_rotated(state, gradient_OI))


def apply_rotated(state: SolverState, gradient_OI: Tensor) -> Tensor:
    """The same as `apply`, left in the eigenbasis: (Q_Sᵀ G Q_A) / (Λ + λ)."""
    rotated = state.rotate(gradient_OI)
    if state.eigenvalues_OI is None:
        return rotated
    return rotated / (state.eigenvalues_OI.to(rotated.dtype) + state.damping)


@dataclass(frozen=True)
class Ekfac:
    """EK-FAC: eigenvalues Λ fitted in the eigenbasis (Equations 19-21), λ = factor · mean(Λ)."""

    name: str = "ekfac"
    needs_covariance: bool = True
    needs_correction: bool = True
    refined: bool = False

    def fit(self, curvature: LayerCurvature | None, damping_factor: float) -> SolverState:
        """Take Λ as the eigenvalues."""
        assert curvature is not None
        assert curvature.correction_OI is not None
        return _state(curvature, curvature.correction_OI, damping_factor)


@dataclass(frozen=True)
class Kfac:
    """K-FAC: eigenvalues T̄ · λ_S λ_Aᵀ (Equations 16-18).

    A and S are means over tokens; a sequence's gradient sums T̄ of them, which K-FAC takes as independent, so
    E[vec G vec Gᵀ] = T̄ · A ⊗ S. That puts its eigenvalues and its damping on the scale of Λ.
    """

    name: str = "kfac"
    needs_covariance: bool = True
    needs_correction: bool = False
    refined: bool = False

    def fit(self, curvature: LayerCurvature | None, damping_factor: float) -> SolverState:
        """Multiply the factors' eigenvalues."""
        assert curvature is not None
        return _state(curvature, kronecker_eigenvalues(curvature), damping_factor)


@dataclass(frozen=True)
class Identity:
    """The identity: influence becomes the dot product of gradients."""

    name: str = "identity"
    needs_covariance: bool = False
    needs_correction: bool = False
    refined: bool = False

    def fit(self, curvature: LayerCurvature | None, damping_factor: float) -> SolverState:
        """Nothing is fitted."""
        del curvature, damping_factor
        return SolverState(None, None, None, 0.0)


SOLVERS: dict[str, Solver] = {
    solver.name: solver for solver in (Ekfac(), Ekfac("ekfac_cg", refined=True), Kfac(), Identity())
}


def kronecker_eigenvalues(curvature: LayerCurvature) -> Tensor:
    """T̄ · λ_S λ_Aᵀ, the eigenvalues of K-FAC on the scale of a sequence; [O, I]."""
    outer = torch.outer(curvature.gradient.all_values, curvature.activation.all_values)
    return outer * curvature.tokens_per_sequence


def _state(curvature: LayerCurvature, eigenvalues_OI: Tensor, damping_factor: float) -> SolverState:
    damping = damping_factor * float(eigenvalues_OI.mean(dtype=torch.float64))
    if not damping > 0:
        raise NoCurvature(
            f"damping {damping}: the layer's curvature is zero on the sample (or factors.damping_factor is); "
            "fit on more sequences or choose a positive damping_factor"
        )
    return SolverState(curvature.activation, curvature.gradient, eigenvalues_OI, damping)
