"""`validation.md`, and what the terminal shows of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from pipelines.plots.style import safe
from pipelines.validation.presentation.sections import headline, sections
from pipelines.validation.presentation.tables import Document, Section, written
from pipelines.validation.presentation.wording import SUBJECTS

WIDTH = 118


def markdown(document: Document, figures: Mapping[str, str] | None = None, level: int = 1) -> str:
    """The page.

    Args:
        document: The content of `validation.json`.
        figures: By name: the path of the picture; those that are not there are left out.
        level: Of the page's own heading.
    """
    mark = "#" * level
    parts = [f"{mark} Validation: {called(document)}", "\n".join(_facts(document))]
    for section in sections(document):
        parts.append(f"{mark}# {section.title}")
        parts += [f"**{warning}**" for warning in section.warnings]
        parts += ["\n".join(textwrap.wrap(text, WIDTH, break_on_hyphens=False)) for text in section.about]
        parts.append(table(section))
        shown = [name for name in section.figures if name in (figures or {})]
        parts += [f"![{section.title}: {name}]({(figures or {})[name]})" for name in shown]
    return "\n\n".join(parts) + "\n"


def terminal(document: Document) -> str:
    """Tables with their headings and warnings, and no explanations."""
    parts = [f"{called(document)}: validation", "\n".join(_facts(document))]
    parts += [titled(section) for section in sections(document)]
    lines = headline(document)
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def titled(section: Section) -> str:
    """A table with its heading and its warnings, for a terminal."""
    return "\n".join([section.title, *(f"  ! {warning}" for warning in section.warnings), table(section)])


def called(document: Document) -> str:
    """The data set, and the name of the run where that says more."""
    subject = SUBJECTS.get(document["subject"], document["subject"])
    return safe(f"{subject} ({document['name']})")


def _facts(document: Document) -> list[str]:
    model = document["studies"]["model"]
    lines = [f"- {safe(name)}: {safe(value)}" for name, value in model["facts"]]
    return [*lines, *(f"- **{safe(warning)}**" for warning in model["warnings"])]


def table(section: Section) -> str:
    """The section's table in Markdown, its columns aligned."""
    head = [column.title for column in section.columns]
    body = [[_cell(written(column, row.get(column.key))) for column in section.columns] for row in section.rows]
    widths = [max(3, *(len(line[at]) for line in [head, *body])) for at in range(len(head))]
    rule = [
        "-" * (width - 1) + ":" if column.numeric else "-" * width
        for column, width in zip(section.columns, widths, strict=True)
    ]
    return "\n".join(_line(cells, widths, section) for cells in [head, rule, *body])


def _line(cells: Sequence[str], widths: Sequence[int], section: Section) -> str:
    placed = [
        cell.rjust(width) if column.numeric else cell.ljust(width)
        for cell, width, column in zip(cells, widths, section.columns, strict=True)
    ]
    return f"| {' | '.join(placed)} |"


def _cell(text: str) -> str:
    return safe(text).replace("|", "\\|")
