"""What finished runs left, and how far the scores of two of them agree.

Runs may differ in their queries and in what they scanned: queries are matched by id, sequences by number, and only what
both have is compared. Of many sequences the correlation takes those whose numbers are multiples of a stride, which are
the same ones in every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import rankdata

SUMMARY = "summary.json"
MOST_SEQUENCES = 100_000  # in a correlation


@dataclass(frozen=True)
class Outcome:
    """A finished run in numbers.

    Attributes:
        folder: Of the run.
        computed: Steps that it computed.
        cached: Steps that it found, or that another run computed meanwhile.
        rank: Singular values a query and layer, the mean; None for full rank.
        fidelity: Correlation with full-rank scores, of the worst query; None where it was not measured.
    """

    folder: Path
    computed: int
    cached: int
    rank: float | None
    fidelity: float | None


@dataclass(frozen=True)
class Agreement:
    """How far two runs agree, each a mean over the queries of both; None where it is not defined.

    Attributes:
        top10: Share of the ten sequences of highest influence that both have among them.
        top100: The same of a hundred.
        spearman: Rank correlation of the scores of the sequences that both scanned.
    """

    top10: float | None
    top100: float | None
    spearman: float | None


def load_outcome(folder: Path) -> Outcome:
    """Read a run's `summary.json`."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    stages, queries = summary["stages"].values(), summary["queries"]
    cached = sum(stage["cached"] for stage in stages)
    ranks = [query["total_rank"] for query in queries]
    layers = summary["stages"]["layers"]["counts"]["layers"]
    rank = None if None in ranks else sum(ranks) / len(ranks) / layers
    return Outcome(folder, len(stages) - cached, cached, rank, summary["fidelity"].get("minimum"))


def compare(mine: Path, other: Path, most: int = MOST_SEQUENCES) -> Agreement:
    """Compare the scores of two finished runs.

    Args:
        mine: Folder of a run.
        other: Folder of another.
        most: Sequences in the correlation, about.
    """
    tops = _tops(mine), _tops(other)
    both = [query for query in tops[0] if query in tops[1]]
    shares = [_mean(overlap(tops[0][query], tops[1][query], count) for query in both) for count in (10, 100)]
    return Agreement(shares[0], shares[1], _spearman(mine, other, both, most))


def _tops(folder: Path) -> dict[str, list[int]]:
    """Sequences of the highest influence by query, in order."""
    table = pq.read_table(folder / "top.parquet", columns=["query_id", "rank", "sequence_id"]).sort_by("rank")
    found: dict[str, list[int]] = {}
    for query, sequence in zip(table["query_id"].to_pylist(), table["sequence_id"].to_pylist(), strict=True):
        found.setdefault(query, []).append(sequence)
    return found


def overlap(mine: Sequence[object], other: Sequence[object], count: int) -> float:
    """Share of the first `count` that both have; NaN if one of them has fewer."""
    if min(len(mine), len(other)) < count:
        return math.nan
    return len(set(mine[:count]) & set(other[:count])) / count


def _spearman(mine: Path, other: Path, queries: list[str], most: int) -> float | None:
    rows = max(_rows(mine), _rows(other))
    stride = max(1, math.ceil(rows / most))
    (ids, scores_NQ), (other_ids, others_NQ) = _scores(mine, stride), _scores(other, stride)
    _, at, other_at = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    columns = _query_ids(mine), _query_ids(other)
    return _mean(
        rank_correlation(scores_NQ[at, columns[0].index(query)], others_NQ[other_at, columns[1].index(query)])
        for query in queries
    )


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two lists of values, ties at their mean rank; NaN where one has a single value."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "scores").glob("*.parquet"))


def _rows(folder: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in _files(folder))


def _scores(folder: Path, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence ids [N] that are multiples of the stride, and their scores [N, Q]; a file at a time."""
    ids, scores = [], []
    for file in _files(folder):
        table = pq.read_table(file, columns=["sequence_id", "scores"])
        numbers = table["sequence_id"].to_numpy()
        values = table["scores"].combine_chunks().flatten().to_numpy().reshape(len(numbers), -1)
        kept = numbers % stride == 0
        ids.append(numbers[kept])
        scores.append(values[kept])
    return np.concatenate(ids), np.concatenate(scores)


def _query_ids(folder: Path) -> list[str]:
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return [query["query_id"] for query in summary["queries"]]


def _mean(values: Iterable[float]) -> float | None:
    """The mean of those that are defined; None if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None
