"""How well a ranking of documents finds those that are known to state a fact: recall@k, reciprocal rank, mistakes.

Legend: N documents, S sequences, Q queries. `scores_QN`: [queries, documents], higher is more influential. Ranks count
from 1; ties go to the document that comes first, and the almanac's order is random. Pure functions of plain arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

K = 10


@dataclass(frozen=True)
class Judgement:
    """What is known about one query: positions of documents by kind.

    Attributes:
        query_id: The query.
        stating: Documents that state the fact, by how they word it; together the relevant ones.
        confusing: Documents that do not state it but resemble those that do, by how they resemble them.
    """

    query_id: str
    stating: Mapping[str, np.ndarray]
    confusing: Mapping[str, np.ndarray]

    @property
    def relevant(self) -> np.ndarray:
        """All documents that state the fact."""
        return np.concatenate([np.asarray(found, dtype=np.int64) for found in self.stating.values()])


@dataclass(frozen=True)
class Evaluation:
    """One method's result on one query, or the mean over queries.

    Attributes:
        recall: recall@k of all documents that state the fact.
        reciprocal_rank: One over the rank of the first of them.
        recall_by_kind: The share of each kind's documents that are in the top k; kinds that there are only.
        rank_by_kind: The median rank of each kind's documents.
        outranked: For each kind of confusing document, the share of pairs (it, a document that states the fact) in
            which it scores higher.
    """

    recall: float
    reciprocal_rank: float
    recall_by_kind: Mapping[str, float]
    rank_by_kind: Mapping[str, float]
    outranked: Mapping[str, float]


def ranks(scores_N: np.ndarray) -> np.ndarray:
    """Rank documents by falling score: ranks_N from 1; NaN (no score) comes last."""
    order = np.argsort(-np.nan_to_num(scores_N, nan=-np.inf), kind="stable")
    ranks_N = np.empty(len(scores_N), dtype=np.int64)
    ranks_N[order] = np.arange(1, len(scores_N) + 1)
    return ranks_N


def recall_at(ranks_N: np.ndarray, relevant: np.ndarray, k: int = K) -> float:
    """Return the share of what the top k could hold of the relevant documents that it does hold.

    recall@k = |top k ∩ relevant| / min(k, |relevant|).

    Raises:
        ValueError: If no document is relevant.
    """
    if not len(relevant):
        raise ValueError("recall is not defined without a relevant document")
    return float(np.sum(ranks_N[relevant] <= k) / min(k, len(relevant)))


def reciprocal_rank(ranks_N: np.ndarray, relevant: np.ndarray) -> float:
    """Return one over the best rank of a relevant document."""
    return float(1.0 / ranks_N[relevant].min())


def outranked_share(scores_N: np.ndarray, confusing: np.ndarray, relevant: np.ndarray) -> float:
    """Return the share of pairs (confusing, relevant) whose confusing document scores higher; ties count half."""
    scores = np.nan_to_num(scores_N, nan=-np.inf)
    above = scores[confusing][:, None] > scores[relevant][None, :]
    level = scores[confusing][:, None] == scores[relevant][None, :]
    return float(np.mean(above + 0.5 * level))


def evaluate(scores_N: np.ndarray, judgement: Judgement, k: int = K) -> Evaluation:
    """Judge one query's ranking.

    Args:
        scores_N: The score of every document; NaN where a method gives none.
        judgement: What is known about the query.
        k: The length of the list that a reader looks at.
    """
    ranks_N, relevant = ranks(scores_N), judgement.relevant
    kinds = {kind: found for kind, found in judgement.stating.items() if len(found)}
    confusing = {kind: found for kind, found in judgement.confusing.items() if len(found)}
    return Evaluation(
        recall=recall_at(ranks_N, relevant, k),
        reciprocal_rank=reciprocal_rank(ranks_N, relevant),
        recall_by_kind={kind: recall_at(ranks_N, found, k) for kind, found in kinds.items()},
        rank_by_kind={kind: float(np.median(ranks_N[found])) for kind, found in kinds.items()},
        outranked={kind: outranked_share(scores_N, found, relevant) for kind, found in confusing.items()},
    )


def evaluate_all(scores_QN: np.ndarray, judgements: Sequence[Judgement], k: int = K) -> Evaluation:
    """Average over queries; a kind is averaged over the queries that have it."""
    return mean([evaluate(scores_N, judgement, k) for scores_N, judgement in zip(scores_QN, judgements, strict=True)])


def expected_by_chance(documents: int, judgements: Sequence[Judgement], k: int = K) -> Evaluation:
    """Return the expectation of every figure under a uniformly random order of the documents."""
    return mean([_by_chance(documents, judgement, k) for judgement in judgements])


def mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Average each figure over the evaluations that have it."""
    return Evaluation(
        recall=float(np.mean([e.recall for e in evaluations])),
        reciprocal_rank=float(np.mean([e.reciprocal_rank for e in evaluations])),
        recall_by_kind=_mean_by_key([e.recall_by_kind for e in evaluations]),
        rank_by_kind=_mean_by_key([e.rank_by_kind for e in evaluations]),
        outranked=_mean_by_key([e.outranked for e in evaluations]),
    )


def document_scores(
    sequence_ids_S: np.ndarray, scores_SQ: np.ndarray, document_of_sequence: np.ndarray, documents: int
) -> np.ndarray:
    """Bring scores of sequences to documents: the best of a document's sequences; NaN where it has no score.

    Args:
        sequence_ids_S: The sequences that have scores, in any order; a repeated one counts once.
        scores_SQ: Their scores.
        document_of_sequence: The document's position for every sequence id.
        documents: N.

    Returns:
        scores_QN.
    """
    scores_NQ = np.full((documents, scores_SQ.shape[1]), np.nan)
    positions_S = document_of_sequence[sequence_ids_S]
    for position, scores_Q in zip(positions_S, scores_SQ, strict=True):
        scores_NQ[position] = np.fmax(scores_NQ[position], scores_Q)
    return scores_NQ.T


def _by_chance(documents: int, judgement: Judgement, k: int) -> Evaluation:
    relevant = len(judgement.relevant)
    kinds = {kind: len(found) for kind, found in judgement.stating.items() if len(found)}
    return Evaluation(
        recall=_chance_recall(documents, relevant, k),
        reciprocal_rank=_chance_reciprocal_rank(documents, relevant),
        recall_by_kind={kind: _chance_recall(documents, count, k) for kind, count in kinds.items()},
        rank_by_kind=dict.fromkeys(kinds, (documents + 1) / 2),
        outranked={kind: 0.5 for kind, found in judgement.confusing.items() if len(found)},
    )


def _chance_recall(documents: int, relevant: int, k: int) -> float:
    return k * relevant / documents / min(k, relevant)


def _chance_reciprocal_rank(documents: int, relevant: int) -> float:
    """Sum over r of P(first relevant at r) / r, with P built up from drawing without replacement."""
    total, none_so_far = 0.0, 1.0
    for rank in range(1, documents - relevant + 2):
        hit = relevant / (documents - rank + 1)
        total += none_so_far * hit / rank
        none_so_far *= 1.0 - hit
    return total


def _mean_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys: Iterable[str] = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}
