"""The unfiltered feed: which sequences go to the scan whatever their words, decided sequence by sequence.

Each sequence has a key, a hash of the seed and its id, one to one in the id. A sample of N is the sequences with the
N smallest keys, so a larger sample holds every smaller one of the same seed. What has to be known of the sample is
only its largest key: any range of ids then finds its part of the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conf.schema import UnfilteredConfig, UnfilteredKind

_BLOCK = 2**18  # ids hashed at a time
_LEADING = 16  # bits of a key that the histogram looks at
_SHIFT = np.uint64(64 - _LEADING)


@dataclass(frozen=True)
class Unfiltered:
    """A feed.

    Attributes:
        count: Sequences in it.
        seed: Of the keys.
        most: The largest key in it; None takes every sequence.
    """

    count: int
    seed: int = 0
    most: int | None = None

    def within(self, first: int, stop: int) -> np.ndarray:
        """Its sequences in [first, stop): int64, ascending."""
        if not self.count:
            return np.empty(0, dtype=np.int64)
        ids = np.arange(first, stop, dtype=np.int64)
        return ids if self.most is None else ids[_keys(ids, self.seed) <= np.uint64(self.most)]


def choose(config: UnfilteredConfig, sequences: int) -> Unfiltered:
    """Choose from a corpus of so many sequences: all, none, or a sample that only the seed and the ids decide.

    Cost: two hashes a sequence for a sample; memory for one block of ids and about 1 in 65,536 of the keys.
    """
    if config.kind is UnfilteredKind.none:
        return Unfiltered(0)
    if config.kind is UnfilteredKind.all or config.sequences >= sequences:
        return Unfiltered(sequences)
    return Unfiltered(config.sequences, config.seed, _smallest(config.sequences, sequences, config.seed))


def _smallest(rank: int, sequences: int, seed: int) -> int:
    """The key of that rank, counted from 1: a histogram finds its leading bits, a second pass the rest of them."""
    bins = np.zeros(2**_LEADING, dtype=np.int64)
    for keys in _blocks(sequences, seed):
        bins += np.bincount((keys >> _SHIFT).astype(np.int64), minlength=len(bins))
    upto = np.cumsum(bins)
    leading = int(np.searchsorted(upto, rank))
    before = int(upto[leading] - bins[leading])
    inside = [keys[keys >> _SHIFT == np.uint64(leading)] for keys in _blocks(sequences, seed)]
    return int(np.partition(np.concatenate(inside), rank - before - 1)[rank - before - 1])


def _blocks(sequences: int, seed: int) -> Iterator[np.ndarray]:
    for start in range(0, sequences, _BLOCK):
        yield _keys(np.arange(start, min(start + _BLOCK, sequences), dtype=np.int64), seed)


def _keys(ids: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser, on the id and then on the sum with the hashed seed: one to one in the id."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64))
    return _mix(_mix(ids.astype(np.uint64)) + start)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
