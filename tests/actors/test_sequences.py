"""Random access to stored sequences, and which feeds a candidate came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.errors import BadRecord, ChecksumError
from actors.sequences import MemorySequences, StoredSequences, candidate_ids, candidate_rows, proposals, read_candidates
from actors.store import Artifact, Store
from tests.integration.world import Candidate, write_candidates, write_sequences

ROWS = [[number] * (1 + number % 4) for number in range(23)]


@pytest.fixture
def sequences(tmp_path: Path) -> Artifact:
    """Three shards of ten, in row groups of four."""
    return write_sequences(Store(str(tmp_path / "store")), ROWS, shard=10, row_group=4)


def test_sequences_are_read_by_number_in_any_order(sequences: Artifact):
    source = StoredSequences(sequences)
    for wanted in ([0], [22, 0, 9, 10, 11, 3, 3], list(range(23)), []):
        found = source.read(wanted)
        assert [row.tolist() for row in found] == [ROWS[number] for number in wanted]
        assert all(row.dtype == np.int64 for row in found)


def test_other_columns_can_be_read(sequences: Artifact):
    rows = StoredSequences(sequences).rows([12, 4], ["sequence_id", "document_id", "offset", "input_ids"])
    assert [row["sequence_id"] for row in rows] == [12, 4]
    assert [row["document_id"] for row in rows] == ["document 12", "document 4"]
    assert [row["offset"] for row in rows] == [0, 0]
    assert rows[1]["input_ids"].tolist() == ROWS[4]


@pytest.mark.parametrize("number", [-1, 23, 10**12])
def test_a_sequence_that_is_not_there_is_an_error(sequences: Artifact, number: int):
    with pytest.raises(BadRecord, match=f"sequence {number} is not in the tokenised corpus"):
        StoredSequences(sequences).read([0, number])


def test_a_damaged_shard_is_named(sequences: Artifact):
    path = Path(sequences.uri, "shard-00001.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    source = StoredSequences(sequences)
    assert len(source.read([0, 22])) == 2
    with pytest.raises(ChecksumError, match=r"shard-00001\.parquet"):
        source.read([10])


def test_sequences_in_memory_are_the_double(sequences: Artifact):
    wanted = [5, 1, 22]
    pairs = zip(MemorySequences(ROWS).read(wanted), StoredSequences(sequences).read(wanted), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


CANDIDATES = [  # sorted by sequence, as the stage writes them
    ("one", 2, "bm25", 0.5),
    ("two", 2, "bm25", 0.7),
    (None, 3, "unfiltered", None),
    ("two", 5, "bm25", 1.5),
    (None, 5, "unfiltered", None),
    (None, 8, "unfiltered", None),
    ("one", 9, "bm25", 0.25),
    (None, 9, "unfiltered", None),
    ("one", 25, "bm25", 2.0),
]


@pytest.fixture(params=[3, 10, 100])
def candidates(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    """In files of 3, 10 or 100 sequence ids, in row groups of two rows."""
    return write_candidates(Store(str(tmp_path / "store")), CANDIDATES, block=request.param, row_group=2)


def test_feeds_of_candidates(candidates: Artifact):
    def found(first: int, stop: int) -> dict[int, str]:
        ids, feeds = candidate_rows(candidates, first, stop)
        assert ids.tolist() == sorted(set(ids.tolist()))
        return dict(zip(ids.tolist(), feeds, strict=True))

    everything = {2: "bm25", 3: "unfiltered", 5: "both", 8: "unfiltered", 9: "both", 25: "bm25"}
    assert found(0, 100) == everything
    assert found(3, 9) == {number: feed for number, feed in everything.items() if 3 <= number < 9}
    assert found(5, 6) == {5: "both"}
    assert found(6, 8) == {}
    assert found(50, 60) == {}


def test_bm25_scores_are_those_of_the_query_itself(candidates: Artifact):
    assert proposals(candidates, "one", [9, 2, 3, 50]) == {2: 0.5, 9: 0.25}
    assert proposals(candidates, "one", [3]) == {}
    assert proposals(candidates, "two", [2, 9]) == {2: 0.7}
    assert proposals(candidates, "three", [2, 9]) == {}


def test_what_is_asked_for_is_all_that_is_opened(candidates: Artifact, monkeypatch: pytest.MonkeyPatch):
    opened = []
    given = Artifact.open_parquet
    monkeypatch.setattr(Artifact, "open_parquet", lambda self, name: opened.append(name) or given(self, name))
    assert candidate_rows(candidates, 25, 26)[0].tolist() == [25]
    assert proposals(candidates, "one", [25]) == {25: 2.0}
    assert len(set(opened)) == 1


POOLS = []  # of Arrow's memory; they must live as long as the buffers


def test_looking_proposals_up_holds_no_more_for_ten_times_the_candidates(tmp_path: Path):
    def held(count: int) -> int:
        rows: list[Candidate] = [(None, number, "unfiltered", None) for number in range(count)]
        rows[count // 2] = ("one", count // 2, "bm25", 0.5)
        candidates = write_candidates(Store(str(tmp_path / str(count))), rows, block=1000, row_group=500)
        given = pa.default_memory_pool()
        POOLS.append(pa.proxy_memory_pool(pa.system_memory_pool()))
        pa.set_memory_pool(POOLS[-1])
        try:
            assert proposals(candidates, "one", range(0, count, 100)) == {count // 2: 0.5}
            return POOLS[-1].max_memory()
        finally:
            pa.set_memory_pool(given)

    assert held(20_000) < 1.5 * held(2_000)


def test_the_whole_table_is_read_in_order(candidates: Artifact):
    assert [tuple(row.values()) for row in read_candidates(candidates).to_pylist()] == CANDIDATES
    files = candidates.read_json("index.json")["files"]
    assert [len(candidate_ids(candidates, file["name"])) for file in files] == [file["sequences"] for file in files]
