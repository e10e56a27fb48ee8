"""How the candidates are cut into shards of the scan: by how many there are, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows
from actors.store import Artifact, Store
from pipelines.stages.scan import LEAST, MOST_SHARDS, SHARDS, scan_ranges, shard_size, tally
from tests.integration.world import Candidate, write_candidates

IDS = [0, 1, 2, 5, 9, 10, 11, 12, 40, 41, 99, 100, 101, 230, 400]


def backwards(function: Any, arguments: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
    """Tasks that finish in the wrong order."""
    return reversed([(position, function(*given)) for position, given in enumerate(arguments)])


def candidates(folder: Path, block: int) -> Artifact:
    """Every one in the unfiltered feed, and every third proposed to two queries as well."""
    rows: list[Candidate] = []
    for number in IDS:
        rows += [(query, number, "bm25", 1.0) for query in ("a", "b") if number % 3 == 0]
        rows.append((None, number, "unfiltered", None))
    return write_candidates(Store(str(folder / str(block))), rows, block)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("size", [1, 4, 5, 14, 15, 16])
def test_every_candidate_is_in_one_range_whatever_the_files(tmp_path: Path, block: int, size: int):
    found = candidates(tmp_path, block)
    ranges = scan_ranges(backwards, found, size)
    rows = [candidate_rows(found, first, stop)[0].tolist() for first, stop in ranges]
    assert rows == [IDS[start : start + size] for start in range(0, len(IDS), size)]
    assert [(first, stop) for first, stop in ranges] == [(mine[0], mine[-1] + 1) for mine in rows]


def test_few_candidates_are_cut_into_enough_shards_for_many_replicas():
    assert shard_size(1_000_000, 512) == 512
    assert shard_size(512 * SHARDS, 512) == 512
    assert (SHARDS - 1) * shard_size(10_000, 512) < 10_000 <= SHARDS * shard_size(10_000, 512)
    assert shard_size(100, 512) == LEAST
    assert shard_size(100, 7) == 7  # what is asked for is the most


def test_however_many_candidates_there_are_the_number_of_shards_is_bounded():
    assert shard_size(512 * MOST_SHARDS, 512) == 512
    for candidates in (512 * MOST_SHARDS + 1, 10_000_000, 123_456_789):
        shards = -(-candidates // shard_size(candidates, 512))
        assert MOST_SHARDS / 2 < shards <= MOST_SHARDS


def test_reports_are_added_up(tmp_path: Path):
    output = Store(str(tmp_path)).folder("scores", "0" * 64)
    for shard in range(5):
        report = ShardReport(1, 10**shard, 0.5, {str(shard): "why"} if shard % 2 else {})
        write_scores(output, shard, np.array([shard]), ["bm25"], np.ones((1, 1)), report)
    assert tally(output, 1, 4) == ({"1": "why", "3": "why"}, 1110, 1.5)
