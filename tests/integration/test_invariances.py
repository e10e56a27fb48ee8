"""What must move no score: how work is cut, batched, padded, ordered and dealt, and who computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.pool import RayPool
from pipelines import cluster
from pipelines.tracing import TraceResult, run_trace
from tests.integration.world import World, documents, fork, ids, matrix, relative, run_locally, write_lines

ROUNDING = 1e-5
CORPUS_STEPS = ("layers", "sequences", "candidates")

Local = Callable[..., TraceResult]


@pytest.fixture
def anew(world: World, traced: TraceResult, store: Path, tmp_path: Path) -> Local:
    """`anew(**changes)`: a run that fits everything again, on the sequences and candidates of `traced`."""

    def run(**changes: Any) -> TraceResult:
        fresh = fork(store, tmp_path / f"store-{len(list(tmp_path.iterdir()))}", CORPUS_STEPS)
        return run_locally(world.config(fresh, **changes), tmp_path / f"run-{fresh.name}")

    return run


def same_bits(result: TraceResult, other: TraceResult) -> bool:
    """Whether every committed factor, query, score and rank is the same, bit by bit."""
    for step in ("covariance", "eigenbasis", "correction", "ihvp", "queries"):
        mine, theirs = result.artifact(step), other.artifact(step)
        names = [name for name in mine.list() if name.endswith(".safetensors")]
        if any(mine.read_bytes(name) != theirs.read_bytes(name) for name in names):
            return False
    return result.scores_table().equals(other.scores_table()) and result.top.equals(other.top)


def test_a_run_can_be_repeated_bit_by_bit(anew: Local, traced: TraceResult):
    assert same_bits(anew(), traced)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_moves_no_score(anew: Local, traced: TraceResult, size: int):
    result = anew(scan__batch_size=size)
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) < ROUNDING


def test_the_cut_of_the_scan_moves_no_score(anew: Local, traced: TraceResult):
    result = anew(scan__shard_sequences=7)
    assert result.summary["stages"]["scores"]["counts"]["shards"] > 10
    assert ids(result.scores_table()) == ids(traced.scores_table())
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) < ROUNDING


@pytest.mark.parametrize("groups", [1, 16])
def test_the_groups_of_sums_move_no_score(anew: Local, traced: TraceResult, groups: int):
    result = anew(factors__groups=groups)
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) < ROUNDING


def test_the_shards_of_the_corpus_move_no_score(world: World, traced: TraceResult, tmp_path: Path):
    config = world.config(tmp_path / "store", corpus__shard_sequences=20)
    result = run_locally(config, tmp_path / "run")
    assert ids(result.scores_table()) == ids(traced.scores_table())
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) < ROUNDING


def test_padding_moves_no_score(world: World, ray_session: None, tmp_path: Path):
    found = []
    for size in (1, 8):
        config = world.config(tmp_path / f"store-{size}", corpus__pack=False, scan__batch_size=size)
        found.append(run_locally(config, tmp_path / f"run-{size}"))
    index = found[0].artifact("sequences")
    lengths = {len(row) for row in index.read_table("shard-00000.parquet").column("input_ids").to_pylist()}
    assert len(lengths) > 5
    assert relative(*(matrix(result.scores_table()) for result in found)) < ROUNDING


def test_the_order_of_the_corpus_moves_no_score(world: World, ray_session: None, tmp_path: Path):
    texts = documents(60, seed=3)
    scores = []
    for name, order in (("forth", range(60)), ("mixed", np.random.default_rng(0).permutation(60).tolist())):
        path = write_lines(tmp_path / f"{name}.jsonl", [{"text": texts[i], "name": f"document {i}"} for i in order])
        config = world.config(
            tmp_path / "store",
            corpus__path=str(path),
            corpus__id_field="name",
            corpus__pack=False,
            factors__labels="empirical",
            prefilter__kind="none",
            unfiltered__kind="all",
        )
        result = run_locally(config, tmp_path / name)
        scores.append(by_place(result))
    assert scores[0].keys() == scores[1].keys()
    first, second = (np.stack([found[key] for key in sorted(scores[0])]) for found in scores)
    assert relative(first, second) < ROUNDING


def by_place(result: TraceResult) -> dict[tuple[str, int], np.ndarray]:
    """Scores by the document and the offset at which a sequence begins."""
    sequences = result.artifact("sequences")
    places = {}
    for shard in sequences.read_json("index.json")["shards"]:
        for row in sequences.read_table(shard["name"], ["sequence_id", "document_id", "offset"]).to_pylist():
            places[row["sequence_id"]] = (row["document_id"], row["offset"])
    table = result.scores_table()
    return {places[number]: values for number, values in zip(ids(table), matrix(table), strict=True)}


class FragilePool(RayPool):
    """Kills a replica when it has got its first task, once in covariance and once in scan."""

    def _deal(self, run: Any) -> None:
        super()._deal(run)
        killed = self.__dict__.setdefault("killed", [])
        busy = [gang for gang in self._gangs if gang.work is not None]
        if run.method in ("covariance", "scan") and run.method not in killed and busy:
            killed.append(run.method)
            ray.kill(busy[0]._actors[0], no_restart=True)


def test_two_replicas_of_which_some_are_killed_give_the_same_bits_as_one_in_this_process(
    world: World,
    traced: TraceResult,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(cluster, "RayPool", FragilePool)
    fresh = fork(store, tmp_path / "store", CORPUS_STEPS)
    with caplog.at_level("WARNING"):
        result = run_trace(world.config(fresh, cluster__max_replicas=2), tmp_path / "run")
    deaths = [record for record in caplog.records if "its task is dealt again" in record.getMessage()]
    assert len(deaths) == 2
    assert same_bits(result, traced)
