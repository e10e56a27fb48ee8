"""`probe.html`: one self-contained page with bars and tokenwise heatmaps of what was probed; no script, no request.

Everything from outside is escaped. Colours are classes of a style sheet that is the page's only licence, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines.probing.layers import BARS, section
from pipelines.probing.markup import escaped, minus
from pipelines.probing.table import number as plain_number
from pipelines.stages.agreement import shown

LEVELS = 12  # of colour on either side
STRONGEST = 0.6  # opacity, at which text is still legible on either ground
MARKED = 6  # level from which a line of its own says which colour it is, for those who cannot tell them apart
REMINDER = (
    "The highlighted token is the one before the token predicted: if “Dunek” after “is” matters, “is” is coloured. "
    "Full colour is the strongest token of the probe, so that its partitions can be compared."
)


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    layers: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Write the page.

    Args:
        path: the file.
        summary: the run's summary.
        rows: of `probe.parquet`.
        layers: names of the layers, in the order of the rows' shares.
        title: of the page; None is the name of the run.
    """
    title = f"Probes: {title}" if title else f"whence probe: {summary['name']}"
    body = [f"<h1>{escaped(title)}</h1>", _overview(summary)]
    if len(summary["probes"]) > 1:
        body.append(_over_probes(summary["partitions"], len(summary["probes"])))
    body += [_index(summary["probes"]), _legend()]
    for number, probe in enumerate(summary["probes"]):
        mine = [row for row in rows if row["probe_id"] == probe["probe_id"]]
        body += [_probe(number, probe, mine), section(mine, list(probe["partitions"]), layers)]
    digest = base64.b64encode(hashlib.sha256(style().encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{style()}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8", errors="replace")


@cache
def style() -> str:
    """The style sheet, with a class for each level of colour."""
    fixed = resources.files("pipelines.probing").joinpath("page.css").read_text(encoding="utf-8")
    lines = []
    for sign, line in (("pos", "solid"), ("neg", "dashed")):
        for level in range(1, LEVELS + 1):
            mark = f" border-bottom: 2px {line} rgb(var(--{sign}));" if level >= MARKED else ""
            shade = STRONGEST * level / LEVELS
            lines.append(f".{sign}{level} {{ background: rgb(var(--{sign}) / {shade:.3f});{mark} }}")
    lines += [f".wide{width} {{ flex: {width} 0 0; }}" for width in range(1, BARS + 1)]
    return fixed + "\n".join(lines) + "\n"


def number_text(value: float | None) -> str:
    """A score with a real minus sign."""
    return minus(plain_number(value))


def heat_class(value: float, scale: float) -> str:
    """The class of a token's colour, red where it raises the measurement; empty where it has none to show."""
    if not math.isfinite(value) or scale <= 0:
        return ""
    level = min(LEVELS, round(LEVELS * abs(value) / scale))
    return f"{'pos' if value > 0 else 'neg'}{level}" if level else ""


def _overview(summary: Mapping[str, Any]) -> str:
    config, fidelity = summary["config"], summary["fidelity"]
    facts = {
        "model": config["model"]["path"],
        "layers": summary["layers"].partition("\n")[0],
        "factors": f"{config['factors']['solver']}, damping factor {config['factors']['damping_factor']}, "
        f"fitted on {config['corpus']['path']}",
        "probes": config["probe"]["path"],
        "fidelity": f"correlation with full-rank scores {shown(fidelity['minimum'])} at worst, on "
        f"{fidelity['sample']} sequences of the corpus"
        if fidelity
        else "full-rank queries, or not measured",
        "unit": summary["score_unit"],
        "relative": "score / mean score of the probe's reference partition",
    }
    if summary["not_finite"]:
        facts["not finite"] = "; ".join(summary["not_finite"])
    return f"<dl>{''.join(f'<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>' for key, value in facts.items())}</dl>"


def _legend() -> str:
    levels = range(2, LEVELS + 1, 2)
    steps = [*(f"neg{level}" for level in reversed(levels)), "", *(f"pos{level}" for level in levels)]
    ramp = "".join(f'<i class="{step}"></i>' for step in steps)
    return (
        f'<div class="legend">lowers the measurement (teal, dashed) <span class="ramp">{ramp}</span> '
        f'raises it (red, solid)</div><p class="note">{escaped(REMINDER)}</p>'
    )


def _index(probes: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f'<li><a href="#probe-{number}">{escaped(probe["probe_id"])}</a> — {escaped(probe["prompt"])} '
        f"<b>{escaped(probe['completion'])}</b></li>"
        for number, probe in enumerate(probes)
    )
    return f"<h2>Probes</h2><ol>{items}</ol>"


def _over_probes(partitions: Mapping[str, Mapping[str, Any]], probes: int) -> str:
    values = [found["median"] for found in partitions.values() if found["median"] is not None]
    ends = [end for found in partitions.values() for end in found["interval"] or ()]
    low, high = min(0.0, *values, *ends), max(0.0, *values, *ends)
    lines = [_heads("partition", "median over probes, 95 % interval", "median", "below")]
    for name, found in partitions.items():
        below = "" if found["below"] is None else f"{found['below']} of {found['defined']}"
        median = "–" if found["median"] is None else minus(f"{found['median']:.2f}")
        label = f"{escaped(name)} <small>({found['probes']} probes)</small>"
        bar = _bar(found["median"], low, high, found["interval"])
        lines.append(_row(label, bar, median, below))
    note = "Relative to each probe’s reference; “below”: in how many probes the partition’s mean is below it."
    return f'<h2>All {probes} probes</h2><p class="note">{note}</p>{"".join(lines)}'


def _probe(number: int, probe: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    against = "" if probe["contrast"] is None else f" <i>against</i> <b>{escaped(probe['contrast'])}</b>"
    scores = [row["score"] for row in rows if row["score"] is not None]
    low, high = min(0.0, *scores, 0.0), max(0.0, *scores, 0.0)
    tokens = [abs(value) for row in rows for value in row["tokens"] if math.isfinite(value)]
    note = f"measured value {minus(format(probe['measured'], '.4f'))} nats"
    if probe["others"]["range"]:
        ends = " to ".join(number_text(end) for end in probe["others"]["range"])
        note += f" · 95 % of the {probe['others']['sequences']:,} sequences of other probes score {ends} here"
    parts = [
        f'<h2 id="probe-{number}">{escaped(probe["probe_id"])}</h2>'
        f'<div class="query" dir="auto">{escaped(probe["prompt"])}<b>{escaped(probe["completion"])}</b>{against}</div>'
        f'<p class="note">{escaped(note)}</p>',
        _heads("sequence", "", "influence", "relative"),
    ]
    for name, found in probe["partitions"].items():
        mark = "reference" if name == probe["reference"] else ""
        mean = "" if found["mean"] is None else f"mean {number_text(found['mean'])}"
        ratio = "" if found["relative"] is None else f"relative {minus(format(found['relative'], '.2f'))}"
        about = " · ".join(part for part in (mark, mean, ratio) if part)
        parts.append(f"<h3>{escaped(name)} <small>{escaped(about)}</small></h3>")
        parts += [_sequence(row, max(tokens, default=0.0), low, high) for row in rows if row["partition"] == name]
    return "".join(parts)


def _sequence(row: Mapping[str, Any], scale: float, low: float, high: float) -> str:
    ratio = "–" if row["relative"] is None else minus(f"{row['relative']:.2f}")
    return _row(
        _heat(row["pieces"], row["tokens"], scale), _bar(row["score"], low, high), number_text(row["score"]), ratio
    )


def _heat(pieces: Sequence[str], values: Sequence[float], scale: float) -> str:
    spans = []
    for position, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        following = f" · predicts “{pieces[position + 1]}”" if position + 1 < len(pieces) else ""
        colour = heat_class(value, scale)
        attribute = f' class="{colour}"' if colour else ""
        spans.append(f'<span{attribute} title="{minus(f"{value:.4g}")}{escaped(following)}">{escaped(piece)}</span>')
    return "".join(spans)


def _bar(value: float | None, low: float, high: float, interval: Sequence[float] | None = None) -> str:
    """A bar from zero on the axis [low, high], which holds zero."""
    if value is None or high <= low:
        return "<span></span>"

    def place(at: float) -> float:
        return 100 * (at - low) / (high - low)

    start, end = sorted((place(0.0), place(value)))
    minus = ' class="minus"' if value < 0 else ""
    whisker = ""
    if interval is not None:
        whisker = f'<line class="interval" x1="{place(interval[0]):.2f}" x2="{place(interval[1]):.2f}" y1="5" y2="5"/>'
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect{minus} x="{start:.2f}" y="1" width="{end - start:.2f}" height="8"/>'
        f'<line x1="{place(0.0):.2f}" x2="{place(0.0):.2f}" y1="0" y2="10"/>{whisker}</svg>'
    )


def _row(text: str, bar: str, number: str, ratio: str) -> str:
    """A row of the grid; `text` is markup, the rest numbers of ours."""
    return (
        f'<div class="row"><div class="text" dir="auto">{text}</div>{bar}'
        f'<span class="number">{number}</span><span class="number">{ratio}</span></div>'
    )


def _heads(*names: str) -> str:
    text, bar, number, ratio = names
    return (
        f'<div class="row head"><span>{text}</span><span>{bar}</span><span class="number">{number}</span>'
        f'<span class="number">{ratio}</span></div>'
    )
