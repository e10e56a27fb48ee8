"""Validation on an almanac of a few dozen documents: every stage of it, what it writes, and after a cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.store import Store
from conf.schema import ClusterConfig, FactorsConfig, RunConfig, Subject, ValidationConfig
from pipelines.almanac.train import TrainSpec
from pipelines.almanac.world import WorldSpec
from pipelines.graph import steps_up_to
from pipelines.runner import Runner, StageOutcome
from pipelines.validation.language import additions, intervals, objectives, removal, scale, solves
from pipelines.validation.language.graph import build_language_steps
from pipelines.validation.language.subject import prepare, specs_of
from tests.integration.world import LocalCluster

WORLD = WorldSpec(entities=3, statements=3, near_misses=1, distractors=1, filler=5, queries=3)
TRAINING = TrainSpec(hidden=8, intermediate=12, layers=1, heads=2, batch_size=16, epochs=2, most_epochs=2)
VALIDATION = ValidationConfig(
    subject=Subject.almanac,
    points=5,
    epsilon=0.02,
    pbo_gradients=12,
    lissa_depth=4,
    lissa_batch=8,
    subsets=4,
    retrainings=2,
    removal=0.05,
)
DOCUMENTS = 15 * (3 + 1 + 1) + 5
STUDIES = ("language_responses", "scale", "language_datamodels", "language_removal", "tracing")
FILES = {
    "language_solves": "solves.json",
    "language_objectives": "objectives.json",
    "language_responses": "responses.json",
    "scale": "scale.json",
    "language_halves": "halves.json",
    "language_datamodels": "datamodels.json",
    "language_removal": "removal.json",
    "tracing": "tracing.json",
}


class Killed(Exception):
    """Somebody stopped the run."""


class Counting(LocalCluster):
    """Counts tasks; after `fatal` of them the run is killed."""

    def __init__(self, config: RunConfig, fatal: int | None = None) -> None:
        super().__init__(config)
        self.fatal, self.done = fatal, 0

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple], memory: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        for position, given in reversed(list(enumerate(arguments))):
            if self.done == self.fatal:
                raise Killed
            self.done += 1
            yield position, function(*given)


def run(config: RunConfig, names: Sequence[str], cluster: LocalCluster | None = None) -> dict[str, StageOutcome]:
    steps = steps_up_to(build_language_steps(config), names)
    return Runner(Store(config.store), steps, config, lambda: cluster or LocalCluster(config)).run()


def without_seconds(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: without_seconds(value) for key, value in record.items() if not key.startswith("seconds")}
    return [without_seconds(value) for value in record] if isinstance(record, list) else record


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Few iterations, steps, draws and resamples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solves, "ITERATIONS", 3)
        patch.setattr(additions, "STEPS", (1, 3))
        patch.setattr(scale, "STEPS", (1, 3))
        patch.setattr(additions, "RANDOM", 2)
        patch.setattr(removal, "DRAWS", 2)
        patch.setattr(intervals, "RESAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("language")
    given = RunConfig(
        store=str(folder / "store"),
        validation=replace(VALIDATION, path=str(folder / "almanac")),
        factors=FactorsConfig(groups=2, cg_iterations=2),
        cluster=ClusterConfig(cpus_per_rank=1),
    )
    return prepare(given, WORLD, TRAINING)


@pytest.fixture(scope="module")
def done(ray_session: None, config: RunConfig) -> dict[str, StageOutcome]:
    return run(config, STUDIES)


def record_of(done: dict[str, StageOutcome], step: str) -> Any:
    return done[step].artifact.read_json(FILES[step])


def test_a_prepared_almanac_is_traced_whole_and_remembers_what_it_was_made_of(config: RunConfig):
    specs = specs_of(config)
    assert (specs.world, specs.training) == (WORLD, TRAINING)
    assert (config.queries.rank, config.unfiltered.kind.name, config.factors.solver.name) == ("full", "all", "ekfac")
    elsewhere = replace(config, validation=replace(config.validation, subject=Subject.language))
    assert prepare(elsewhere).model == config.model


def test_every_method_scores_every_sequence(done: dict[str, StageOutcome]):
    artifact = done["language_scores"].artifact
    scores, record = artifact.read_tensors("scores.safetensors"), artifact.read_json("scores.json")
    assert sorted(scores) == ["bm25", "ekfac", "ekfac_cg", "identity", "kfac"]
    assert {value.shape for value in scores.values()} == {(3, DOCUMENTS)}
    assert all(torch.isfinite(value).all() for value in scores.values())
    assert record["sequences"] == record["documents"] == DOCUMENTS
    assert record["parameters"]["tracked"] == 3 * 8 * 12
    assert set(record["damping"]) == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_conjugate_gradients_here_are_those_of_the_real_step(done: dict[str, StageOutcome]):
    exact_KQN = done["language_solves"].artifact.read_tensors("exact.safetensors")["scores_KQN"]
    refined_QN = done["language_scores"].artifact.read_tensors("scores.safetensors")["ekfac_cg"]
    assert exact_KQN.shape == (3, 3, DOCUMENTS)
    torch.testing.assert_close(exact_KQN[1], refined_QN, rtol=1e-3, atol=1e-3 * float(refined_QN.abs().max()))
    record = record_of(done, "language_solves")
    assert record["agreement"]["mean"] > 0.9999
    assert [len(row) for row in record["exact"]["residuals"]] == [3, 3, 3]
    assert (record["lissa"]["depth"], record["lissa"]["products"]) == (4, 8)


def test_responses_are_compared_with_every_method(done: dict[str, StageOutcome]):
    record = record_of(done, "language_responses")
    tensors = done["language_objectives"].artifact.read_tensors("responses.safetensors")
    assert tensors["numbers_P"].tolist() == [*record["numbers"], *record["added"]]
    assert tensors["response_PQ"].shape == (5 + len(record["added"]), 3)
    assert sorted(record["methods"]) == ["bm25", "ekfac", "ekfac_cg", "exact", "identity", "kfac", "lissa"]
    assert [entry["iterations"] for entry in record["curve"]] == [1, 2, 3]
    assert record["linearity"]["chosen_by"] == "given"
    assert record["linearity"]["epsilons"][0]["epsilon"] == record["epsilon"] == 0.02
    assert len(record["convergence"]["gradients"]) == len(tensors["numbers_P"])


def test_scale_compares_predicted_with_measured_changes(done: dict[str, StageOutcome]):
    record = record_of(done, "scale")
    added = done["language_additions"].artifact.read_tensors("additions.safetensors")
    points = record["points"]
    assert record["weight"] == 1 / DOCUMENTS
    assert np.shape(record["pairs"]["training_on"]) == np.shape(record["pairs"]["pbo"]) == (points, 3)
    assert record["pairs"]["pbo"][0][1] == pytest.approx(float(added["response_PQ"][0, 1]) / DOCUMENTS)
    assert [entry["steps"] for entry in record["training_on"]["checkpoints"]] == [1, 3]
    assert {"slope", "slope_interval", "correlation", "correlation_interval"} == set(record["pbo"]["ekfac"])


def test_training_on_with_a_sequence_raises_its_own_likelihood(config: RunConfig, done: dict[str, StageOutcome]):
    fitted = {name: done[name].artifact for name in ("layers", "sequences", "gradients", "eigenbasis", "correction")}

    def loss(added: int | None) -> float:
        problem = solves.load_problem(config, fitted)
        additions.train_on(replace(problem, queries=problem.queries[:1]), added, seed=0, steps=(3,))
        return float(additions._losses(problem, torch.tensor([7])).detach())

    assert loss(7) < loss(None)


def test_datamodels_are_measured_by_retraining(done: dict[str, StageOutcome]):
    record = record_of(done, "language_datamodels")
    measured = done["language_halves"].artifact.read_tensors("measured.safetensors")
    assert measured["measured_QSR"].shape == (3, 4, 2)
    assert measured["kept_SN"].shape == (4, DOCUMENTS)
    assert float(measured["measured_QSR"].std(1).min()) > 0  # halves differ, and so do models
    assert set(record["methods"]) >= {"identity", "kfac", "ekfac", "ekfac_cg", "lissa", "exact", "bm25"}
    assert record["ceiling"] is not None


def test_removal_and_tracing_say_what_they_promise(done: dict[str, StageOutcome]):
    record = record_of(done, "language_removal")
    assert record["dropped"] == round(0.05 * DOCUMENTS)
    assert set(record["methods"]) == {*removal.METHODS, "random"}
    assert record["methods"]["ekfac"]["against_random"]["interval"] is not None
    traced = record_of(done, "tracing")
    assert set(traced["methods"]) >= {"ekfac", "ekfac_cg", "identity", "bm25", "bm25_ekfac", "bm25_ekfac_cg", "random"}
    assert [entry["iterations"] for entry in traced["curve"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "tasks", "fatal"), [("language_halves", 8, 3), ("language_objectives", 0, 1), ("language_solves", 4, 3)]
)
def test_a_study_that_was_cut_short_goes_on(
    done: dict[str, StageOutcome], config: RunConfig, tmp_path: Path, step: str, tasks: int, fatal: int
):
    """What is there is not done again, and the results are those of an undisturbed run."""
    added = len(record_of(done, "language_responses")["added"])
    tasks = {"language_objectives": 2 - (-(5 + added) // objectives.AT_A_TIME)}.get(step, tasks)
    fork = tmp_path / "store"
    needed = steps_up_to(build_language_steps(config), (step,))
    for kind in {each.kind for each in needed} - {step}:
        shutil.copytree(Path(config.store) / kind, fork / kind)
    cut = replace(config, store=str(fork))
    with pytest.raises(Killed):
        run(cut, (step,), Counting(cut, fatal))
    counting = Counting(cut)
    again = run(cut, (step,), counting)
    assert counting.done == tasks - fatal
    assert again[step].extra["resumed"]
    found, expected = (without_seconds(record_of(each, step)) for each in (again, done))
    assert json.dumps(found) == json.dumps(expected)
