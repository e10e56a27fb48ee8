"""How many training examples the factors of EK-FAC need: fits on disjoint samples, compared by their scores.

A fit has the damping of its own Λ, as it would have if there were no other examples.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig
from influence.gauss_newton import Examples, Vectors
from influence.score_agreement import disjoint, size_agreement
from influence.solvers import SOLVERS
from influence.supervised import example_scores, fit, sampled_targets
from pipelines.validation.loading import load_problem_from
from pipelines.validation.problem import Problem
from pipelines.validation.setting import applied, measurement_gradients, micro_batch

HALVES = ("first", "second")


def size_file(size: int) -> str:
    """The file of the scores of two fits on samples of a size."""
    return f"sizes/{size:07d}.safetensors"


def fit_size(
    output: Artifact, size: int, dataset: Artifact, training: Artifact, curvature: Artifact, config: RunConfig
) -> None:
    """Scores of two fits on disjoint samples of a size. A Ray task."""
    del curvature
    problem = load_problem_from(dataset, training, config.validation)
    vectors, validation = measurement_gradients(problem), config.validation
    batch = micro_batch(problem, 1)
    targets_DN = sampled_targets(problem.network, problem.train, validation.seed, validation.label_draws, batch)
    samples = disjoint(size, problem.size, validation.seed)
    damping = config.factors.damping_factor
    found = [scores_of(problem, rows, targets_DN[:, rows], vectors, damping) for rows in samples]
    output.write_tensors(size_file(size), dict(zip(HALVES, found, strict=True)))


def scores_of(problem: Problem, rows: Tensor, targets_DN: Tensor, vectors: Vectors, damping_factor: float) -> Tensor:
    """Scores by EK-FAC that was fitted on some of the training examples, [Q, P] in float64.

    Args:
        problem: what is scored.
        rows: numbers of N of its training examples.
        targets_DN: D sampled targets of each of them; an example has the same in every sample that it is in.
        vectors: ∇f of the measurements.
        damping_factor: λ over mean(Λ).
    """
    batch = micro_batch(problem, 1)
    sample = Examples(problem.train.inputs[rows], problem.train.targets[rows])
    curvature = fit(problem.network, problem.layers, sample, targets_DN, batch=batch)
    states = {name: SOLVERS["ekfac"].fit(layer, damping_factor) for name, layer in curvature.items()}
    solved = applied(states)(vectors).vectors
    return example_scores(problem.network, problem.layers, problem.points, solved, batch).cpu()


def read_sizes(output: Artifact, sizes: list[int], total: int, full_QP: Tensor) -> dict[str, Any]:
    """Agreement by size.

    Returns:
        `solver` (ekfac), `total` N and `sizes`, descending: `size`, `between` (correlation of the scores of two fits on
        disjoint samples) and `with_full` (of such a fit with the fit on all, the mean of the two), each an `Interval`.
    """
    found = []
    for size in sizes:
        tensors = output.read_tensors(size_file(size))
        found.append(size_agreement(size, tensors[HALVES[0]], tensors[HALVES[1]], full_QP).as_json())
    return {"solver": "ekfac", "total": total, "sizes": found}
