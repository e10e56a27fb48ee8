"""Random access to stored sequences, and which feeds a candidate came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.errors import BadRecord, ChecksumError
from actors.sequences import MemorySequences, StoredSequences, candidate_rows
from actors.store import Artifact, Store
from tests.integration.world import write_sequences

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


def test_feeds_of_candidates(tmp_path: Path):
    rows = [  # sorted by sequence, as the stage writes them
        ("one", 2, "bm25"),
        ("two", 2, "bm25"),
        (None, 3, "unfiltered"),
        ("two", 5, "bm25"),
        (None, 5, "unfiltered"),
        (None, 8, "unfiltered"),
        ("one", 9, "bm25"),
    ]
    table = pa.table(dict(zip(("query_id", "sequence_id", "feed"), map(list, zip(*rows, strict=True)), strict=True)))
    artifact = Store(str(tmp_path / "store")).folder("candidates", "0" * 64)
    artifact.write_table("candidates.parquet", table, row_group_size=2)

    def found(first: int, stop: int) -> dict[int, str]:
        ids, feeds = candidate_rows(artifact, first, stop)
        assert ids.tolist() == sorted(set(ids.tolist()))
        return dict(zip(ids.tolist(), feeds, strict=True))

    everything = {2: "bm25", 3: "unfiltered", 5: "both", 8: "unfiltered", 9: "bm25"}
    assert found(0, 100) == everything
    assert found(3, 9) == {number: feed for number, feed in everything.items() if 3 <= number < 9}
    assert found(5, 6) == {5: "both"}
    assert found(6, 8) == {}
    assert found(50, 60) == {}
