"""Plots by matplotlib: functions from plain data to a figure, in one style, and how a figure becomes SVG and PNG.

    style       fonts, colours, text from elsewhere made safe, `save`
    tails       survival functions with the power law (Figure 8), share of the influence by top sequences (Figure 9)
    layers      distribution over layers by query (Figures 19, 35), token × layer maps (Figure 4)
    bars        grouped bars of probes (Figures 24-26)
    scatter     scores of two runs against each other, correlations by query (Figures 3, 30)
    validation  methods beside what was measured: bars, times, lines over a setting, planes (Figures 6, 7, 30)

Nothing here reads files, and pyplot with its global state is not used.
"""

from __future__ import annotations

from pipelines.plots.bars import grouped_bars
from pipelines.plots.layers import LayerShares, TokenMap, layer_shares, token_map
from pipelines.plots.scatter import Cloud, correlations, scatter
from pipelines.plots.style import NEGATIVE, POSITIVE, safe, save, slug
from pipelines.plots.tails import Curve, PowerLaw, Tail, influence_share, survival

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "Cloud",
    "Curve",
    "LayerShares",
    "PowerLaw",
    "Tail",
    "TokenMap",
    "correlations",
    "grouped_bars",
    "influence_share",
    "layer_shares",
    "safe",
    "save",
    "scatter",
    "slug",
    "survival",
    "token_map",
]
