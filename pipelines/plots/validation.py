"""How methods compare with what was measured: Figures 6, 7 and 30, scatter plots with their slope, convergence."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from pipelines.plots.style import CATEGORIES, INK, LINE, SOFT, legend, number, panels, powers, safe, styled

COLUMNS = 4
WIDEST = 10.0  # inches
CROWDED = 12  # points of a line above which intervals become a band
HALF_WIDTH = 0.16  # over which the dots of single measurements are spread, in widths of a bar's place


@dataclass(frozen=True)
class Estimate:
    """A mean over measurements.

    Attributes:
        mean: None where it is not defined.
        interval: Of the mean, [low, high].
        values: Of single measurements, shown as dots.
    """

    mean: float | None
    interval: Sequence[float] | None = None
    values: Sequence[float | None] = ()


@dataclass(frozen=True)
class Series:
    """Something that was measured at several settings.

    Attributes:
        name: For the legend; none if empty.
        x: The settings, ascending and positive.
        y: What was measured at each.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Estimate]


@dataclass(frozen=True)
class Plane:
    """What was predicted against what was measured, of the same things.

    Attributes:
        name: A title, of one line or of two.
        predicted: [N].
        measured: [N].
        slope: Of a line through the origin; None draws none.
        note: A few words, such as the correlation.
    """

    name: str
    predicted: Sequence[float]
    measured: Sequence[float]
    slope: float | None = None
    note: str = ""


@styled
def method_bars(
    groups: Mapping[str, Mapping[str, Estimate]],
    colours: Mapping[str, str],
    *,
    label: str,
    limit: float | None = None,
    reference: tuple[str, float] | None = None,
    logarithmic: bool = False,
) -> Figure:
    """A bar a method in a group a data set, with its interval and a dot for each measurement (Figures 6 and 7).

    Args:
        groups: By data set, by method. Of one data set, methods stand under their bars.
        colours: By method.
        label: Of the axis of values.
        limit: The highest value there can be.
        reference: A level to compare with, and its name.
        logarithmic: Whether the axis of values is.
    """
    methods = list(dict.fromkeys(name for group in groups.values() for name in group))
    alone = len(groups) == 1
    width = 1.0 if alone else 0.84 / max(len(methods), 1)
    across = max(4.4, 1.2 + 1.15 * len(methods)) if alone else max(6.4, 1.6 + 0.24 * len(groups) * len(methods))
    across = min(across, WIDEST)
    figure = Figure(figsize=(across, 3.8), layout="constrained")
    place = figure.add_subplot()
    if logarithmic:
        _logarithmic(place, [found.mean for group in groups.values() for found in group.values()])
    handles = {}
    for row, group in enumerate(groups.values()):
        for column, method in enumerate(methods):
            if (found := group.get(method)) is None or found.mean is None:
                continue
            at = column if alone else row + (column - (len(methods) - 1) / 2) * width
            handles[method] = place.bar(at, found.mean, width=0.68 if alone else 0.92 * width, color=colours[method])
            _measurements(place, at, found, (0.68 if alone else width) * HALF_WIDTH * 2)
    if not logarithmic:
        place.axhline(0, color=SOFT, lw=0.8)
    if reference is not None:
        handles[reference[0]] = (place.axhline(reference[1], color=INK, lw=1.0, ls=(0, (4, 3))),)
    names = [safe(name, 30) for name in (methods if alone else groups)]
    place.set_xticks(range(len(names)), [_folded(name) for name in names] if alone else names)
    place.tick_params(axis="x", length=0)
    place.set_xlim(-0.6, len(names) - 0.4)
    if limit is not None:
        place.set_ylim(top=limit * 1.02)
    place.set_ylabel(safe(label))
    place.grid(visible=False, axis="x")
    shown = [name for name in handles if not alone or name not in methods]
    if shown:
        entries = min(len(shown), max(2, int(across / 1.7)))
        legend(figure, [handles[name][0] for name in shown], shown, loc="outside upper left", ncols=entries)
    return figure


def _logarithmic(place: Axes, values: Sequence[float | None]) -> None:
    """An axis of values from below the least to above the largest of them, all positive."""
    known = [value for value in values if value is not None and value > 0]
    low, high = 10 ** np.floor(np.log10(min(known, default=1.0)) - 0.2), 1.5 * max(known, default=1.0)
    place.set_yscale("log")
    place.set_ylim(low, high)
    powers(place.yaxis, float(low), high, most=7)


