"""Limited-memory BFGS from gradients alone, with a fitted curvature as its first metric.

For objectives that are nearly quadratic, ill-conditioned, and whose gradient costs less than a product with their
Gauss-Newton matrix; unlike Gauss-Newton steps it follows a curve where responses are not linear.

    d = −H g;  x ← x + t d,  H of the last pairs s = x' − x, y = g' − g over H₀ = γ M⁻¹  (Nocedal and Wright, 7.2)

On a quadratic with exact steps these are the iterates of conjugate gradients preconditioned by M. A step is tried at
the length of the last one, and then at the zero of the line through both slopes, if the slope that is left is more than
half of the first; again only where it is more than all of it. P parameters, in one vector.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
Inverse = Callable[[Tensor], Tensor]

MEMORY = 100  # pairs
SLOPE = 0.5  # that a step may leave, as a share of the one that it began with
FIRST = 0.25  # length of the first step; a curvature block by block lies below the whole
LONGEST = 4.0  # times the length that was tried
TRIES = 8  # of a step, each at least a tenth as long as the one before


@dataclass(frozen=True)
class Descended:
    """Where a descent ended.

    Attributes:
        position_P: x.
        earlier_P: x after a quarter to a half of the evaluations.
        error: the relative gradient √(gᵀ M⁻¹ g / g₀ᵀ M⁻¹ g₀), g₀ the first; in the norm of M⁻¹, and not the Euclidean
            one, so that directions of little curvature count for what they move.
        evaluations: gradients that were taken, the first one among them.
    """

    position_P: Tensor
    earlier_P: Tensor
    error: float
    evaluations: int


def descend(gradient: Gradient, inverse: Inverse, start_P: Tensor, evaluations: int, tolerance: float) -> Descended:
    """Descend to a gradient of zero.

    Args:
        gradient: g(x).
        inverse: M⁻¹ g, symmetric and positive definite.
        start_P: x at first.
        evaluations: of the gradient, at most one more than that.
        tolerance: of `Descended.error`, at which it stops.
    """
    path = _Path(gradient, inverse, start_P)
    passed = [(0, start_P), (1, start_P)]  # at evaluations that double
    while path.evaluations < evaluations and path.error() > tolerance and path.step():
        if path.evaluations >= 2 * passed[-1][0]:
            passed = [passed[-1], (path.evaluations, path.position_P)]
    earlier_P = next(x_P for count, x_P in reversed(passed) if 2 * count <= path.evaluations)
    return Descended(path.position_P, earlier_P, path.error(), path.evaluations)


class _Path:
    def __init__(self, gradient: Gradient, inverse: Inverse, start_P: Tensor) -> None:
        self._gradient, self._inverse = gradient, inverse
        self.position_P, self.gradient_P = start_P, gradient(start_P)
        self._first = self.gradient_P @ inverse(self.gradient_P)
        self.evaluations, self._length = 1, FIRST
        self._pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
        self._scale = torch.ones((), dtype=start_P.dtype)

    def error(self) -> float:
        """The relative gradient; 0 where there was none at first."""
        rest = self.gradient_P @ self._inverse(self.gradient_P)
        return float((rest / self._first).clamp_min(0).sqrt()) if self._first > 0 else 0.0

    def step(self) -> bool:
        """One step, by one gradient or more; False if there is none that lowers the slope."""
        direction_P = -self._preconditioned(self.gradient_P)
        slope, length, least = float(self.gradient_P @ direction_P), self._length, math.inf
        reached: tuple[float, Tensor] | None = None
        for attempt in range(TRIES):
            found_P = self._at(length, direction_P)
            left = float(found_P @ direction_P)
            if abs(left) < min(least, abs(slope)):  # not where it is not a number
                least, reached = abs(left), (length, found_P)
            if least <= SLOPE * abs(slope) or (attempt and reached):
                break
            length = self._other(length, slope, left)
        if reached is None:
            return False
        self._length, found_P = reached
        moved_P = self._length * direction_P
        self._remember(moved_P, found_P - self.gradient_P)
        self.position_P, self.gradient_P = self.position_P + moved_P, found_P
        if len(self._pairs) == 1:
            self._length = 1.0  # the first pair brings the scale
        return True

    def _at(self, length: float, direction_P: Tensor) -> Tensor:
        self.evaluations += 1
        return self._gradient(self.position_P + length * direction_P)

    @staticmethod
    def _other(length: float, slope: float, left: float) -> float:
        """Where the line through both slopes is zero, within bounds; beyond the first try if it bends downwards."""
        if not math.isfinite(left):
            return length / 10
        share = slope / (slope - left) if left > slope else LONGEST
        return length * min(max(share, 1 / 10), LONGEST)

    def _remember(self, moved_P: Tensor, change_P: Tensor) -> None:
        curvature = moved_P @ change_P
        if curvature > 1e-12 * moved_P.norm() * change_P.norm():
            self._pairs.append((moved_P, change_P, curvature))
            self._scale = curvature / (change_P @ self._inverse(change_P))

    def _preconditioned(self, gradient_P: Tensor) -> Tensor:
        """H g, by two loops over the pairs."""
        rest_P, shares = gradient_P.clone(), []
        for moved_P, change_P, curvature in reversed(self._pairs):
            share = (moved_P @ rest_P) / curvature
            shares.append(share)
            rest_P -= share * change_P
        found_P = self._scale * self._inverse(rest_P)
        for (moved_P, change_P, curvature), share in zip(self._pairs, reversed(shares), strict=True):
            found_P += (share - (change_P @ found_P) / curvature) * moved_P
        return found_P
