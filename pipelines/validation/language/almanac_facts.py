"""Stage `tracing`: how well each method finds the almanac's documents that state a fact.

Legend: Q queries, N documents, each one sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.almanac.evaluate import Judgement
from pipelines.almanac.world import CONFUSING, STATING
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.problem import documents_of
from pipelines.validation.language.scores import BM25, methods_and_curve
from pipelines.validation.language.subject import almanac_folder
from pipelines.validation.language.tracing import CANDIDATES, bm25_then, trace_results

COMBINED = ("ekfac", "ekfac_cg")  # that BM25's candidates are put in the order of


def run(context: StageContext) -> StageResult:
    """Write `tracing.json`: as `tracing.trace_results` gives it, with `candidates`, and `curve`.

    `curve`: `iterations`, and `recall` and `reciprocal_rank` of conjugate gradients after so many.
    """
    truth = json.loads((almanac_folder(context.config) / "truth.json").read_text(encoding="utf-8"))["queries"]
    names = documents_of(context.inputs["sequences"])
    assert len(set(names)) == len(names), "a document of an almanac is one sequence"
    ids = [query["query_id"] for query in context.inputs["language_scores"].read_json("scores.json")["queries"]]
    judgements = [judgement(query_id, truth[query_id], names) for query_id in ids]
    methods, exact_KQN = methods_and_curve(context.inputs)
    methods |= {f"{BM25}_{name}": bm25_then(methods[name], methods[BM25]) for name in COMBINED}
    record = trace_results(methods, judgements, len(names)) | {"candidates": CANDIDATES}
    iterated = {str(k): scores_QN for k, scores_QN in enumerate(exact_KQN, start=1)}
    record["curve"] = curve(trace_results(iterated, judgements, len(names)), len(exact_KQN))
    context.artifact.write_json("tracing.json", record)
    return StageResult({"queries": len(ids), "documents": len(names)})


def judgement(query_id: str, known: Mapping[str, Sequence[str]], names: Sequence[str]) -> Judgement:
    """What is known of a query, by positions of documents.

    Args:
        query_id: the query.
        known: names of documents by kind, as in `truth.json`.
        names: of all documents, in the order of the scores.
    """
    positions = {name: position for position, name in enumerate(names)}

    def found(kind: str) -> np.ndarray:
        return np.asarray([positions[name] for name in known[kind]], dtype=np.int64)

    return Judgement(query_id, {kind: found(kind) for kind in STATING}, {kind: found(kind) for kind in CONFUSING})


def curve(results: Mapping[str, Any], iterations: int) -> list[dict[str, Any]]:
    """Both figures by the number of iterations."""
    methods = results["methods"]
    figures = ("recall", "reciprocal_rank")
    return [
        {"iterations": k} | {figure: methods[str(k)][figure] for figure in figures} for k in range(1, iterations + 1)
    ]
