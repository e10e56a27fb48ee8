"""Grouped bars: the influence of sequences that somebody wrote, in partitions (Figures 24-26)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.plots.style import INK, NEGATIVE, POSITIVE, SOFT, number, safe, styled

WIDTH = 62  # characters a line of a label
LINES = 3
BAR, LINE_HEIGHT, GAP = 0.30, 0.15, 0.34  # inches: a bar with a label of one line, a further line, between groups

Value = tuple[float, tuple[float, float] | None]


@styled
def grouped_bars(groups: Mapping[str, Mapping[str, Value]], *, title: str = "", label: str = "influence") -> Figure:
    """Horizontal bars in named groups, from the top down, each with its text at its left.

    Args:
        groups: By name of the group, by text of the bar: its value, and an interval (low, high) or None. Texts may be
            long; they are wrapped, and cut after three lines.
        title: Over all.
        label: Of the axis of values.
    """
    rows = [(name, text, value) for name, bars in groups.items() for text, value in bars.items()]
    labels = [_wrapped(text) for _, text, _ in rows]
    tops, places, height = {}, [], 0.0
    for (name, _, _), wrapped in zip(rows, labels, strict=True):
        if name not in tops:
            height += GAP if tops else 0.0
            tops[name] = height
            height += GAP if name else 0.0
        thick = BAR + LINE_HEIGHT * wrapped.count("\n")
        places.append(height + thick / 2)
        height += thick
    figure = Figure(figsize=(8.6, height + 1.0), layout="constrained")
    place = figure.add_subplot()
    values = np.array([value for _, _, (value, _) in rows], float)
    place.barh(places, values, height=BAR * 0.72, color=np.where(values >= 0, POSITIVE, NEGATIVE).tolist())
    for at, (_, _, (_, interval)) in zip(places, rows, strict=True):
        if interval is not None:
            place.plot(interval, [at, at], color=INK, lw=1.0, marker="|", ms=4)
    for name, top in tops.items():
        if name:
            place.annotate(
                safe(name, 80),
                (0, top + GAP / 2),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                fontweight="bold",
            )
    place.set_yticks(places, labels)
    place.tick_params(axis="y", length=0, labelsize=8)
    place.set_ylim(height + BAR / 3, -BAR / 3)
    place.axvline(0, color=SOFT, lw=0.8)
    place.grid(visible=False, axis="y")
    place.spines["left"].set_visible(False)
    place.xaxis.set_major_locator(MaxNLocator(6))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.4g}"))))
    place.set_xlabel(safe(label))
    if title:
        figure.suptitle(safe(title, 110), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _wrapped(text: str) -> str:
    """Lines of a label; scripts without spaces are cut where a line is full, at half the width where they are wide."""
    line = safe(text, WIDTH * LINES)
    wide = sum(ord(char) >= 0x1100 for char in line) > len(line) / 3
    return "\n".join(textwrap.wrap(line, WIDTH // 2 if wide else WIDTH, max_lines=LINES, placeholder=" …")) or "␣"
