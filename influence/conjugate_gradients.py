"""Conjugate gradients on (G + λ) X = B, K right-hand sides side by side, preconditioned by a fitted solver.

vectors_KOI: K vectors in one layer; λ is one number a layer (the house's 0.1 · mean Λ); all layers are one system, so
that what EK-FAC leaves out, curvature between layers among it, is in G. Each of the K systems has step lengths of its
own and stops by itself; they share nothing but the products.

    p₀ = z₀ = M⁻¹ b,  r₀ = b,  x₀ = 0;    q = G p + λ p,  α = ⟨r, z⟩ / ⟨p, q⟩
    x ← x + α p,  r ← r − α q,  z ← M⁻¹ r,  β = ⟨r, z⟩ₙₑw / ⟨r, z⟩,  p ← z + β p

M is the solver's own damped curvature, or whatever else is given as a function. The start is zero and not M⁻¹ b: one
product then gives the best multiple of M⁻¹ b, and i products the best of all polynomials of M⁻¹ (G + λ) of degree i − 1
in the norm of G + λ; none is spent on a first residual. Inner products are summed in float64, whatever the type of the
vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.gauss_newton import Vectors
from influence.solvers import SolverState, apply

Product = Callable[[Vectors], Vectors]
"""`product(V) -> G V` for any number of vectors side by side."""

Preconditioner = Mapping[str, SolverState] | Callable[[Vectors], Vectors]
"""M⁻¹: a fitted solver by layer, or a symmetric positive definite function of vectors over all layers."""


@dataclass(frozen=True)
class Solution:
    """X, and how it came about.

    Attributes:
        vectors: X by layer, [K, O, I].
        residuals_NK: ‖B − (G + λ) X‖ / ‖B‖ before the first and after each iteration, as the recursion has it; float64.
        products_K: products that each vector took part in.
    """

    vectors: Vectors
    residuals_NK: Tensor
    products_K: Tensor


def conjugate_gradients(
    product: Product,
    right: Vectors,
    damping: Mapping[str, float],
    preconditioner: Preconditioner | None,
    iterations: int,
    tolerance: float = 0.0,
) -> Solution:
    """Solve (G + λ) X = B.

    Args:
        product: G V; called once an iteration, with the vectors that have not stopped.
        right: B by layer, [K, O, I].
        damping: λ by layer, positive.
        preconditioner: M⁻¹; None is the identity.
        iterations: at most.
        tolerance: relative residual at which a vector stops.

    Returns:
        The solution in the type of B. Memory: X, R, Z, P and Q, five times the K·Σ I·O numbers of B.
    """
    x = {name: torch.zeros_like(value) for name, value in right.items()}
    r = {name: value.clone() for name, value in right.items()}
    z = _preconditioned(preconditioner, r)
    p = {name: value.clone() for name, value in z.items()}
    recursion = Recursion.begun(inner(r, z), inner(r, r))
    residuals = [recursion.residual_K]
    products_K = torch.zeros(len(recursion.norm_K), dtype=torch.int64)
    for _ in range(iterations):
        chosen = recursion.open(tolerance)
        if not len(chosen):
            break
        products_K[chosen] += 1
        held = {name: value[chosen] for name, value in p.items()}
        curved = product(held)
        q = {name: curved[name] + damping[name] * value for name, value in held.items()}
        alpha = recursion.step_lengths(chosen, inner(held, q))
        for name, direction in held.items():
            advance(x[name], r[name], chosen, alpha, direction, q[name])
        for name, value in _preconditioned(preconditioner, {name: r[name][chosen] for name in r}).items():
            z[name][chosen] = value
        recursion, beta = recursion.advanced(chosen, alpha, _rows(inner, r, z, chosen), _rows(inner, r, r, chosen))
        for name in p:
            p[name][chosen] = conjugate(z[name][chosen], p[name][chosen], beta)
        residuals.append(recursion.residual_K)
    return Solution(x, torch.stack(residuals), products_K)


@dataclass(frozen=True)
class Recursion:
    """The scalars of K recursions; what remains of them between iterations, wherever the vectors are.

    Attributes:
        rz_K: ⟨r, z⟩, the squared residual in the norm of M⁻¹.
        norm_K: ‖b‖.
        residual_K: ‖r‖ / ‖b‖; 0 for b = 0.
        halted_K: whether a vector goes no further: rounding has used up its direction.
    """

    rz_K: Tensor
    norm_K: Tensor
    residual_K: Tensor
    halted_K: Tensor

    @staticmethod
    def begun(rz_K: Tensor, rr_K: Tensor) -> Recursion:
        """Before the first iteration, where r = b."""
        return Recursion(rz_K, rr_K.sqrt(), (rr_K > 0).to(rr_K.dtype), rz_K <= 0)

    def open(self, tolerance: float) -> Tensor:
        """The vectors that have not stopped, ascending."""
        return torch.nonzero((self.residual_K > tolerance) & ~self.halted_K).flatten()

    def step_lengths(self, chosen: Tensor, pq: Tensor) -> Tensor:
        """α of the chosen vectors; 0 where p has no curvature, which only rounding can bring about."""
        usable = torch.isfinite(pq) & (pq > 0)
        return torch.where(usable, self.rz_K[chosen] / torch.where(usable, pq, 1.0), 0.0)

    def advanced(self, chosen: Tensor, alpha: Tensor, rz: Tensor, rr: Tensor) -> tuple[Recursion, Tensor]:
        """The scalars after a step of the chosen vectors, and their β."""
        rz_K, residual_K, halted_K = self.rz_K.clone(), self.residual_K.clone(), self.halted_K.clone()
        rz_K[chosen], residual_K[chosen] = rz, rr.sqrt() / self.norm_K[chosen]
        halted_K[chosen] = (alpha == 0) | (rz <= 0)
        return Recursion(rz_K, self.norm_K, residual_K, halted_K), rz / self.rz_K[chosen]


# --- parts of one layer -----------------------------------------------------------------------------------------------


def inner(left: Vectors, right: Vectors) -> Tensor:
    """⟨left, right⟩ of each vector over all layers, added in their order; float64, on the CPU."""
    return torch.stack([inner_of(left[name], right[name]) for name in left]).sum(0)


def inner_of(left_KOI: Tensor, right_KOI: Tensor) -> Tensor:
    """The same in one layer; a vector at a time, so that no more than it is held in float64."""
    pairs = zip(left_KOI, right_KOI, strict=True)
    return torch.stack([left.flatten().double() @ right.flatten().double() for left, right in pairs]).cpu()


def precondition(state: SolverState | None, vectors_KOI: Tensor) -> Tensor:
    """M⁻¹ V in one layer."""
    if state is None:
        return vectors_KOI.clone()
    return torch.stack([apply(state, vector_OI) for vector_OI in vectors_KOI])


def advance(x_KOI: Tensor, r_KOI: Tensor, chosen: Tensor, alpha: Tensor, p: Tensor, q: Tensor) -> None:
    """Write x + α p and r − α q for the chosen vectors, in place."""
    step = alpha.to(x_KOI)[:, None, None]
    x_KOI[chosen] += step * p
    r_KOI[chosen] -= step * q


def conjugate(z: Tensor, p: Tensor, beta: Tensor) -> Tensor:
    """The next direction, z + β p."""
    return z + beta.to(z)[:, None, None] * p


def _preconditioned(preconditioner: Preconditioner | None, vectors: Vectors) -> Vectors:
    """M⁻¹ V over all layers."""
    if callable(preconditioner):
        return preconditioner(vectors)
    states = preconditioner or {}
    return {name: precondition(states.get(name), value) for name, value in vectors.items()}


def _rows(of: Callable[[Vectors, Vectors], Tensor], left: Vectors, right: Vectors, chosen: Tensor) -> Tensor:
    return of({name: v[chosen] for name, v in left.items()}, {name: v[chosen] for name, v in right.items()})
