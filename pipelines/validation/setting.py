"""What a method of influence estimation is given, and what it gives back; and what all methods have in common.

Q measurements, N training examples; vectors: [Q, O, I] by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from conf.schema import RunConfig
from influence.conjugate_gradients import Product, precondition
from influence.gauss_newton import Examples, GaussNewton, Vectors
from influence.solvers import SOLVERS, LayerCurvature, SolverState
from influence.supervised import example_gradients, example_scores, fit, micro_batches, places, sampled_targets
from pipelines.validation.problem import Problem

MEMORY = 1 << 29  # bytes that the rows of a micro-batch may take
LARGEST_EXACT = 2 * 10**11  # multiply-adds of a forward pass of all training examples, times measurements


@dataclass(frozen=True)
class Options:
    """Settings of the methods.

    Attributes:
        seed: of sampled targets and of mini-batches.
        label_draws: sampled targets of an example.
        cg_iterations: of conjugate gradients from EK-FAC.
        lissa_depth: steps of LiSSA's recursion.
        lissa_batch: training examples a step.
    """

    seed: int
    label_draws: int
    cg_iterations: int
    lissa_depth: int
    lissa_batch: int

    @property
    def lissa(self) -> tuple[int, int, int]:
        """Depth, batch and seed."""
        return self.lissa_depth, self.lissa_batch, self.seed

    @staticmethod
    def of(config: RunConfig, size: int) -> Options:
        """Those of a config, for N training examples.

        They are `validation.seed`, `.label_draws`, `.lissa_depth` and `.lissa_batch`, and `factors.cg_iterations`.
        """
        validation = config.validation
        depth = validation.lissa_depth or size
        return Options(
            seed=validation.seed,
            label_draws=validation.label_draws,
            cg_iterations=config.factors.cg_iterations,
            lissa_depth=depth,
            lissa_batch=min(validation.lissa_batch, size),
        )


@dataclass(frozen=True)
class Setting:
    """What a method works on.

    Attributes:
        problem: the network, all N training examples, the points that are scored and the measurements.
        damping: λ by layer.
        curvature: EK-FAC's statistics by layer.
        seconds: wall clock of each phase of their fit.
        cpu_seconds: the same in CPU time.
        options: settings.
    """

    problem: Problem
    damping: Mapping[str, float]
    curvature: Mapping[str, LayerCurvature]
    seconds: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    options: Options

    def states(self, solver: str, curvature: Mapping[str, LayerCurvature] | None = None) -> dict[str, SolverState]:
        """A solver of the house, fitted to each layer, with the damping of all methods."""
        given = curvature or self.curvature
        fitted = {name: SOLVERS[solver].fit(value, 1.0) for name, value in given.items()}
        return {name: replace(state, damping=self.damping[name]) for name, state in fitted.items()}

    def product(self, width: int) -> Product:
        """G V over all training examples, micro-batches sized for `width` vectors."""
        newton = GaussNewton(self.problem.network, self.problem.layers)
        size = micro_batch(self.problem, width)
        return lambda vectors: newton(micro_batches(self.problem.train, size), vectors)


@dataclass(frozen=True)
class Solved:
    """(G + λ)⁻¹ V as a method has it.

    Attributes:
        vectors: by layer, [Q, O, I].
        products: Gauss-Newton products of the Q vectors together.
        examples: examples that the products went over in all.
        residual_Q: ‖V − (G + λ) X‖ / ‖V‖; None where it is not known.
        bytes: of the vectors that the method holds besides V, or of its matrix.
        notes: anything else, JSON-able.
    """

    vectors: Vectors
    products: int = 0
    examples: int = 0
    residual_Q: Tensor | None = None
    bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


Apply = Callable[[Vectors], Solved]


def applied(states: Mapping[str, SolverState]) -> Apply:
    """What a fitted solver of the house does."""
    return lambda vectors: Solved({name: precondition(states[name], value) for name, value in vectors.items()})


def measurement_gradients(problem: Problem) -> Vectors:
    """∇f_q = −∇L of each test example, [Q, O, I] by layer."""
    gradients = example_gradients(problem.network, problem.layers, problem.test)
    return {name: -value for name, value in gradients.items()}


def micro_batch(problem: Problem, width: int) -> int:
    """Examples a micro-batch, so that rows of `width` vectors of all layers fit into `MEMORY`; N at most."""
    rows = places(problem.network, problem.layers, problem.train)
    numbers = sum(rows[layer.name] * (layer.columns + width * layer.outputs) for layer in problem.layers)
    return max(1, min(problem.size, MEMORY // (problem.train.inputs.element_size() * max(1, numbers))))


def warm_up(problem: Problem) -> None:
    """Do everything once on two examples: what happens at a first call is no method's cost."""
    few = Examples(problem.train.inputs[:2], problem.train.targets[:2])
    vectors = measurement_gradients(replace(problem, test=few))
    GaussNewton(problem.network, problem.layers)([few], vectors)
    example_scores(problem.network, problem.layers, few, vectors)
    fit(problem.network, problem.layers, few, sampled_targets(problem.network, few, 0))


def too_large(name: str, problem: Problem) -> str | None:
    """Why a method is not run on this network; None if it is.

    The exact solution takes tens of products, each some six times a forward pass for each vector.
    """
    if name != "exact":
        return None
    rows = places(problem.network, problem.layers, problem.train)
    forward = problem.size * sum(rows[layer.name] * layer.parameters for layer in problem.layers)
    if forward * len(problem.test.inputs) <= LARGEST_EXACT:
        return None
    return (
        f"a forward pass of all training examples takes {forward:.2g} multiply-adds, and there are "
        f"{len(problem.test.inputs)} measurements; more than {LARGEST_EXACT:.0e} in all are not solved exactly"
    )


def count_of(vectors: Vectors) -> int:
    """How many vectors lie side by side."""
    return len(next(iter(vectors.values())))
