"""Fits on disjoint halves: correlations by brute force, whoever works, after a cut, and what the user is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.queries import read_queries
from actors.reduction import decompose
from actors.replica import Replica
from actors.store import Artifact, Store
from conf.schema import RunConfig
from pipelines.cluster import Cluster
from pipelines.graph import build_steps, steps_up_to
from pipelines.plan import make_plan
from pipelines.runner import Runner, StageOutcome
from pipelines.stages import convergence, grouped
from pipelines.stages.convergence import beyond, in_words, low
from pipelines.stages.halves import halves_of
from tests.integration.brute import Brute, tokens_of
from tests.integration.world import LocalCluster, World, fork

BEFORE = ("layers", "sequences", "gradients")
DOUBLE = {"model__dtype": "float64", "scan__product_dtype": "float64", "scan__sum_dtype": "float64"}
TRACKED = "h.0.mlp"
SMALL = {"corpus__limit": 40, "model__layers": TRACKED, "factors__convergence_share": 0.5, "factors__groups": 4}


def config_of(world: World, store: Path, **changes: Any) -> RunConfig:
    return world.config(store, **{"model__path": str(world.root / "gpt2"), **SMALL, **DOUBLE, **changes})


def compare(config: RunConfig, cluster: type[Cluster] = LocalCluster) -> StageOutcome:
    """A run that ends with the comparison of fits."""
    steps = steps_up_to(build_steps(config), ["convergence"])
    return Runner(Store(config.store), steps, config, lambda: cluster(config)).run()["convergence"]


def found_in(outcome: StageOutcome) -> dict[str, Any]:
    return outcome.artifact.read_json("convergence.json")


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert [entry["sequences"] for entry in found["sizes"]] == [entry["sequences"] for entry in expected["sizes"]]
    for mine, theirs in zip(found["sizes"], expected["sizes"], strict=True):
        assert mine["pearson"] == pytest.approx(theirs["pearson"], abs=tolerance)
    assert {key: found["fitted"][key] for key in ("sequences", "tokens")} == {
        key: expected["fitted"][key] for key in ("sequences", "tokens")
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converged") / "store"


@pytest.fixture(scope="module")
def compared(ray_session: None, world: World, store: Path) -> StageOutcome:
    """By one replica in this process."""
    return compare(config_of(world, store))


@pytest.fixture
def own(compared: StageOutcome, store: Path, tmp_path: Path) -> Path:
    """A store with what comes before."""
    return fork(store, tmp_path / "own", BEFORE)


@pytest.fixture(scope="module")
def brute(compared: StageOutcome, world: World, store: Path) -> Brute:
    (folder,) = (store / "sequences").iterdir()
    record = json.loads((folder / "artifact.json").read_text())
    rows = tokens_of(Artifact(Store(str(store)), "sequences", record["fingerprint"]))
    return Brute(world.root / "gpt2", rows, tracked=TRACKED)


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "ekfac_cg"])
def test_correlations_are_those_of_brute_force(
    compared: StageOutcome, world: World, own: Path, brute: Brute, solver: str
):
    """All sequences are scored, since there are no more than the sample takes."""
    config = config_of(world, own, factors__solver=solver)
    found = found_in(compared if solver == "ekfac" else compare(config))
    sequences = found["samples"]
    assert 45 < sequences == found["scored"] <= convergence.SCORED
    assert found["solver"] == ("kfac" if solver == "kfac" else "ekfac")
    queries, halves = read_queries(config), halves_of(sequences, config.factors)
    for size, entry in zip(halves.sizes, found["sizes"], strict=True):
        fits = halves.of_size(halves.sizes.index(size))
        members = [[number for group in fit.groups for number in halves.groups[group]] for fit in fits]
        assert entry["sequences"] == len(members[0]) == len(members[1]) == size
        first, second = (brute.fitted_on(numbers).scores(queries, found["solver"]) for numbers in members)
        for column, query in enumerate(queries):
            expected = np.corrcoef(first[:, column], second[:, column])[0, 1]
            assert entry["pearson"][query.query_id] == pytest.approx(expected, abs=1e-8)
        assert entry["mean"] == pytest.approx(np.mean(list(entry["pearson"].values())))
        assert entry["minimum"] == min(entry["pearson"].values())


def test_each_sequence_is_gone_through_once_for_all_covariances_and_once_a_fit_for_the_correction(
    compared: StageOutcome,
):
    found = found_in(compared)
    small, middle, large = (entry["sequences"] for entry in found["sizes"])
    assert found["fitted"]["sequences"] == 2 * large + 2 * (small + middle + large)
    assert compared.counts == {key: found["fitted"][key] for key in ("sequences", "tokens")}
    assert compared.artifact.list() == ["convergence.json"]


def test_the_run_goes_on_from_what_was_measured(compared: StageOutcome):
    found = found_in(compared)
    assert found["extrapolated"] == beyond(found["sizes"], found["samples"])
    outlook, largest = found["extrapolated"], found["sizes"][-1]
    assert outlook["sequences"] == found["samples"] > 2 * largest["sequences"] - 2
    assert largest["mean"] <= outlook["mean"] <= outlook["at_best"] <= 1
    assert outlook["minimum"] == min(outlook["pearson"].values())


@pytest.mark.parametrize(
    "changes",
    [
        {"scan__batch_size": 3},
        {"scan__dense_memory": 1},  # a query at a time
        {"cluster__memory_per_rank": 5200},  # in several passes
    ],
    ids=str,
)
def test_how_work_is_cut_moves_nothing(compared: StageOutcome, world: World, own: Path, changes: dict):
    found = compare(config_of(world, own, **changes))
    assert found.artifact.fingerprint == compared.artifact.fingerprint
    close(found_in(found), found_in(compared), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"cluster__max_replicas": 2}, {"cluster__world_size": 2, "cluster__memory_per_rank": 2000}], ids=str
)
def test_who_works_moves_nothing(compared: StageOutcome, world: World, tmp_path: Path, changes: dict):
    single = dict.fromkeys(DOUBLE, "float32")  # which a sharded model on CPUs asks for
    found = compare(config_of(world, tmp_path / "store", **single, **changes), Cluster)
    close(found_in(found), found_in(compared), 1e-4)


class Cut(Exception):
    """Stands in for a kill."""


def after(calls: int, function: Callable[..., Any], counted: list[str]) -> Callable[..., Any]:
    """The function, which raises instead of its last but `calls` calls."""

    def call(*arguments: Any) -> Any:
        if len(counted) >= calls:
            raise Cut
        counted.append(str(arguments[-1]))
        return function(*arguments)

    return call


@pytest.mark.parametrize(
    ("method", "calls"),
    [("covariance", 3), ("covariance", 6), ("decompose", 20), ("correction", 5), ("convergence", 1)],
)
def test_a_cut_loses_no_finished_group(
    compared: StageOutcome, world: World, own: Path, monkeypatch: pytest.MonkeyPatch, method: str, calls: int
):
    config, counted = config_of(world, own), list[str]()
    place, function = (convergence, decompose) if method == "decompose" else (Replica, getattr(Replica, method))
    with monkeypatch.context() as patch:
        patch.setattr(place, method, after(calls, function, counted))
        if method == "covariance" and calls == 6:  # all groups are summed, none is merged
            patch.setattr(grouped, "Parts", None)
            with pytest.raises(TypeError):
                compare(config)
        else:
            with pytest.raises(Cut):
                compare(config)
    again: list[str] = []
    monkeypatch.setattr(place, method, after(99, function, again))
    found = compare(config)
    assert found.extra["resumed"]
    close(found_in(found), found_in(compared), 1e-12)
    assert found.artifact.list() == ["convergence.json"]
    whole = {"covariance": 6, "correction": 12, "decompose": 6 * 4, "convergence": calls + 3}[method]
    assert len(again) == whole - calls


def test_damaged_unfinished_work_is_made_again(
    compared: StageOutcome, world: World, own: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(world, own)
    with monkeypatch.context() as patch:
        patch.setattr(Replica, "correction", after(0, Replica.correction, []))
        with pytest.raises(Cut):
            compare(config)
    victim = sorted(own.glob("convergence/*/parts/fits/0-2/eigenbasis/gradient/*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    close(found_in(compare(config)), found_in(compared), 1e-12)


@pytest.mark.parametrize("changes", [{"factors__convergence_share": 0}, {"factors__solver": "identity"}], ids=str)
def test_it_is_off(world: World, own: Path, changes: dict, monkeypatch: pytest.MonkeyPatch):
    for method in ("covariance", "correction", "convergence"):
        monkeypatch.setattr(Replica, method, None)
    outcome = compare(config_of(world, own, **changes))
    assert found_in(outcome) == outcome.counts == {}
    assert in_words(found_in(outcome)) == "not measured"


def test_a_sample_that_is_too_small_says_so(world: World, own: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        found = found_in(compare(config_of(world, own, factors__samples=20)))
    assert found == {"samples": 20, "reason": "20 sequences: two fits take 32 at least"}
    assert "convergence: not measured: 20 sequences: two fits take 32 at least" in caplog.text
    assert low(found, 60) is None


def test_a_fit_without_curvature_is_no_reason_to_stop(
    compared: StageOutcome, world: World, own: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of one size, as if its small sample reached some layer with no gradient at all."""

    def convergence_of(replica: Replica, task: Any, function: Callable = Replica.convergence) -> Any:
        return function(replica, task if task.size > 6 else replace(task, damping_factor=0.0))

    monkeypatch.setattr(Replica, "convergence", convergence_of)
    found = found_in(compare(config_of(world, own)))
    first, *others = found["sizes"]
    assert first["mean"] is None
    assert first["reason"].startswith("layer transformer.h.0.mlp.c_fc: damping 0.0: the layer's curvature is zero")
    assert others == found_in(compared)["sizes"][1:]
    assert found["extrapolated"]["mean"] is not None


