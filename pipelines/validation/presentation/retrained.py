"""Sections on models that were trained again, and on facts whose sources are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.validation.presentation.tables import INTERVAL, METHOD, Column, Document, Row, Section, signed
from pipelines.validation.presentation.wording import method, ordered

# --- retraining -------------------------------------------------------------------------------------------------------


def datamodels(document: Document) -> Section | None:
    """Linear datamodeling scores; None where no subsets were drawn."""
    found = document["studies"].get("datamodels")
    if not found:
        return None
    rows: list[Row] = [{"method": method(name), **found["methods"][name]} for name in ordered(found["methods"])]
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


def dampings(document: Document) -> Section | None:
    """Linear datamodeling scores by damping; None where one was tried."""
    found = (document["studies"].get("datamodels") or {}).get("dampings")
    if not found:
        return None
    methods = list(dict.fromkeys(name for row in found for name in row["methods"]))
    others = list(dict.fromkeys(name for row in found for name in row["differences"]))
    rows: list[Row] = [
        {"damping": _damping(row)}
        | row["methods"]
        | {f"{name}_beyond": difference for name, difference in row["differences"].items()}
        for row in found
    ]
    columns = [Column("damping", "damping"), *(Column(name, f"LDS, {method(name)}", "mean") for name in methods)]
    columns += [Column(f"{name}_beyond", f"{method(name)} more than EK-FAC", "mean") for name in others]
    about = [
        "Retraining does not know the damping of the proximal Bregman objective: it answers by how far training moves. "
        "The same scores with other dampings: multiples of the usual one, which is a factor of each layer’s mean "
        "eigenvalue, and that of early stopping, 1/(ηK) + L2 for K steps at learning rate η, the same in every layer. "
        f"{INTERVAL}"
    ]
    return Section("dampings", "Linear datamodeling score by damping", about, columns, rows)


def _damping(row: Mapping[str, Any]) -> str:
    if row["multiple"] is None:
        return f"early stopping, {row['damping']:.2g}"
    return "the usual one" if row["multiple"] == 1 else f"{row['multiple']:g} times the usual one"


def removal(document: Document) -> Section | None:
    """What is lost without the most influential examples."""
    found = document["studies"].get("removal")
    if not found:
        return None
    rows: list[Row] = [{"method": method(name), **found["methods"][name]} for name in ordered(found["methods"])]
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


def tracing(document: Document) -> Section | None:
    """Recall of what states a fact."""
    found = document["studies"].get("tracing")
    if not found:
        return None
    rows: list[Row] = [{"method": method(name), **found["methods"][name]} for name in ordered(found["methods"])]
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
