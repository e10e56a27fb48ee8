"""Gauss-Newton steps to the minimum of proximal Bregman objectives (`influence.proximal`).

S points side by side; u, d, r, z: vectors by layer, [S, O, I]. Steps are solved in the type of the network; u,
gradients and inner products are float64.

    u ← u + d,    (G + λ) d = −∇,    by conjugate gradients on exact products with G, preconditioned by M.

G belongs to θˢ and stays. What is solved is no more than a proposal: the gradient that the next step begins with, and
that says when to stop, is that of the objective itself, with its nonlinear network. An ε at which responses are linear
is small enough for these steps.

Why not Adam, as in Appendix C. It has the same optimum, and a test follows it there. But with the house's damping the
condition number of G + λ is 10⁴ to 10⁵, and steps of Adam on mini-batches leave the directions of little curvature,
where the response mostly lies, for last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from influence.conjugate_gradients import Recursion, advance, conjugate, inner
from influence.gauss_newton import GaussNewton, Vectors
from influence.proximal import Proximal

M = TypeVar("M")

Precondition = Callable[[Vectors], Vectors]
"""M⁻¹ V of any number of vectors side by side, in the type of V."""


@dataclass(frozen=True)
class Descent:
    """How far objectives are minimised.

    Attributes:
        steps: Gauss-Newton steps at most.
        iterations: of conjugate gradients, at most in each step.
        tolerance: relative gradient that is aimed at; two steps are tried at least.
    """

    steps: int = 6
    iterations: int = 60
    tolerance: float = 0.01


@dataclass(frozen=True)
class Optimum:
    """Where S objectives were left.

    Attributes:
        weights: u, float64.
        early: u after the first step; what is no longer moved is at its optimum.
        errors_S: relative gradient of the objective at u (`influence.proximal`), float64; 1 where nothing lowered it.
        steps_S: Gauss-Newton steps that were kept.
        products_S: Gauss-Newton products.
    """

    weights: Vectors
    early: Vectors
    errors_S: Tensor
    steps_S: Tensor
    products_S: Tensor


def minimise(
    proximal: Proximal[M],
    points: Sequence[M],
    epsilon: float,
    inverse: Precondition,
    descent: Descent | None = None,
) -> Optimum:
    """The minimum of the objective of each point. A step that does not lower the norm of its gradient ends a point.

    Args:
        proximal: what the objectives share.
        points: z_m, a micro-batch of one example each.
        epsilon: ε.
        inverse: M⁻¹, symmetric and positive definite.
        descent: how far.
    """
    return _Minimisation(proximal, points, epsilon, inverse, descent or Descent()).run()


class _Minimisation(Generic[M]):
    """The state of S minimisations; those that are `open` take part in the next step."""

    def __init__(
        self, proximal: Proximal[M], points: Sequence[M], epsilon: float, inverse: Precondition, descent: Descent
    ) -> None:
        self._proximal, self._points, self._epsilon = proximal, points, epsilon
        self._inverse, self._descent = inverse, descent
        self._newton = GaussNewton(proximal.network, proximal.layers)
        self._dtype = next(proximal.network.model.parameters()).dtype
        self.first = proximal.gradients(points, None, epsilon)  # g
        self.gradient = {name: value.clone() for name, value in self.first.items()}
        self.weights, self.early = proximal.zero(len(points)), proximal.zero(len(points))
        self.norm = self._norms(self.first)  # of the gradient
        self.length = self.norm.clone()  # of the response, in the norm of G + λ; at first what M makes of it
        self.steps, self.products = (torch.zeros(len(points), dtype=torch.int64) for _ in range(2))
        self.open = torch.nonzero(self.norm > 0).flatten()

    def run(self) -> Optimum:
        for step in range(self._descent.steps):
            if not len(self.open):
                break
            self._step(step)
            if step == 0:
                self.early = {name: value.clone() for name, value in self.weights.items()}
        return Optimum(self.weights, self.early, self._errors(), self.steps, self.products)

    def _step(self, step: int) -> None:
        """One Gauss-Newton step of the points that are open."""
        chosen = self.open
        accuracy = max(0.3 * self._descent.tolerance, 0.1 ** (step + 1))  # the first ones meet nonlinearity anyway
        right = {name: -value[chosen] for name, value in self.gradient.items()}
        proposed, products = self._solve(right, accuracy * self.length[chosen])
        self.products[chosen] += products
        weights = {name: value[chosen] + proposed[name] for name, value in self.weights.items()}
        points = [self._points[index] for index in chosen.tolist()]
        gradient = self._proximal.gradients(points, weights, self._epsilon)
        first = {name: value[chosen] for name, value in self.first.items()}
        norm, length = self._norms(gradient), (-inner(first, weights)).clamp_min(0).sqrt()
        better = (norm < self.norm[chosen]) & (length > 0)
        kept = chosen[better]
        for name in self.weights:
            self.weights[name][kept] = weights[name][better]
            self.gradient[name][kept] = gradient[name][better]
        self.norm[kept], self.length[kept] = norm[better], length[better]
        self.steps[kept] += 1
        self.open = kept[(self._errors()[kept] > self._descent.tolerance) | (self.steps[kept] < 2)]

    def _errors(self) -> Tensor:
        """Relative gradients; 0 where there never was one."""
        return torch.where(self.norm > 0, self.norm / self.length.clamp_min(1e-300), 0.0)

    def _norms(self, gradient: Vectors) -> Tensor:
        """√(∇ᵀ M⁻¹ ∇)."""
        given = {name: value.to(self._dtype) for name, value in gradient.items()}
        return inner(given, self._inverse(given)).clamp_min(0).sqrt()

    def _solve(self, right: Vectors, target: Tensor) -> tuple[Vectors, Tensor]:
        """(G + λ)⁻¹ V, by one iteration at least and until √(rᵀ M⁻¹ r) is at its target; products of each vector."""
        right = {name: value.to(self._dtype) for name, value in right.items()}
        x = {name: torch.zeros_like(value) for name, value in right.items()}
        r, z = right, self._inverse(right)
        p = {name: value.clone() for name, value in z.items()}
        recursion = Recursion.begun(inner(r, z), inner(r, z))
        products = torch.zeros(len(target), dtype=torch.int64)
        for iteration in range(self._descent.iterations):
            far = recursion.rz_K.clamp_min(0).sqrt() > target
            open_ = torch.nonzero((far | (iteration == 0)) & ~recursion.halted_K).flatten()
            if not len(open_):
                break
            products[open_] += 1
            held = {name: value[open_] for name, value in p.items()}
            curved = self._newton(self._proximal.batches, held)
            q = {name: curved[name] + self._proximal.damping[name] * value for name, value in held.items()}
            alpha = recursion.step_lengths(open_, inner(held, q))
            for name, direction in held.items():
                advance(x[name], r[name], open_, alpha, direction, q[name])
            rest = {name: value[open_] for name, value in r.items()}
            again = self._inverse(rest)
            rz = inner(rest, again)
            recursion, beta = recursion.advanced(open_, alpha, rz, rz)
            for name, value in again.items():
                p[name][open_] = conjugate(value, p[name][open_], beta)
        return {name: value.double() for name, value in x.items()}, products
