"""Whole runs with `factors.solver=ekfac_cg`: scores by brute force, whoever works, and after a cut."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.queries import read_queries
from actors.refinement import ProductTask
from actors.replica import Replica
from actors.store import Artifact, Store
from actors.tasks import Done
from conf.schema import RunConfig
from pipelines.cluster import Cluster
from pipelines.estimate import estimate
from pipelines.graph import build_steps
from pipelines.plan import make_plan, step_names
from pipelines.runner import Runner, StageOutcome
from tests.integration.brute import Brute, tokens_of
from tests.integration.world import LocalCluster, World, fork, matrix, relative, run_locally

FACTORS = ("layers", "sequences", "covariance", "eigenbasis", "correction", "gradients")
DOUBLE = {"model__dtype": "float64", "scan__product_dtype": "float64", "scan__sum_dtype": "float64"}
THREE = {"factors__cg_iterations": 3, "factors__groups": 2}
SMALL = {"corpus__limit": 60, "unfiltered__kind": "all", "attribution__top": 0, "factors__solver": "ekfac_cg"}
VECTORS = 2 * 8 * 824  # bytes of one query's vectors in a replica, in float64


def config_of(world: World, store: Path, **changes: Any) -> RunConfig:
    return world.config(store, **{"model__path": str(world.root / "gpt2"), **SMALL, **DOUBLE, **changes})


def refine(config: RunConfig, cluster: type[Cluster] = LocalCluster) -> StageOutcome:
    """A run that ends with the refined IHVPs."""
    steps = [step for step in build_steps(config) if step.name in (*FACTORS, "refinement")]
    return Runner(Store(config.store), steps, config, lambda: cluster(config)).run()["refinement"]


def tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Refined IHVPs by layer, of all queries."""
    names = sorted(name for name in artifact.list() if name.endswith(".safetensors"))
    found: dict[str, list[torch.Tensor]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[0], []).append(artifact.read_tensors(name)["dense"])
    return {name: torch.cat(parts) for name, parts in found.items()}


def furthest(found: StageOutcome, expected: StageOutcome) -> float:
    """The largest difference of any layer's IHVPs, relative to its largest entry."""
    mine, theirs = tensors(found.artifact), tensors(expected.artifact)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - value).abs().max() / value.abs().max()) for name, value in theirs.items())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refined") / "store"


@pytest.fixture(scope="module")
def few(ray_session: None, world: World, store: Path) -> StageOutcome:
    """Three iterations, in two groups, by one replica in this process."""
    return refine(config_of(world, store, **THREE))


@pytest.fixture
def own(few: StageOutcome, store: Path, tmp_path: Path) -> Path:
    """A store with the factors and the gradients of `few` alone."""
    return fork(store, tmp_path / "own", FACTORS)


