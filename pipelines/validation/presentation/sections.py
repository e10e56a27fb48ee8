"""Which sections a validation has, from `validation.json` alone: every study that was done, what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.validation.presentation.tables import Column, Section, signed
from pipelines.validation.presentation.wording import BLOCKS, method, pair

Document = Mapping[str, Any]
Row = dict[str, Any]

METHOD = Column("method", "method")
INTERVAL = "Brackets are 95 % intervals."
GOOD_SIZE = 0.9  # correlation of two fits on disjoint halves, below which a warning is given
STRAIGHT = 0.99  # correlation of responses at ε and at another weight, below which they are not called linear
SLOPE = 0.1  # by which a slope may miss 1 before it is pointed out


def sections(document: Document) -> list[Section]:
    """All sections of a validation, in the order in which they are read."""
    return [section for build in BUILDERS if (section := build(document)) is not None]


def headline(document: Document) -> list[str]:
    """Sentences that sum the validation up."""
    studies, lines = document["studies"], []
    if agreed := studies.get("agreement"):
        best = _best(agreed["methods"], "pearson")
        lines.append(
            f"Correlation with the measured response: {best}, over {agreed['points']:,} points, "
            f"{agreed['measurements']} measurements."
        )
    if found := studies.get("datamodels"):
        lines.append(f"Linear datamodeling score: {_best(found['methods'], 'lds')}.")
    if found := studies.get("tracing"):
        lines.append(
            f"Recall@{found['k']} of {found['unit']} that state the fact: {_best(found['methods'], 'recall')}."
        )
    return lines


def _best(methods: Mapping[str, Any], key: str) -> str:
    """The methods that are no variants of others, with their means."""
    plain = {name: record[key]["mean"] for name, record in methods.items() if not BLOCKS.match(name)}
    known = sorted(((value, name) for name, value in plain.items() if value is not None), reverse=True)
    return ", ".join(f"{method(name)} {value:.3f}" for value, name in known)


def warnings(document: Document) -> list[str]:
    """Every warning of every section."""
    return [warning for section in sections(document) for warning in section.warnings]


# --- the response -----------------------------------------------------------------------------------------------------


def _agreement(document: Document) -> Section | None:
    found, costs = document["studies"].get("agreement"), document["studies"].get("cost")
    if not found:
        return None
    seconds = {name: record["seconds"]["total"] for name, record in (costs or {"methods": {}})["methods"].items()}
    rows: list[Row] = [
        {"method": method(name), **record, "seconds": seconds.get(name)}
        for name, record in found["methods"].items()
        if not BLOCKS.match(name)
    ]
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


def _slope_warning(found: Mapping[str, Any]) -> list[str]:
    exact = found["methods"].get("exact")
    slope = exact and exact.get("slope") and exact["slope"]["mean"]
    if not slope or abs(slope - 1) <= SLOPE:
        return []
    return [
        f"Responses are {slope:.2f} times what exact solves predict: the objective was not minimised, or ε is too "
        "large."
    ]


def _differences(document: Document) -> Section | None:
    found = document["studies"].get("agreement")
    if not found or not found["differences"]:
        return None
    rows: list[Row] = []
    for name, value in found["differences"].items():
        rows.append({"pair": pair(name), "difference": value, "verdict": _verdict(value["interval"])})
    about = [
        "Difference of two methods’ correlations with the PBRF, paired by measurement, so that what makes a "
        f"measurement hard for both cancels. {INTERVAL}"
    ]
    columns = [Column("pair", "methods"), Column("difference", "difference", "mean"), Column("verdict", "the first is")]
    return Section("differences", "Which differences are more than noise", about, columns, rows)


def _verdict(interval: Sequence[float] | None) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "not told apart"
    return "better" if interval[0] > 0 else "worse"


def _response(document: Document) -> Section | None:
    found = document["studies"].get("response")
    if not found:
        return None
    rows: list[Row] = [{"what": name, "value": value} for name, value in found["facts"]]
    about = [
        "What every method is compared with: for each point, its loss is added to the objective with weight ε and "
        "the objective is minimised by Adam from the trained weights; the change of every measurement, divided by ε, "
        "is the response.",
        "Two things must hold, and are shown: that the objective was minimised (the gradient at the end over all "
        "training examples, relative to the gradient of the added point, is below the tolerance), and that the "
        "response is linear in ε.",
    ]
    columns = [Column("what", "what"), Column("value", "value")]
    figures = ("convergence", "linearity")
    return Section("response", "How the response was measured", about, columns, rows, found["warnings"], figures)


# --- cost -------------------------------------------------------------------------------------------------------------


def _cost(document: Document) -> Section | None:
    found = document["studies"].get("cost")
    if not found:
        return None
    rows: list[Row] = []
    for name, record in found["methods"].items():
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
    threads = f", each method alone with {found['threads']} threads" if found.get("threads") else ""
    about = [
        f"Wall-clock of each method for all {found['measurements']} measurements together, fitting included{threads}. "
        "Products: of the exact Gauss-Newton matrix with all measurements’ vectors. Residual: ‖v − (G + λ)x‖ / ‖v‖, "
        "the largest over measurements. Memory: of factors, corrections and the vectors that a solver holds."
    ]
    about += [f"{method(name)} was left out: {reason}." for name, reason in (found.get("left_out") or {}).items()]
    return Section("time", "Time and memory", about, columns, rows, _cost_warnings(found), ("time",))


def _notes(notes: Mapping[str, Any]) -> str:
    shown = [f"{key} {value:.4g}" for key, value in notes.items() if isinstance(value, (int, float))]
    shown += [f"{key} {value}" for key, value in notes.items() if isinstance(value, str)]
    return ", ".join(shown)


def _cost_warnings(found: Mapping[str, Any]) -> list[str]:
    change = (found["methods"].get("lissa") or {}).get("notes", {}).get("change")
    if isinstance(change, (int, float)) and change > 0.1:
        return [f"LiSSA’s last step still moved its vectors by {change:.0%}: it has not converged."]
    return []


def _iterations(document: Document) -> Section | None:
    found = document["studies"].get("iterations")
    if not found:
        return None
    about = [
        "Correlation with the PBRF of EK-FAC refined by so many iterations of conjugate gradients on exact "
        f"Gauss-Newton products. {INTERVAL}"
    ]
    columns = [
        Column("iterations", "iterations", "count"),
        Column("pearson", "correlation with the PBRF", "mean"),
    ]
    return Section("iterations", "Conjugate gradients", about, columns, found, (), ("iterations",))


# --- retraining -------------------------------------------------------------------------------------------------------


def _datamodels(document: Document) -> Section | None:
    found = document["studies"].get("datamodels")
    if not found:
        return None
    rows: list[Row] = [
        {"method": method(name), "lds": record["lds"], "tests": record["tests"], "difference": record["difference"]}
        for name, record in found["methods"].items()
    ]
    if found["ceiling"]:
        rows.append({"method": "the best there can be", "lds": found["ceiling"]})
    columns = [METHOD, Column("lds", "LDS", "mean")]
    if any(row.get("tests") for row in rows):
        columns.append(Column("tests", "with intervals over test examples", "mean"))
    if any(row.get("difference") for row in rows):
        columns.append(Column("difference", "more than EK-FAC", "mean"))
    models = "model" if found["retrainings"] == 1 else f"models ({found['retrainings']} a subset)"
    about = [
        f"Models were trained on {found['subsets']} random subsets of {found['share']:.0%} of the {found['unit']}, "
        f"{found['subsets'] * found['retrainings']:,} {models} in all. LDS: Spearman’s correlation over subsets of "
        "the measured value with the sum of a method’s scores over the subset, averaged over measurements. "
        f"{INTERVAL}",
    ]
    if found["ceiling"]:
        about.append(
            "The best there can be: what a perfect prediction would reach, given how far models of the same subset "
            "differ by their first weights and order (from the agreement of disjoint halves of the retrainings)."
        )
    return Section(
        "datamodels", "Linear datamodeling score: retraining on random subsets", about, columns, rows, (), ("lds",)
    )


def _removal(document: Document) -> Section | None:
    found = document["studies"].get("removal")
    if not found:
        return None
    rows: list[Row] = [{"method": method(name), **record} for name, record in found["methods"].items()]
    measured = found["measured"]
    columns = [METHOD, Column("change", f"change of the {measured}", "mean", 4)]
    optional = {"over_random": "beyond random", "over_bm25": "beyond BM25"}
    columns += [Column(key, title, "mean", 4) for key, title in optional.items() if any(row.get(key) for row in rows)]
    if any(row.get("wins") is not None for row in rows):
        columns.append(Column("wins", "more than random", "share"))
    direction = "Higher" if measured == "loss" else "Lower"
    base = signed(f"{found['base']:.4g}")
    about = [
        f"For each of {found['measurements']} measurements, the {found['dropped']:,} {found['unit']} "
        f"({100 * found['share']:.3g} % of all) with the highest scores are left out and models are trained again "
        f"({found['retrainings']} each). The change of the measurement’s {measured}, which is "
        f"{base} where nothing is left out. {direction} is better: what was removed had helped. {INTERVAL}"
    ]
    return Section("removal", "Removal of the most influential", about, columns, rows, (), ("removal",))


# --- known facts ------------------------------------------------------------------------------------------------------


def _tracing(document: Document) -> Section | None:
    found = document["studies"].get("tracing")
    if not found:
        return None
    rows: list[Row] = [{"method": method(name), **record} for name, record in found["methods"].items()]
    columns = [
        METHOD,
        Column("recall", f"recall@{found['k']}", "mean"),
        Column("reciprocal_rank", "MRR", "mean"),
    ]
    if any(row.get("difference") for row in rows):
        columns.append(Column("difference", "recall beyond EK-FAC", "mean"))
    candidates = f" BM25 → EK-FAC orders BM25’s first {found['candidates']:,}." if found.get("candidates") else ""
    about = [
        f"{found['queries']:,} facts that the model completes, and the {found['unit']} among {found['documents']:,} "
        f"that state them. recall@{found['k']}: the share of these among the {found['k']} highest scores; MRR: mean "
        f"of one over the rank of the first.{candidates} {INTERVAL}"
    ]
    return Section("tracing", "Fact tracing", about, columns, rows, (), ("tracing",))


# --- cheaper settings -------------------------------------------------------------------------------------------------


def _blocks(document: Document) -> Section | None:
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


def _ranks(document: Document) -> Section | None:
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


def _sizes(document: Document) -> Section | None:
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


def _scale(document: Document) -> Section | None:
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


Builder = Callable[[Document], Section | None]
BUILDERS: Sequence[Builder] = (
    _agreement,
    _differences,
    _cost,
    _response,
    _iterations,
    _datamodels,
    _removal,
    _tracing,
    _scale,
    _blocks,
    _ranks,
    _sizes,
)
