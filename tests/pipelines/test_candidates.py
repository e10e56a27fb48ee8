"""The candidates artifact: BM25 over shards equals BM25 over the corpus, and the unfiltered sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.errors import BadRecord, ConfigError
from actors.queries import read_queries
from actors.sequences import candidate_files, read_candidates
from actors.store import Artifact, Store
from actors.tokeniser import load_tokeniser
from conf.schema import (
    CorpusConfig,
    ModelConfig,
    PrefilterConfig,
    PrefilterKind,
    QueriesConfig,
    RunConfig,
    UnfilteredConfig,
    UnfilteredKind,
)
from influence.bm25 import PresenceBM25, TopK, top_k
from pipelines.stages import candidates, unfiltered
from pipelines.stages.candidates import candidates_table
from pipelines.stages.unfiltered import choose
from pipelines.steps import StageContext
from pipelines.streaming import stream
from tests.corpora import byte_model, write_lines

ContextFactory = Callable[..., StageContext]
SEQUENCES = 137
NONE = UnfilteredConfig(kind=UnfilteredKind.none)
QUERIES = [
    {"query_id": "late", "prompt": "the cat", "completion": " sat"},
    {"query_id": "early", "prompt": "q", "completion": "q"},
]


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(2, 264, random.integers(1, 12)).tolist() for _ in range(SEQUENCES)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(byte_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def config(model: ModelConfig, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model=model,
        corpus=CorpusConfig(path="-"),
        queries=QueriesConfig(path=str(write_lines(tmp_path / "q.jsonl", QUERIES))),
        prefilter=PrefilterConfig(top=20),
        unfiltered=UnfilteredConfig(kind=UnfilteredKind.sample, sequences=15, seed=3),
    )


def sequences_of(rows: list[list[int]], folder: Path, shard: int) -> Artifact:
    artifact = Store(str(folder)).folder("sequences", f"{shard:016d}".ljust(64, "0"))
    shards = []
    for number, start in enumerate(range(0, len(rows), shard)):
        part = rows[start : start + shard]
        ids = pa.array(range(start, start + len(part)), pa.int64())
        table = pa.table({"sequence_id": ids, "input_ids": pa.array(part, pa.list_(pa.int32()))})
        artifact.write_table(f"shard-{number:05d}.parquet", table, row_group_size=5)
        shards.append({"name": f"shard-{number:05d}.parquet", "first_sequence_id": start, "rows": len(part)})
    artifact.write_json("index.json", {"shards": shards, "sequences": len(rows)})
    return artifact


@pytest.mark.usefixtures("two_cpus")
def test_both_feeds_are_one_sorted_table(
    config: RunConfig, rows: list[list[int]], tmp_path: Path, stage_context: ContextFactory
) -> None:
    context = stage_context(config, "candidates", {"sequences": sequences_of(rows, tmp_path / "s", 10)})
    result = candidates.run(context)
    found = read_candidates(context.artifact).to_pylist()
    assert found == sorted(
        found, key=lambda r: (r["sequence_id"], r["feed"], ["late", "early", None].index(r["query_id"]))
    )
    special = load_tokeniser(config.model).special
    index = PresenceBM25(rows)
    for query in read_queries(config):
        scores_D = index.get_scores([token for token in query.input_ids if token not in special])
        best = top_k(scores_D, np.arange(SEQUENCES), 20)
        mine = {r["sequence_id"]: r["bm25_score"] for r in found if r["query_id"] == query.query_id}
        assert mine == pytest.approx(dict(zip(best.sequence_ids.tolist(), best.scores.tolist(), strict=True)))
        assert 0 < len(mine) <= 20
    plain = [r for r in found if r["feed"] == "unfiltered"]
    assert len(plain) == 15
    assert {(r["query_id"], r["bm25_score"]) for r in plain} == {(None, None)}
    distinct = {r["sequence_id"] for r in found}
    assert result.counts == {
        "per_feed": {"bm25": len({r["sequence_id"] for r in found if r["feed"] == "bm25"}), "unfiltered": 15},
        "sequences": len(distinct),
        "rows": len(found),
    }
    stored = context.artifact.read_json("index.json")
    assert stored["per_query"]["late"] == 20
    assert {name: stored[name] for name in result.counts} == result.counts


@pytest.mark.usefixtures("two_cpus")
def test_shards_groups_and_cpus_move_no_bit(
    config: RunConfig,
    rows: list[list[int]],
    tmp_path: Path,
    stage_context: ContextFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = []
    for attempt, (shard, group, cpus) in enumerate([(1000, 16, 1), (10, 3, 1), (7, 1, 2)]):
        monkeypatch.setattr(candidates, "SHARDS_A_TASK", group)
        monkeypatch.setattr(candidates, "BLOCK", 50)
        monkeypatch.setattr(candidates, "stream", partial(stream, cpus=cpus))
        sequences = sequences_of(rows, tmp_path / "s", shard)
        context = stage_context(config, "candidates", {"sequences": sequences}, attempt=attempt)
        candidates.run(context)
        tables.append({name: context.artifact.read_bytes(name) for name in context.artifact.list()})
    assert len(tables[0]) == 4
    assert tables[0] == tables[1] == tables[2]


def test_files_cover_blocks_of_ids_and_the_index_says_what_is_in_them(
    config: RunConfig,
    rows: list[list[int]],
    tmp_path: Path,
    stage_context: ContextFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, prefilter=PrefilterConfig(kind=PrefilterKind.none))
    sequences = {"sequences": sequences_of(rows, tmp_path / "s", 50)}
    whole = stage_context(config, "candidates", sequences)
    candidates.run(whole)
    monkeypatch.setattr(candidates, "BLOCK", 4)
    cut = stage_context(config, "candidates", sequences, attempt=1)
    candidates.run(cut)
    assert read_candidates(cut.artifact).equals(read_candidates(whole.artifact))
    found = candidate_files(cut.artifact)
    assert 4 <= len(found) < 15 < SEQUENCES / 4  # blocks without a candidate have no file
    assert cut.artifact.list("block-") == [file["name"] for file in found]
    for file in found:
        ids = cut.artifact.read_table(file["name"]).column("sequence_id").to_pylist()
        assert file["first_sequence_id"] <= min(ids) <= max(ids) < file["stop"] <= file["first_sequence_id"] + 4
        assert file["rows"] == file["sequences"] == file["unfiltered"] == len(ids)
        assert file["bm25"] == 0


@pytest.mark.usefixtures("two_cpus")
def test_no_candidate_at_all_is_said(config: RunConfig, tmp_path: Path, stage_context: ContextFactory) -> None:
    sequences = sequences_of([[2]] * 4, tmp_path / "s", 2)
    context = stage_context(replace(config, unfiltered=NONE), "candidates", {"sequences": sequences})
    with pytest.raises(BadRecord, match=r"no sequence shares a token with any query.*Remedy: set unfiltered.kind"):
        candidates.run(context)


def test_without_a_prefilter_there_is_the_unfiltered_feed_only(
    config: RunConfig, rows: list[list[int]], tmp_path: Path, stage_context: ContextFactory
) -> None:
    config = replace(config, prefilter=PrefilterConfig(kind=PrefilterKind.none))
    sequences = {"sequences": sequences_of(rows, tmp_path / "s", 50)}
    context = stage_context(replace(config, unfiltered=UnfilteredConfig(kind=UnfilteredKind.all)), "all", sequences)
    assert candidates.run(context).counts["per_feed"] == {"bm25": 0, "unfiltered": SEQUENCES}
    table = read_candidates(context.artifact)
    assert table.column("sequence_id").to_pylist() == list(range(SEQUENCES))
    with pytest.raises(ConfigError, match="leave nothing to scan"):
        candidates.run(stage_context(replace(config, unfiltered=NONE), "none", sequences))


def sample(size: int, seed: int, corpus: int = 5000) -> np.ndarray:
    return choose(UnfilteredConfig(sequences=size, seed=seed), corpus).within(0, corpus)


def test_a_sample_is_exact_seeded_and_nested() -> None:
    first = sample(400, 1)
    assert len(first) == len(set(first.tolist())) == 400
    assert first.tolist() == sorted(first.tolist())
    np.testing.assert_array_equal(first, sample(400, 1))
    assert set(first.tolist()) <= set(sample(900, 1).tolist())
    assert len(set(first.tolist()) & set(sample(400, 2).tolist())) < 80  # 32 expected
    assert sample(6000, 1).tolist() == list(range(5000))
    assert choose(NONE, 10).within(0, 10).tolist() == []


@pytest.mark.parametrize("size", [1, 2, 1999, 19_999])
def test_a_sample_is_the_smallest_keys_of_all(size: int) -> None:
    keys = unfiltered._keys(np.arange(20_000), 5)
    np.testing.assert_array_equal(sample(size, 5, 20_000), np.sort(np.argsort(keys)[:size]))


def test_a_sample_is_the_same_in_blocks_and_spreads_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(2000, 5, 20_000)
    monkeypatch.setattr(unfiltered, "_BLOCK", 777)
    chosen = choose(UnfilteredConfig(sequences=2000, seed=5), 20_000)
    assert chosen.count == 2000
    cut = [chosen.within(first, min(first + 999, 20_000)) for first in range(0, 20_000, 999)]
    np.testing.assert_array_equal(np.concatenate(cut), whole)
    counts = np.bincount(whole // 2000, minlength=10)
    assert np.all(abs(counts - 200) < 60)


def test_the_table_orders_queries_as_their_file_does() -> None:
    best = [TopK(np.array([4, 2]), np.array([1.0, 2.0])), TopK(np.array([2]), np.array([0.5]))]
    table = candidates_table(["z", "a"], best, np.array([2, 9]))
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("z", 2, "bm25", 2.0),
        ("a", 2, "bm25", 0.5),
        (None, 2, "unfiltered", None),
        ("z", 4, "bm25", 1.0),
        (None, 9, "unfiltered", None),
    ]
