"""The tables of probes: rows of `probe.parquet` and `probe.csv`, and what the terminal shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from actors.pieces import token_pieces
from actors.probes import Probe
from actors.tokeniser import Tokeniser
from pipelines.probing.measures import mean, relative
from pipelines.tracing import one_line

SCHEMA = pa.schema(
    [
        ("probe_id", pa.string()),
        ("partition", pa.string()),
        ("index", pa.int32()),  # its place in the partition, from 1
        ("text", pa.string()),  # as the file has it
        ("length", pa.int32()),  # tokens, BOS and EOS among them
        ("score", pa.float64()),  # on the probe's own query; null where it is not finite
        ("relative", pa.float64()),  # score / mean score of the probe's reference partition
        ("scores", pa.list_(pa.float64())),  # on the query of each probe, in the order of the metadata's `probe_ids`
        ("pieces", pa.list_(pa.string())),  # text of each token
        ("tokens", pa.list_(pa.float64())),  # Equation 31 summed over layers; position t predicts token t + 1
        ("layers", pa.list_(pa.float64())),  # Equation 31 summed over tokens, in the order of `layer_names`
    ]
)
IN_CSV = ("probe_id", "partition", "index", "length", "score", "relative", "text")
NAME_WIDTH = 34


def probe_rows(
    probes: Sequence[Probe], found: Sequence[Sequence[Mapping[str, Any]]], tokeniser: Tokeniser
) -> list[dict[str, Any]]:
    """Rows of the table.

    Args:
        probes: As the file has them.
        found: What the step wrote of each probe's sequences, in the same order.
        tokeniser: Turns tokens into text.
    """
    rows = []
    for number, (probe, scored) in enumerate(zip(probes, found, strict=True)):
        own = [entry["scores"][number] for entry in scored]
        named = zip(probe.sequences, own, strict=True)
        scale = mean([score for sequence, score in named if sequence.partition == probe.reference])
        for sequence, entry, score in zip(probe.sequences, scored, own, strict=True):
            rows.append(
                {
                    "probe_id": probe.probe_id,
                    "partition": sequence.partition,
                    "index": sequence.index,
                    "text": sequence.text,
                    "length": len(entry["input_ids"]),
                    "score": score if math.isfinite(score) else None,
                    "relative": relative(score, scale),
                    "scores": entry["scores"],
                    "pieces": token_pieces(tokeniser, entry["input_ids"]),
                    "tokens": entry["tokens"],
                    "layers": entry["layers"],
                }
            )
    return rows


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], probe_ids: list[str], layers: list[str]) -> pa.Table:
    """Write `probe.parquet` and `probe.csv`."""
    metadata = {"probe_ids": json.dumps(probe_ids), "layer_names": json.dumps(layers)}
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(metadata))
    pq.write_table(table, folder / "probe.parquet")
    pc.write_csv(table.select(list(IN_CSV)), folder / "probe.csv")
    return table


def render_table(summary: Mapping[str, Any]) -> str:
    """What the terminal shows: partitions of each probe, then of all of them."""
    lines = []
    for probe in summary["probes"]:
        lines += [*_probe_lines(probe), ""]
    if len(summary["probes"]) > 1:
        lines += _over_lines(summary["partitions"], len(summary["probes"]))
    return "\n".join(lines).rstrip("\n")


def _probe_lines(probe: Mapping[str, Any]) -> list[str]:
    name, prompt, completion = (one_line(probe[key]) for key in ("probe_id", "prompt", "completion"))
    head = f"  {'partition':<{NAME_WIDTH}}  {'sequences':>9}  {'influence':>11}  {'relative':>8}"
    lines = [f"{name}: {prompt} → {completion}", head]
    for partition, found in probe["partitions"].items():
        mark = " ← 1" if partition == probe["reference"] else ""
        lines.append(
            f"  {one_line(partition)[:NAME_WIDTH]:<{NAME_WIDTH}}  {found['sequences']:>9}  {number(found['mean']):>11}"
            f"  {_ratio(found['relative']):>8}{mark}"
        )
    if probe["others"]["range"]:
        low, high = probe["others"]["range"]
        lines.append(
            f"  95 % of the {probe['others']['sequences']:,} sequences of other probes: {number(low)} to {number(high)}"
        )
    return lines


def _over_lines(partitions: Mapping[str, Mapping[str, Any]], probes: int) -> list[str]:
    head = f"  {'partition':<{NAME_WIDTH}}  {'probes':>9}  {'median':>11}  {'95 % interval':>17}  below the reference"
    lines = [f"over {probes} probes, relative to each probe's reference:", head]
    for name, found in partitions.items():
        interval = "" if found["interval"] is None else " to ".join(f"{bound:.2f}" for bound in found["interval"])
        below = "" if found["below"] is None else f"{found['below']} of {found['defined']}"
        lines.append(
            f"  {one_line(name)[:NAME_WIDTH]:<{NAME_WIDTH}}  {found['probes']:>9}  {_ratio(found['median']):>11}"
            f"  {interval:>17}  {below}".rstrip()
        )
    return lines


def number(value: float | None) -> str:
    """A score as people read it."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
