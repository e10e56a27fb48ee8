"""Where in the network influence lies: by layer and query (Figures 19 and 35), by token and layer (Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.plots.style import INK, NEGATIVE, POSITIVE, SIGNED, SOFT, number, panels, safe, styled

COLUMNS = 4
MOST_LABELS = 12
NAMED_TOKENS = 8
SATURATION = 0.995  # quantile of the sizes of cells at which colours are full


@dataclass(frozen=True)
class LayerShares:
    """How a query's influence is distributed over groups of layers.

    Attributes:
        name: Of the query.
        groups: Their names, in the order of the network.
        shares: Of the influence, [G]; they add up to 1, and some may be negative.
        low: Lower quartile over sequences, [G].
        high: Upper quartile over sequences, [G].
    """

    name: str
    groups: Sequence[str]
    shares: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class TokenMap:
    """The influence of one sequence by token and group of layers.

    Attributes:
        name: A title.
        pieces: Text of each token, [T].
        groups: Names of the groups of layers, [G].
        matrix_TG: Influence.
    """

    name: str
    pieces: Sequence[str]
    groups: Sequence[str]
    matrix_TG: np.ndarray


@styled
def layer_shares(queries: Sequence[LayerShares], sequences: int) -> Figure:
    """A panel a query: bars of the mean share of influence by group of layers, lines from quartile to quartile.

    Args:
        queries: What to show; all have the same groups.
        sequences: How many top sequences the shares are of, at most.
    """
    several = len(queries) > 1
    size = (2.5, 2.1) if several else (5.0, 3.6)
    figure, axes = panels(len(queries), COLUMNS if several else 1, *size, sharey=several)
    for place, query in zip(axes, queries, strict=True):
        at = np.arange(len(query.groups))
        shares, low, high = (100 * np.asarray(values, float) for values in (query.shares, query.low, query.high))
        place.bar(at, shares, width=0.8, color=np.where(shares >= 0, POSITIVE, NEGATIVE).tolist())
        place.vlines(at, low, high, color=INK, lw=0.8)
        place.axhline(0, color=SOFT, lw=0.7)
        place.grid(visible=False, axis="x")
        place.set_title(safe(query.name, 28))
        _label_groups(place, query.groups)
    prefix, _ = _without_prefix(queries[0].groups if queries else [])
    figure.supxlabel(safe(prefix, 40) or "layers", fontsize=9)
    figure.supylabel(f"percent of influence, top {sequences}", fontsize=9)
    return figure


def _without_prefix(groups: Sequence[str]) -> tuple[str, list[str]]:
    """The word that all names begin with, and what is left of each: `block 0`, `block 1` are `block` and 0, 1."""
    heads = {group.rpartition(" ")[0] for group in groups}
    if len(heads) == 1 and "" not in heads:
        return heads.pop(), [group.rpartition(" ")[2] for group in groups]
    return "", list(groups)


def _label_groups(place: Axes, groups: Sequence[str], rotate: bool = True) -> None:
    """Every group's name where there is room, else every second, third, ...."""
    _, names = _without_prefix(groups)
    step = -(-len(names) // MOST_LABELS) if names else 1
    chosen = list(range(0, len(names), step))
    shown = [safe(names[index], 18) for index in chosen]
    place.set_xticks(chosen, shown)
    if rotate and max(map(len, shown), default=0) * len(shown) > 30:
        place.tick_params(axis="x", rotation=90 if len(shown) > 6 else 45, labelsize=7)


@styled
def token_map(given: TokenMap) -> Figure:
    """Token × layer map with its sums beside it; red raises the query's completion, teal lowers it.

    Colours are symmetric about zero and full at a quantile of the cells' sizes, which the scale states.
    """
    matrix_GT = np.asarray(given.matrix_TG, float).T
    groups, tokens = matrix_GT.shape
    figure = Figure(figsize=(8.6, float(np.clip(2.6 + 0.16 * groups, 3.0, 8.0))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(12, 1.6), height_ratios=(1.3, max(1.4, 0.14 * groups)))
    above = figure.add_subplot(grid[0, 0])
    centre = figure.add_subplot(grid[1, 0], sharex=above)
    beside = figure.add_subplot(grid[1, 1], sharey=centre)
    sizes = np.abs(matrix_GT)
    full = float(np.quantile(sizes, SATURATION)) or float(sizes.max(initial=0)) or 1.0
    image = centre.imshow(
        matrix_GT, aspect="auto", origin="lower", cmap=SIGNED, norm=Normalize(-full, full), interpolation="nearest"
    )
    _sums(above, beside, matrix_GT)
    _name_tokens(above, given.pieces, matrix_GT.sum(0))
    centre.grid(visible=False)
    centre.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    centre.set_xlabel("position in the sequence: the token before the one that is predicted")
    _label_rows(centre, given.groups)
    above.set_title(safe(given.name, 90), pad=34 if tokens else 6)
    bar = figure.colorbar(image, ax=[centre, beside], location="bottom", fraction=0.06, aspect=50, pad=0.02)
    bar.locator = MaxNLocator(5, symmetric=True)
    bar.formatter = FuncFormatter(lambda value, _: number(float(f"{value:.3g}")))
    bar.update_ticks()
    bar.set_label(f"influence of a cell; colours are full at ±{number(float(f'{full:.2g}'))}", fontsize=8)
    return figure


def _sums(above: Axes, beside: Axes, matrix_GT: np.ndarray) -> None:
    groups, tokens = matrix_GT.shape
    by_token, by_group = matrix_GT.sum(0), matrix_GT.sum(1)
    above.bar(np.arange(tokens), by_token, width=1.0, color=np.where(by_token >= 0, POSITIVE, NEGATIVE).tolist())
    beside.barh(np.arange(groups), by_group, height=0.8, color=np.where(by_group >= 0, POSITIVE, NEGATIVE).tolist())
    above.set_xlim(-0.5, tokens - 0.5)
    for place, axis in ((above, above.yaxis), (beside, beside.xaxis)):
        axis.set_major_locator(MaxNLocator(3 if place is above else 2))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.3g}"))))
        place.tick_params(labelsize=7)
    above.axhline(0, color=SOFT, lw=0.6)
    beside.axvline(0, color=SOFT, lw=0.6)
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    above.set_ylabel("by token", fontsize=8)
    beside.set_xlabel("by layer", fontsize=8)


def _label_rows(place: Axes, groups: Sequence[str]) -> None:
    prefix, names = _without_prefix(groups)
    step = -(-len(names) // 24) if names else 1
    chosen = list(range(0, len(names), step))
    place.set_yticks(chosen, [safe(names[index], 24) for index in chosen])
    place.set_ylabel(safe(prefix, 24) or "layer")


def _name_tokens(place: Axes, pieces: Sequence[str], by_token: np.ndarray) -> None:
    """The text of the tokens with the largest sums, above them, leaving out those too near to a larger one."""
    room, named = max(1.0, len(by_token) / 28), []
    for at in np.argsort(-np.abs(by_token), kind="stable"):
        if len(named) == NAMED_TOKENS or by_token[at] == 0:
            break
        if all(abs(at - other) >= room for other in named):
            named.append(int(at))
    for at in named:
        place.annotate(
            safe(pieces[at], 14) or "␣",
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=40,
            rotation_mode="anchor",
            fontsize=7,
            color=INK,
        )
