"""The stage `training`: what it chooses, what it writes, and that it goes on where it was cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import ConfigError
from conf.schema import Subject
from pipelines.validation import training
from pipelines.validation.dataset import TENSORS
from pipelines.validation.loading import MODEL, load_problem_from
from pipelines.validation.training import LADDERS, Ladder
from tests.pipelines.retrained import SIZES, VALIDATION, InProcess, Killed, staged, table


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SIDE_BY_SIDE", 4)


def trained(folder: Path, cluster: InProcess | None = None, attempt: str = "0", **settings: Any) -> dict[str, Any]:
    context = staged(folder, "training", {"dataset": table(folder)}, cluster, attempt, **settings)
    training.run(context)
    return {"artifact": context.artifact, "document": context.artifact.read_json(training.TRAINING), "context": context}


def test_lowest_validation_loss_is_chosen(tmp_path: Path) -> None:
    found = trained(tmp_path)
    document, grid = found["document"], found["document"]["grid"]
    ladder = LADDERS[Subject.energy]
    assert [(run["learning_rate"], run["l2"]) for run in grid] == [
        (rate, l2) for rate in ladder.learning_rates for l2 in ladder.l2
    ]
    best = min((run for run in grid if run["valid_loss"] is not None), key=lambda run: run["valid_loss"])
    assert document["chosen"] == {"learning_rate": best["learning_rate"], "l2": best["l2"]}
    assert document["losses"] == {name: best[f"{name}_loss"] for name in SIZES}
    assert document["accuracy"] is None
    assert document["sizes"] == SIZES
    assert document["parameters"] == 9 * 128 + 129 * 128 + 129


def test_losses_are_those_of_the_model_that_is_written(tmp_path: Path) -> None:
    found, dataset = trained(tmp_path), table(tmp_path)
    network = load_problem_from(dataset, found["artifact"], VALIDATION).network
    tensors = dataset.read_tensors(TENSORS)
    for name, loss in found["document"]["losses"].items():
        outputs = network.model(tensors[f"x_{name}"])
        expected = 0.5 * float((outputs - tensors[f"y_{name}"]).square().sum(1).mean())
        assert loss == pytest.approx(expected, rel=1e-12)


def test_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, InProcess(fatal=3))
    second = InProcess()
    found = trained(tmp_path, second)
    assert second.done == 1
    expected = trained(tmp_path, attempt="1")
    for name, value in expected["artifact"].read_tensors(MODEL).items():
        assert torch.equal(value, found["artifact"].read_tensors(MODEL)[name])
    assert found["document"] | {"seconds": 0} == expected["document"] | {"seconds": 0}


def test_parts_move_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path)
    monkeypatch.setattr(training, "SIDE_BY_SIDE", 7)
    other = trained(tmp_path, attempt="1")
    assert other["document"]["chosen"] == found["document"]["chosen"]
    for name, value in other["artifact"].read_tensors(MODEL).items():
        torch.testing.assert_close(value, found["artifact"].read_tensors(MODEL)[name], rtol=1e-10, atol=1e-12)


def test_ends_of_the_ladder_and_runs_that_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.LADDERS, Subject.energy, Ladder((1e-3, 1e-2, 1e100), (0.0,)))  # type: ignore[index]
    document = trained(tmp_path)["document"]
    assert [run["valid_loss"] is None for run in document["grid"]] == [False, False, True]
    assert document["chosen"]["learning_rate"] == 1e-2
    assert document["edge"] == []  # the lowest L2 is none at all
    monkeypatch.setitem(training.LADDERS, Subject.energy, Ladder((1e-3, 1e-2), (1e-4,)))  # type: ignore[index]
    assert trained(tmp_path, attempt="1")["document"]["edge"] == ["learning_rate", "l2"]


def test_no_run_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.LADDERS, Subject.energy, Ladder((1e100,), (0.0, 0.1)))  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"subject=energy.*every one of 2 trainings diverged"):
        trained(tmp_path)
