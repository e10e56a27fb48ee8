"""The problem of a validation, put together from the artifacts of the steps `dataset` and `training`."""

from __future__ import annotations

import torch

from actors.store import Artifact
from conf.schema import ValidationConfig
from influence.gauss_newton import Examples
from pipelines.steps import StageContext
from pipelines.validation.dataset import RECORD, TENSORS
from pipelines.validation.networks import Built, build
from pipelines.validation.problem import Problem, chosen

MODEL = "model.safetensors"  # of the step `training`: the state dict
POINTS, MEASUREMENTS = 1, 2  # purposes of draws


def load_problem(context: StageContext) -> Problem:
    """The problem of a stage that has the steps `dataset` and `training` among its inputs."""
    return load_problem_from(context.inputs["dataset"], context.inputs["training"], context.config.validation)


def load_problem_from(dataset: Artifact, training: Artifact, validation: ValidationConfig) -> Problem:
    """The trained network, its training examples, and the points and measurements that are drawn from the seed.

    Args:
        dataset: of the step `dataset`.
        training: of the step `training`.
        validation: subject, seed, and how many points and measurements.
    """
    tensors = dataset.read_tensors(TENSORS)
    built = fresh(dataset, validation)
    built.network.model.load_state_dict(training.read_tensors(MODEL))
    points_P = chosen(validation.points, len(tensors["x_train"]), validation.seed, POINTS)
    test_Q = chosen(validation.measurements, len(tensors["x_test"]), validation.seed, MEASUREMENTS)
    train = Examples(tensors["x_train"], tensors["y_train"])
    test = Examples(tensors["x_test"][test_Q], tensors["y_test"][test_Q])
    return Problem(built.network, built.layers, train, points_P, test)


def fresh(dataset: Artifact, validation: ValidationConfig, seed: int = 0, dtype: torch.dtype | None = None) -> Built:
    """A network for this data, with the first weights of a seed."""
    record = dataset.read_json(RECORD)
    return build(validation.subject, record["inputs"], record["outputs"], seed, dtype)
