"""One shape for a mean with its interval, wherever it comes from: `mean`, `interval` ([low, high], None), `values`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence.score_agreement import Interval

Statistic = dict[str, Any]

UNSCALED = ("identity", "bm25", "bm25_ekfac", "bm25_ekfac_cg")  # methods whose scores have a scale of their own


def statistic(found: Mapping[str, Any] | float | None, interval: Sequence[float] | None = None) -> Statistic:
    """A mean in the one shape.

    Args:
        found: a number, whose interval is given; or a record with `mean` and either `interval` or `low` and `high`, and
            either `values` or `by_query`.
        interval: of a number.
    """
    if not isinstance(found, Mapping):
        return {"mean": found, "interval": _pair(interval), "values": []}
    ends = found.get("interval") if "interval" in found else (found.get("low"), found.get("high"))
    values = found.get("values") or list((found.get("by_query") or {}).values())
    return {"mean": found.get("mean"), "interval": _pair(ends), "values": list(values)}


def of_interval(found: Interval) -> Statistic:
    """A mean over measurements in the one shape."""
    return statistic(found.as_json())


def slopes(predicted_QP: Tensor, measured_QP: Tensor) -> Tensor:
    """Of the line through the origin that fits each row best, measured = slope · predicted: Σ x y / Σ x², [Q]."""
    x, y = predicted_QP.double(), measured_QP.double()
    return (x * y).sum(1) / (x * x).sum(1).clamp_min(torch.finfo(torch.float64).tiny)


def _pair(ends: Sequence[Any] | None) -> list[float] | None:
    if ends is None or any(end is None for end in ends):
        return None
    return [float(ends[0]), float(ends[1])]
