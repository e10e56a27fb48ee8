"""Stage `training`: a small network by SGD, its learning rate and L2 chosen by validation loss (Appendix C).

All points of the grid start from the same weights and see the examples in the same order. Networks of linear layers
are trained side by side, a part of the grid a Ray task; a ResNet is a task of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from actors.errors import ConfigError
from actors.store import Artifact
from conf.schema import Subject, ValidationConfig
from influence.gauss_newton import Examples, TensorNetwork
from influence.score_agreement import finite
from pipelines.steps import StageContext, StageResult
from pipelines.validation import learning
from pipelines.validation.dataset import RECORD, TENSORS
from pipelines.validation.datasets import SETS, Table
from pipelines.validation.learning import BATCH, Recipe, States
from pipelines.validation.loading import MODEL
from pipelines.validation.networks import build

TRAINING = "training.json"
SIDE_BY_SIDE = 20  # networks in a stack: enough for batched products, few enough for a core's cache
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Ladder:
    """The grid of a data set: every learning rate with every L2."""

    learning_rates: tuple[float, ...]
    l2: tuple[float, ...]


LADDERS: Mapping[Subject, Ladder] = {
    Subject.concrete: Ladder((0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)),
    Subject.energy: Ladder((0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)),
    Subject.mnist: Ladder((0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)),
    Subject.fashion_mnist: Ladder((0.03, 0.1, 0.3, 1.0), (0.0, 1e-4, 1e-3, 1e-2)),
    Subject.cifar10: Ladder((0.03, 0.1, 0.3), (0.0, 1e-3)),
}


def run(context: StageContext) -> StageResult:
    """Write `model.safetensors`, the state dict of the chosen network, and `training.json`.

    Reads validation.subject, validation.seed and validation.epochs, and the step `dataset`.

    `training.json`: `subject`, `seed`, `epochs`, `batch`, `momentum` (0), `schedule` (constant), `parameters`,
    `sizes` {train, valid, test}; `grid`: [{learning_rate, l2, train_loss, valid_loss, test_loss, train_accuracy,
    valid_accuracy, test_accuracy}], None for the losses of a run that diverged and for accuracies of regressions;
    `chosen` {learning_rate, l2}; `edge`: which of these lie at an end of their ladder, an L2 of 0 aside; `losses` and
    `accuracy` (or None) of the chosen network {train, valid, test}; `seconds` of all trainings together.

    Raises:
        ConfigError: if every run diverged.
    """
    validation, output, dataset = context.config.validation, context.artifact, context.inputs["dataset"]
    ladder = LADDERS[validation.subject]
    grid = list(product(ladder.learning_rates, ladder.l2))
    width = SIDE_BY_SIDE if learning.stackable(fresh(dataset, validation)(0)) else 1
    parts = [grid[start : start + width] for start in range(0, len(grid), width)]
    waiting = [number for number in range(len(parts)) if not output.exists(_name(number, "json"))]
    progress = context.progress("training", len(grid), "networks")
    progress.resume(len(grid) - sum(len(parts[number]) for number in waiting))
    arguments = [(output, dataset, validation, number, parts[number]) for number in waiting]
    for position, _ in context.cluster.map(train_part, arguments):
        progress.advance(len(arguments[position][-1]))
    progress.close()
    records = [output.read_json(_name(number, "json")) for number in range(len(parts))]
    runs = [run for record in records for run in record["runs"]]
    best = _best(runs)
    if best is None:
        raise ConfigError(
            f"validation.subject={validation.subject.name}: every one of {len(grid)} trainings diverged",
            remedy="look at the data: are its targets far outside of what validation normalises?",
        )
    state = output.read_tensors(_name(best // width, "safetensors"))
    output.write_tensors(MODEL, state)
    seconds = sum(record["seconds"] for record in records)
    document = _document(validation, dataset.read_json(RECORD), runs, runs[best], ladder)
    learnt = fresh(dataset, validation)(0).model.parameters()
    output.write_json(TRAINING, document | {"parameters": sum(each.numel() for each in learnt), "seconds": seconds})
    return StageResult({"networks": len(grid), "epochs": validation.epochs})


def fresh(
    dataset: Artifact, validation: ValidationConfig, dtype: torch.dtype | None = None
) -> Callable[[int], TensorNetwork]:
    """What makes a network for this data, with the first weights of a seed; in its own type if `dtype` is None."""
    record = dataset.read_json(RECORD)
    return lambda seed: build(validation.subject, record["inputs"], record["outputs"], seed, dtype).network


def train_part(
    output: Artifact,
    dataset: Artifact,
    validation: ValidationConfig,
    number: int,
    points: Sequence[tuple[float, float]],
) -> None:
    """Train some points of the grid: what they reached, and the weights of the best. A Ray task."""
    start = time.perf_counter()
    tensors = dataset.read_tensors(TENSORS)
    data = {name: Examples(tensors[f"x_{name}"], tensors[f"y_{name}"]) for name in PARTS}
    recipes = [Recipe(learning_rate, l2, validation.seed) for learning_rate, l2 in points]
    make = fresh(dataset, validation)
    states = learning.learn(make, data["train"], recipes, validation.epochs)
    runs = _reached(make(0), states, data, points, accuracies=not isinstance(SETS[validation.subject], Table))
    best = _best(runs)
    if best is not None:
        output.write_tensors(_name(number, "safetensors"), learning.one(states, best))
    output.write_json(_name(number, "json"), {"runs": runs, "seconds": time.perf_counter() - start})


def _reached(
    network: TensorNetwork,
    states: States,
    data: Mapping[str, Examples],
    points: Sequence[tuple[float, float]],
    accuracies: bool,
) -> list[dict[str, float | None]]:
    runs: list[dict[str, float | None]] = [{"learning_rate": rate, "l2": l2} for rate, l2 in points]
    for name, examples in data.items():
        loss_S = learning.losses(network, states, examples).mean(1)
        accuracy_S = learning.hits(network, states, examples).mean(1) if accuracies else None
        for run, record in enumerate(runs):
            record[f"{name}_loss"] = finite(float(loss_S[run]))
            record[f"{name}_accuracy"] = _accuracy(accuracy_S, loss_S, run)
    return runs


def _accuracy(accuracy_S: Tensor | None, loss_S: Tensor, run: int) -> float | None:
    return None if accuracy_S is None or not math.isfinite(loss_S[run]) else float(accuracy_S[run])


def _best(runs: Sequence[Mapping[str, Any]]) -> int | None:
    """The run with the lowest validation loss, the first of them; None if all diverged."""
    finished = [number for number, record in enumerate(runs) if record["valid_loss"] is not None]
    return min(finished, key=lambda number: runs[number]["valid_loss"], default=None)


def _document(
    validation: ValidationConfig,
    dataset: Mapping[str, Any],
    runs: list[dict[str, Any]],
    best: Mapping[str, Any],
    ladder: Ladder,
) -> dict[str, Any]:
    chosen = {name: best[name] for name in ("learning_rate", "l2")}
    rungs = {"learning_rate": ladder.learning_rates, "l2": ladder.l2}
    accuracy = {name: best[f"{name}_accuracy"] for name in PARTS}
    return {
        "subject": validation.subject.name,
        "seed": validation.seed,
        "epochs": validation.epochs,
        "batch": BATCH,
        "momentum": 0.0,
        "schedule": "constant",
        "sizes": {name: dataset[name] for name in PARTS},
        "grid": runs,
        "chosen": chosen,
        "edge": [name for name, values in rungs.items() if chosen[name] and chosen[name] in (min(values), max(values))],
        "losses": {name: best[f"{name}_loss"] for name in PARTS},
        "accuracy": None if None in accuracy.values() else accuracy,
    }


def _name(number: int, extension: str) -> str:
    return f"parts/grid-{number}.{extension}"
