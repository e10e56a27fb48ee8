"""Sections of a validation as data: columns, rows of plain values, what they mean; and how a value is written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
Row = dict[str, Any]

INTERVAL = "Brackets are 95 % intervals."
NONE = "–"
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Of the value in a row, and the name of the column in a CSV file.
        title: Of the column for people.
        kind: `text`, `count`, `number`, `mean` (a mean with its interval), `share`, `seconds` or `bytes`.
        digits: Decimals of a `mean`; significant digits of a `number`.
    """

    key: str
    title: str
    kind: str = "text"
    digits: int = 3

    @property
    def numeric(self) -> bool:
        """Whether it is set flush right."""
        return self.kind != "text"


METHOD = Column("method", "method")


@dataclass(frozen=True)
class Section:
    """A table, with what its numbers mean and what a reader must not miss.

    Attributes:
        name: A word: of the CSV file, of the anchor in the page.
        title: For people.
        about: What was done and what each number means; paragraphs.
        columns: Of the table.
        rows: Plain values by the columns' keys; a mean is a mapping with `mean` and `interval`.
        warnings: What did not come out as it should: failures of convergence come first.
        figures: Names of the plots that belong here.
    """

    name: str
    title: str
    about: Sequence[str]
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    warnings: Sequence[str] = ()
    figures: Sequence[str] = ()


def written(column: Column, value: object) -> str:
    """A value as a cell for people."""
    if isinstance(value, Mapping):
        return _mean(value, column.digits)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if column.kind == "text" or not isinstance(value, (int, float)):
        return str(value)
    if column.kind == "mean":
        return signed(f"{value:.{column.digits}f}")
    if column.kind == "count":
        return f"{round(value):,}"
    if column.kind == "share":
        return f"{value:.0%}"
    if column.kind == "seconds":
        return seconds(value)
    if column.kind == "bytes":
        return size(value)
    return signed(f"{value:,.0f}" if abs(value) >= 10**column.digits else f"{value:.{column.digits}g}")


def _mean(value: Mapping[str, Any], digits: int) -> str:
    mean, interval = value.get("mean"), value.get("interval")
    if mean is None:
        return NONE
    text = f"{mean:.{digits}f}"
    if interval is not None:
        text += f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return signed(text)


def signed(text: str) -> str:
    """Text whose numbers have proper minus signs; those of exponents stay."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def seconds(value: float) -> str:
    """Seconds in three digits, minutes and hours where there are many."""
    if value == 0:
        return "0 s"
    if value < 100:
        return f"{value:.3g} s" if value >= 0.0095 else f"{value * 1000:.2g} ms"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float) -> str:
    """Bytes in three digits, in powers of a thousand."""
    power = min(int(math.log10(value) / 3 + 1e-9), len(UNITS) - 1) if value >= 1 else 0
    scaled = value / 1000**power
    return f"{scaled:.3g} {UNITS[power]}" if scaled < 999.5 or power == len(UNITS) - 1 else f"1 {UNITS[power + 1]}"


def flat(section: Section) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows for a CSV file: a mean becomes three columns, numbers stay as they are."""
    means = {
        column.key
        for column in section.columns
        if column.kind == "mean" and any(isinstance(row.get(column.key), Mapping) for row in section.rows)
    }
    names: list[str] = []
    for column in section.columns:
        names.append(column.key)
        names += [f"{column.key}_low", f"{column.key}_high"] * (column.key in means)
    return names, [_flat_row(row, means) for row in section.rows]


def _flat_row(row: Mapping[str, Any], means: set[str]) -> dict[str, Any]:
    found = {key: value for key, value in row.items() if key not in means}
    for key in means:
        value = row.get(key)
        if isinstance(value, Mapping):
            low, high = value.get("interval") or (None, None)
            found |= {key: value.get("mean"), f"{key}_low": low, f"{key}_high": high}
        else:
            found[key] = value
    return found
