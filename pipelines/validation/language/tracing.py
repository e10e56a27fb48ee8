"""Fact tracing: do the documents that state a fact have the highest scores? recall@k and MRR with intervals.

Legend: Q queries, N documents. scores_QN: higher is more influential; NaN where a method gives none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipelines.almanac import evaluate
from pipelines.almanac.evaluate import Evaluation, Judgement, ranks
from pipelines.validation.language.intervals import interval, over_queries

CANDIDATES = 100
FIGURES = ("recall", "reciprocal_rank")


def bm25_then(scores_QN: np.ndarray, bm25_QN: np.ndarray, candidates: int = CANDIDATES) -> np.ndarray:
    """BM25 → a method: BM25's candidates in the order of the method's scores, all others behind them by BM25.

    Args:
        scores_QN: of the method; among candidates, one without a score (NaN) comes last.
        bm25_QN: of the prefilter; 0 where it proposes nothing, which makes no candidate.
        candidates: a query, at most.

    Returns:
        Numbers to rank by, [Q, N]: N − rank, so higher is better.
    """
    pairs = zip(scores_QN, bm25_QN, strict=True)
    return np.stack([_one(scores_N, bm25_N, candidates) for scores_N, bm25_N in pairs])


def trace_results(
    methods: Mapping[str, np.ndarray],
    judgements: Sequence[Judgement],
    documents: int,
    reference: str = "ekfac",
    k: int = evaluate.K,
) -> dict[str, Any]:
    """Judge every method on every query.

    Args:
        methods: scores_QN by the name of the method.
        judgements: what is known of each query, in the order of the scores.
        documents: N.
        reference: the method that the others are compared with, query by query.
        k: length of the list that a reader looks at.

    Returns:
        `k`, `documents`, `queries`, `reference`; `methods`: by name `recall` and `reciprocal_rank` (`mean`, `interval`
        over queries, `by_query`) and the mean over queries of `recall_by_kind`, `rank_by_kind`, `outranked`, chance
        among them as `random`; `differences`: by name the mean of (method − reference) of both figures with its
        interval, paired by query.
    """
    names = [judgement.query_id for judgement in judgements]
    each = {
        name: [
            evaluate.evaluate(scores_N, judgement, k) for scores_N, judgement in zip(scores, judgements, strict=True)
        ]
        for name, scores in methods.items()
    }
    chance = asdict(evaluate.expected_by_chance(documents, judgements, k))
    random = {figure: {"mean": chance[figure], "interval": None, "by_query": {}} for figure in FIGURES}
    return {
        "k": k,
        "documents": documents,
        "queries": len(names),
        "reference": reference,
        "methods": {name: _summary(found, names) for name, found in each.items()} | {"random": chance | random},
        "differences": {
            name: {figure: _difference(found, each[reference], figure) for figure in FIGURES}
            for name, found in each.items()
            if name != reference and reference in each
        },
    }


def _one(scores_N: np.ndarray, bm25_N: np.ndarray, candidates: int) -> np.ndarray:
    bm25_ranks_N = ranks(bm25_N)
    proposed_N = (bm25_ranks_N <= candidates) & (np.nan_to_num(bm25_N) > 0)
    place_N = np.where(proposed_N, ranks(np.where(proposed_N, scores_N, np.nan)), len(scores_N) + bm25_ranks_N)
    return len(scores_N) - 1.0 - np.argsort(np.argsort(place_N, kind="stable"), kind="stable")


def _summary(found: Sequence[Evaluation], names: Sequence[str]) -> dict[str, Any]:
    figures = {figure: over_queries([getattr(one, figure) for one in found], names) for figure in FIGURES}
    return asdict(evaluate.mean(found)) | figures


def _difference(found: Sequence[Evaluation], reference: Sequence[Evaluation], figure: str) -> dict[str, Any]:
    values = np.asarray([getattr(a, figure) - getattr(b, figure) for a, b in zip(found, reference, strict=True)])
    return {"mean": float(values.mean()), "interval": interval(values)}
