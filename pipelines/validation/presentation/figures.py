"""The plots of one validation, and of several together: names, captions, figures, from their documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from pipelines.plots.validation import Estimate, Plane, Series, below, dependence, method_bars, planes, wall_clock
from pipelines.validation.presentation.tables import Document, signed
from pipelines.validation.presentation.wording import BLOCKS, METHODS, colour, method, ordered, title

Drawn = tuple[str, str, Figure]
Statistic = Mapping[str, Any]

INTERVAL = "lines are 95 % intervals"
PAIRS = "pairs.parquet"
DRAWN = 20_000  # points in a panel
PBRF = "correlation with the PBRF"
EXACT = "correlation with exact solves"


def figures(documents: Sequence[Document], pairs: Path | None = None) -> Iterator[Drawn]:
    """Every plot that these validations have something for: file name, caption, figure.

    Args:
        documents: Of one run or of several, which are then drawn side by side.
        pairs: Of one run: its table of scores and responses.
    """
    names = labels(documents)
    yield from _bars(documents, names)
    yield from _time(documents, names)
    yield from _blocks(documents, names)
    yield from _lines(documents, names)
    if len(documents) == 1:
        yield from _alone(documents[0], pairs)


def labels(documents: Sequence[Document]) -> list[str]:
    """What the runs are called, each differently."""
    found = [title(document["name"], document["subject"]) for document in documents]
    return [
        name if found.count(name) == 1 else f"{name}, run {found[: place + 1].count(name)}"
        for place, name in enumerate(found)
    ]


def estimate(found: Statistic | None) -> Estimate:
    """A statistic as the plots take it."""
    if not found:
        return Estimate(None)
    return Estimate(found["mean"], found.get("interval"), found.get("values") or ())


# --- bars by method ---------------------------------------------------------------------------------------------------


def _by_method(
    documents: Sequence[Document], names: Sequence[str], study: str, key: str
) -> dict[str, dict[str, Estimate]]:
    """Values of methods by run, for the runs that have the study; in one order of methods."""
    found = {}
    for name, document in zip(names, documents, strict=True):
        methods = (document["studies"].get(study) or {}).get("methods") or {}
        kept = {each: estimate(record[key]) for each, record in methods.items() if not BLOCKS.match(each)}
        if any(value.mean is not None for value in kept.values()):
            found[name] = {method(each): kept[each] for each in ordered(kept)}
    return found


def _colours(documents: Sequence[Document]) -> dict[str, str]:
    names = [*METHODS]
    for document in documents:
        for study in document["studies"].values():
            names += (study.get("methods") or {}) if isinstance(study, Mapping) else ()
    return {method(name): colour(name) for name in names}


def _bars(documents: Sequence[Document], names: Sequence[str]) -> Iterator[Drawn]:
    colours = _colours(documents)
    dots = "; dots are single measurements" if len(documents) == 1 else ""
    drawn = (
        ("agreement", "agreement", "pearson", PBRF, 1.0, "Correlation with the measured response by method"),
        ("solved", "solved", "pearson", EXACT, 1.0, "Correlation with exact solves by method"),
        ("lds", "datamodels", "lds", "linear datamodeling score", None, "Linear datamodeling score by method"),
        ("removal", "removal", "change", "change after removal", None, "Change of what was measured after removal"),
        ("tracing", "tracing", "recall", "recall", None, "Recall of what states the fact, by method"),
    )
    for name, study, key, label, limit, caption in drawn:
        groups = _by_method(documents, names, study, key)
        if not groups or (name == "removal" and len(documents) > 1):  # in units of different measurements
            continue
        if name == "lds" or len(documents) > 1:  # values of single queries would hide the bars
            groups = {
                run: {each: _without_values(value) for each, value in found.items()} for run, found in groups.items()
            }
        reference = _ceiling(documents) if name == "lds" and len(documents) == 1 else None
        figure = method_bars(groups, colours, label=label, limit=limit, reference=reference)
        paper = " (Figure 6)" if name == "agreement" else ""
        yield name, f"{caption}{paper}; {INTERVAL}{dots if name != 'lds' else ''}.", figure


def _without_values(found: Estimate) -> Estimate:
    return Estimate(found.mean, found.interval)


def _ceiling(documents: Sequence[Document]) -> tuple[str, float] | None:
    found = (documents[0]["studies"].get("datamodels") or {}).get("ceiling")
    return ("the best there can be", found["mean"]) if found and found["mean"] is not None else None


# --- cost -------------------------------------------------------------------------------------------------------------


def _time(documents: Sequence[Document], names: Sequence[str]) -> Iterator[Drawn]:
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    measurements = set()
    for name, document in zip(names, documents, strict=True):
        found = document["studies"].get("cost")
        if not found:
            continue
        seconds = {each: found["methods"][each]["seconds"] for each in found["methods"] if not BLOCKS.match(each)}
        groups[name] = {
            method(each): (seconds[each]["total"], seconds[each].get("fit") or 0.0) for each in ordered(seconds)
        }
        measurements.add(found["measurements"])
    if not groups:
        return
    count = f"{measurements.pop()} measurements" if len(measurements) == 1 else "all measurements"
    label, colours = f"seconds for {count}", _colours(documents)
    if len(groups) == 1:
        figure = wall_clock(next(iter(groups.values())), colours, label=label)
    else:
        totals = {name: {each: Estimate(total) for each, (total, _) in found.items()} for name, found in groups.items()}
        figure = method_bars(totals, colours, label=label, logarithmic=True)
    yield "time", f"Wall-clock time for {count}, fitting included, on a logarithmic axis (Figure 7).", figure


# --- lines over a setting ---------------------------------------------------------------------------------------------


def _blocks(documents: Sequence[Document], names: Sequence[str]) -> Iterator[Drawn]:
    runs = {
        name: document["studies"]["blocks"]
        for name, document in zip(names, documents, strict=True)
        if document["studies"].get("blocks")
    }
    if not runs:
        return
    truths = {found["truth"] for found in runs.values()}
    what = PBRF if truths == {"response"} else "correlation with whole factors" if len(truths) == 1 else "correlation"
    series = {
        what: [
            Series(
                name,
                [row["blocks"] for row in found["rows"]],
                [_quiet(row["agreement"], runs) for row in found["rows"]],
            )
            for name, found in runs.items()
        ],
        "memory of factors and bases, of whole ones": [
            Series(
                name,
                [row["blocks"] for row in found["rows"]],
                [Estimate(row["relative_bytes"]) for row in found["rows"]],
            )
            for name, found in runs.items()
        ],
    }
    figure = dependence(series, label="diagonal blocks of a factor", logarithmic=(list(series)[1],), limit=1.0)
    yield "blocks", f"EK-FAC by the blocks of its factors: agreement and memory (Figure 30); {INTERVAL}.", figure


def _quiet(found: Statistic, runs: Mapping[str, Any]) -> Estimate:
    """Single values are shown where there is one run."""
    return estimate(found) if len(runs) == 1 else _without_values(estimate(found))


def _lines(documents: Sequence[Document], names: Sequence[str]) -> Iterator[Drawn]:
    runs = list(zip(names, (document["studies"] for document in documents), strict=True))
    ranks = []
    for name, studies in runs:
        rows = [row for row in (studies.get("ranks") or {"rows": []})["rows"] if row["rank"] is not None]
        if rows:
            ranks.append(Series(name, [row["rank"] for row in rows], [estimate(row["pearson"]) for row in rows]))
    if ranks:
        figure = dependence({"correlation with full rank": ranks}, label="rank of the queries", limit=1.0)
        yield "ranks", "Scores by queries of low rank against full rank, a dot a query (Figure 3).", figure
    iterations = {}
    for key, label in (("pearson", PBRF), ("lds", "linear datamodeling score")):
        given = [(name, studies["iterations"]) for name, studies in runs if studies.get("iterations")]
        series = [_iteration_series(name, rows, key) for name, rows in given if any(row[key] for row in rows)]
        iterations |= {label: series} if series else {}
    if iterations:
        figure = dependence(iterations, label="iterations of conjugate gradients")
        yield "iterations", f"EK-FAC refined by conjugate gradients; {INTERVAL}.", figure
    sizes = [(name, studies["sizes"]) for name, studies in runs if studies.get("sizes")]
    if sizes:
        series = [each for name, found in sizes for each in _size_series(name if len(runs) > 1 else "", found)]
        figure = dependence({"correlation of scores": series}, label=f"{sizes[0][1]['unit']} a fit", limit=1.0)
        yield "sizes", f"Agreement of fits of the factors by the size of their sample; {INTERVAL}.", figure


def _iteration_series(name: str, rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    known = [row for row in rows if row[key]]
    return Series(name, [row["iterations"] for row in known], [_without_values(estimate(row[key])) for row in known])


def _size_series(name: str, found: Mapping[str, Any]) -> list[Series]:
    sizes = [row["size"] for row in found["rows"]]
    kinds = (("between", "two disjoint fits"), ("with_full", "with the fit on all"))
    chosen = kinds[:1] if name else kinds
    return [
        Series(name or called, sizes, [_without_values(estimate(row[key])) for row in found["rows"]])
        for key, called in chosen
    ]


# --- of one run -------------------------------------------------------------------------------------------------------


def _alone(document: Document, pairs: Path | None) -> Iterator[Drawn]:
    studies = document["studies"]
    if studies.get("agreement") and pairs is not None and pairs.exists():
        yield from _response(studies, pairs)
    if studies.get("scale"):
        yield from _scale(studies["scale"])
    response = studies.get("response") or {}
    gradients = [np.inf if value is None else value for value in response.get("gradients") or ()]
    if gradients:
        figure = below(
            {"gradient at the end": gradients},
            label="gradient of the objective at the end, relative to that of the added point",
            limit=response["tolerance"],
            limit_name="tolerance",
        )
        yield (
            "convergence",
            "How far each point’s objective was minimised: percent of the points by gradient left.",
            figure,
        )
    if response.get("linearity"):
        yield "linearity", "How far responses are from linear by ε, and the ε that was used.", _linearity(response)


def _linearity(response: Mapping[str, Any]) -> Figure:
    lines = {
        name: [
            Series(
                "",
                [row["epsilon"] for row in response["linearity"]],
                [Estimate(row[key]) for row in response["linearity"]],
            )
        ]
        for key, name in (
            ("difference", "relative difference of responses"),
            ("correlation", "correlation of responses"),
        )
        if any(row.get(key) is not None for row in response["linearity"])
    }
    logarithmic = [name for name in lines if name.startswith("relative")]
    return dependence(lines, label="ε", logarithmic=logarithmic, mark=("ε used", response["epsilon"]))


def _response(studies: Mapping[str, Any], pairs: Path) -> Iterator[Drawn]:
    table = pq.read_table(pairs)
    names = [name for name in ordered(studies["agreement"]["methods"]) if not BLOCKS.match(name)]
    measured = table["response"].to_numpy()
    measurement = table["measurement"].to_numpy()
    scales = {at: float(np.std(measured[measurement == at])) or 1.0 for at in np.unique(measurement)}
    unit = np.array([scales[at] for at in measurement])
    given = []
    for name in names:
        predicted, slope = table[name].to_numpy(), None
        found = studies["agreement"]["methods"][name]
        if found.get("slope"):
            x, y, slope = predicted / unit, measured / unit, found["slope"]["mean"]
        else:  # no scale of its own: in units of each measurement
            own = {at: float(np.std(predicted[measurement == at])) or 1.0 for at in scales}
            x, y = predicted / np.array([own[at] for at in measurement]), measured / unit
        some = np.random.default_rng(0).permutation(len(x))[:DRAWN]
        note = signed(f"r = {found['pearson']['mean']:.3f}" + ("" if slope is None else f", slope {slope:.2f}"))
        given.append(Plane(method(name), x[some].tolist(), y[some].tolist(), slope, note))
    figure = planes(given, "score, in standard deviations of the response", "measured response")
    caption = (
        "Measured response over scores, a dot a point and measurement, in standard deviations of each measurement’s "
        "response (of the scores themselves where they have no scale); dashed: slope 1."
    )
    yield "response", caption, figure


def _scale(found: Mapping[str, Any]) -> Iterator[Drawn]:
    pairs, given = found["pairs"], []
    best = [name for name in ("exact", "ekfac_cg", "ekfac") if name in pairs["predicted"]][:1]
    for name in dict.fromkeys(each for each in ("ekfac", *best) if each in pairs["predicted"]):
        predicted = np.asarray(pairs["predicted"][name], float).ravel()
        for key, called in (("pbo", "Equation 7"), ("training_on", "training on")):
            if not pairs.get(key):
                continue
            lines = [line for line in found["lines"] if line["method"] == name and line["against"] == called]
            if not lines:
                continue
            slope, correlation = lines[-1]["slope"]["mean"], lines[-1]["correlation"]["mean"]
            known = slope is not None and correlation is not None
            note = signed(f"slope {slope:.2f}, r = {correlation:.3f}") if known else ""
            measured = np.asarray(pairs[key], float).ravel()
            given.append(Plane(f"{method(name)}\n{called}", predicted.tolist(), measured.tolist(), slope, note))
    if given:
        figure = planes(given, "predicted change of log p (score / N)", "measured change, nats")
        yield "scale", "Change of log p when a sequence is added: measured over predicted; dashed: slope 1.", figure
