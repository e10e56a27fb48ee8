"""The steps of a validation and what determines the bits of each: where their identities are written down.

    dataset ─▶ training ─▶ curvature ─┬─▶ estimates
                                      ├─▶ responses
                                      ├─▶ datamodels
                                      └─▶ removal

for small networks; the steps of language models and of facts are in `pipelines.validation.language` and
`pipelines.validation.facts`. What is turned off in `validation` is no step.
"""

from __future__ import annotations

from typing import Any

from conf.schema import RunConfig, Subject
from pipelines.steps import Step
from pipelines.validation import curvature, datamodels, dataset, estimates, removal, responses, training
from pipelines.validation.datasets import SETS, data_digest

# Raise a version when a stage's code changes what it writes.
VERSIONS = {
    "dataset": 1,
    "training": 1,
    "curvature": 1,
    "estimates": 1,
    "responses": 1,
    "datamodels": 1,
    "removal": 1,
}
TRAINED, FITTED = ("dataset", "training"), ("dataset", "training", "curvature")


def build_validation_steps(config: RunConfig) -> list[Step]:
    """The steps of a validation, in the order in which they run.

    Reads the digests of data, models and corpora, so their files must be there.

    Args:
        config: Of a language model as `pipelines.validation.language.subject.prepare` returns it.
    """
    subject = config.validation.subject
    if subject in SETS:
        return _network_steps(config)
    if subject is Subject.facts:
        from pipelines.validation import facts

        return facts.steps(config)
    return _language_steps(config)


def _network_steps(config: RunConfig) -> list[Step]:
    validation = config.validation
    assert validation.path is not None
    subject, seed = validation.subject.name, validation.seed
    digest = data_digest(validation.subject, validation.path)
    data = {"subject": subject, "data": digest, "limit": validation.limit, "seed": seed}
    steps = [
        _step("dataset", (), data, dataset.run),
        _step("training", ("dataset",), {"subject": subject, "seed": seed, "epochs": validation.epochs}, training.run),
        _step("curvature", TRAINED, _curvature(config), curvature.run),
        _step("estimates", FITTED, _compared(config) | _solvers(config) | _variants(config), estimates.run),
    ]
    if validation.pbo_steps:
        steps.append(_step("responses", FITTED, _compared(config) | _response(config), responses.run))
    if validation.subsets:
        steps.append(_step("datamodels", FITTED, _retrained(config) | {"subsets": validation.subsets}, datamodels.run))
    if validation.removal:
        steps.append(_step("removal", FITTED, _retrained(config) | {"removal": validation.removal}, removal.run))
    return steps


def _language_steps(config: RunConfig) -> list[Step]:
    from pipelines.validation.language import blocks, ranks
    from pipelines.validation.language.graph import build_language_steps

    steps = build_language_steps(config)
    if config.validation.largest_rank:
        steps.append(ranks.step(config))
    if config.validation.largest_blocks:
        steps.append(blocks.step(config))
    return steps


def _step(name: str, inputs: tuple[str, ...], identity: dict[str, Any], run: Any) -> Step:
    return Step(name, f"validation-{name}", inputs, {"version": VERSIONS[name]} | identity, run)


def _curvature(config: RunConfig) -> dict[str, Any]:
    return {
        "subject": config.validation.subject.name,
        "seed": config.validation.seed,
        "label_draws": config.validation.label_draws,
        "damping_factor": config.factors.damping_factor,
    }


def _measured(config: RunConfig) -> dict[str, Any]:
    """Which test examples are the measurements."""
    validation = config.validation
    return {"subject": validation.subject.name, "seed": validation.seed, "measurements": validation.measurements}


def _compared(config: RunConfig) -> dict[str, Any]:
    """Which examples are compared."""
    return _measured(config) | {"points": config.validation.points}


def _solvers(config: RunConfig) -> dict[str, Any]:
    """What methods read besides the fitted curvature."""
    validation = config.validation
    return {
        "cg_iterations": config.factors.cg_iterations,
        "lissa_depth": validation.lissa_depth,
        "lissa_batch": validation.lissa_batch,
    }


def _variants(config: RunConfig) -> dict[str, Any]:
    validation = config.validation
    return {"largest_blocks": validation.largest_blocks, "convergence": validation.convergence}


def _response(config: RunConfig) -> dict[str, Any]:
    validation = config.validation
    return {
        "steps": validation.pbo_steps,
        "tolerance": validation.pbo_tolerance,
        "epsilon": validation.epsilon,
    }


def _retrained(config: RunConfig) -> dict[str, Any]:
    """Of models that are trained again on parts of the data."""
    validation = config.validation
    training = {"epochs": validation.epochs, "retrainings": validation.retrainings}
    return _measured(config) | _solvers(config) | training