def test_scores_are_those_of_the_dense_inverse(
    few: StageOutcome, world: World, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Iterations enough for 1e-9; the damping is high so that some dozens are. Plain EK-FAC is far off."""
    changes = {"factors__damping_factor": 3.0, "factors__groups": 2, "corpus__limit": 30}
    config = config_of(world, store, factors__cg_iterations=80, **changes)
    with caplog.at_level(logging.INFO):
        result = run_locally(config, tmp_path / "cg")
    brute = Brute(world.root / "gpt2", tokens_of(result.artifact("sequences")))
    queries = read_queries(config)
    expected = brute.scores(queries, "ekfac_cg", damping_factor=3.0)
    assert relative(matrix(result.scores_table()), expected) < 1e-8
    assert relative(brute.scores(queries, "ekfac", damping_factor=3.0), expected) > 1e-2
    for history in result.outcomes["refinement"].extra["residuals"].values():
        assert history[0] == 1
        assert len(history) <= 81
        assert history[-1] < 1e-9
    assert "iteration 1 of 80: relative residual" in caplog.text
    said, residuals = result.summary["refinement"], result.outcomes["refinement"].extra["residuals"]
    assert said["residual"] == {name: history[-1] for name, history in residuals.items()}
    for name, iterations in said["iterations"].items():
        assert 10 < iterations <= 80
        assert residuals[name][iterations - 1] != residuals[name][-1] == residuals[name][iterations]
        assert 0 < said["gain"][name] < 1e-9
    assert "iterations at most; relative residual" in result.report_path.read_text(encoding="utf-8")
    assert not result.artifact("refinement").list("parts/")


def test_a_smaller_sample_is_another_curvature(few: StageOutcome, world: World, own: Path):
    found = refine(config_of(world, own, **THREE, factors__cg_samples=20))
    assert found.counts["sequences"] == 20
    assert furthest(found, few) > 1e-3


def test_queries_in_batches_are_the_same(few: StageOutcome, world: World, own: Path):
    """With memory for the vectors of two queries, and for rows of one."""
    config = config_of(world, own, **THREE, scan__dense_memory=2 * VECTORS + 100)
    found = refine(config)
    assert found.artifact.read_json("residuals.json")["batches"] == [[0, 2], [2, 3]]
    assert furthest(found, few) < 1e-10
    for query, history in found.extra["residuals"].items():
        assert history == pytest.approx(few.extra["residuals"][query], rel=1e-9)


def test_the_plan_lists_the_step_and_what_it_takes(few: StageOutcome, world: World, tmp_path: Path):
    plan = make_plan(config_of(world, tmp_path / "none", **THREE))
    names = [step.name for step in plan.steps]
    assert names.index("gradients") < names.index("refinement") < names.index("ihvp")
    disk = {step.name: step.disk for step in plan.steps}["refinement"]
    assert disk == sum(tensor.nbytes for tensor in tensors(few.artifact).values())
    config = config_of(world, tmp_path / "none", **THREE)
    assert set(step_names(config)) == {step.name for step in build_steps(config)}
    costs = estimate(plan.load)
    assert costs["refinement"].memory["vectors"] == 3 * VECTORS
    assert costs["refinement"].flops > 3 * costs["covariance"].flops  # iterations, each of more than a pass
    plain = make_plan(config_of(world, tmp_path / "none", factors__solver="ekfac"))
    assert "refinement" not in {step.name for step in plain.steps}


class Stopped(Exception):
    """The run was cut."""


def test_a_run_that_was_cut_goes_on_and_ends_in_the_same_bits(
    few: StageOutcome, world: World, own: Path, monkeypatch: pytest.MonkeyPatch
):
    config, products = config_of(world, own, **THREE), Replica.products
    done: list[tuple[int, int]] = []

    def note(self: Replica, task: ProductTask, most: int = 99) -> Done:
        if len(done) == most:
            raise Stopped
        done.append((task.direction.iteration, task.group))
        return products(self, task)

    monkeypatch.setattr(Replica, "products", lambda self, task: note(self, task, most=3))
    with pytest.raises(Stopped):  # in the second iteration, with one of its two groups behind it
        refine(config)
    done.clear()
    monkeypatch.setattr(Replica, "products", note)
    found = refine(config)
    assert done == [(1, 1), (2, 0), (2, 1)]
    assert furthest(found, few) == 0
    assert found.extra["residuals"] == few.extra["residuals"]
    assert found.artifact.read_json("residuals.json") == few.artifact.read_json("residuals.json")


@pytest.mark.slow
def test_two_replicas_give_the_bits_of_one(few: StageOutcome, world: World, own: Path):
    assert furthest(refine(config_of(world, own, **THREE, cluster__max_replicas=2), Cluster), few) == 0


@pytest.mark.slow
def test_a_sharded_model_gives_the_same(few: StageOutcome, world: World, tmp_path: Path):
    """Two ranks with DeepSpeed, in float32; bases may differ in signs, which moves nothing."""
    single = {"model__dtype": "float32", "scan__product_dtype": "float32", "scan__sum_dtype": "float32"}
    expected = refine(config_of(world, tmp_path / "alone", **THREE, **single))
    assert furthest(expected, few) < 1e-3
    found = refine(config_of(world, tmp_path / "store", **THREE, **single, cluster__world_size=2), Cluster)
    assert furthest(found, expected) < 1e-3
