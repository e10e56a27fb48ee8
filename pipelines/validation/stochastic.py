"""LiSSA on a small network: its mini-batches, its scale, and what it costs for one vector at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence.gauss_newton import Examples, GaussNewton, Vectors
from influence.lissa import StepProduct, largest_eigenvalue, lissa
from pipelines.validation.problem import Problem

POWER_ITERATIONS = 10
TIMED_STEPS = 50  # with one vector


@dataclass(frozen=True)
class StochasticSolution:
    """LiSSA's estimate; `products` and `examples` that they went over count the tuning too."""

    vectors: Vectors
    products: int
    examples: int
    notes: dict[str, Any]


def mini_batches(size: int, batch: int, steps: int, seed: int) -> Tensor:
    """Numbers of the examples of each step, [steps, batch]: permutations of all, one after the other, cut up."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * batch / size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)])
    return order[: steps * batch].view(steps, batch)


def products_of(problem: Problem, batch: int, depth: int, seed: int) -> StepProduct:
    """G̃_j V of the mini-batch of step j."""
    newton, numbers = GaussNewton(problem.network, problem.layers), mini_batches(problem.size, batch, depth, seed)

    def product(step: int, given: Vectors) -> Vectors:
        rows = numbers[step]
        return newton([Examples(problem.train.inputs[rows], problem.train.targets[rows])], given)

    return product


def run_lissa(
    problem: Problem, vectors: Vectors, damping: Mapping[str, float], depth: int, batch: int, seed: int
) -> StochasticSolution:
    """(G + λ)⁻¹ V by `depth` steps on mini-batches.

    The first scale is 1 over the largest eigenvalue of G + λ on a sample of the training examples, ten mini-batches at
    most; it is halved for as long as the recursion diverges (`influence.lissa`).
    """
    product, generator = products_of(problem, batch, depth, seed), torch.Generator().manual_seed(seed)
    rows = torch.randperm(problem.size, generator=generator)[: 10 * batch]
    sample = Examples(problem.train.inputs[rows], problem.train.targets[rows])
    newton = GaussNewton(problem.network, problem.layers)
    top = largest_eigenvalue(lambda given: newton([sample], given), damping, vectors, POWER_ITERATIONS, generator)
    found = lissa(product, vectors, damping, depth, 1 / top)
    notes = {
        "depth": depth,
        "batch": batch,
        "first_scale": 1 / top,
        "scale": found.scale,
        "attempts": found.attempts,
        "change": found.change_N[-1],
    }
    examples = found.products * batch + POWER_ITERATIONS * len(rows)
    return StochasticSolution(found.vectors, found.products + POWER_ITERATIONS, examples, notes)


def time_alone(
    problem: Problem, vectors: Vectors, damping: Mapping[str, float], depth: int, batch: int, seed: int
) -> dict[str, float]:
    """What the recursion takes where each vector goes through it alone, from a few steps of the first one.

    Returns:
        `steps` and their `seconds`, and `estimated_total`: the seconds of all steps of all vectors at this rate.
    """
    product, steps = products_of(problem, batch, depth, seed), min(TIMED_STEPS, depth)
    first = {name: value[:1] for name, value in vectors.items()}
    product(0, first)
    started = time.perf_counter()
    lissa(product, first, damping, steps, 1e-300)  # a scale so small that it does not diverge
    seconds = time.perf_counter() - started
    count = len(next(iter(vectors.values())))
    return {"steps": steps, "seconds": seconds, "estimated_total": seconds * count * depth / steps}
