"""Stage `agreement`: how well scores at the run's precision agree with float32; and how any two ways are compared.

Nothing but the summary and the report depends on the step. first_NQ, second_NQ: scores of N sequences on Q queries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.store import Artifact
from actors.tasks import AgreementTask, Done
from conf.schema import Dtype, RunConfig
from influence.compression import pearson
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)

EXACT = (Dtype.float32, Dtype.float64)


def sample_size(config: RunConfig) -> int:
    """Sequences to score again in float32, as far as the corpus has them; none where no precision is below that."""
    precise = config.model.dtype in EXACT and config.scan.product_dtype in EXACT
    return 0 if precise else config.scan.agreement_sample


def run(context: StageContext) -> StageResult:
    """Write `agreement.json`: the correlation of every query, or nothing where it is not to be measured."""
    found = _measured(context) if sample_size(context.config) else {}
    context.artifact.write_json("agreement.json", found)
    return StageResult({"sample": found.get("sample", 0)}, {"agreement": found})


def _measured(context: StageContext) -> dict[str, Any]:
    """Correlation with float32 scores on a seeded sample, by query."""
    sequences, queries = context.inputs["sequences"], context.inputs["queries"]
    sample = sample_of(sequences, sample_size(context.config), context.config.seed)
    reports: list[Done] = []
    with context.progress("agreement", len(sample), "sequences") as progress:
        context.cluster.pool.run(
            "agreement",
            [AgreementTask(sample, sequences, queries)],
            lambda _task, report: reports.append(report),
            progress.advance_to,
        )
        progress.advance_to(len(sample))
    run_scores, exact_scores = (torch.tensor(scores) for scores in reports[0].result)  # type: ignore[attr-defined]
    found = agreement(run_scores, exact_scores, [record["query_id"] for record in queries.read_json("queries.json")])
    log.info("agreement with float32 scores: correlation %s at worst", shown(found["minimum"]))
    return found


def sample_of(sequences: Artifact, size: int, seed: int) -> tuple[int, ...]:
    """A seeded sample of the corpus without replacement, ascending; all of it if it has no more than `size`."""
    count = sequences.read_json("index.json")["sequences"]
    return tuple(np.sort(np.random.default_rng(seed).choice(count, min(size, count), replace=False)).tolist())


def agreement(first_NQ: Tensor, second_NQ: Tensor, query_ids: Sequence[str]) -> dict[str, Any]:
    """The correlation of every query's scores, its minimum and its mean over queries, JSON-able.

    Sequences whose scores are not finite are left out. A correlation is None where it is undefined: scores that are
    constant over the sample, or fewer than two sequences; so are minimum and mean if no query has one.
    """
    finite_N = (torch.isfinite(first_NQ) & torch.isfinite(second_NQ)).all(dim=1)
    first_NQ, second_NQ = first_NQ[finite_N], second_NQ[finite_N]
    values: dict[str, float | None] = dict.fromkeys(query_ids)
    for position, query_id in enumerate(query_ids):
        value = pearson(first_NQ[:, position], second_NQ[:, position]) if len(first_NQ) > 1 else math.nan
        values[query_id] = value if math.isfinite(value) else None
    return {"sample": len(first_NQ), "pearson": values} | summary(values)


def summary(values: dict[str, float | None]) -> dict[str, float | None]:
    """The least and the mean of those correlations that are defined."""
    defined = [value for value in values.values() if value is not None]
    if not defined:
        return {"minimum": None, "mean": None}
    return {"minimum": min(defined), "mean": sum(defined) / len(defined)}


def shown(value: float | None) -> str:
    """A correlation as people read it."""
    return "undefined" if value is None else f"{value:.5f}"
