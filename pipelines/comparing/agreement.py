"""How far runs agree, by pair and query: the overlap of their top sequences, correlations of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipelines.comparing.matching import Matching, document_key, first_sequences, matching, top_keys
from pipelines.comparing.runs import ComparedRun, SharedQueries, shared_queries
from pipelines.comparing.scores import Batch, Moments, batches, chosen, joined, matched, side_by_side
from pipelines.comparison import overlap, rank_correlation

DEPTHS = (10, 100)  # of the top sequences that are compared


@dataclass(frozen=True)
class Agreement:
    """Of two runs on one query; None where it is not defined.

    Attributes:
        overlap: Share of the first k sequences that both have among their first k, by k.
        spearman: Rank correlation.
        pearson: Correlation.
    """

    overlap: Mapping[int, float | None]
    spearman: float | None
    pearson: float | None

    def values(self) -> dict[str, float | None]:
        """By name: top10, top100, spearman, pearson."""
        return {
            **{f"top{k}": share for k, share in self.overlap.items()},
            "spearman": self.spearman,
            "pearson": self.pearson,
        }


@dataclass(frozen=True)
class Pair:
    """Two runs.

    Attributes:
        first: Place of the one in the comparison.
        second: Place of the other.
        common: Sequences that both scanned; of a sample, where they are matched by document and there are many.
        ranked: Those of them whose ranks were correlated.
        queries: By query id.
    """

    first: int
    second: int
    common: int
    ranked: int
    queries: Mapping[str, Agreement]

    def mean(self, name: str) -> float | None:
        """A measure's mean over the queries for which it is defined."""
        return mean(agreement.values()[name] for agreement in self.queries.values())


@dataclass(frozen=True)
class Comparison:
    """Runs and how far they agree.

    Attributes:
        runs: In the order in which they were given.
        shared: The queries that all of them have.
        how: What makes sequences of two runs the same.
        share: Of the sequences, in the sample of which ranks are correlated.
        seed: Of that sample.
        pairs: All pairs of runs.
        samples: Of each run: keys and scores of the sample, and of all top sequences.
    """

    runs: Sequence[ComparedRun]
    shared: SharedQueries
    how: Matching
    share: float
    seed: int
    pairs: Sequence[Pair]
    samples: Sequence[Batch]

    @property
    def measures(self) -> list[str]:
        """Names of what is measured."""
        return [*(f"top{k}" for k in DEPTHS), "spearman", "pearson"]


def compare(runs: Sequence[ComparedRun], most: int, seed: int = 0) -> Comparison:
    """Compare runs, reading each one's scores once.

    Pearson's correlation is over all sequences that two runs scanned, but for sequences that are matched by document;
    those, and rank correlations, are of a sample where a run scanned more than `most`. Memory: a batch and the sample
    of each run, whatever was scanned.

    Args:
        runs: Two or more.
        most: Sequences in the sample, about.
        seed: Of the sample.

    Raises:
        ConfigError: the runs have no query in common, or no sequence is known to be the same.
        WhenceError: a file cannot be read.
    """
    shared, how = shared_queries(runs), matching(runs)
    share = min(1.0, most / max(max(run.scanned for run in runs), 1))
    if how is Matching.sequence:
        moments, samples = _by_number(runs, shared, share, seed)
    else:
        samples = [_by_document(run, shared, share, seed) for run in runs]
        moments = {}
    pairs = []
    for first, second in combinations(range(len(runs)), 2):
        x_NQ, y_NQ = matched(*(_sampled(samples[place], share, seed) for place in (first, second)))
        found = moments.get((first, second)) or Moments.of(x_NQ, y_NQ)
        pearson_Q = found.pearson()
        agreements = {
            query: Agreement(
                _overlaps(runs[first], runs[second], query, how),
                _defined(rank_correlation(x_NQ[:, column], y_NQ[:, column])),
                _defined(float(pearson_Q[column])),
            )
            for column, query in enumerate(shared.ids)
        }
        pairs.append(Pair(first, second, found.count, len(x_NQ), agreements))
    return Comparison(runs, shared, how, share, seed, pairs, samples)


def _by_number(
    runs: Sequence[ComparedRun], shared: SharedQueries, share: float, seed: int
) -> tuple[dict[tuple[int, int], Moments], list[Batch]]:
    """Moments of every pair over all sequences, and each run's sample with its top sequences."""
    queries = len(shared.ids)
    best = np.unique([row["sequence_id"] for run in runs for query in shared.ids for row in run.top.get(query, [])])
    nothing = np.empty((0, queries))
    moments = {pair: Moments.of(nothing, nothing) for pair in combinations(range(len(runs)), 2)}
    samples: list[list[Batch]] = [[] for _ in runs]
    streams = [_stream(run, shared) for run in runs]
    for window in side_by_side(streams, queries):
        for first, second in moments:
            found = Moments.of(*matched(window[first], window[second]))
            moments[first, second] = moments[first, second].merge(found)
        for sample, batch in zip(samples, window, strict=True):
            sample.append(batch.take(chosen(batch.ids_N, share, seed) | np.isin(batch.ids_N, best)))
    return moments, [joined(sample, queries) for sample in samples]


def _by_document(run: ComparedRun, shared: SharedQueries, share: float, seed: int) -> Batch:
    """The sample of a run whose sequences have other numbers than the other runs': by the key of their documents."""
    tops = [row["document_id"] for query in shared.ids for row in run.top.get(query, []) if row["offset"] == 0]
    best = np.unique(np.array([document_key(name) for name in tops], np.int64))
    ids_N, keys_N = first_sequences(run, lambda keys: chosen(keys, share, seed) | np.isin(keys, best))
    sample = []
    for batch in _stream(run, shared):
        place = np.minimum(np.searchsorted(ids_N, batch.ids_N), max(len(ids_N) - 1, 0))
        kept = ids_N[place] == batch.ids_N if len(ids_N) else np.zeros(len(batch), bool)
        sample.append(Batch(keys_N[place[kept]], batch.scores_NQ[kept]))
    found = joined(sample, len(shared.ids))
    return found.take(np.argsort(found.ids_N, kind="stable"))


def _stream(run: ComparedRun, shared: SharedQueries) -> Iterator[Batch]:
    return batches(run.files, [run.query_ids.index(query) for query in shared.ids])


def _sampled(sample: Batch, share: float, seed: int) -> Batch:
    """Without the top sequences that chance did not choose, which would weigh too much in a correlation."""
    return sample.take(chosen(sample.ids_N, share, seed))


def _overlaps(first: ComparedRun, second: ComparedRun, query: str, how: Matching) -> dict[int, float | None]:
    mine, other = (top_keys(run, query, how) for run in (first, second))
    return {depth: _defined(overlap(mine, other, depth)) for depth in DEPTHS}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
