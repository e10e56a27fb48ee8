"""What the scores of probes say: by partition, relative to a reference, beside sequences written for other probes.

The paper shows influences of written sequences as they are (Figures 24-26), on an axis that its models share. Scores of
different probes have different scales, so there is a relative one too: score / mean score of the probe's reference
partition. It is left undefined where that mean is not positive: then the reference does not do what it was written for.
Pure functions of plain numbers; a score that is not finite counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95  # of intervals
LEAST_OTHERS = 20  # sequences of other probes, below which they give no range


def mean(values: Sequence[float]) -> float | None:
    """The mean of those that are finite; None if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def relative(value: float | None, reference: float | None) -> float | None:
    """A score as a multiple of the reference's mean; None where either is missing or the mean is not positive."""
    if value is None or reference is None or not math.isfinite(value) or reference <= 0:
        return None
    return value / reference


def by_partition(
    partitions: Sequence[str], scores: Sequence[float], reference: str, others: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Summarise one probe.

    Args:
        partitions: That of each sequence.
        scores: On the probe's own query.
        reference: The partition that the rest is relative to.
        others: What `range_of` says of the scores of other probes' sequences.

    Returns:
        For each partition, in order: sequences, mean, minimum, maximum, relative (of the mean), and above_others, the
        sequences whose score is above the range of the others (None without a range).
    """
    grouped: dict[str, list[float]] = {}
    for name, score in zip(partitions, scores, strict=True):
        grouped.setdefault(name, []).append(score)
    scale = mean(grouped[reference])
    found = {}
    for name, values in grouped.items():
        finite = [value for value in values if math.isfinite(value)]
        found[name] = {
            "sequences": len(values),
            "mean": mean(values),
            "minimum": min(finite, default=None),
            "maximum": max(finite, default=None),
            "relative": relative(mean(values), scale),
            "above_others": sum(v > others["range"][1] for v in finite) if others["range"] else None,
        }
    return found


def range_of(scores: Sequence[float]) -> dict[str, Any]:
    """Where the scores of other probes' sequences on this query lie: their count, and the central 95 % of them."""
    finite = [score for score in scores if math.isfinite(score)]
    if len(finite) < LEAST_OTHERS:
        return {"sequences": len(finite), "range": None}
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"sequences": len(finite), "range": [float(low), float(high)]}


def over_probes(probes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What partitions of the same name come to over all probes that have them.

    Args:
        probes: Records with `reference` and `partitions`, as `by_partition` gives them.

    Returns:
        By name: probes that have it, those of them whose relative score is defined, the median of that with its
        interval, and in how many of them it is below the reference.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for probe in probes for name in probe["partitions"]):
        having = [probe for probe in probes if name in probe["partitions"]]
        values = [value for probe in having if (value := probe["partitions"][name]["relative"]) is not None]
        is_reference = all(probe["reference"] == name for probe in having)
        found[name] = {
            "probes": len(having),
            "defined": len(values),
            "median": float(np.median(values)) if values else None,
            "interval": None if is_reference else median_interval(values),
            "below": None if is_reference else sum(value < 1 for value in values),
        }
    return found


def median_interval(values: Sequence[float]) -> list[float] | None:
    """An interval of the median from order statistics: exact, of at least 95 %; None for fewer than six values."""
    if not len(values):
        return None
    interval = stats.quantile_test(np.asarray(values), p=0.5).confidence_interval(LEVEL)
    low, high = float(interval.low), float(interval.high)
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None
