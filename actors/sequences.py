"""Random access to the tokenised corpus, a row group at a time, its test double in memory, and candidates by range.

A `candidates` artifact is one table, sorted by sequence id, in files by ranges of ids. Its `index.json` lists, beside
counts of the whole, for each file: name, first_sequence_id, stop, rows, distinct sequences, and those of each feed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.errors import BadRecord
from actors.store import Artifact

CANDIDATES = pa.schema(
    [
        ("query_id", pa.string()),  # null where unfiltered
        ("sequence_id", pa.int64()),
        ("feed", pa.string()),  # bm25 or unfiltered
        ("bm25_score", pa.float64()),  # null where unfiltered
    ]
)


class SequenceSource(Protocol):
    """Where sequences are read from by number."""

    def read(self, sequence_ids: Sequence[int]) -> list[np.ndarray]:
        """Token ids of each sequence asked for, in that order."""
        ...


class MemorySequences:
    """Sequences held in memory, numbered from 0."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = [np.asarray(row, dtype=np.int64) for row in rows]

    def read(self, sequence_ids: Sequence[int]) -> list[np.ndarray]:
        """Token ids of each sequence asked for."""
        return [self._rows[index] for index in sequence_ids]


class StoredSequences:
    """Reads sequences of a `sequences` artifact; remembers the row group that it read last."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        index = artifact.read_json("index.json")
        self._shards: list[dict] = index["shards"]
        self._starts = [shard["first_sequence_id"] for shard in self._shards]
        self._last: tuple[str, int, int, pa.Table] | None = None

    @property
    def count(self) -> int:
        """Sequences of the corpus."""
        return self._starts[-1] + self._shards[-1]["rows"] if self._shards else 0

    def read(self, sequence_ids: Sequence[int]) -> list[np.ndarray]:
        """Token ids of each sequence asked for, in that order."""
        return [row["input_ids"] for row in self.rows(sequence_ids, ["input_ids"])]

    def rows(self, sequence_ids: Sequence[int], columns: Sequence[str]) -> list[dict]:
        """Some columns of each sequence asked for; `input_ids` as an int64 array.

        Raises:
            BadRecord: if the corpus has no such sequence.
        """
        found: dict[int, dict] = {}
        for sequence_id in sorted(set(sequence_ids)):
            table, offset = self._row_group(sequence_id)
            found[sequence_id] = {name: _value(table, name, offset) for name in columns}
        return [found[sequence_id] for sequence_id in sequence_ids]

    def _row_group(self, sequence_id: int) -> tuple[pa.Table, int]:
        if self._last and self._last[1] <= sequence_id < self._last[2]:
            return self._last[3], sequence_id - self._last[1]
        position = bisect_right(self._starts, sequence_id) - 1
        if position < 0 or sequence_id >= self._starts[position] + self._shards[position]["rows"]:
            raise BadRecord(f"sequence {sequence_id} is not in the tokenised corpus", file=self._artifact.uri)
        shard = self._shards[position]
        file = self._artifact.open_parquet(shard["name"])
        start = shard["first_sequence_id"]
        for group in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if sequence_id < stop:
                table = file.read_row_group(group).combine_chunks()
                self._last = (shard["name"], start, stop, table)
                return table, sequence_id - start
            start = stop
        raise BadRecord(f"sequence {sequence_id} is missing", file=f"{self._artifact.uri}/{shard['name']}")


def _value(table: pa.Table, name: str, offset: int) -> object:
    value = table.column(name)[offset]
    if pa.types.is_list(value.type) or pa.types.is_large_list(value.type):
        return value.values.to_numpy(zero_copy_only=False).astype(np.int64)
    return value.as_py()


def candidate_files(candidates: Artifact) -> list[dict]:
    """The files of a `candidates` artifact in the order of their ranges of sequence ids, with their counts."""
    return candidates.read_json("index.json")["files"]


def read_candidates(candidates: Artifact, columns: list[str] | None = None) -> pa.Table:
    """The whole table of candidates, sorted by sequence id; for corpora that fit this process."""
    return pa.concat_tables(candidates.read_table(file["name"], columns) for file in candidate_files(candidates))


def candidate_ids(candidates: Artifact, name: str) -> np.ndarray:
    """The distinct candidates in one file, ascending."""
    return np.unique(candidates.read_table(name, columns=["sequence_id"]).column("sequence_id").to_numpy())


def candidate_rows(candidates: Artifact, first: int, stop: int) -> tuple[np.ndarray, list[str]]:
    """The distinct candidates in [first, stop), ascending, and the feed of each: bm25, unfiltered or both."""
    inside = (pc.field("sequence_id") >= first) & (pc.field("sequence_id") < stop)
    table = _row_groups(candidates, lambda low, high: high >= first and low < stop, ["sequence_id", "feed"], inside)
    unique, inverse = np.unique(table.column("sequence_id").to_numpy(), return_inverse=True)
    is_bm25 = np.asarray(table.column("feed").cast(pa.string())) == "bm25"
    bm25 = np.bincount(inverse, weights=is_bm25, minlength=len(unique)) > 0
    unfiltered = np.bincount(inverse, weights=~is_bm25, minlength=len(unique)) > 0
    names = np.where(bm25 & unfiltered, "both", np.where(bm25, "bm25", "unfiltered"))
    return unique, names.tolist()


def proposals(candidates: Artifact, query_id: str, sequence_ids: Sequence[int]) -> dict[int, float]:
    """BM25 scores of those of the sequences that BM25 proposed for this query itself."""
    wanted = np.sort(np.asarray(sequence_ids, dtype=np.int64))

    def holds_some(low: int, high: int) -> bool:
        return bool(np.searchsorted(wanted, low) < np.searchsorted(wanted, high, side="right"))

    mine = _row_groups(
        candidates,
        holds_some,
        ["query_id", "sequence_id", "bm25_score"],
        (pc.field("query_id") == query_id) & pc.field("sequence_id").isin(pa.array(wanted)),
    )
    return dict(zip(mine.column("sequence_id").to_pylist(), mine.column("bm25_score").to_pylist(), strict=True))


def proposals_within(candidates: Artifact, first: int, stop: int) -> dict[str, np.ndarray]:
    """The sequences in [first, stop) that BM25 proposed, ascending, by the query that they were proposed for."""
    inside = (pc.field("sequence_id") >= first) & (pc.field("sequence_id") < stop)
    mine = _row_groups(
        candidates,
        lambda low, high: high >= first and low < stop,
        ["query_id", "sequence_id"],
        pc.field("query_id").is_valid() & inside,
    )
    names = mine.column("query_id").combine_chunks().dictionary_encode()
    codes, ids = names.indices.to_numpy(), mine.column("sequence_id").to_numpy()
    return {name: np.sort(ids[codes == code]) for code, name in enumerate(names.dictionary.to_pylist())}


def _row_groups(
    candidates: Artifact, concerns: Callable[[int, int], bool], columns: list[str], wanted: pc.Expression
) -> pa.Table:
    """The rows that are wanted, of row groups whose sequence ids, from the lowest to the highest, are of concern.

    One row group is held at a time, beside what is wanted of those before it.
    """
    pieces = [CANDIDATES.empty_table().select(columns)]
    for file in candidate_files(candidates):
        if not concerns(file["first_sequence_id"], file["stop"] - 1):
            continue
        with candidates.open_parquet(file["name"]) as parquet:
            place = parquet.metadata.schema.names.index("sequence_id")
            for group in range(parquet.num_row_groups):
                bound = parquet.metadata.row_group(group).column(place).statistics
                if bound is None or concerns(bound.min, bound.max):
                    pieces.append(parquet.read_row_group(group, columns=columns).filter(wanted))
    return pa.concat_tables(pieces)