def _measurements(place: Axes, at: float, found: Estimate, spread: float) -> None:
    """The interval of a mean as a line, and the single values behind it."""
    values = [value for value in found.values if value is not None]
    if values:
        offsets = np.linspace(-spread, spread, len(values)) if len(values) > 1 else np.zeros(1)
        place.plot(at + offsets, values, ls="", marker="o", ms=3.2, mew=0.6, mec=INK, mfc="white", alpha=0.8)
    if found.interval is not None:
        place.plot([at, at], found.interval, color=INK, lw=1.2, marker="_", ms=6, zorder=3)


def _folded(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 15))


@styled
def wall_clock(methods: Mapping[str, tuple[float, float]], colours: Mapping[str, str], *, label: str) -> Figure:
    """Seconds by method on a logarithmic axis, with the part that is spent once marked (Figure 7).

    Args:
        methods: Seconds in all, and those of them that fitting took.
        colours: By method.
        label: Of the axis of values.
    """
    figure = Figure(figsize=(6.8, 1.0 + 0.28 * len(methods)), layout="constrained")
    place = figure.add_subplot()
    totals = [max(total, 1e-4) for total, _ in methods.values()]
    low, high = 10 ** np.floor(np.log10(min(totals, default=1.0)) - 0.3), max(totals, default=1.0) * 3
    marked = False
    for y, (method, (_, fitted)) in enumerate(methods.items()):
        place.barh(y, totals[y] - low, left=low, height=0.72, color=colours[method])
        if low < fitted < totals[y]:
            marked = True
            place.plot([fitted, fitted], [y - 0.36, y + 0.36], color="white", lw=1.6)
            place.plot([fitted, fitted], [y - 0.36, y + 0.36], color=INK, lw=1.0, ls=(0, (2, 1)))
        place.text(totals[y] * 1.1, y, safe(f"{number(float(f'{totals[y]:.3g}'))} s"), va="center", fontsize=8)
    place.set_xscale("log")
    place.set_xlim(low, high)
    powers(place.xaxis, float(low), high, most=7)
    place.set_yticks(range(len(methods)), [safe(method, 48) for method in methods])
    place.tick_params(axis="y", length=0)
    place.set_ylim(len(methods) - 0.4, -0.6)
    place.grid(visible=False, axis="y")
    place.set_xlabel(safe(label + ("; dashes: of which fitting" if marked else "")))
    return figure


