"""Stage `responses`: how the loss of each measurement responds to each point, by the proximal Bregman objective.

The ground truth of Figure 6: for a point, its loss is added to the objective with weight ε, the objective is minimised,
and what the measurements have changed by is divided by ε. θ(ε) does not depend on the measurement, so that the P
minimisations serve all Q of them. Points are dealt in parts, a Ray task each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig, ValidationConfig
from influence.dominant import ROWS, Dominant
from influence.formed import Formed
from influence.gauss_newton import Examples, Network
from influence.newton import Descent, Optimum, Precondition, minimise
from influence.proximal import Proximal, measured
from influence.score_agreement import correlations, finite
from influence.supervised import places
from pipelines.steps import StageContext, StageResult
from pipelines.validation.curvature import setting_of
from pipelines.validation.dataset import RECORD as DATASET
from pipelines.validation.linearity import Tried, choose, sample
from pipelines.validation.loading import MEASUREMENTS, POINTS, load_problem_from
from pipelines.validation.problem import Problem, chosen
from pipelines.validation.setting import micro_batch

TENSORS = "responses.safetensors"
RECORD = "responses.json"
EPSILON = "parts/epsilon.json"
PART = 50  # points side by side
SAMPLE = 8  # points that ε is tried on
AIM = 0.2  # of the tolerance: where minimisations stop

Inputs = tuple[Artifact, Artifact, Artifact]


def run(context: StageContext) -> StageResult:
    """Write `responses.safetensors` {response_QP, early_QP, errors_P} and `responses.json`.

    Reads validation.subject, seed, points, measurements, pbo_steps, pbo_tolerance and epsilon, and the steps `dataset`,
    `training` and `curvature` (the damping).

    `responses.json`: `points` P, `measurements` Q, `numbers` [P] of the points and `tests` [Q] of the measurements
    among the training and test examples; `optimiser`, in words; `steps` of Gauss-Newton at most, `batch` (N: all
    examples a step); `epsilon`; `linearity`: {`epsilons`: [{epsilon, smaller, difference, worst, slope, correlation}]
    from the largest that was tried down (`pipelines.validation.linearity.Comparison`), `chosen_by` "given" or
    "linearity", `tolerance`, `linear`: whether the chosen one is within it}; `convergence`: {`tolerance`, `gradients`
    [P] relative gradients at the end in the norm of the inverse curvature (`influence.proximal`), `bound`: whether they
    bound the relative errors, `converged`: how many are within the tolerance, `halfway`: correlation, its mean over
    measurements, of responses after the first step with those at the end, `steps` and `products` [P] of each};
    `rows`, `trace_share` of the preconditioner; `seconds` of all tasks together.
    """
    output, config = context.artifact, context.config
    names = ("dataset", "training", "curvature")
    inputs: Inputs = (context.inputs[names[0]], context.inputs[names[1]], context.inputs[names[2]])
    if not output.exists(EPSILON):
        for _ in context.cluster.map(find_epsilon, [(output, inputs, config)]):
            pass
    epsilon = output.read_json(EPSILON)["epsilon"]
    sizes = inputs[0].read_json(DATASET)
    numbers_P = chosen(config.validation.points, sizes["train"], config.validation.seed, POINTS)
    parts = list(torch.arange(len(numbers_P)).split(PART))
    waiting = [number for number in range(len(parts)) if not output.exists(_part(number, "json"))]
    progress = context.progress("responses", len(numbers_P), "points")
    progress.resume(len(numbers_P) - sum(len(parts[number]) for number in waiting))
    arguments = [(output, inputs, config, epsilon, number, parts[number].tolist()) for number in waiting]
    for position, _ in context.cluster.map(respond, arguments):
        progress.advance(len(parts[waiting[position]]))
    progress.close()
    return _gather(context, numbers_P, len(parts), sizes["test"])


# --- tasks ------------------------------------------------------------------------------------------------------------


def find_epsilon(output: Artifact, inputs: Inputs, config: RunConfig) -> None:
    """Try ε on some of the points. A Ray task."""
    start = time.perf_counter()
    work = _Work(inputs, config)
    places = sample(work.gradient_norms(), SAMPLE)

    def tried(epsilon: float) -> Tried:
        found = work.minimised(places, epsilon)
        return Tried(work.measured(found.weights, epsilon), found.errors_S <= config.validation.pbo_tolerance)

    found = choose(tried, work.problem.size, config.validation.epsilon)
    seconds = time.perf_counter() - start
    output.write_json(EPSILON, {"epsilon": found.epsilon, "linearity": found.as_json(), "seconds": seconds})


def respond(
    output: Artifact, inputs: Inputs, config: RunConfig, epsilon: float, number: int, places: Sequence[int]
) -> None:
    """Minimise the objectives of a part's points and measure. A Ray task."""
    start = time.perf_counter()
    work = _Work(inputs, config)
    found = work.minimised(places, epsilon)
    tensors = {"response_SQ": work.measured(found.weights, epsilon), "early_SQ": work.measured(found.early, epsilon)}
    output.write_tensors(_part(number, "safetensors"), tensors)
    record = {
        "errors": found.errors_S.tolist(),
        "steps": found.steps_S.tolist(),
        "products": found.products_S.tolist(),
        "rows": work.rows,
        "trace_share": work.trace_share,
        "seconds": time.perf_counter() - start,
    }
    output.write_json(_part(number, "json"), record)


