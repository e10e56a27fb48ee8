"""Random access to the tokenised corpus, a row group at a time, and sequences in memory (its test double)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from actors.errors import BadRecord
from actors.store import Artifact


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


def candidate_rows(candidates: Artifact, first: int, stop: int) -> tuple[np.ndarray, list[str]]:
    """The distinct candidates in [first, stop), ascending, and the feed of each: bm25, unfiltered or both."""
    file = candidates.open_parquet("candidates.parquet")
    ids, from_bm25, from_unfiltered = _feeds(file, first, stop)
    unique, inverse = np.unique(ids, return_inverse=True)
    bm25 = np.bincount(inverse, weights=from_bm25, minlength=len(unique)) > 0
    unfiltered = np.bincount(inverse, weights=from_unfiltered, minlength=len(unique)) > 0
    names = np.where(bm25 & unfiltered, "both", np.where(bm25, "bm25", "unfiltered"))
    return unique, names.tolist()


def _feeds(file: object, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, bm25, unfiltered = [], [], []
    metadata = file.metadata  # type: ignore[attr-defined]
    column = metadata.schema.names.index("sequence_id")
    for group in range(metadata.num_row_groups):
        bounds = metadata.row_group(group).column(column).statistics
        if bounds is not None and (bounds.max < first or bounds.min >= stop):
            continue
        table = file.read_row_group(group, columns=["sequence_id", "feed"])  # type: ignore[attr-defined]
        ids.append(table.column("sequence_id").to_numpy())
        is_bm25 = np.asarray(table.column("feed").cast(pa.string())) == "bm25"
        bm25.append(is_bm25)
        unfiltered.append(~is_bm25)
    if not ids:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    all_ids = np.concatenate(ids)
    inside = (all_ids >= first) & (all_ids < stop)
    return all_ids[inside], np.concatenate(bm25)[inside], np.concatenate(unfiltered)[inside]
