"""How influence is distributed over sequences: survival functions and the share of the top (Figures 8 and 9)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.plots.style import CATEGORIES, DASHES, INK, LINE, SOFT, legend, panels, powers, safe, styled

FEEDS = {"unfiltered": (CATEGORIES[0], "o"), "bm25": (CATEGORIES[1], "s")}  # by colour and by shape
NAMES = {"bm25": "BM25"}
COLUMNS = 4
MANY = len(CATEGORIES) * len(DASHES)


@dataclass(frozen=True)
class Curve:
    """An empirical survival function.

    Attributes:
        influences: Values, positive.
        survivals: Share of the feed's sequences with at least that influence.
    """

    influences: Sequence[float]
    survivals: Sequence[float]


@dataclass(frozen=True)
class PowerLaw:
    """A fit p(x) ∝ x^−alpha for x ≥ xmin, whose survival function there is share · (x / xmin)^(1 − alpha).

    Attributes:
        alpha: The exponent of the density.
        xmin: The cutoff.
        share: Of the feed's sequences at or above it.
    """

    alpha: float
    xmin: float
    share: float


@dataclass(frozen=True)
class Tail:
    """A query's tails.

    Attributes:
        name: Of the query.
        curves: By feed.
        fit: To the unfiltered feed; None where none was made.
        note: A few words beside it.
    """

    name: str
    curves: Mapping[str, Curve]
    fit: PowerLaw | None = None
    note: str = ""


@styled
def survival(tails: Sequence[Tail]) -> Figure:
    """Survival functions of both feeds on logarithmic axes, a panel a query, with the power law as a line.

    A power law is a straight line here. Where BM25's feed lies above the unfiltered one, it finds more than chance.
    The flat part at the left is cut off.
    """
    figure, axes = panels(len(tails), COLUMNS if len(tails) > 1 else 1, *((3.0, 2.5) if len(tails) > 1 else (5, 4)))
    handles: dict[str, object] = {}
    for place, tail in zip(axes, tails, strict=True):
        place.set_title(safe(tail.name, 30))
        place.set_xscale("log")
        place.set_yscale("log")
        for feed, curve in tail.curves.items():
            handles[NAMES.get(feed, feed)] = _points(place, feed, curve)
        if tail.fit:
            handles["power law"] = _line(place, tail.fit, tail.curves["unfiltered"])
        if tail.note:
            _note(place, tail.note)
        _ticks(place, tail)
    figure.supxlabel("influence", fontsize=9)
    figure.supylabel("survival: share of the feed", fontsize=9)
    if handles:
        where = {"loc": "outside upper right", "ncols": len(handles)}
        legend(figure, list(handles.values()), list(handles), **where)
    return figure


def _note(place: Axes, note: str) -> None:
    """A few words inside the panel, however many there are: the layout is made without them."""
    lines = "\n".join(textwrap.wrap(safe(note, 120), 32))
    text = place.text(0.03, 0.04, lines, transform=place.transAxes, fontsize=7, color=INK, clip_on=True)
    text.set_in_layout(False)


def _points(place: Axes, feed: str, curve: Curve) -> object:
    colour, marker = FEEDS.get(feed, (SOFT, "^"))
    return place.plot(
        curve.influences,
        curve.survivals,
        marker=marker,
        ms=2.6,
        ls="none",
        mew=0,
        color=colour,
        alpha=0.75,
        clip_on=True,
    )[0]


def _line(place: Axes, fit: PowerLaw, curve: Curve) -> object:
    last = max([*curve.influences, fit.xmin * 1.01])
    x = np.geomspace(fit.xmin, last, 50)
    return place.plot(x, fit.share * (x / fit.xmin) ** (1 - fit.alpha), color=INK, lw=1.4, zorder=3)[0]


def _ticks(place: Axes, tail: Tail) -> None:
    for axis, values in (
        (place.xaxis, [x for curve in tail.curves.values() for x in curve.influences]),
        (place.yaxis, [y for curve in tail.curves.values() for y in curve.survivals]),
    ):
        if values:
            powers(axis, min(values), max(values))
    flat = [_flat_until(curve) for curve in tail.curves.values() if len(curve.influences) > 1]
    if flat:
        place.set_xlim(left=min(flat))
    if not any(curve.influences for curve in tail.curves.values()):
        place.text(0.5, 0.5, "no positive influence", transform=place.transAxes, ha="center", color=SOFT)


def _flat_until(curve: Curve) -> float:
    """The influence up to which the curve hardly falls: what is below it says nothing of the tail."""
    least = 0.8 * max(curve.survivals)
    return max(x for x, y in zip(curve.influences, curve.survivals, strict=True) if y >= least)


@styled
def influence_share(shares: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """The share of the total positive influence that the top p % of sequences hold, a line a query.

    Args:
        shares: By query: p in percent, and the share (0 to 1), ascending.
    """
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    place = figure.add_subplot()
    place.set_xscale("log")
    handles, names = [], []
    for number, (name, points) in enumerate(shares.items()):
        percents, parts = [p for p, _ in points], [100 * share for _, share in points]
        colour, dash = CATEGORIES[number % len(CATEGORIES)], DASHES[number // len(CATEGORIES) % len(DASHES)]
        if len(shares) > MANY:
            colour, dash = CATEGORIES[0], "-"
        handles.append(place.plot(percents, parts, color=colour, ls=dash, alpha=0.35 if len(shares) > MANY else 1.0)[0])
        names.append(name)
    lowest = min([p for points in shares.values() for p, _ in points if p > 0], default=0.01)
    even = np.geomspace(lowest, 100, 100)
    handles.append(place.plot(even, even, color=SOFT, lw=1, ls=(0, (1, 2)))[0])
    names.append("if all were alike")
    place.set_xlim(lowest, 100)
    place.set_ylim(0, 101)
    powers(place.xaxis, lowest, 100, most=7)
    place.axvline(1, color=LINE, lw=1, zorder=0)
    place.set_xlabel("top sequences, percent of the scanned")
    place.set_ylabel("share of the total positive influence, percent")
    if len(shares) > MANY:
        handles, names = [handles[0], handles[-1]], [f"{len(shares)} queries", "if all were alike"]
    legend(figure, handles, names, loc="outside right upper", ncols=1 if len(names) <= 18 else 2)
    return figure
