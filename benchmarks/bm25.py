"""How fast a corpus is scored by BM25: a million short documents, 16 queries, one process, one thread.

    python -m benchmarks.bm25 [--documents 1000000] [--tokens 64] [--queries 16] [--top 10000]

Documents are made of tokens drawn from a Zipf law over 50,000, of varying lengths, 4,096 to a shard; making them is
not counted. Both passes are: document frequencies, then scores and the best of each query. The same scores are then
computed by the rank_bm25 subclass for a subsample, with the frequencies of the subsample, and compared.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from influence.bm25 import DocumentFrequencies, PresenceBM25, QueryTokens, TopK, presence, scores, top_k

VOCABULARY = 50_000
SHARD = 4096
Shard = tuple[np.ndarray, np.ndarray, np.ndarray]  # sequence ids, tokens, offsets


def make_shards(documents: int, tokens: int) -> list[Shard]:
    random = np.random.default_rng(0)
    weights = 1 / (np.arange(VOCABULARY) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    shards = []
    for start in range(0, documents, SHARD):
        ids = np.arange(start, min(start + SHARD, documents))
        lengths = random.integers(tokens // 2, tokens + tokens // 2 + 1, len(ids))
        values = np.searchsorted(cumulative, random.random(lengths.sum())).astype(np.int32)
        shards.append((ids, values, np.concatenate(([0], np.cumsum(lengths)))))
    return shards


def search(shards: list[Shard], queries: list[list[int]], top: int) -> tuple[list[TopK], float, float]:
    """Score all shards; also gives the seconds of the two passes."""
    tokens = QueryTokens.build(queries)
    started = time.perf_counter()
    frequencies = DocumentFrequencies.empty(len(tokens.tokens_U))
    for _, values, offsets in shards:
        frequencies = frequencies.merge(DocumentFrequencies.of(presence(tokens.tokens_U, values, offsets)))
    counted = time.perf_counter()
    weights_UQ = tokens.weights(frequencies)
    best = [TopK.empty() for _ in queries]
    for ids, values, offsets in shards:
        scores_DQ = scores(presence(tokens.tokens_U, values, offsets), weights_UQ)
        best = [b.merge(top_k(scores_DQ[:, query], ids, top), top) for query, b in enumerate(best)]
    return best, counted - started, time.perf_counter() - counted


def compare(shard: Shard, queries: list[list[int]]) -> tuple[float, float, float]:
    """Score one shard by the subclass: seconds to index, seconds to score, largest relative difference."""
    _, values, offsets = shard
    documents = [d.tolist() for d in np.split(values, offsets[1:-1])]
    started = time.perf_counter()
    index = PresenceBM25(documents)
    indexed = time.perf_counter()
    expected_DQ = np.stack([index.get_scores(query) for query in queries], axis=1)
    finished = time.perf_counter()
    tokens = QueryTokens.build(queries)
    presence_DU = presence(tokens.tokens_U, values, offsets)
    actual_DQ = scores(presence_DU, tokens.weights(DocumentFrequencies.of(presence_DU)))
    difference = np.abs(actual_DQ - expected_DQ).max() / np.abs(expected_DQ).max()
    return indexed - started, finished - indexed, float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"documents": 1_000_000, "tokens": 64, "queries": 16, "top": 10_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    shards = make_shards(options.documents, options.tokens)
    random = np.random.default_rng(1)
    texts = [shards[int(i)] for i in random.integers(0, len(shards), options.queries)]
    queries = [values[: options.tokens].tolist() for _, values, _ in texts]
    total = sum(len(values) for _, values, _ in shards)
    distinct = len(set().union(*queries))
    print(f"{options.documents:,} documents, {total:,} tokens, {options.queries} queries, {distinct} distinct tokens")
    best, counting, scoring = search(shards, queries, options.top)
    seconds = counting + scoring
    print(
        f"document frequencies {counting:.2f} s, scores and top {options.top:,} {scoring:.2f} s, total {seconds:.2f} s"
    )
    print(f"{options.documents / seconds:,.0f} documents/s, {total / seconds:,.0f} tokens/s, both passes, 1 thread")
    print(f"candidates a query: {min(len(b.scores) for b in best):,} to {max(len(b.scores) for b in best):,}")
    indexing, ranking, difference = compare(shards[0], queries)
    count = len(shards[0][0])
    rate = count / (indexing + ranking)
    print(
        f"rank_bm25 subclass on {count:,} of them: index {indexing:.2f} s, scores {ranking:.2f} s, "
        f"{rate:,.0f} documents/s, {options.documents / seconds / rate:.1f} times slower; "
        f"largest relative difference {difference:.1e}"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, corpus held in memory")


if __name__ == "__main__":
    main()
