"""Stage `language_responses`: how well the scores of each method correlate with the responses (Figure 6).

Legend: Q queries, N training sequences, P of them whose response was measured, K iterations of conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.intervals import compared, correlations, over_queries
from pipelines.validation.language.scores import methods_and_curve

PAIRS = (("ekfac", "identity"), ("ekfac", "kfac"), ("ekfac", "lissa"), ("ekfac_cg", "ekfac"), ("exact", "ekfac_cg"))


def run(context: StageContext) -> StageResult:
    """Write `responses.json`: what `objectives.json` says, and what `response_results` gives."""
    objectives = context.inputs["language_objectives"]
    record = objectives.read_json("objectives.json")
    response_PQ = objectives.read_tensors("responses.safetensors")["response_PQ"]
    measured_QP = response_PQ[: record["points"]].numpy().T
    found = response_results(*methods_and_curve(context.inputs), measured_QP, record["numbers"], record["queries"])
    context.artifact.write_json("responses.json", record | found)
    return StageResult({"points": record["points"], "methods": len(found["methods"])})


def response_results(
    methods: Mapping[str, np.ndarray],
    exact_KQN: np.ndarray,
    measured_QP: np.ndarray,
    numbers: Sequence[int],
    query_ids: Sequence[str],
) -> dict[str, Any]:
    """Correlations of every method's scores with the responses, by query.

    Returns:
        `methods`: by name what `intervals.compared` gives; `curve`: the same for conjugate gradients after 1 to K
        `iterations`; `differences`: of Pearson's correlations of two methods, paired by query, by `left - right`.
    """
    chosen_P = np.asarray(numbers)

    def correlation(scores_QN: np.ndarray) -> dict[str, Any]:
        return compared(scores_QN[:, chosen_P], measured_QP, query_ids)

    pearson = {name: correlations(scores_QN[:, chosen_P], measured_QP) for name, scores_QN in methods.items()}
    return {
        "methods": {name: correlation(scores_QN) for name, scores_QN in methods.items()},
        "differences": {
            f"{left} - {right}": over_queries(pearson[left] - pearson[right], query_ids)
            for left, right in PAIRS
            if {left, right} <= pearson.keys()
        },
        "curve": [{"iterations": k} | correlation(scores_QN) for k, scores_QN in enumerate(exact_KQN, start=1)],
    }
