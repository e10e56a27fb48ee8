"""Stage `language_datamodels`: the linear datamodeling score of every method.

LDS of query q: Spearman's correlation over subsets S of the sum of scores Σ_{m ∈ S} I(q, m) with the measurement of
models that were trained on S (mean over seeds). Legend: Q queries, N documents, S subsets, R seeds, K iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.intervals import by_subsets, over_queries, rank_correlations
from pipelines.validation.language.scores import methods_and_curve


def run(context: StageContext) -> StageResult:
    """Write `datamodels.json`: what `halves.json` says, `ceiling`, and what `lds_results` gives."""
    trained = context.inputs["language_halves"]
    tensors = {name: value.numpy() for name, value in trained.read_tensors("measured.safetensors").items()}
    ids = [query["query_id"] for query in context.inputs["language_scores"].read_json("scores.json")["queries"]]
    measured_QSR = tensors["measured_QSR"]
    record = trained.read_json("halves.json") | {"ceiling": ceiling(measured_QSR, ids)}
    record |= lds_results(*methods_and_curve(context.inputs), tensors["kept_SN"], measured_QSR.mean(-1), ids)
    context.artifact.write_json("datamodels.json", record)
    return StageResult({"subsets": record["subsets"], "methods": len(record["methods"])})


def lds_results(
    methods: Mapping[str, np.ndarray],
    exact_KQN: np.ndarray,
    kept_SN: np.ndarray,
    measured_QS: np.ndarray,
    query_ids: Sequence[str],
) -> dict[str, Any]:
    """LDS of every method, and of conjugate gradients by their number of iterations.

    Returns:
        `methods`: by name `mean` over queries, `interval` (bootstrap over subsets and queries), `by_query`; `curve`:
        the same with `iterations`, 1 to K; `differences`: of every method's LDS to that of EK-FAC, likewise.
    """
    weights_NS = kept_SN.T.astype(np.float64)

    def lds(scores_QN: np.ndarray) -> dict[str, Any]:
        return by_subsets(scores_QN @ weights_NS, measured_QS, query_ids)

    reference_QS = methods["ekfac"] @ weights_NS if "ekfac" in methods else None
    return {
        "methods": {name: lds(scores_QN) for name, scores_QN in methods.items()},
        "differences": {
            name: by_subsets(scores_QN @ weights_NS, measured_QS, query_ids, reference_QS)
            for name, scores_QN in methods.items()
            if name != "ekfac" and reference_QS is not None
        },
        "curve": [{"iterations": k} | lds(scores_QN) for k, scores_QN in enumerate(exact_KQN, start=1)],
    }


def ceiling(measured_QSR: np.ndarray, query_ids: Sequence[str]) -> dict[str, Any] | None:
    """What a perfect score could reach against the mean over R seeds: √(reliability); None with one seed.

    The reliability of that mean is Spearman-Brown's, R ρ / (1 + (R − 1) ρ), of ρ, the mean rank correlation over
    subsets of two seeds' measurements.
    """
    seeds = measured_QSR.shape[-1]
    if seeds < 2:
        return None
    pairs = [(a, b) for a in range(seeds) for b in range(a)]
    rho_Q = np.mean([rank_correlations(measured_QSR[..., a], measured_QSR[..., b]) for a, b in pairs], axis=0)
    rho_Q = np.clip(rho_Q, 0, 1)
    return over_queries(np.sqrt(seeds * rho_Q / (1 + (seeds - 1) * rho_Q)), query_ids)
