"""Scores of several runs side by side, streamed: what is held is a batch of each run, moments, and a sample.

Legend: N sequences, Q queries. Files of scores ascend by sequence, in themselves and from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.errors import WhenceError

BATCH_NUMBERS = 1 << 22  # scores of a run that are in memory at a time
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True, eq=False)
class Batch:
    """Some scores of a run.

    Attributes:
        ids_N: Sequences, ascending.
        scores_NQ: Of the queries that were asked for.
    """

    ids_N: np.ndarray
    scores_NQ: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_N)

    def split(self, at: int) -> tuple[Batch, Batch]:
        """The first rows, and the others."""
        return Batch(self.ids_N[:at], self.scores_NQ[:at]), Batch(self.ids_N[at:], self.scores_NQ[at:])

    def take(self, rows: np.ndarray) -> Batch:
        """Some rows, by mask or place."""
        return Batch(self.ids_N[rows], self.scores_NQ[rows])


def joined(batches: Sequence[Batch], queries: int) -> Batch:
    """Batches as one."""
    ids = [np.empty(0, np.int64), *(batch.ids_N for batch in batches)]
    scores = [np.empty((0, queries)), *(batch.scores_NQ for batch in batches)]
    return Batch(np.concatenate(ids), np.concatenate(scores))


def batches(files: Sequence[Path], columns: Sequence[int]) -> Iterator[Batch]:
    """The scores of a run, a batch at a time.

    Args:
        files: In order.
        columns: Places of the queries that are wanted.

    Raises:
        WhenceError: a file cannot be read, or sequences do not ascend.
    """
    last, rows = -1, None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                rows = rows or max(256, BATCH_NUMBERS // _width(file))
                for batch in file.iter_batches(batch_size=rows, columns=["sequence_id", "scores"], use_threads=False):
                    ids_N = batch.column("sequence_id").to_numpy()
                    values = batch.column("scores").flatten().to_numpy().reshape(len(ids_N), -1)
                    if len(ids_N) and (ids_N[0] <= last or (np.diff(ids_N) <= 0).any()):
                        raise _unreadable(path, "its sequences do not ascend from file to file")
                    last = int(ids_N[-1]) if len(ids_N) else last
                    yield Batch(ids_N, values[:, columns].astype(np.float64))
        except (pa.ArrowException, OSError, KeyError, IndexError) as error:
            raise _unreadable(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _width(file: pq.ParquetFile) -> int:
    """Scores of a sequence."""
    kind = file.schema_arrow.field("scores").type
    return kind.list_size if pa.types.is_fixed_size_list(kind) else 1


def _unreadable(path: Path, reason: str) -> WhenceError:
    return WhenceError(
        f"these scores cannot be read ({reason})",
        file=str(path),
        remedy="run whence trace again with the same settings: it writes the run's folder anew from the store",
    )


def side_by_side(streams: Sequence[Iterator[Batch]], queries: int) -> Iterator[list[Batch]]:
    """Batches of all runs over the same range of sequences, until no two runs have any left.

    Every sequence of a run is in one batch of it, together with the same sequence of all others.
    """
    empty = joined([], queries)

    def following(stream: Iterator[Batch]) -> Batch:
        return next((found for found in stream if len(found)), empty)

    held = [following(stream) for stream in streams]
    while sum(bool(len(batch)) for batch in held) > 1:
        bound = min(batch.ids_N[-1] for batch in held if len(batch))
        parts = [batch.split(int(np.searchsorted(batch.ids_N, bound, side="right"))) for batch in held]
        yield [part for part, _ in parts]
        held = [rest if len(rest) else following(stream) for (_, rest), stream in zip(parts, streams, strict=True)]


def matched(first: Batch, second: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, Q] of the sequences that both have."""
    _, at, other = np.intersect1d(first.ids_N, second.ids_N, assume_unique=True, return_indices=True)
    return first.scores_NQ[at], second.scores_NQ[other]


def chosen(keys_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A mask of a random sample, of about this share; the same keys are in it wherever they are met.

    The keys' digests (splitmix64, with the seed) are compared with a threshold.
    """
    if share >= 1:
        return np.ones(len(keys_N), bool)
    with np.errstate(over="ignore"):
        mixed = keys_N.astype(np.int64).view(np.uint64) + _GOLDEN * np.uint64(2 * (seed & 0xFFFFFFFF) + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed < np.uint64(share * 2.0**64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and second moments about them of N pairs of scores, for Q queries at once; a value with `merge`.

    Attributes:
        count: N.
        x_Q: Means of the first.
        y_Q: Means of the second.
        xx_Q: Σ (x − x̄)².
        yy_Q: Σ (y − ȳ)².
        xy_Q: Σ (x − x̄)(y − ȳ).
    """

    count: int
    x_Q: np.ndarray
    y_Q: np.ndarray
    xx_Q: np.ndarray
    yy_Q: np.ndarray
    xy_Q: np.ndarray

    @classmethod
    def of(cls, x_NQ: np.ndarray, y_NQ: np.ndarray) -> Moments:
        """Of these pairs."""
        if not len(x_NQ):
            return cls(0, *(np.zeros(x_NQ.shape[1]) for _ in range(5)))
        x_Q, y_Q = x_NQ.mean(0), y_NQ.mean(0)
        x_NQ, y_NQ = x_NQ - x_Q, y_NQ - y_Q
        return cls(len(x_NQ), x_Q, y_Q, (x_NQ**2).sum(0), (y_NQ**2).sum(0), (x_NQ * y_NQ).sum(0))

    def merge(self, other: Moments) -> Moments:
        """Of both; Chan, Golub and LeVeque's formula, which loses no digits to large means."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        dx_Q, dy_Q, weight = other.x_Q - self.x_Q, other.y_Q - self.y_Q, self.count * other.count / count
        return Moments(
            count,
            self.x_Q + dx_Q * other.count / count,
            self.y_Q + dy_Q * other.count / count,
            self.xx_Q + other.xx_Q + dx_Q**2 * weight,
            self.yy_Q + other.yy_Q + dy_Q**2 * weight,
            self.xy_Q + other.xy_Q + dx_Q * dy_Q * weight,
        )

    def pearson(self) -> np.ndarray:
        """Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² Σ(y − ȳ)²) of each query; NaN where one of them does not vary."""
        spread_Q = np.sqrt(self.xx_Q * self.yy_Q)
        found_Q = np.divide(self.xy_Q, spread_Q, out=np.full(len(spread_Q), np.nan), where=spread_Q > 0)
        return np.clip(found_Q, -1, 1)
