"""The head of all scores: exact against a sort, ties, feeds, text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.store import Artifact, Store
from conf.schema import ModelConfig, RunConfig, ScanConfig
from pipelines.progress import Progress
from pipelines.stages import top
from pipelines.stages.top import feed_for, merged, shard_top, shards_top
from pipelines.steps import StageContext
from tests.corpora import byte_model
from tests.integration.world import write_candidates, write_sequences

QUERIES = 3
SEQUENCES = 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def write_shard(scores: Artifact, shard: int, numbers: list[int], values_NQ: np.ndarray) -> None:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values_NQ.reshape(-1)), values_NQ.shape[1])
    feeds = pa.array(["unfiltered" if number % 2 else "bm25" for number in numbers], pa.string()).dictionary_encode()
    table = pa.table({"sequence_id": pa.array(numbers, pa.int64()), "feed": feeds, "scores": rows})
    scores.write_table(f"shard-{shard:06d}.parquet", table)


@pytest.fixture
def values_NQ() -> np.ndarray:
    """Scores with many ties."""
    return np.random.default_rng(0).integers(-5, 6, size=(SEQUENCES, QUERIES)).astype(np.float32)


@pytest.fixture
def scores(store: Store, values_NQ: np.ndarray) -> Artifact:
    """Three shards, one of them empty."""
    found = store.folder("scores", "1" * 64)
    for shard, (first, stop) in enumerate(((0, 25), (25, 25), (25, 40))):
        write_shard(found, shard, list(range(first, stop)), values_NQ[first:stop])
    found.write_json("queries.json", [{"query_id": f"query {number}"} for number in range(QUERIES)])
    return found


def head(values_N: np.ndarray, count: int, numbers: range = range(SEQUENCES)) -> list[int]:
    return sorted(numbers, key=lambda number: (-values_N[number], number))[:count]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_head_of_a_shard_is_that_of_a_sort(scores: Artifact, values_NQ: np.ndarray, count: int):
    found = shard_top(scores, "shard-000002.parquet", QUERIES, count)
    for query in range(QUERIES):
        expected = head(values_NQ[:, query], count, range(25, 40))
        assert [number for _, number, _ in found[query]] == expected
        assert [score for score, _, _ in found[query]] == [values_NQ[number, query] for number in expected]
        assert [feed for _, _, feed in found[query]] == ["unfiltered" if n % 2 else "bm25" for n in expected]


def test_an_empty_shard_has_no_head(scores: Artifact):
    assert shard_top(scores, "shard-000001.parquet", QUERIES, 5) == [[], [], []]


def test_float64_scores_are_ranked_by_all_their_digits(store: Store):
    scores = store.folder("scores", "2" * 64)
    write_shard(scores, 0, [0, 1], np.array([[1.0], [1.0 + 1e-12]]))
    assert shard_top(scores, "shard-000000.parquet", 1, 2) == [[(1.0 + 1e-12, 1, "unfiltered"), (1.0, 0, "bm25")]]


@pytest.mark.parametrize(
    ("scanned", "proposed", "expected"),
    [
        ("unfiltered", False, "unfiltered"),
        ("both", True, "both"),
        ("both", False, "unfiltered"),
        ("bm25", True, "bm25"),
        ("bm25", False, "other"),
    ],
)
def test_the_feed_of_a_query(scanned: str, proposed: bool, expected: str):
    assert feed_for(scanned, proposed) == expected


@pytest.fixture
def candidates(store: Store) -> Artifact:
    rows = [
        ("query 0", 2, "bm25", 0.5),
        ("query 1", 2, "bm25", 0.7),
        (None, 3, "unfiltered", None),
        ("query 0", 9, "bm25", 0.25),
        (None, 9, "unfiltered", None),
    ]
    return write_candidates(store, rows)


def test_groups_of_shards_are_ranked_as_one(scores: Artifact, values_NQ: np.ndarray):
    names = [f"shard-{shard:06d}.parquet" for shard in range(3)]
    whole = shards_top(scores, names, QUERIES, 7)
    assert [[number for _, number, _ in ranked] for ranked in whole] == [
        head(values_NQ[:, q], 7) for q in range(QUERIES)
    ]
    first, second = (shards_top(scores, some, QUERIES, 7) for some in (names[:1], names[1:]))
    assert merged(first, second, 7) == merged(second, first, 7) == whole


def test_the_stage_ranks_over_all_shards_with_text(
    store: Store,
    scores: Artifact,
    candidates: Artifact,
    values_NQ: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    model = ModelConfig(path=str(byte_model(tmp_path / "model")))
    monkeypatch.setattr(top, "SHARDS_A_TASK", 2)
    sequences = write_sequences(store, [[2 + number, 3] for number in range(SEQUENCES)], shard=16)

    def one_by_one(function: Any, arguments: list) -> Any:
        return reversed([(position, function(*argument)) for position, argument in enumerate(arguments)])

    context = StageContext(
        RunConfig(model=model, scan=ScanConfig(top=6)),
        SimpleNamespace(map=one_by_one),
        store.folder("top", "4" * 64),
        {"scores": scores, "candidates": candidates, "sequences": sequences},
        partial(Progress, every=1e9, terminal=False),
    )
    result = top.run(context)
    assert result.counts == {"queries": QUERIES, "rows": 6 * QUERIES}
    table = context.artifact.read_table("top.parquet")
    assert table.schema.equals(top.SCHEMA)
    rows = table.to_pylist()
    assert [row["query_id"] for row in rows] == [f"query {query}" for query in range(QUERIES) for _ in range(6)]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6] * QUERIES
    for query in range(QUERIES):
        mine = rows[6 * query : 6 * query + 6]
        expected = head(values_NQ[:, query], 6)
        assert [row["sequence_id"] for row in mine] == expected
        assert [row["score"] for row in mine] == [values_NQ[number, query] for number in expected]
        assert [row["document_id"] for row in mine] == [f"document {number}" for number in expected]
        assert all(len(row["text"]) == 2 for row in mine)


def test_the_bottom_is_ranked_from_the_most_negative(scores: Artifact, values_NQ: np.ndarray):
    names = [f"shard-{shard:06d}.parquet" for shard in range(3)]
    whole = shards_top(scores, names, QUERIES, 30, sign=-1)
    for query in range(QUERIES):
        expected = [number for number in head(-values_NQ[:, query], 30) if values_NQ[number, query] < 0]
        assert 5 < len(expected) < 30  # what is not negative is not among them
        assert [number for _, number, _ in whole[query]] == expected
    first, second = (shards_top(scores, some, QUERIES, 30, sign=-1) for some in (names[:1], names[1:]))
    assert merged(first, second, 30, sign=-1) == whole
