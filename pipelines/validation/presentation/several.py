"""Several validations side by side: a row a method, a column a data set (Figures 6 and 7 as tables)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.validation.presentation.figures import labels
from pipelines.validation.presentation.sections import warnings
from pipelines.validation.presentation.tables import INTERVAL, Column, Document, Section
from pipelines.validation.presentation.wording import BLOCKS, method, ordered, pair

Values = Mapping[str, Any]


def several(documents: Sequence[Document]) -> list[Section]:
    """Sections over all runs; a study that only some of them did has columns for those."""
    return [section for section in _sections(documents) if section.rows]


def _sections(documents: Sequence[Document]) -> Iterator[Section]:
    counts = {study["points"] for document in documents if (study := document["studies"].get("agreement"))}
    points = f"{min(counts):,}" if len(counts) == 1 else "the same"
    yield _table(
        documents,
        ("agreement", "Agreement with the measured response"),
        "agreement",
        lambda study: {name: record["pearson"] for name, record in study["methods"].items()},
        f"Pearson’s correlation of scores with the measured response (Equation 7: the PBRF) over {points} training "
        f"points, averaged over measurements. {INTERVAL}",
        figures=("agreement",),
    )
    yield _table(
        documents,
        ("differences", "Which differences are more than noise"),
        "agreement",
        lambda study: study["differences"],
        f"Differences of these correlations, paired by measurement. {INTERVAL}",
        called=pair,
    )
    yield _table(
        documents,
        ("time", "Wall-clock time"),
        "cost",
        lambda study: {name: record["seconds"]["total"] for name, record in study["methods"].items()},
        "For all measurements together, fitting included.",
        kind="seconds",
        figures=("time",),
    )
    yield _table(
        documents,
        ("datamodels", "Linear datamodeling score"),
        "datamodels",
        lambda study: (
            {name: record["lds"] for name, record in study["methods"].items()}
            | ({"ceiling": study["ceiling"]} if study["ceiling"] else {})
        ),
        f"Spearman’s correlation of sums of scores with models trained on random subsets. {INTERVAL}",
        called=lambda name: "the best there can be" if name == "ceiling" else method(name),
        figures=("lds",),
    )
    yield _table(
        documents,
        ("blocks", "Block-diagonal factors"),
        "blocks",
        lambda study: {f"{row['blocks']}": row["agreement"] for row in study["rows"]},
        "Correlation of EK-FAC with the PBRF (with whole factors, where no response was measured) by the diagonal "
        f"blocks of its factors, which take one over so much memory. {INTERVAL}",
        called=str,
        head="blocks",
        figures=("blocks",),
    )
    yield _table(
        documents,
        ("sizes", "How much data the factors need"),
        "sizes",
        lambda study: {_share(row["size"], study["total"]): row["between"] for row in reversed(study["rows"])},
        "Correlation of the scores of two fits on disjoint samples, by the share of the training examples that each "
        f"of them has. {INTERVAL}",
        called=str,
        head="share",
        figures=("sizes",),
    )
    yield _table(
        documents,
        ("tracing", "Fact tracing"),
        "tracing",
        lambda study: {name: record["recall"] for name, record in study["methods"].items()},
        f"Recall of what states the fact, among the highest scores. {INTERVAL}",
        figures=("tracing",),
    )
    yield _runs(documents)


def _share(size: int, total: int) -> str:
    """1/2, 1/4 ...: samples are halved again and again, so the nearest one is meant."""
    return f"1/{2 ** round(math.log2(total / size))}"


def _table(
    documents: Sequence[Document],
    names: tuple[str, str],
    study: str,
    values: Callable[[Any], Values],
    about: str,
    *,
    kind: str = "mean",
    called: Callable[[str], str] = method,
    head: str = "",
    figures: Sequence[str] = (),
) -> Section:
    name, title = names
    found = {
        label: values(document["studies"][study])
        for label, document in zip(labels(documents), documents, strict=True)
        if document["studies"].get(study)
    }
    keys = [key for key in dict.fromkeys(key for each in found.values() for key in each) if not BLOCKS.match(key)]
    rows = [{"what": called(key), **{label: each.get(key) for label, each in found.items()}} for key in ordered(keys)]
    first = head or ("methods" if called is pair else "method")
    columns = [Column("what", first), *(Column(label, label, kind) for label in found)]
    return Section(name, title, [about], columns, rows, (), figures)


def _runs(documents: Sequence[Document]) -> Section:
    rows = []
    for label, document in zip(labels(documents), documents, strict=True):
        response = document["studies"].get("response") or {}
        converged = response.get("converged")
        rows.append(
            {
                "run": label,
                "date": document["date"],
                "seconds": sum(stage["seconds"] for stage in document["stages"].values()),
                "measurements": (document["studies"].get("agreement") or {}).get("measurements"),
                "epsilon": response.get("epsilon"),
                "converged": None if converged is None else f"{converged:,} of {len(response['gradients']):,}",
            }
        )
    columns = [
        Column("run", "run"),
        Column("date", "date"),
        Column("measurements", "measurements", "count"),
        Column("epsilon", "ε", "number", 2),
        Column("converged", "objectives minimised"),
        Column("seconds", "all steps", "seconds"),
    ]
    warned = [
        f"{label}: {warning}"
        for label, document in zip(labels(documents), documents, strict=True)
        for warning in warnings(document)
    ]
    about = ["Objectives minimised: points whose gradient at the end is below the tolerance."]
    return Section("runs", "The runs", about, columns, rows, warned)
