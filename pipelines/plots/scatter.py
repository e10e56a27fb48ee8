"""Two runs against each other: scores of the same sequences, and correlations by query (Figures 3 and 30)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.plots.style import CATEGORIES, INK, SOFT, number, panels, safe, styled

COLUMNS = 4
MARKED = 10
ACROSS, UPWARDS = 17, 40  # characters of a line below a run, and beside the axis


@dataclass(frozen=True)
class Cloud:
    """Scores of the same sequences in two runs.

    Attributes:
        name: Of the query.
        first: Scores in the one run, [N].
        second: Scores in the other, [N].
        note: A few words, such as the correlations.
    """

    name: str
    first: np.ndarray
    second: np.ndarray
    note: str = ""


@styled
def scatter(clouds: Sequence[Cloud], x_label: str, y_label: str, *, diagonal: bool) -> Figure:
    """A panel a query; a circle is on the ten highest of the first run, a cross on those of the second.

    Args:
        clouds: What to show.
        x_label: Of the first run.
        y_label: Of the second.
        diagonal: Whether to draw where both scores are the same: of runs whose scores have the same scale.
    """
    several = len(clouds) > 1
    figure, axes = panels(len(clouds), COLUMNS if several else 1, *((2.5, 2.6) if several else (4.6, 4.7)))
    for place, cloud in zip(axes, clouds, strict=True):
        _cloud(place, cloud, diagonal)
    figure.supxlabel(safe(x_label, 90), fontsize=9)
    figure.supylabel(safe(y_label, 60), fontsize=9)
    return figure


def _cloud(place: Axes, cloud: Cloud, diagonal: bool) -> None:
    first, second = np.asarray(cloud.first, float), np.asarray(cloud.second, float)
    alpha = float(np.clip(40 / np.sqrt(max(len(first), 1)), 0.12, 0.8))
    place.scatter(first, second, s=5, lw=0, color=CATEGORIES[0], alpha=alpha, rasterized=True)
    best, other = (np.argsort(-values, kind="stable")[:MARKED] for values in (first, second))
    place.scatter(first[best], second[best], s=24, lw=0.9, facecolors="none", edgecolors=CATEGORIES[1], zorder=3)
    place.scatter(first[other], second[other], s=14, lw=0.9, marker="x", color=CATEGORIES[1], zorder=3)
    if diagonal and len(first):
        low, high = min(first.min(), second.min()), max(first.max(), second.max())
        place.plot([low, high], [low, high], color=SOFT, lw=0.8, ls=(0, (4, 3)), zorder=0)
        place.set_aspect("equal", adjustable="datalim")
    place.set_title(safe(cloud.name, 28))
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.4g}"))))
    place.tick_params(labelsize=7)
    if cloud.note:
        place.text(0.98, 0.03, safe(cloud.note, 60), transform=place.transAxes, ha="right", fontsize=7.5, color=INK)


@styled
def correlations(
    columns: Sequence[str], queries: Mapping[str, Sequence[float | None]], *, label: str, limit: float | None = None
) -> Figure:
    """A dot a query over each run, and their mean as a line from run to run: Figures 3 (right) and 30 (left).

    Args:
        columns: The runs, by what tells them apart.
        queries: By query: its value in each run; None where it is not defined.
        label: What the values are.
        limit: The highest value there can be.
    """
    figure = Figure(figsize=(max(4.2, 1.5 + 1.3 * len(columns)), 3.8), layout="constrained")
    place = figure.add_subplot()
    table_QC = np.array([[np.nan if v is None else v for v in row] for row in queries.values()], float)
    table_QC = table_QC.reshape(len(queries), len(columns))
    at = np.arange(len(columns))
    spread = np.linspace(-0.16, 0.16, len(queries)) if len(queries) > 1 else np.zeros(len(queries))
    for offset, row in zip(spread, table_QC, strict=True):
        place.plot(at + offset, row, ls="", marker="o", ms=4, mew=0, color=CATEGORIES[0], alpha=0.55)
    defined = [row[~np.isnan(row)] for row in table_QC.T]
    means = [float(row.mean()) if len(row) else np.nan for row in defined]
    place.plot(at, means, color=CATEGORIES[1], marker="D", ms=5, lw=1.4)
    for x, mean in zip(at, means, strict=True):
        if not np.isnan(mean):
            place.text(x + 0.2, mean, f"{mean:.3f}", va="center", fontsize=8)
    place.set_xticks(at, [_lines(name, ACROSS) for name in columns])
    place.set_xlim(-0.5, len(columns) - 0.5)
    if limit is not None and table_QC.size:
        low = float(np.nanmin(table_QC)) if not np.isnan(table_QC).all() else 0.0
        room = 0.06 * max(limit - low, 1e-3)
        place.set_ylim(low - room, limit + room)
    place.set_ylabel(_lines(label, UPWARDS))
    place.grid(visible=False, axis="x")
    return figure


def _lines(text: str, width: int) -> str:
    """Text in lines of so many characters, four at most."""
    return "\n".join(textwrap.wrap(safe(text, 4 * width), width, max_lines=4, placeholder=" …")) or " "
