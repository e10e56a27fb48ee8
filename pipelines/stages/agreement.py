"""How well two ways of scoring agree: what the fidelity of ranks and the agreement of precisions report.

first_NQ, second_NQ: scores of N sequences on Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.store import Artifact
from influence.compression import pearson


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
