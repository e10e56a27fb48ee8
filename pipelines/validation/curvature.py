"""Stage `curvature`: EK-FAC of a small network on all of its training examples, and the damping of all methods.

It is fitted once, alone, so that its seconds can be counted for every method that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.factors import basis_tensors, layer_file, numbered
from actors.store import Artifact
from conf.schema import RunConfig, ValidationConfig
from influence.eigenbasis import BlockBasis
from influence.layers import TrackedLayer
from influence.solvers import SOLVERS, LayerCurvature
from influence.supervised import bases_of, curvature_of, fit_correction, fit_covariance, sampled_targets
from pipelines.steps import StageContext, StageResult
from pipelines.validation.loading import load_problem_from
from pipelines.validation.problem import Problem
from pipelines.validation.setting import Options, Setting, micro_batch, warm_up
from pipelines.validation.stopwatch import Stopwatch

RECORD = "curvature.json"
DAMPING = "damping.json"
SIDES = ("activation", "gradient")


@dataclass(frozen=True)
class Fitted:
    """What the step wrote: EK-FAC by layer, λ by layer, and the seconds of each phase of the fit."""

    curvature: dict[str, LayerCurvature]
    damping: dict[str, float]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>.safetensors` (bases and Λ), `damping.json` {layer: λ} and `curvature.json`.

    Reads validation.subject, validation.seed and validation.label_draws (of sampled targets), and
    factors.damping_factor, and the steps `dataset` and `training`.

    `curvature.json`: `examples` N, `draws` of targets for each, `batch` (examples a micro-batch), `threads`; `seconds`
    and `cpu_seconds` of `labels`, `covariance`, `eigenbasis`, `correction` and in `total`; `layers`: by name, `inputs`
    (with the bias), `outputs`, `places` (rows of an example), `damping`, `mean_eigenvalue` (of Λ).
    """
    output, config = context.artifact, context.config
    if not output.exists(RECORD):
        arguments = (output, context.inputs["dataset"], context.inputs["training"], config)
        for _ in context.cluster.map(fit_and_write, [arguments]):
            pass
    record = output.read_json(RECORD)
    return StageResult({"layers": len(record["layers"]), "examples": record["examples"]}, {})


def fit_and_write(output: Artifact, dataset: Artifact, training: Artifact, config: RunConfig) -> None:
    """Fit EK-FAC, phase by phase. A Ray task."""
    problem = load_problem_from(dataset, training, config.validation)
    warm_up(problem)
    watch, batch = Stopwatch(), micro_batch(problem, 1)
    curvature = fitted(problem, config.validation, batch, watch)
    damping = damping_of(curvature, config.factors.damping_factor)
    for name, found in curvature.items():
        output.write_tensors(layer_file(name), curvature_tensors(found))
    output.write_json(DAMPING, damping)
    draws = config.validation.label_draws
    record = {"examples": problem.size, "draws": draws, "batch": batch, "threads": torch.get_num_threads()}
    layers = {layer.name: _describe(layer, curvature[layer.name], damping[layer.name]) for layer in problem.layers}
    output.write_json(RECORD, record | watch.as_json() | {"layers": layers})


def fitted(problem: Problem, validation: ValidationConfig, batch: int, watch: Stopwatch) -> dict[str, LayerCurvature]:
    """EK-FAC on all training examples, with some draws of targets for each; timed."""
    given = (problem.network, problem.layers, problem.train)
    with watch.phase("labels"):
        targets = sampled_targets(problem.network, problem.train, validation.seed, validation.label_draws, batch)
    with watch.phase("covariance"):
        covariance = fit_covariance(*given, targets, batch=batch)
    with watch.phase("eigenbasis"):
        bases = bases_of(problem.layers, covariance)
    with watch.phase("correction"):
        correction = fit_correction(*given, targets, bases, batch)
    return curvature_of(problem.layers, covariance, bases, correction)


def damping_of(curvature: Mapping[str, LayerCurvature], factor: float) -> dict[str, float]:
    """λ = factor · mean(Λ) of each layer.

    Raises:
        ValueError: naming the layer, if its curvature is zero.
    """
    found = {}
    for name, layer in curvature.items():
        try:
            found[name] = SOLVERS["ekfac"].fit(layer, factor).damping
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    return found


def setting_of(problem: Problem, curvature: Artifact, config: RunConfig) -> Setting:
    """What methods work on, with what this step wrote."""
    found = read_fitted(curvature, problem.layers)
    options = Options.of(config, problem.size)
    return Setting(problem, found.damping, found.curvature, found.seconds, found.cpu_seconds, options)


# --- files ------------------------------------------------------------------------------------------------------------


def curvature_tensors(found: LayerCurvature) -> dict[str, Tensor]:
    """One layer's bases and Λ as named tensors."""
    assert found.correction_OI is not None
    tensors = {"correction": found.correction_OI, "places": torch.tensor([found.tokens_per_sequence])}
    for side, basis in zip(SIDES, (found.activation, found.gradient), strict=True):
        tensors |= {f"{side}/{name}": value for name, value in basis_tensors(basis).items()}
    return tensors


def read_fitted(curvature: Artifact, layers: Sequence[TrackedLayer]) -> Fitted:
    """Read what the step wrote."""
    found = {}
    for layer in layers:
        tensors = curvature.read_tensors(layer_file(layer.name))
        activation, gradient = (
            BlockBasis(numbered(tensors, f"{side}/vectors"), numbered(tensors, f"{side}/values")) for side in SIDES
        )
        found[layer.name] = LayerCurvature(activation, gradient, tensors["correction"], float(tensors["places"][0]))
    record = curvature.read_json(RECORD)
    return Fitted(found, curvature.read_json(DAMPING), record["seconds"], record["cpu_seconds"])


def _describe(layer: TrackedLayer, found: LayerCurvature, damping: float) -> dict[str, Any]:
    assert found.correction_OI is not None
    return {
        "inputs": layer.columns,
        "outputs": layer.outputs,
        "places": found.tokens_per_sequence,
        "damping": damping,
        "mean_eigenvalue": float(found.correction_OI.mean(dtype=torch.float64)),
    }
