"""Which sections a validation has, from `validation.json` alone: every study that was done, what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.validation.presentation.measured import agreement, cost, differences, iterations, response, solved
from pipelines.validation.presentation.retrained import dampings, datamodels, removal, tracing
from pipelines.validation.presentation.settings import blocks, ranks, scale, sizes
from pipelines.validation.presentation.tables import Document, Section, signed
from pipelines.validation.presentation.wording import BLOCKS, method

Builder = Callable[[Document], Section | None]
BUILDERS: Sequence[Builder] = (
    agreement,
    solved,
    differences,
    cost,
    response,
    iterations,
    datamodels,
    dampings,
    removal,
    tracing,
    scale,
    blocks,
    ranks,
    sizes,
)


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
    if found := studies.get("solved"):
        lines.append(
            f"Correlation with exact solves: {_best(found['methods'], 'pearson')}, over {found['points']:,} points, "
            f"{found['measurements']} measurements."
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
    return ", ".join(f"{method(name)} {signed(f'{value:.3f}')}" for value, name in known)


def warnings(document: Document) -> list[str]:
    """Every warning of every section."""
    return [warning for section in sections(document) for warning in section.warnings]
