"""Which layers the influence of a probe's sequences comes from, by partition (as in Figures 19 and 35).

rows_L: Equation 31 summed over the tokens of a sequence, by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.probing.markup import escaped, minus
from pipelines.report.packing import MapRows, map_rows
from pipelines.report.reading import Layers
from pipelines.stages.attribution import layer_names

BARS = 64  # of a strip at most; deeper models have a bar for a block, or for some neighbouring ones
LABELS = 16  # below a strip at most
NOTE = (
    "The share of a partition’s influence that comes from each layer, first to last: what raises the measurement above "
    "the line (red), what lowers it below (teal). It is a mean over sequences, each of which counts the same: the "
    "magnitudes of its layers add up to 100 %. A partition without influence shows the layers of what is left of it."
)


@dataclass(frozen=True)
class Share:
    """A part of a partition's influence, that of one bar.

    Attributes:
        plus: Mean over sequences of what raises the measurement, as a share of all magnitudes of the sequence.
        minus: The same of what lowers it; not negative.
        mean: Mean influence, in nats.
    """

    plus: float
    minus: float
    mean: float


def shares(layers: Sequence[Sequence[float]], bars: MapRows) -> list[Share]:
    """The shares of some sequences by bar; those without any influence, or with one that is not finite, do not count.

    Args:
        layers: Influence by layer of each sequence.
        bars: Which layers share a bar.
    """
    values_NR = np.asarray([np.asarray(row, float) @ bars.share_LR for row in layers]).reshape(-1, len(bars.labels))
    magnitudes_N = np.abs(values_NR).sum(1)
    kept_N = np.isfinite(magnitudes_N) & (magnitudes_N > 0)
    if not kept_N.any():
        return []
    values_NR = values_NR[kept_N]
    parts_NR = values_NR / magnitudes_N[kept_N, None]
    plus_R, minus_R = np.maximum(parts_NR, 0).mean(0), np.maximum(-parts_NR, 0).mean(0)
    columns = zip(plus_R.tolist(), minus_R.tolist(), values_NR.mean(0).tolist(), strict=True)
    return [Share(*column) for column in columns]


def section(rows: Sequence[Mapping[str, Any]], partitions: Sequence[str], names: Sequence[str]) -> str:
    """The layers of one probe as HTML: a strip of bars a partition, all on one scale; empty where none is known.

    Args:
        rows: Of `probe.parquet`, the probe's own.
        partitions: In the order in which they are shown.
        names: Of the layers.
    """
    if not names:
        return ""
    bars = map_rows(Layers(**{key: tuple(value) for key, value in layer_names(names).items()}), BARS)
    found = {name: shares([row["layers"] for row in rows if row["partition"] == name], bars) for name in partitions}
    top = max((share.plus for strip in found.values() for share in strip), default=0.0)
    below = max((share.minus for strip in found.values() for share in strip), default=0.0)
    if top + below == 0:
        return ""
    strips = "".join(
        f'<div class="strip"><span>{escaped(name)}</span>{_strip(strip, bars.labels, top, below)}</div>'
        for name, strip in found.items()
        if strip
    )
    axis = f'<div class="strip axis"><span>layers</span><div>{_axis(bars.groups)}</div></div>'
    return (
        f'<details class="layers"><summary>Layers</summary><p class="note">{NOTE} '
        f"The tallest bar is {100 * max(top, below):.3g} %.</p>{strips}{axis}</details>"
    )


def _strip(strip: Sequence[Share], labels: Sequence[str], top: float, bottom: float) -> str:
    unit = 100 / (top + bottom)
    zero = top * unit
    drawn = []
    for at, (share, label) in enumerate(zip(strip, labels, strict=True)):
        parts = f"raises {100 * share.plus:.3g} %, lowers {100 * share.minus:.3g} %, mean influence {share.mean:.4g}"
        place, plus, below = f'x="{at + 0.06:.2f}" width=".88"', share.plus * unit, share.minus * unit
        drawn.append(
            f"<g><title>{escaped(label)}: {minus(parts)}</title>"
            f'<rect {place} y="{zero - plus:.2f}" height="{plus:.2f}"/>'
            f'<rect class="minus" {place} y="{zero:.2f}" height="{below:.2f}"/></g>'
        )
    return (
        f'<svg class="bar" viewBox="0 0 {len(labels)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Share of influence by layer">{"".join(drawn)}'
        f'<line x1="0" x2="{len(labels)}" y1="{zero:.2f}" y2="{zero:.2f}"/></svg>'
    )


def _axis(groups: Sequence[str]) -> str:
    """Names of neighbouring bars of one group, each as wide as these; some are left out where they are many."""
    runs: list[tuple[str, int]] = []
    for group in groups:
        if runs and runs[-1][0] == group:
            runs[-1] = (group, runs[-1][1] + 1)
        else:
            runs.append((group, 1))
    every = math.ceil(len(runs) / LABELS)
    return "".join(
        f'<span class="wide{width}">{escaped(name.removeprefix("block ")) if place % every == 0 else ""}</span>'
        for place, (name, width) in enumerate(runs)
    )
