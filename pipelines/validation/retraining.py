"""Training again on parts of the data, and the scores of all training examples that predict what comes of it.

N training examples, T test examples, R trainings. The hyperparameters are those that the step `training` chose. All
studies share the seeds 1, 2 ... of first weights and orders: two trainings of one seed differ by what they leave out,
and by nothing else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig, ValidationConfig
from influence.gauss_newton import Examples
from pipelines.steps import StageContext
from pipelines.validation import learning
from pipelines.validation.curvature import setting_of
from pipelines.validation.dataset import TENSORS
from pipelines.validation.learning import Recipe
from pipelines.validation.loading import load_problem_from
from pipelines.validation.methods import METHODS, estimate
from pipelines.validation.training import SIDE_BY_SIDE, TRAINING, fresh

SEEDS = 1_000_003  # between the seeds of two validations
DTYPE = torch.float32  # of training again; float64 takes 1.7 times as long, and chance moves far more than rounding


@dataclass(frozen=True)
class Inputs:
    """What a task reads; it pickles to any worker."""

    dataset: Artifact
    training: Artifact
    curvature: Artifact

    @staticmethod
    def of(context: StageContext) -> Inputs:
        """Those of a stage."""
        return Inputs(*(context.inputs[name] for name in ("dataset", "training", "curvature")))


@dataclass(frozen=True)
class Retraining:
    """One training: the numbers of the examples that it sees (None: all), and which of the seeds it has."""

    kept: Tensor | None
    repeat: int


def measured(context: StageContext, name: str, runs: Sequence[Retraining], tests_T: Tensor) -> tuple[Tensor, float]:
    """Train and measure: f = −L of test examples, float64 [R, T], and the seconds of all tasks together.

    Args:
        context: of the stage; parts are written to `parts/<name>-<number>.safetensors`, and those that exist are kept.
        name: of the study.
        runs: R trainings.
        tests_T: numbers of the test examples.
    """
    inputs, output, validation = Inputs.of(context), context.artifact, context.config.validation
    width = SIDE_BY_SIDE if learning.stackable(fresh(inputs.dataset, validation)(0)) else 1
    parts = [runs[start : start + width] for start in range(0, len(runs), width)]
    names = [f"parts/{name}-{number}" for number in range(len(parts))]
    waiting = [number for number, part in enumerate(names) if not output.exists(f"{part}.json")]
    progress = context.progress(name, len(runs), "trainings")
    progress.resume(len(runs) - sum(len(parts[number]) for number in waiting))
    arguments = [(output, inputs, validation, names[number], parts[number], tests_T) for number in waiting]
    for position, _ in context.cluster.map(retrain_part, arguments):
        progress.advance(len(arguments[position][4]))
    progress.close()
    found_RT = torch.cat([output.read_tensors(f"{part}.safetensors")["measured_RT"] for part in names])
    return found_RT, sum(output.read_json(f"{part}.json")["seconds"] for part in names)


def retrain_part(
    output: Artifact,
    inputs: Inputs,
    validation: ValidationConfig,
    name: str,
    runs: Sequence[Retraining],
    tests_T: Tensor,
) -> None:
    """Train some networks with the chosen hyperparameters and measure them. A Ray task."""
    start = time.perf_counter()
    tensors, chosen = inputs.dataset.read_tensors(TENSORS), inputs.training.read_json(TRAINING)["chosen"]
    train = _typed(Examples(tensors["x_train"], tensors["y_train"]))
    test = _typed(Examples(tensors["x_test"][tests_T], tensors["y_test"][tests_T]))
    first = SEEDS * validation.seed + 1
    recipes = [Recipe(chosen["learning_rate"], chosen["l2"], first + run.repeat, run.kept) for run in runs]
    make = fresh(inputs.dataset, validation, DTYPE)
    states = learning.learn(make, train, recipes, validation.epochs)
    output.write_tensors(f"{name}.safetensors", {"measured_RT": -learning.losses(make(0), states, test)})
    output.write_json(f"{name}.json", {"trainings": len(runs), "seconds": time.perf_counter() - start})


def _typed(examples: Examples) -> Examples:
    """The examples for networks of that type; classes stay what they are."""
    targets = examples.targets.to(DTYPE) if examples.targets.is_floating_point() else examples.targets
    return Examples(examples.inputs.to(DTYPE), targets)


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scoring:
    """Scores to be had.

    Attributes:
        method: of the registry.
        multiple: times the damping of all other studies; None where `damping` is given.
        damping: the same λ in every layer.
    """

    method: str
    multiple: float | None = 1.0
    damping: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        if self.damping is not None:
            return f"{self.method}-uniform"
        return self.method if self.multiple == 1 else f"{self.method}-{self.multiple:g}"

    def dampings(self, house: Mapping[str, float]) -> dict[str, float]:
        """λ by layer."""
        if self.damping is not None:
            return dict.fromkeys(house, self.damping)
        assert self.multiple is not None
        return {layer: self.multiple * value for layer, value in house.items()}


EVERY_METHOD = tuple(Scoring(method) for method in METHODS)


def scored(
    context: StageContext, tests_T: Tensor, scorings: Sequence[Scoring] = EVERY_METHOD
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scores of all training examples on test examples, float64 [T, N], and the seconds of each, by name."""
    output, inputs = context.artifact, Inputs.of(context)
    waiting = [scoring for scoring in scorings if not output.exists(f"parts/scores/{scoring.name}.json")]
    progress = context.progress("scores", len(scorings), "methods")
    progress.resume(len(scorings) - len(waiting))
    arguments = [(output, inputs, context.config, scoring, tests_T) for scoring in waiting]
    for _ in context.cluster.map(score_part, arguments):
        progress.advance(1)
    progress.close()
    names = [scoring.name for scoring in scorings]
    scores = {name: output.read_tensors(f"parts/scores/{name}.safetensors")["scores_TN"].double() for name in names}
    return scores, {name: output.read_json(f"parts/scores/{name}.json")["seconds"] for name in names}


def score_part(output: Artifact, inputs: Inputs, config: RunConfig, scoring: Scoring, tests_T: Tensor) -> None:
    """The scores of one method. A Ray task."""
    start = time.perf_counter()
    problem = load_problem_from(inputs.dataset, inputs.training, config.validation)
    tensors = inputs.dataset.read_tensors(TENSORS)
    test = Examples(tensors["x_test"][tests_T], tensors["y_test"][tests_T])
    problem = dataclasses.replace(problem, points_P=torch.arange(problem.size), test=test)
    setting = setting_of(problem, inputs.curvature, config)
    setting = dataclasses.replace(setting, damping=scoring.dampings(setting.damping))
    found = estimate(scoring.method, setting)
    output.write_tensors(f"parts/scores/{scoring.name}.safetensors", {"scores_TN": found.scores_QP})
    record: dict[str, Any] = {"record": found.record, "seconds": time.perf_counter() - start}
    output.write_json(f"parts/scores/{scoring.name}.json", record)