def curve(*means: float | None) -> list[dict[str, Any]]:
    sizes = (100, 200, 400)
    return [
        {"sequences": size, "pearson": {"a": mean, "b": mean}, "mean": mean, "minimum": mean}
        for size, mean in zip(sizes, means, strict=True)
    ]


def test_a_warning_names_what_to_raise_and_by_how_much(caplog: pytest.LogCaptureFixture):
    sizes = curve(0.5, 2 / 3, 0.8)  # shares of error 1, 1/2, 1/4
    found = {"samples": 1000, "sizes": sizes, "extrapolated": beyond(sizes, 1000)}
    assert found["extrapolated"]["mean"] == pytest.approx(1 / 1.1)
    assert found["extrapolated"]["rate"] == pytest.approx(1)
    text = low(found, corpus=5000)
    assert text == (
        "another sample of 1,000 sequences may give factors whose scores correlate with those of this run by 0.909 "
        "only (mean over queries, extrapolated from 0.800 for fits on 400): raise factors.samples; about 1,901 would "
        "reach 0.95"
    )
    everything = low(found, corpus=1000)
    assert everything is not None
    assert "factors.samples takes all of the corpus: give more text, or a higher factors.damping_factor" in everything
    with caplog.at_level(logging.WARNING):
        convergence._tell(found, 5000)
    assert caplog.messages == [text]
    assert low(found | {"extrapolated": beyond(sizes, 2000)}, 5000) is None
    level = curve(0.8, 0.8, 0.8)
    stuck = low(found | {"sizes": level, "extrapolated": beyond(level, 1000)}, 5000)
    assert stuck is not None
    assert stuck.endswith("raise factors.samples; none would reach 0.95")
    assert beyond(curve(0.5, 0.6, None), 1000) is None


