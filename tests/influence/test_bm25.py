"""BM25: the formula by hand, the subclass of rank_bm25 and the sparse products at corpus scale agree."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from rank_bm25 import BM25

from influence.bm25 import (
    DocumentFrequencies,
    PresenceBM25,
    QueryTokens,
    TopK,
    idf,
    presence,
    scores,
    top_k,
)

CORPUS = [[5, 6, 6, 7], [7, 8], [9], [5, 8, 8, 8, 11]]


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0] + [len(document) for document in documents])
    return np.concatenate([np.asarray(document, dtype=np.int32) for document in documents]), offsets


def at_scale(documents: list[list[int]], queries: list[list[int]], cuts: list[int]) -> np.ndarray:
    tokens = QueryTokens.build(queries)
    bounds = [0, *cuts, len(documents)]
    shards = [documents[start:stop] for start, stop in pairwise(bounds) if stop > start]
    marks = [presence(tokens.tokens_U, *flat(shard)) for shard in shards]
    frequencies = DocumentFrequencies.empty(len(tokens.tokens_U))
    for mark in reversed(marks):
        frequencies = frequencies.merge(DocumentFrequencies.of(mark))
    return np.concatenate([scores(mark, tokens.weights(frequencies)) for mark in marks])


def test_scores_follow_the_formula_by_hand() -> None:
    def weight(count: int) -> float:
        return math.log((4 - count + 0.5) / (count + 0.5) + 1)

    query = [6, 8, 8, 99]  # 6 is in one document, 8 in two and twice in the query, 99 in none
    expected = [weight(1), 2 * weight(2), 0.0, 2 * weight(2)]
    assert PresenceBM25(CORPUS).get_scores(query) == pytest.approx(expected, rel=1e-15)
    assert at_scale(CORPUS, [query], []).ravel() == pytest.approx(expected, rel=1e-15)


def test_the_subclass_is_rank_bm25_and_its_batches_agree() -> None:
    index = PresenceBM25(CORPUS)
    assert isinstance(index, BM25)
    assert index.get_batch_scores([8, 7], [3, 1]) == [index.get_scores([8, 7])[i] for i in (3, 1)]
    assert index.get_top_n([9], CORPUS, n=1) == [[9]]


def test_k1_cancels() -> None:
    assert PresenceBM25(CORPUS, k1=0.3).get_scores([5, 8]) == pytest.approx(PresenceBM25(CORPUS).get_scores([5, 8]))


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one document"):
        PresenceBM25([])


@pytest.mark.parametrize("cuts", [[], [1], [100, 101, 250]])
def test_corpus_scale_equals_the_subclass_for_any_cut(cuts: list[int]) -> None:
    random = np.random.default_rng(3)
    documents = [random.zipf(1.3, random.integers(1, 40)).clip(max=400).tolist() for _ in range(300)]
    queries = [random.zipf(1.3, 30).clip(max=500).tolist() for _ in range(5)]
    index = PresenceBM25(documents)
    expected_DQ = np.stack([index.get_scores(query) for query in queries], axis=1)
    actual_DQ = at_scale(documents, queries, cuts)
    np.testing.assert_allclose(actual_DQ, expected_DQ, rtol=1e-12)
    np.testing.assert_array_equal(actual_DQ, at_scale(documents, queries, []))  # bit for bit


def test_other_queries_move_no_bit() -> None:
    alone = at_scale(CORPUS, [[5, 8, 7]], [])
    together = at_scale(CORPUS, [[9, 6], [5, 8, 7]], [])
    np.testing.assert_array_equal(alone[:, 0], together[:, 1])


def test_presence_in_blocks_equals_presence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_U = np.array([5, 8, 9])
    whole = presence(tokens_U, *flat(CORPUS)).toarray()
    monkeypatch.setattr("influence.bm25._FLAGS", 3)
    np.testing.assert_array_equal(presence(tokens_U, *flat(CORPUS)).toarray(), whole)
    np.testing.assert_array_equal(whole, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


def test_special_tokens_and_empty_queries_score_nothing() -> None:
    tokens = QueryTokens.build([[5, 8], [5]], exclude={5})
    assert tokens.tokens_U.tolist() == [8]
    mark = presence(tokens.tokens_U, *flat(CORPUS))
    assert scores(mark, tokens.weights(DocumentFrequencies.of(mark)))[:, 1].tolist() == [0, 0, 0, 0]
    nothing = QueryTokens.build([[5]], exclude={5})
    mark = presence(nothing.tokens_U, *flat(CORPUS))
    assert scores(mark, nothing.weights(DocumentFrequencies.of(mark))).tolist() == [[0], [0], [0], [0]]


def test_idf_is_positive_even_for_a_token_of_every_document() -> None:
    assert idf(DocumentFrequencies(10, np.array([10, 0])))[0] > 0


def test_top_k_breaks_ties_by_sequence_id_and_never_takes_a_zero() -> None:
    values, ids = np.array([1.0, 2.0, 0.0, 2.0, 1.0, 1.0]), np.array([50, 40, 30, 20, 10, 60])
    best = top_k(values, ids, 3).ranked()
    assert best.sequence_ids.tolist() == [20, 40, 10]
    assert best.scores.tolist() == [2.0, 2.0, 1.0]
    assert top_k(values, ids, 100).ranked().sequence_ids.tolist() == [20, 40, 10, 50, 60]
    assert top_k(values, ids, 0).sequence_ids.tolist() == []


def test_top_k_merges_to_the_same_whatever_the_order() -> None:
    random = np.random.default_rng(0)
    values, ids = random.integers(0, 9, 500).astype(float), random.permutation(500)
    expected = top_k(values, ids, 40).ranked()
    for seed in range(3):
        pieces = np.array_split(np.random.default_rng(seed).permutation(500), 7)
        merged = TopK.empty()
        for piece in pieces:
            merged = merged.merge(top_k(values[piece], ids[piece], 40), 40)
        np.testing.assert_array_equal(merged.ranked().sequence_ids, expected.sequence_ids)
        np.testing.assert_array_equal(merged.ranked().scores, expected.scores)
