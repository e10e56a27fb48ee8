"""Bars of probes as SVG and PNG: one figure a probe (Figures 24 and 25), and one over all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.plots import grouped_bars, save, slug

log = logging.getLogger(__name__)

SHOWN = 8  # sequences of a partition in a figure; all of them are in the table
FIGURES = 24  # probes with a figure of their own; the page has all of them

Bars = dict[str, dict[str, tuple[float, tuple[float, float] | None]]]


def write_figures(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write `plots/probe-ID.svg` and `.png` for each probe, and `plots/probes.*` for what partitions come to."""
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    written: list[Path] = []
    if len(summary["probes"]) > FIGURES:
        log.info("figures of the first %d probes; probe.html has all of them", FIGURES)
    for probe in summary["probes"][:FIGURES]:
        bars = sequence_bars([row for row in rows if row["probe_id"] == probe["probe_id"]])
        if not bars:
            continue
        title = f"{probe['prompt']} → {probe['completion']}"
        written += save(grouped_bars(bars, title=title), plots, f"probe-{slug(probe['probe_id'])}")
    medians = partition_bars(summary["partitions"])
    if len(summary["probes"]) > 1 and medians[""]:
        label = "influence relative to the reference, median over probes with 95 % interval"
        written += save(grouped_bars(medians, label=label), plots, "probes")
    return written


def sequence_bars(rows: Sequence[Mapping[str, Any]]) -> Bars:
    """The scores of one probe's sequences by partition and text; those that are not finite have no bar."""
    bars: Bars = {}
    for row in rows:
        group = bars.setdefault(row["partition"], {})
        if row["score"] is None or len(group) == SHOWN:
            continue
        text = row["text"] if row["text"] not in group else f"{row['text']} ({row['index']})"
        group[text] = (row["score"], None)
    return {name: group for name, group in bars.items() if group}


def partition_bars(partitions: Mapping[str, Mapping[str, Any]]) -> Bars:
    """The median of each partition's relative score, with its interval."""
    group: dict[str, tuple[float, tuple[float, float] | None]] = {}
    for name, found in partitions.items():
        if found["median"] is not None:
            interval = None if found["interval"] is None else (found["interval"][0], found["interval"][1])
            group[f"{name} ({found['defined']} probes)"] = (found["median"], interval)
    return {"": group}