def test_no_more_queries_than_are_needed_are_scored():
    assert convergence.chosen_queries(3) == [0, 1, 2]
    chosen = convergence.chosen_queries(100)
    assert len(chosen) == convergence.QUERIES
    assert (chosen[0], chosen[-1]) == (0, 99)


def test_settings_that_move_no_fit_compute_nothing_again(world: World, store: Path, compared: StageOutcome):
    def fingerprint(**changes: Any) -> str:
        config = config_of(world, store, **changes)
        steps = {
            item.step.name: item.fingerprint for item in Runner(Store(config.store), build_steps(config), config).plan()
        }
        return steps["convergence"]

    mine = compared.artifact.fingerprint
    assert fingerprint() == mine
    for same in ({"queries__rank": 4}, {"factors__solver": "ekfac_cg"}, {"unfiltered__sequences": 5}, {"scan__top": 3}):
        assert fingerprint(**same) == mine
    for other in (
        {"factors__convergence_share": 0.25},
        {"factors__damping_factor": 1.0},
        {"factors__samples": 40},
        {"factors__seed": 1},
        {"factors__blocks": 2},
        {"factors__labels": "empirical"},
    ):
        assert fingerprint(**other) != mine


def test_no_other_step_depends_on_the_share(world: World, store: Path):
    def fingerprints(share: float) -> dict[str, str]:
        config = config_of(world, store, factors__convergence_share=share)
        return {
            item.step.name: item.fingerprint for item in Runner(Store(config.store), build_steps(config), config).plan()
        }

    first, second = fingerprints(0.5), fingerprints(0.0)
    assert {name for name in first if first[name] != second[name]} == {"convergence"}


def test_the_plan_knows_what_it_takes(world: World, tmp_path: Path):
    plan = make_plan(config_of(world, tmp_path / "none"))
    costs = {step.name: step.cost for step in plan.steps}
    halves = halves_of(plan.load.sequences, plan.load.config.factors)
    large, every = halves.sizes[-1], sum(halves.sizes)
    samples = plan.load.samples
    fitted = costs["covariance"].flops * 2 * large + costs["correction"].flops * 2 * every
    bases = 6 * costs["eigenbasis"].flops
    assert fitted / samples + bases < costs["convergence"].flops < fitted / samples + bases + 12 * costs["scores"].flops
    assert costs["convergence"].temporary > 6 * costs["eigenbasis"].disk
    for changes in ({"factors__convergence_share": 0}, {"factors__solver": "identity"}, {"factors__samples": 20}):
        off = make_plan(config_of(world, tmp_path / "none", **changes))
        (cost,) = (step.cost for step in off.steps if step.name == "convergence")
        assert cost.flops == cost.temporary == 0
