"""Sections on what was measured by the proximal Bregman objective, and on what each method costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.validation.presentation.tables import INTERVAL, METHOD, Column, Document, Row, Section
from pipelines.validation.presentation.wording import BLOCKS, method, ordered, pair

SLOPE = 0.1  # by which a slope may miss 1 before it is pointed out
LISTED = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50)  # iterations that a table has; the plot has all
MOVING = 0.1  # relative change of LiSSA's last step above which it has not converged
NOTES = {
    "iterations": "iterations",
    "rows": "rows",
    "depth": "steps",
    "batch": "examples a step",
    "scale": "scale",
    "attempts": "attempts at the scale",
    "change": "last change",
}


# --- the response -----------------------------------------------------------------------------------------------------


def agreement(document: Document) -> Section | None:
    """Correlations with the measured response; None where none was measured."""
    found = document["studies"].get("agreement")
    if not found:
        return None
    rows = _by_method(found, document)
    columns = [METHOD, Column("pearson", "correlation with the PBRF", "mean"), Column("spearman", "Spearman's", "mean")]
    optional = (("converged", "converged points alone"), ("slope", "slope"), ("exact", "with exact solves"))
    columns += [Column(key, title, "mean") for key, title in optional if any(row.get(key) for row in rows)]
    columns.append(Column("seconds", "time", "seconds"))
    about = [
        f"Pearson’s correlation of a method’s scores with the measured response of the proximal Bregman objective "
        f"(Equation 7: the PBRF) over {found['points']:,} training points, for each of {found['measurements']} "
        f"measurements; the mean over measurements. {INTERVAL} They are Student’s t over the measurements.",
    ]
    if any(row.get("slope") for row in rows):
        about.append(
            "Slope: of the line through the origin that gives the measured from the predicted response; 1 says that "
            "scores have the right size. With exact solves: correlation with scores by the exact damped Gauss-Newton "
            "matrix, which is what the response tends to as ε goes to 0."
        )
    return Section(
        "agreement",
        "Agreement with the measured response",
        about,
        columns,
        rows,
        _slope_warning(found),
        ("agreement", "response"),
    )


def solved(document: Document) -> Section | None:
    """Correlations with exact solves, where no response was measured."""
    found = document["studies"].get("solved")
    if not found:
        return None
    about = [
        "No response was measured, so that what there is to compare with is what the response tends to as ε goes to 0: "
        "scores by the exact damped Gauss-Newton matrix. Pearson’s correlation of a method’s scores with those over "
        f"{found['points']:,} training points, for each of {found['measurements']} measurements; the mean over "
        f"measurements. {INTERVAL} They are Student’s t over the measurements. Slope: of the line through the origin "
        "that gives the exact from the estimated score.",
    ]
    columns = [METHOD, Column("pearson", "correlation with exact solves", "mean")]
    columns += [Column("spearman", "Spearman's", "mean"), Column("slope", "slope", "mean")]
    columns.append(Column("seconds", "time", "seconds"))
    title = "Agreement with exact solves"
    return Section("solved", title, about, columns, _by_method(found, document), (), ("solved",))


def _by_method(found: Mapping[str, Any], document: Document) -> list[Row]:
    """What is known of each method that is no variant of another, with its wall clock."""
    costs = document["studies"].get("cost") or {"methods": {}}
    seconds = {name: record["seconds"]["total"] for name, record in costs["methods"].items()}
    return [
        {"method": method(name), **found["methods"][name], "seconds": seconds.get(name)}
        for name in ordered(found["methods"])
        if not BLOCKS.match(name)
    ]


def _slope_warning(found: Mapping[str, Any]) -> list[str]:
    exact = found["methods"].get("exact")
    slope = exact and exact.get("slope") and exact["slope"]["mean"]
    if not slope or abs(slope - 1) <= SLOPE:
        return []
    return [
        f"Responses are {slope:.2f} times what exact solves predict: the objective was not minimised, or ε is too "
        "large."
    ]


def differences(document: Document) -> Section | None:
    """Differences between methods, paired by measurement."""
    measured, exact = (document["studies"].get(name) for name in ("agreement", "solved"))
    found, truth = measured or exact, "the PBRF" if measured else "exact solves"
    if not found or not found["differences"]:
        return None
    rows: list[Row] = []
    for name, value in found["differences"].items():
        rows.append({"pair": pair(name), "difference": value, "verdict": _verdict(value["interval"])})
    about = [
        f"Difference of two methods’ correlations with {truth}, paired by measurement, so that what makes a "
        f"measurement hard for both cancels. {INTERVAL}"
    ]
    columns = [Column("pair", "methods"), Column("difference", "difference", "mean"), Column("verdict", "the first is")]
    return Section("differences", "Which differences are more than noise", about, columns, rows)


def _verdict(interval: Sequence[float] | None) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "not told apart"
    return "better" if interval[0] > 0 else "worse"


def response(document: Document) -> Section | None:
    """How the response was measured, and whether that came out."""
    found = document["studies"].get("response")
    if not found:
        return None
    rows: list[Row] = [{"what": name, "value": value} for name, value in found["facts"]]
    about = [
        "What every method is compared with: for each point, its loss is added to the objective with weight ε and "
        "the objective is minimised from the trained weights on; the change of every measurement, divided by ε, "
        "is the response.",
        "Two things must hold, and are shown: that the objective was minimised (the gradient at the end over all "
        "training examples, relative to the gradient of the added point, is below the tolerance), and that the "
        "response is linear in ε.",
    ]
    columns = [Column("what", "what"), Column("value", "value")]
    figures = ("convergence", "linearity")
    return Section("response", "How the response was measured", about, columns, rows, found["warnings"], figures)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(document: Document) -> Section | None:
    """Seconds, memory and products of each method."""
    found = document["studies"].get("cost")
    if not found:
        return None
    rows: list[Row] = []
    for name in ordered(found["methods"]):
        record = found["methods"][name]
        parts = record["seconds"]
        cpu = record.get("cpu_seconds") or {}
        rows.append(
            {
                "method": method(name),
                "total": parts["total"],
                **{key: parts.get(key) for key in ("fit", "gradients", "solve", "score")},
                "cpu": cpu.get("total"),
                **{key: record.get(key) for key in ("bytes", "products", "residual")},
                "notes": _notes(record.get("notes") or {}),
            }
        )
    titles = {"total": "in all", "fit": "fitting", "gradients": "gradients", "solve": "solving", "score": "scoring"}
    columns = [METHOD, *(Column(key, title, "seconds") for key, title in titles.items())]
    columns += [
        Column("cpu", "CPU time", "seconds"),
        Column("bytes", "memory", "bytes"),
        Column("products", "products", "count"),
        Column("residual", "residual", "number", 2),
        Column("notes", "notes"),
    ]
    columns = [column for column in columns if any(row.get(column.key) not in (None, "") for row in rows)]
    count = found.get("threads")
    threads = f", each method alone with {count} thread{'s' * (count > 1)}" if count else ""
    about = [
        f"Wall-clock of each method for all {found['measurements']} measurements together, fitting included{threads}. "
        "Products: of the exact Gauss-Newton matrix with all measurements’ vectors. Residual: ‖v − (G + λ)x‖ / ‖v‖, "
        "the largest over measurements. Memory: of factors, corrections and the vectors that a solver holds."
    ]
    about += [f"{method(name)} was left out: {reason}." for name, reason in (found.get("left_out") or {}).items()]
    return Section("time", "Time and memory", about, columns, rows, _cost_warnings(found), ("time",))


def _notes(notes: Mapping[str, Any]) -> str:
    shown = [notes["way"]] if "way" in notes else []
    for key, words in NOTES.items():
        value = notes.get(key)
        if value is not None:
            shown.append(f"{value:,} {words}" if isinstance(value, int) else f"{words} {value:.2g}")
    return ", ".join(shown)


def _cost_warnings(found: Mapping[str, Any]) -> list[str]:
    change = (found["methods"].get("lissa") or {}).get("notes", {}).get("change")
    if isinstance(change, (int, float)) and change > MOVING:
        return [f"LiSSA’s last step still moved its vectors by {change:.0%}: it has not converged."]
    return []


def iterations(document: Document) -> Section | None:
    """Agreement by iterations of conjugate gradients."""
    found = document["studies"].get("iterations")
    if not found:
        return None
    rows = [row for row in found if row["iterations"] in LISTED or row is found[-1]]
    about = [
        "EK-FAC refined by so many iterations of conjugate gradients on exact Gauss-Newton products: correlation with "
        f"the PBRF, and linear datamodeling score. {INTERVAL}"
    ]
    columns = [Column("iterations", "iterations", "count")]
    optional = (("pearson", "correlation with the PBRF"), ("lds", "LDS"))
    columns += [Column(key, title, "mean") for key, title in optional if any(row[key] for row in rows)]
    return Section("iterations", "Conjugate gradients", about, columns, rows, (), ("iterations",))
