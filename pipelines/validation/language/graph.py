"""The steps of a validation on a language model: those of an EK-FAC trace, and what is measured beside its scores.

    trace ─▶ language_scores ─▶ language_solves ─┐
          └▶ language_objectives ────────────────┼─▶ language_responses
                  └▶ language_additions ─────────┼─▶ scale
             language_halves ────────────────────┼─▶ language_datamodels
                                                 └─▶ language_removal, tracing

Halves, datamodels, removal and tracing are an almanac's. Whatever is trained or optimised for long depends on no more
than it must, so that other settings of a solver repeat none of it.
What `validation` turns off is no step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from conf.schema import RunConfig, Subject
from pipelines.graph import build_steps, steps_up_to
from pipelines.steps import StageContext, StageResult, Step
from pipelines.validation.language import (
    additions,
    almanac_facts,
    datamodels,
    halves,
    objectives,
    removal,
    responses,
    scale,
    scores,
    solves,
    tracing,
    variants,
)
from pipelines.validation.language.problem import FITTED
from pipelines.validation.language.subject import specs_of

# Raise a version when a stage's code changes what it writes.
VERSIONS = {
    "language_scores": 1,
    "language_solves": 1,
    "language_objectives": 2,
    "language_additions": 2,
    "language_responses": 1,
    "scale": 1,
    "language_halves": 1,
    "language_datamodels": 1,
    "language_removal": 1,
    "tracing": 1,
}
SCORED = ("language_scores", "language_solves")


def build_language_steps(config: RunConfig) -> list[Step]:
    """The steps in order.

    Args:
        config: as `subject.prepare` gives it; its model, corpus and queries are read.
    """
    steps = [*steps_up_to(build_steps(config), ("scores",)), *_scoring(config)]
    if config.validation.pbo_steps:
        steps += _responses(config)
    if config.validation.subject is Subject.almanac:
        steps += _almanac(config)
    return steps


def _scoring(config: RunConfig) -> list[Step]:
    damping = {"damping_factor": config.factors.damping_factor}
    return [
        _step(
            "language_scores",
            (*FITTED, "candidates"),
            {"variants": variants.identity(scores.variants(config))} | damping,
            scores.run,
        ),
        _step("language_solves", (*FITTED, "language_scores"), solves.identity(config) | damping, solves.run),
    ]


def _responses(config: RunConfig) -> list[Step]:
    measured = (*SCORED, "language_objectives")
    return [
        _step("language_objectives", (*FITTED, "scores"), objectives.identity(config), objectives.run),
        _step("language_additions", (*FITTED, "language_objectives"), additions.identity(config), additions.run),
        _step("language_responses", measured, {}, responses.run),
        _step("scale", (*measured, "language_additions"), {}, scale.run),
    ]


def _almanac(config: RunConfig) -> list[Step]:
    made, settings = {"specs": asdict(specs_of(config))}, config.validation
    steps = []
    if settings.subsets:
        steps.append(_step("language_halves", (), halves.identity(config) | made, halves.run))
        steps.append(_step("language_datamodels", (*SCORED, "language_halves"), {}, datamodels.run))
    if settings.removal:
        steps.append(_step("language_removal", SCORED, removal.identity(config) | made, removal.run))
    judged = made | {"candidates": tracing.CANDIDATES, "combined": list(almanac_facts.COMBINED)}
    return [*steps, _step("tracing", ("sequences", *SCORED), judged, almanac_facts.run)]


def _step(
    name: str, inputs: tuple[str, ...], identity: dict[str, Any], run: Callable[[StageContext], StageResult]
) -> Step:
    return Step(name, name, inputs, {"version": VERSIONS[name]} | identity, run)
