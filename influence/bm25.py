"""The paper's BM25 (Section 3.2.1): presence instead of frequency, over token ids, for one shard or for a whole corpus.

Legend: D documents (packed sequences), U distinct query tokens, Q queries. `weights_UQ`: [query tokens, queries].

`PresenceBM25` is the textbook: one shard in memory, one query at a time, on rank_bm25's base class. The rest of the
module is the same score at the scale of a corpus. Only the tokens of the queries matter, so a shard becomes a sparse
presence matrix over those U columns, and all queries are scored by one product. `DocumentFrequencies` and `TopK` are
values with `merge`, so the corpus may be cut in any way and visited in any order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rank_bm25 import BM25
from scipy.sparse import csr_matrix, vstack

K1 = 1.5
_FLAGS = 2**26  # bytes of scratch memory for the presence of one block of documents


class PresenceBM25(BM25):
    """Equations 28 and 29 on one shard that fits in memory, as a subclass of rank_bm25's `BM25`.

    Args:
        corpus: D documents, each a sequence of token ids.
        k1: The parameter of Equation 28. As presence is 0 or 1, the factor (k1 + 1) / (k1 + presence) is 1 wherever
            presence is 1, so k1 moves no score; it is here so that the code reads like the equation.

    Raises:
        ValueError: The corpus has no document.
    """

    def __init__(self, corpus: Sequence[Sequence[int]], k1: float = K1) -> None:
        if not len(corpus):
            raise ValueError("BM25 needs at least one document, and the corpus has none")
        self.k1 = k1
        super().__init__(corpus)

    def _calc_idf(self, nd: dict[int, int]) -> None:
        for token, count in nd.items():
            self.idf[token] = math.log((self.corpus_size - count + 0.5) / (count + 0.5) + 1)

    def get_scores(self, query: Iterable[int]) -> np.ndarray:
        """Score every document: scores_D, a token that the query repeats counting as often as it occurs there."""
        return np.asarray(self.get_batch_scores(query, range(self.corpus_size)))

    def get_batch_scores(self, query: Iterable[int], doc_ids: Iterable[int]) -> list[float]:
        """Score the documents at the positions `doc_ids`, in that order."""
        tokens = list(query)
        return [self._score(tokens, self.doc_freqs[position]) for position in doc_ids]

    def _score(self, query: list[int], document: dict[int, int]) -> float:
        total = 0.0
        for token in query:
            exists = 1.0 if token in document else 0.0
            total += (self.k1 + 1) * exists / (self.k1 + exists) * self.idf.get(token, 0.0)
        return total


@dataclass(frozen=True)
class QueryTokens:
    """The distinct tokens of all queries, and how often each query holds each of them.

    Attributes:
        tokens_U: Token ids, ascending.
        counts_UQ: Occurrences (float64) of each token in each query.
    """

    tokens_U: np.ndarray
    counts_UQ: np.ndarray

    @classmethod
    def build(cls, queries: Sequence[Sequence[int]], exclude: Collection[int] = ()) -> QueryTokens:
        """Count the tokens of Q queries, leaving out those of `exclude` (the special tokens)."""
        counters = [Counter(token for token in query if token not in exclude) for query in queries]
        tokens = sorted(set().union(*counters))
        column = {token: index for index, token in enumerate(tokens)}
        counts_UQ = np.zeros((len(tokens), len(queries)))
        for query, counter in enumerate(counters):
            for token, count in counter.items():
                counts_UQ[column[token], query] = count
        return cls(np.asarray(tokens, dtype=np.int64), counts_UQ)

    def weights(self, frequencies: DocumentFrequencies) -> np.ndarray:
        """Give weights_UQ: what the presence of token u in a document adds to the score of query q."""
        return self.counts_UQ * idf(frequencies)[:, None]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of `documents` documents each query token appears: C and count(t) of Equation 29.

    Attributes:
        documents: Documents seen.
        counts_U: Documents (int64) that hold each token.
    """

    documents: int
    counts_U: np.ndarray

    @classmethod
    def empty(cls, columns: int) -> DocumentFrequencies:
        """Start a sum over no documents."""
        return cls(0, np.zeros(columns, dtype=np.int64))

    @classmethod
    def of(cls, presence_DU: csr_matrix) -> DocumentFrequencies:
        """Count the documents of a presence matrix."""
        counts_U = presence_DU.getnnz(axis=0)
        return cls(len(presence_DU.indptr) - 1, np.asarray(counts_U, dtype=np.int64))

    def merge(self, other: DocumentFrequencies) -> DocumentFrequencies:
        """Add the counts of other documents."""
        return DocumentFrequencies(self.documents + other.documents, self.counts_U + other.counts_U)


