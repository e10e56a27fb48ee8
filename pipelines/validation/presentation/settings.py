"""Sections on settings of a trace: what cheaper ones lose, how much data factors need, what a score is in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.validation.presentation.tables import INTERVAL, METHOD, Column, Document, Row, Section
from pipelines.validation.presentation.wording import method

SCALED = ("ekfac", "ekfac_cg", "exact", "response", "pbo")  # predictions that a slope is shown of
GOOD_SIZE = 0.9  # correlation of two fits on disjoint halves, below which a warning is given


# --- cheaper settings -------------------------------------------------------------------------------------------------


def blocks(document: Document) -> Section | None:
    """Block-diagonal factors: agreement and memory."""
    found = document["studies"].get("blocks")
    if not found:
        return None
    response = found["truth"] == "response"
    columns = [
        Column("blocks", "blocks", "count"),
        Column("agreement", "correlation with " + ("the PBRF" if response else "whole factors"), "mean"),
    ]
    if response:
        columns.append(Column("whole", "with whole factors", "mean"))
    columns += [
        Column("bytes", "memory of factors", "bytes"),
        Column("relative_bytes", "of whole factors", "share"),
        Column("seconds", found["timed"], "seconds"),
    ]
    about = [
        "EK-FAC whose covariance factors keep only so many diagonal blocks on each side of each layer (Appendix A). "
        "With O blocks, factors and their bases take 1/O of the memory, decompositions 1/O² of the products. "
        f"{INTERVAL}"
    ]
    return Section("blocks", "Block-diagonal factors", about, columns, found["rows"], (), ("blocks",))


def ranks(document: Document) -> Section | None:
    """Low-rank queries against full rank."""
    found = document["studies"].get("ranks")
    if not found:
        return None
    columns = [
        Column("name", "queries"),
        Column("pearson", "correlation with full rank", "mean", 4),
        Column("minimum", "worst query", "mean", 4),
        Column("predicted", "predicted", "mean", 4),
        Column("mean_rank", "mean rank", "number"),
        Column("bytes", "memory", "bytes"),
        Column("relative_bytes", "of full rank", "share"),
    ]
    about = [
        f"Scores of {found['sequences']:,} sequences on {found['queries']} queries by queries of low rank, against "
        "full rank. Predicted: the correlation that singular values promise before anything is scanned. At a "
        f"fidelity, ranks are chosen by layer and query to meet it. {INTERVAL}"
    ]
    return Section("ranks", "Low-rank queries", about, columns, found["rows"], (), ("ranks",))


def sizes(document: Document) -> Section | None:
    """Agreement of fits on disjoint samples, by their size."""
    found = document["studies"].get("sizes")
    if not found:
        return None
    columns = [
        Column("size", f"{found['unit']} a fit", "count"),
        Column("between", "two disjoint fits", "mean"),
        Column("with_full", "with the fit on all", "mean"),
    ]
    about = [
        f"Correlation of the scores of two fits of the factors ({method(found['solver'])}) on disjoint samples, by "
        f"their size; and of such a fit with the fit on all {found['total']:,} {found['unit']}. Where the curve is "
        f"flat, more data would not change the factors. {INTERVAL}"
    ]
    largest = found["rows"][-1]["between"]["mean"]
    low = [] if largest is None or largest >= GOOD_SIZE else [_size_warning(found["rows"][-1]["size"], largest, found)]
    return Section("sizes", "How much data the factors need", about, columns, found["rows"], low, ("sizes",))


def _size_warning(size: int, largest: float, found: Mapping[str, Any]) -> str:
    return (
        f"Two fits on disjoint samples of {size:,} {found['unit']} agree by {largest:.2f} only: the factors have not "
        "converged with the data that there is."
    )


def scale(document: Document) -> Section | None:
    """Predicted against measured changes of log p."""
    found = document["studies"].get("scale")
    if not found:
        return None
    rows: list[Row] = [
        {
            "against": line["against"] + (f", {line['steps']} steps" if line["steps"] else ""),
            "method": method(line["method"]),
            "slope": line["slope"],
            "correlation": line["correlation"],
        }
        for line in found["lines"]
        if line["method"] in SCALED
    ]
    columns = [
        Column("against", "measured by"),
        METHOD,
        Column("slope", "slope", "mean"),
        Column("correlation", "correlation", "mean"),
    ]
    about = [
        "A score divided by N predicts the change of log p, in nats, when one copy of the sequence is added to the N "
        "that the model was trained on. It is measured by minimising the objective of Equation 7 with that weight, "
        "and by training the model on with one copy more.",
        f"Measured over predicted change for {found['points']} sequences and {found['queries']} queries: the slope of "
        f"the line through the origin (1: scores are nats) and the correlation. {INTERVAL} They come from a bootstrap "
        "over sequences.",
    ]
    return Section("scale", "The scale of scores", about, columns, rows, (), ("scale",))