class _Work:
    """What a task needs: the problem, the objective, and a preconditioner."""

    def __init__(self, inputs: Inputs, config: RunConfig) -> None:
        dataset, training, curvature = inputs
        self.problem = load_problem_from(dataset, training, config.validation)
        setting = setting_of(self.problem, curvature, config)
        given = (self.problem.network, self.problem.layers)
        size = micro_batch(self.problem, PART)
        batches = [_rows(self.problem.train, rows) for rows in torch.arange(self.problem.size).split(size)]
        self.proximal = Proximal(*given, setting.damping, batches)
        self.descent = descent_of(config.validation)
        if max(places(*given, self.problem.train).values()) > 1:
            inverse = Formed.fit(*given, self.problem.train, setting.damping)
        else:
            inverse = Dominant.fit(*given, self.problem.train, setting.damping, ROWS)
        self.inverse: Precondition = inverse
        self.rows, self.trace_share = len(inverse.cholesky_RR), inverse.trace_share

    def point(self, place: int) -> Examples:
        return _rows(self.problem.points, torch.tensor([place]))

    def gradient_norms(self) -> Tensor:
        """‖∇L(z_m)‖ of all points, [P]."""
        found = []
        for place in range(len(self.problem.points_P)):
            gradient = self.proximal.gradients([self.point(place)], None, 1.0)
            found.append(sum(value.square().sum() for value in gradient.values()))
        return torch.stack(found).sqrt()  # type: ignore[arg-type]

    def minimised(self, places: Sequence[int], epsilon: float) -> Optimum:
        points = [self.point(place) for place in places]
        return minimise(self.proximal, points, epsilon, self.inverse, self.descent)

    def measured(self, weights: dict[str, Tensor], epsilon: float) -> Tensor:
        measure = partial(_minus_losses, self.problem)
        return measured(self.problem.network, self.problem.layers, weights, epsilon, measure)


def descent_of(validation: ValidationConfig) -> Descent:
    """How far the objectives of a validation are minimised."""
    return Descent(steps=validation.pbo_steps, tolerance=AIM * validation.pbo_tolerance)


def _minus_losses(problem: Problem, network: Network[Examples]) -> Tensor:
    """The measurements f_q = −L(z_q), [Q], in float64."""
    test = Examples(problem.test.inputs.double(), problem.test.targets)
    targets = test.targets.double() if test.targets.is_floating_point() else test.targets
    return -network.loss.value(network.outputs(test), targets)


def _rows(examples: Examples, rows: Tensor) -> Examples:
    return Examples(examples.inputs[rows], examples.targets[rows])


def _part(number: int, extension: str) -> str:
    return f"parts/responses-{number:04d}.{extension}"


# --- what came of them ------------------------------------------------------------------------------------------------


def _gather(context: StageContext, numbers_P: Tensor, count: int, tests: int) -> StageResult:
    """Put the parts together."""
    output, validation = context.artifact, context.config.validation
    tensors = [output.read_tensors(_part(number, "safetensors")) for number in range(count)]
    records = [output.read_json(_part(number, "json")) for number in range(count)]
    response_QP, early_QP = (torch.cat([part[name] for part in tensors]).T for name in ("response_SQ", "early_SQ"))
    errors = [error for record in records for error in record["errors"]]
    found = output.read_json(EPSILON)
    output.write_tensors(
        TENSORS,
        {
            "response_QP": response_QP,
            "early_QP": early_QP,
            "errors_P": torch.tensor(errors, dtype=torch.float64),
        },
    )
    tests_Q = chosen(validation.measurements, tests, validation.seed, MEASUREMENTS)
    document = {
        "points": len(numbers_P),
        "measurements": len(tests_Q),
        "numbers": numbers_P.tolist(),
        "tests": tests_Q.tolist(),
        "optimiser": "Gauss-Newton steps by conjugate gradients, all training examples in each",
        "steps": validation.pbo_steps,
        "batch": context.inputs["dataset"].read_json(DATASET)["train"],
        "epsilon": found["epsilon"],
        "linearity": found["linearity"],
        "convergence": _convergence(validation, records, errors, response_QP, early_QP),
        "rows": records[0]["rows"],
        "trace_share": records[0]["trace_share"],
        "seconds": found["seconds"] + sum(record["seconds"] for record in records),
    }
    output.write_json(RECORD, document)
    for name in output.list("parts/"):
        output.delete(name)
    return StageResult({"points": len(numbers_P), "converged": document["convergence"]["converged"]})


def _convergence(
    validation: ValidationConfig,
    records: Sequence[dict[str, Any]],
    errors: Sequence[float],
    response_QP: Tensor,
    early_QP: Tensor,
) -> dict[str, Any]:
    return {
        "tolerance": validation.pbo_tolerance,
        "gradients": list(errors),
        "bound": True,
        "converged": sum(error <= validation.pbo_tolerance for error in errors),
        "halfway": finite(float(correlations(early_QP, response_QP).nanmean())),
        "steps": [steps for record in records for steps in record["steps"]],
        "products": [products for record in records for products in record["products"]],
    }