def idf(frequencies: DocumentFrequencies) -> np.ndarray:
    """Weigh tokens by rarity, Equation 29: idf_U = log((C - count(t) + 0.5) / (count(t) + 0.5) + 1) > 0."""
    counts_U = frequencies.counts_U.astype(np.float64)
    return np.log((frequencies.documents - counts_U + 0.5) / (counts_U + 0.5) + 1)


def presence(tokens_U: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> csr_matrix:
    """Mark which query tokens each document holds.

    Args:
        tokens_U: Distinct query tokens, ascending.
        values: Token ids of D documents, one after the other.
        offsets: D + 1 positions in `values`: document d is `values[offsets[d]:offsets[d + 1]]`.

    Returns:
        presence_DU, ones (float64) with ascending column indices. Cost: one table look-up a token of the documents.
    """
    block = max(1, _FLAGS // max(1, len(tokens_U)))
    starts = range(0, len(offsets) - 1, block)
    parts = [_presence_block(tokens_U, values, offsets[start : start + block + 1]) for start in starts]
    if not parts:
        return csr_matrix((0, len(tokens_U)))
    return parts[0] if len(parts) == 1 else csr_matrix(vstack(parts, format="csr"))


def _presence_block(tokens_U: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> csr_matrix:
    documents, columns = len(offsets) - 1, len(tokens_U)
    column_of = np.full(int(tokens_U[-1]) + 2 if columns else 1, -1, dtype=np.int64)
    column_of[tokens_U] = np.arange(columns)
    # the last entry stands for every token id beyond those of the queries
    hit = column_of.take(values[offsets[0] : offsets[-1]], mode="clip")
    base = np.repeat(np.arange(documents, dtype=np.int64) * columns, np.diff(offsets))
    found = hit >= 0
    flags = np.zeros(documents * columns, dtype=bool)
    flags[base[found] + hit[found]] = True
    rows, indices = np.divmod(np.flatnonzero(flags), max(1, columns))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=documents))))
    return csr_matrix((np.ones(len(indices)), indices, indptr), shape=(documents, columns))


def scores(presence_DU: csr_matrix, weights_UQ: np.ndarray) -> np.ndarray:
    """Score D documents for Q queries by Equation 28: scores_DQ = presence_DU @ weights_UQ.

    The row of a document is summed in the order of token ids, whatever shard it is in and whatever other queries
    there are, so that its scores have the same bits however the corpus is cut.
    """
    return np.asarray(presence_DU @ weights_UQ)


@dataclass(frozen=True)
class TopK:
    """The best documents of one query, in no particular order until `ranked`.

    Attributes:
        sequence_ids: int64.
        scores: float64, all positive.
    """

    sequence_ids: np.ndarray
    scores: np.ndarray

    @classmethod
    def empty(cls) -> TopK:
        """Start a selection over no documents."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0))

    def merge(self, other: TopK, k: int) -> TopK:
        """Keep the best k of both; the two must not share a document."""
        kept = other.scores >= self.scores.min() if len(self.scores) >= k > 0 else slice(None)
        sequence_ids = np.concatenate((self.sequence_ids, other.sequence_ids[kept]))
        return top_k(np.concatenate((self.scores, other.scores[kept])), sequence_ids, k)

    def ranked(self) -> TopK:
        """Order by score, the best first, and by sequence id where scores are equal."""
        order = np.lexsort((self.sequence_ids, -self.scores))
        return TopK(self.sequence_ids[order], self.scores[order])


def top_k(scores_D: np.ndarray, sequence_ids_D: np.ndarray, k: int) -> TopK:
    """Select the k best documents: the highest scores, and of equal scores the lowest sequence ids.

    A document that scores zero shares no token with the query and is never selected, so fewer than k may come back.
    """
    positive = np.flatnonzero(scores_D > 0)
    scores_D, sequence_ids_D = scores_D[positive], sequence_ids_D[positive]
    if len(scores_D) <= k:
        return TopK(sequence_ids_D.astype(np.int64), scores_D.astype(np.float64))
    if k <= 0:
        return TopK.empty()
    threshold = np.partition(scores_D, len(scores_D) - k)[len(scores_D) - k]
    above = np.flatnonzero(scores_D > threshold)
    tied = np.flatnonzero(scores_D == threshold)
    tied = tied[np.argsort(sequence_ids_D[tied], kind="stable")[: k - len(above)]]
    chosen = np.concatenate((above, tied))
    return TopK(sequence_ids_D[chosen].astype(np.int64), scores_D[chosen].astype(np.float64))
