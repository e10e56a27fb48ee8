"""LiSSA: (G + λ)⁻¹ v by a stochastic recursion (Equation 10), K vectors side by side.

    r₀ = v,  r_j = v + (1 − α (G̃_j + λ)) r_{j−1};   α r_j → (G + λ)⁻¹ v

G̃_j is a mini-batch's Gauss-Newton matrix. The recursion contracts where α (G̃ + λ) ≤ 1 at every step. Then
‖r_j‖ ≤ Σ (1 − αλ)^i ‖v‖, so ‖α r_j‖ ≤ ‖v‖ / λ at all times: an iterate beyond that bound has diverged, without a
threshold that somebody chose. The scale α is then halved and the recursion begun anew. Where α (G + λ) comes near 2 it
neither diverges nor converges: `LissaSolution.change_N` shows that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.conjugate_gradients import Product, inner
from influence.gauss_newton import Vectors

log = logging.getLogger(__name__)

StepProduct = Callable[[int, Vectors], Vectors]
"""`product(j, V) -> G̃_j V`, the mini-batch of step j; the same one for the same j."""

SLACK = 1 + 1e-6  # of the bound, for rounding
HALVINGS = 30


@dataclass(frozen=True)
class LissaSolution:
    """An estimate of (G + λ)⁻¹ V.

    Attributes:
        vectors: α r, by layer.
        scale: the α that did not diverge.
        attempts: recursions that were begun, the last one among them.
        products: products taken in all, those of attempts that diverged included.
        change_N: ‖r_j − r_{j−1}‖ / ‖r_j‖ of each step of the last attempt, over all vectors: how far it has converged.
    """

    vectors: Vectors
    scale: float
    attempts: int
    products: int
    change_N: tuple[float, ...]


def lissa(
    product: StepProduct, vectors: Vectors, damping: Mapping[str, float], depth: int, scale: float
) -> LissaSolution:
    """Run the recursion, with a smaller scale each time that it diverges.

    Args:
        product: G̃_j V of a mini-batch.
        vectors: V by layer, [K, O, I].
        damping: λ by layer, positive.
        depth: steps J.
        scale: the first α; 1 / `largest_eigenvalue` is as large as full batches allow.

    Raises:
        ValueError: if it diverges at every scale that was tried; the products or the damping are at fault.
    """
    norm_K, products = inner(vectors, vectors).sqrt(), 0
    bound_K = SLACK * norm_K / min(damping.values())
    for attempt in range(HALVINGS):
        alpha = scale / 2**attempt
        found, steps, change = _recursion(product, vectors, damping, depth, alpha, bound_K)
        products += steps
        if found is not None:
            scaled = {name: alpha * value for name, value in found.items()}
            return LissaSolution(scaled, alpha, attempt + 1, products, tuple(change))
        log.info("LiSSA diverged at step %d with a scale of %.3g: it is halved", steps, alpha)
    raise ValueError(
        f"LiSSA diverged at every scale from {scale:.3g} to {scale / 2 ** (HALVINGS - 1):.3g}: are the products "
        "finite, and the damping positive?"
    )


def largest_eigenvalue(
    product: Product, damping: Mapping[str, float], like: Vectors, iterations: int, generator: torch.Generator
) -> float:
    """The largest eigenvalue of G + λ, by power iteration from a random vector; approached from below.

    Args:
        product: G V.
        damping: λ by layer.
        like: tells shapes, type and device; its values are not read.
        iterations: products.
        generator: of the first vector.
    """
    v = {name: torch.randn(value.shape[1:], generator=generator).to(value)[None] for name, value in like.items()}
    value = 0.0
    for _ in range(iterations):
        norm = math.sqrt(float(inner(v, v)))
        v = {name: part / norm for name, part in v.items()}
        curved = product(v)
        moved = {name: curved[name] + damping[name] * part for name, part in v.items()}
        value = float(inner(v, moved))
        v = moved
    return value


def _recursion(
    product: StepProduct, vectors: Vectors, damping: Mapping[str, float], depth: int, alpha: float, bound_K: Tensor
) -> tuple[Vectors | None, int, list[float]]:
    """r_J with the steps that were taken; None in its place if it diverged."""
    r, change = {name: value.clone() for name, value in vectors.items()}, []
    for step in range(depth):
        curved = product(step, r)
        moved = {
            name: vectors[name] + value - alpha * (curved[name] + damping[name] * value) for name, value in r.items()
        }
        norm_K = inner(moved, moved).sqrt()
        if not bool((alpha * norm_K <= bound_K).all()):  # NaN is not within it either
            return None, step + 1, change
        difference = {name: moved[name] - value for name, value in r.items()}
        change.append(float((inner(difference, difference).sum() / norm_K.square().sum().clamp_min(1e-300)).sqrt()))
        r = moved
    return r, depth, change
