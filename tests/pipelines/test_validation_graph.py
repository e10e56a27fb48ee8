"""What invalidates each step of a validation, and nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from actors.store import Store
from conf.schema import RunConfig, Subject, ValidationConfig
from pipelines.runner import Runner
from pipelines.validation.graph import build_validation_steps

ALL = {"dataset", "training", "curvature", "estimates", "responses", "datamodels", "removal"}
MEASURED = {"estimates", "responses", "datamodels", "removal"}
SOLVED = {"estimates", "datamodels", "removal"}
RETRAINED = {"datamodels", "removal"}
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "limit": (20, ALL),
    "seed": (1, ALL),
    "points": (7, {"estimates", "responses"}),
    "measurements": (3, MEASURED),
    "epochs": (7, ALL - {"dataset"}),
    "pbo_steps": (7, {"responses"}),
    "pbo_gradients": (7, set()),
    "pbo_tolerance": (0.5, {"responses"}),
    "epsilon": (0.1, {"responses"}),
    "label_draws": (3, MEASURED | {"curvature"}),
    "lissa_depth": (7, SOLVED),
    "lissa_batch": (7, SOLVED),
    "subsets": (7, {"datamodels"}),
    "retrainings": (7, RETRAINED),
    "removal": (0.5, {"removal"}),
    "largest_blocks": (2, {"estimates"}),
    "largest_rank": (2, set()),
    "convergence": (False, {"estimates"}),
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "data.csv").write_text("made up\n")
    validation = ValidationConfig(path=str(tmp_path / "data.csv"), subsets=2, removal=0.1)
    return RunConfig(store=str(tmp_path / "store"), validation=validation)


def fingerprints(config: RunConfig) -> dict[str, str]:
    planned = Runner(Store(config.store), build_validation_steps(config), config).plan()
    return {plan.step.name: plan.fingerprint for plan in planned}


def changed(config: RunConfig, **changes: Any) -> set[str]:
    before = fingerprints(config)
    after = fingerprints(replace(config, **changes))
    return {name for name in before if before[name] != after[name]}


def test_every_setting_is_judged() -> None:
    assert set(CHANGES) | {"subject", "path"} == {field.name for field in fields(ValidationConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_invalidate_what_reads_them(name: str, config: RunConfig) -> None:
    value, expected = CHANGES[name]
    assert changed(config, validation=replace(config.validation, **{name: value})) == expected


def test_the_rest_of_a_run_moves_damping_and_iterations_alone(config: RunConfig) -> None:
    factors = config.factors
    assert changed(config, factors=replace(factors, damping_factor=0.2)) == ALL - {"dataset", "training"}
    assert changed(config, factors=replace(factors, cg_iterations=3)) == SOLVED
    assert changed(config, seed=5, name="other", factors=replace(factors, samples=3, seed=8)) == set()


def test_data_is_known_by_its_content(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "copy.csv").write_text("made up\n")
    moved = replace(config, validation=replace(config.validation, path=str(tmp_path / "copy.csv")))
    assert fingerprints(moved) == fingerprints(config)
    (tmp_path / "copy.csv").write_text("another\n")
    assert not set(fingerprints(moved).values()) & set(fingerprints(config).values())


def test_what_is_turned_off_is_no_step(config: RunConfig) -> None:
    off = replace(config, validation=replace(config.validation, subsets=0, removal=0.0, pbo_steps=0))
    names = [step.name for step in build_validation_steps(off)]
    assert names == ["dataset", "training", "curvature", "estimates"]
    energy = replace(config, validation=replace(config.validation, subject=Subject.energy))
    assert set(fingerprints(energy)) == ALL
    assert not set(fingerprints(energy).values()) & set(fingerprints(config).values())