@styled
def dependence(
    plots: Mapping[str, Sequence[Series]],
    *,
    label: str,
    logarithmic: Sequence[str] = (),
    limit: float | None = None,
    mark: tuple[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """A panel a quantity: lines over a setting on a logarithmic axis (Figures 3 and 30, sample sizes, ε).

    Args:
        plots: By what is measured.
        label: Of the setting.
        logarithmic: Quantities with a logarithmic axis.
        limit: The highest value of the first quantity.
        mark: A setting to point out, and its name.
        colours: By the name of a series.
    """
    figure, axes = panels(len(plots), len(plots), 4.2 if len(plots) > 1 else 5.6, 3.5)
    handles: dict[str, object] = {}
    settings = sorted({x for lines in plots.values() for line in lines for x in line.x})
    for order, (place, (quantity, lines)) in enumerate(zip(axes, plots.items(), strict=True)):
        place.set_xscale("log")
        if quantity in logarithmic:
            place.set_yscale("log")
        for index, line in enumerate(lines):
            colour = (colours or {}).get(line.name, CATEGORIES[index % len(CATEGORIES)])
            drawn = _line(place, line, colour)
            if line.name:
                handles[line.name] = drawn
        place.set_ylabel(safe(quantity, 60))
        _settings(place, settings)
        if quantity in logarithmic:
            values = [y.mean for line in lines for y in line.y if y.mean is not None and y.mean > 0]
            if values:
                powers(place.yaxis, min(values), max(values))
        elif limit is not None and order == 0:
            low, high = place.get_ylim()
            place.set_ylim(low, max(high, limit + 0.03 * (limit - low)) if high > limit else high)
        if mark is not None:
            handles[mark[0]] = place.axvline(mark[1], color=INK, lw=1.0, ls=(0, (4, 3)), zorder=0)
    figure.supxlabel(safe(label, 90), fontsize=9)
    if len(handles) > (mark is None):
        legend(figure, list(handles.values()), list(handles), loc="outside upper left", ncols=min(len(handles), 4))
    return figure


def _line(place: Axes, line: Series, colour: str) -> object:
    known = [(x, y.mean) for x, y in zip(line.x, line.y, strict=True) if y.mean is not None]
    x, means = [x for x, _ in known], [mean for _, mean in known]
    bands = [(x, *y.interval) for x, y in zip(line.x, line.y, strict=True) if y.interval is not None]
    if len(known) > CROWDED:
        if bands:
            at, low, high = np.array(bands).T
            place.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)
        return place.plot(x, means, color=colour, lw=1.6)[0]
    for at, y in zip(line.x, line.y, strict=True):
        values = [value for value in y.values if value is not None]
        place.plot([at] * len(values), values, ls="", marker="o", ms=3, mew=0, color=colour, alpha=0.35)
    for at, low, high in bands:
        place.plot([at, at], [low, high], color=colour, lw=1.0, marker="_", ms=5)
    return place.plot(x, means, color=colour, marker="D", ms=4, lw=1.4)[0]


def _settings(place: Axes, settings: Sequence[float]) -> None:
    """A tick at each setting where there is room, else at powers of ten."""
    if len(settings) <= 8:
        place.set_xticks(list(settings), [number(float(f"{x:.4g}")) for x in settings])
        place.xaxis.set_minor_locator(NullLocator())
    else:
        powers(place.xaxis, min(settings), max(settings), most=6)


@styled
def planes(given: Sequence[Plane], x_label: str, y_label: str) -> Figure:
    """A panel each: measured over predicted, the line through the origin that fits best, and that of slope 1."""
    several = len(given) > 1
    size = (2.7, 2.8) if several else (4.8, 4.4)
    figure, axes = panels(len(given), min(COLUMNS, len(given)), *size)
    for place, plane in zip(axes, given, strict=True):
        _plane(place, plane, 30 if several else 60)
    figure.supxlabel(safe(x_label, 90), fontsize=9)
    figure.supylabel(safe(y_label, 60), fontsize=9)
    return figure


def _plane(place: Axes, plane: Plane, room: int) -> None:
    predicted, measured = np.asarray(plane.predicted, float), np.asarray(plane.measured, float)
    place.axhline(0, color=LINE, lw=0.8, zorder=0)
    place.axvline(0, color=LINE, lw=0.8, zorder=0)
    alpha = float(np.clip(40 / np.sqrt(max(len(predicted), 1)), 0.12, 0.8))
    place.scatter(predicted, measured, s=6, lw=0, color=CATEGORIES[0], alpha=alpha, rasterized=True)
    ends = np.array([predicted.min(initial=0.0), predicted.max(initial=0.0)])
    low, high = measured.min(initial=0.0), measured.max(initial=0.0)
    margin = 0.06 * ((high - low) or 1.0)
    if plane.slope is not None:
        place.plot(ends, plane.slope * ends, color=CATEGORIES[1], lw=1.4)
        place.plot(ends, ends, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=0)
    place.set_ylim(low - margin, high + margin)
    place.set_title("\n".join(safe(line, 30) for line in plane.name.split("\n")))
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.3g}"))))
    place.tick_params(labelsize=7)
    if plane.note:
        lines = "\n".join(textwrap.wrap(safe(plane.note, 120), room))
        place.text(0.03, 0.97, lines, transform=place.transAxes, va="top", fontsize=7.5, color=INK)


@styled
def below(values: Mapping[str, Sequence[float]], *, label: str, limit: float, limit_name: str) -> Figure:
    """Which share of points is at or below each value, on a logarithmic axis, with the limit they should keep.

    Args:
        values: By name of the line; positive. Those that are infinite count, and are beyond the end.
        label: Of the values.
        limit: What the values should stay below.
        limit_name: What it is called.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    place = figure.add_subplot()
    place.set_xscale("log")
    handles: dict[str, object] = {}
    everything = [value for line in values.values() for value in line if 0 < value < np.inf]
    for index, (name, line) in enumerate(values.items()):
        ordered = np.sort([max(value, min(everything, default=1e-12)) for value in line if value < np.inf])
        share = 100 * np.arange(1, len(ordered) + 1) / max(len(line), 1)
        handles[name] = place.step(ordered, share, where="post", color=CATEGORIES[index % len(CATEGORIES)])[0]
    handles[limit_name] = place.axvline(limit, color=INK, lw=1.0, ls=(0, (4, 3)))
    powers(place.xaxis, min([*everything, limit]), max([*everything, limit]))
    place.set_ylim(0, 103)
    place.set_xlabel(safe(label, 90))
    place.set_ylabel("percent of the points, at most")
    legend(figure, list(handles.values()), list(handles), loc="outside upper left", ncols=3)
    return figure
