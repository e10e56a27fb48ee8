"""Queries of low rank and factors in blocks against whole ones, by the real steps on a tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.factors import load_selection
from actors.store import Store
from conf.schema import RunConfig
from influence.layers import TrackedLayer
from pipelines.graph import build_steps, steps_up_to
from pipelines.runner import Runner
from pipelines.validation.language import blocks, ranks
from pipelines.validation.language.variants import Scores, agreement, identity, read_scores, run_variants
from tests.integration.world import QUERIES, LocalCluster, World

NAMES = [query["query_id"] for query in QUERIES]


@pytest.fixture(scope="module")
def config(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """All of a small corpus, scored without a prefilter."""
    settings: dict[str, Any] = {"corpus.limit": 40, "prefilter.kind": "none", "unfiltered.kind": "all"}
    settings |= {"validation.largest_rank": 16, "validation.largest_blocks": 4, "factors.groups": 2}
    changes = {name.replace(".", "__"): value for name, value in settings.items()}
    return world.config(tmp_path_factory.mktemp("sweeps") / "store", **changes)


@pytest.fixture(scope="module")
def ranked(ray_session: None, config: RunConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return read(config, ranks.step(config), "ranks.json", "ranks.safetensors")


@pytest.fixture(scope="module")
def blocked(ray_session: None, config: RunConfig) -> dict[str, Any]:
    return read(config, blocks.step(config), "block_factors.json")[0]


def read(config: RunConfig, step: Any, file: str, tensors: str | None = None) -> tuple[dict[str, Any], dict]:
    """Run one step and read what it wrote."""
    artifact = Runner(Store(config.store), [step], config, lambda: LocalCluster(config)).run()[step.name].artifact
    return artifact.read_json(file), artifact.read_tensors(tensors) if tensors else {}


def layers_of(config: RunConfig) -> tuple[TrackedLayer, ...]:
    (outcomes,) = run_variants({"": config}, ("layers",), LocalCluster(config)).values()
    return load_selection(outcomes["layers"].artifact).layers


def test_ranks_go_up_in_doublings_and_then_come_fidelities(ranked: tuple, config: RunConfig):
    found, tensors = ranked
    names = [row["name"] for row in found["variants"]]
    assert names == ["rank 1", "rank 2", "rank 4", "rank 8", "rank 16", "fidelity 0.99", "fidelity 0.999"]
    assert set(tensors) == {"full", *names}
    assert (found["queries"], tensors["full"].shape) == (NAMES, (3, found["sequences"]))
    assert list(ranks.doublings(7)) == [1, 2, 4]
    assert [row["rank"] for row in found["variants"]] == [1, 2, 4, 8, 16, None, None]
    json.dumps(found, allow_nan=False)


def test_correlations_are_those_of_the_scores(ranked: tuple):
    found, tensors = ranked
    for row in found["variants"]:
        by_hand = [np.corrcoef(a, b)[0, 1] for a, b in zip(tensors[row["name"]], tensors["full"], strict=True)]
        np.testing.assert_allclose(list(row["pearson"]["by_query"].values()), by_hand, rtol=1e-4)
        assert row["pearson"]["mean"] == pytest.approx(np.mean(by_hand), rel=1e-4)
        assert row["pearson"]["minimum"] == pytest.approx(min(by_hand), rel=1e-4)


def test_more_ranks_agree_better_and_whole_ranks_agree(ranked: tuple):
    rows = {row["name"]: row for row in ranked[0]["variants"]}
    means = [rows[f"rank {rank}"]["pearson"]["mean"] for rank in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    assert rows["rank 16"]["pearson"]["minimum"] > 0.99999  # no layer of this model has more than 16
    assert rows["fidelity 0.999"]["pearson"]["mean"] > rows["fidelity 0.99"]["pearson"]["mean"]
    assert rows["fidelity 0.99"]["predicted"] >= 0.99
    assert rows["fidelity 0.99"]["mean_rank"] < rows["fidelity 0.999"]["mean_rank"] < 16


def test_bytes_of_queries_are_those_of_their_numbers(ranked: tuple, config: RunConfig):
    layers, rows = layers_of(config), {row["name"]: row for row in ranked[0]["variants"]}
    dense = 4 * len(NAMES) * sum(layer.outputs * layer.columns for layer in layers)
    assert 0 <= ranked[0]["full"]["bytes"] - dense < 200 * len(layers)  # names of tensors and their shapes
    assert rows["rank 1"]["bytes"] < rows["rank 2"]["bytes"] < rows["rank 4"]["bytes"]
    assert rows["rank 2"]["relative_bytes"] == rows["rank 2"]["bytes"] / ranked[0]["full"]["bytes"]
    assert rows["rank 2"]["mean_rank"] == 2


def test_variants_share_what_they_have_in_common(ranked: tuple, blocked: dict, config: RunConfig):
    made = {"sequences": 1, "gradients": 1, "candidates": 1, "covariance": 3, "correction": 3}
    made |= {"ihvp": 1 + 1 + 2 + 2, "queries": 1 + 5 + 2 + 2}  # full; ranks up to 16; fidelities; blocks of 2 and 4
    assert {kind: len(list((Path(config.store) / kind).iterdir())) for kind in made} == made


def test_blocks_are_compared_with_whole_factors(blocked: dict):
    rows = blocked["variants"]
    assert [row["blocks"] for row in rows] == [1, 2, 4]
    assert rows[0]["pearson"]["minimum"] == pytest.approx(1)
    assert 0 < rows[2]["pearson"]["mean"] < rows[1]["pearson"]["mean"] < 1
    assert blocked["queries"] == NAMES
    assert all(seconds > 0 for row in rows for seconds in (row["decomposition_seconds"], *row["seconds"].values()))
    json.dumps(blocked, allow_nan=False)


def test_bytes_of_factors_fall_with_their_blocks(blocked: dict, config: RunConfig):
    layers = layers_of(config)
    sizes = [layer.columns for layer in layers if layer.name == layer.input_group] + [layer.outputs for layer in layers]
    whole, half, quarter = blocked["variants"]
    files = 2 * 400 * len(layers)  # names of tensors and their shapes, four of them a block
    for row in (whole, half, quarter):
        numbers = sum(size**2 // row["blocks"] for size in sizes)
        assert 0 <= row["bytes"]["covariance"] - 8 * numbers < row["blocks"] * files
        assert 0 <= row["bytes"]["eigenbasis"] - 4 * (numbers + sum(sizes)) < row["blocks"] * files
    assert whole["bytes"]["correction"] == quarter["bytes"]["correction"]
    assert 1 == whole["relative_bytes"] > half["relative_bytes"] > quarter["relative_bytes"]


def test_identity_tells_what_is_computed(ray_session: None, config: RunConfig, world: World):
    found = identity(ranks.variants(config))
    assert len({names["scores"] for names in found.values()}) == len(found)
    assert found == identity(ranks.variants(config))
    other = world.config(Path(config.store), factors__damping_factor=0.2)
    assert identity({"full": other})["full"] != found["full"]


def test_replicas_of_one_variant_must_do_for_all(config: RunConfig, world: World):
    other = world.config(Path(config.store), model__dtype="float64")
    with pytest.raises(ValueError, match=r"\['one', 'other'\] differ in what a replica is made of"):
        run_variants({"one": config, "other": other}, cluster=LocalCluster(config))


def test_sequences_that_were_set_aside_are_left_out():
    scores = np.random.default_rng(0).normal(size=(2, 9))
    broken = scores.copy()
    broken[:, 3] = np.nan
    broken[1, :] = 1.0
    found = agreement(broken, scores, ["a", "b"])
    assert found["by_query"]["a"] == pytest.approx(1)
    assert (found["by_query"]["b"], found["minimum"], found["mean"]) == (None, pytest.approx(1), pytest.approx(1))


def test_scores_come_back_in_the_order_of_their_sequences(ranked: tuple, config: RunConfig):
    outcomes = run_variants({"full": ranks.variants(config)["full"]}, cluster=LocalCluster(config))["full"]
    found = read_scores(outcomes["scores"].artifact)
    assert isinstance(found, Scores)
    assert found.sequence_ids_N.tolist() == list(range(ranked[0]["sequences"]))
    np.testing.assert_array_equal(found.scores_QN.astype(np.float32), ranked[1]["full"].numpy())


def test_steps_up_to_are_those_that_are_needed(config: RunConfig):
    steps = build_steps(config)
    names = [step.name for step in steps_up_to(steps, ["gradients", "candidates"])]
    assert names == ["layers", "sequences", "gradients", "candidates"]
    assert "top" not in [step.name for step in steps_up_to(steps, ["scores"])]
    with pytest.raises(ValueError, match="there are no steps \\['score'\\]"):
        steps_up_to(steps, ["score"])
