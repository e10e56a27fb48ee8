"""What a notebook shows of a run: the top sequences of each query, with the strongest part of each coloured by token.

Notebooks keep neither scripts nor style sheets of what they show, so every style is inline; all text is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.reading import RunFolder, read_run

SHOWN = 3  # sequences a query
QUERIES = 12
TOKENS = 48  # of each sequence, around the strongest
FAINT = 0.04  # share of the strongest token below which nothing is coloured
CLEAR = 0.15  # from it on, what lowers the measurement is underlined too: colours are not told apart by everyone
POSITIVE, NEGATIVE = "239,90,69", "40,160,150"  # red raises the measurement, teal lowers it
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def notebook_view(run_dir: Path) -> str:
    """HTML of the run in a folder."""
    run = read_run(run_dir, SHOWN)
    queries = run.summary["queries"]
    head = "<tr><th>rank<th>influence<th>feed<th>sequence<th style='text-align:left'>text</tr>"
    rows = [line for query in queries[:QUERIES] for line in _query(run, query)]
    more = f"<p>… and {len(queries) - QUERIES} queries more</p>" if len(queries) > QUERIES else ""
    link = f"<p>{_escaped(str(run_dir / 'report.html'))}</p>"
    return f"<div><table>{head}{''.join(rows)}</table>{_legend(run)}{more}{link}</div>"


def _query(run: RunFolder, query: Mapping[str, Any]) -> list[str]:
    name = query["query_id"]
    title = f"<b>{_escaped(name)}</b>: {_escaped(query['prompt'])}<b>{_escaped(query['completion'])}</b>"
    lines = [f"<tr><td colspan=5 style='text-align:left'><bdi>{title}</bdi></tr>"]
    texts = {
        found.row["sequence_id"]: heat(found.pieces, found.matrix_TL.sum(axis=1))
        for side, found in run.attributions(name, SHOWN)
        if side == "top"
    }
    for row in run.rows.get((name, "top"), []):
        text = texts.get(row["sequence_id"]) or _escaped(row["text"][:300])
        lines.append(
            f"<tr><td>{row['rank']}<td>{_score(row['score'])}<td>{_escaped(row['feed'])}<td>{row['sequence_id']}"
            f"<td style='text-align:left;white-space:pre-wrap'><bdi>{text}</bdi></tr>"
        )
    return lines


def _score(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "\u2212")


def heat(pieces: Sequence[str], values_T: np.ndarray, tokens: int = TOKENS) -> str:
    """Escaped text around the strongest token, red where the update raises the measurement, teal where it lowers it."""
    strongest = int(np.argmax(np.abs(values_T))) if len(values_T) else 0
    peak = float(np.abs(values_T).max(initial=0.0)) or 1.0
    first = max(0, min(strongest - tokens // 2, len(pieces) - tokens))
    last = min(len(pieces), first + tokens)
    spans = [_coloured(pieces[at], float(values_T[at]) / peak, float(values_T[at])) for at in range(first, last)]
    return f"{'… ' if first else ''}{''.join(spans)}{' …' if last < len(pieces) else ''}"


def _coloured(piece: str, share: float, value: float) -> str:
    text = _escaped(piece)
    if not text or not abs(share) >= FAINT:
        return text
    colour = POSITIVE if share > 0 else NEGATIVE
    dashed = ";border-bottom:1px dashed" if share <= -CLEAR else ""
    shade = f"background:rgba({colour},{min(1.0, abs(share)) * 0.8:.2f})"
    return f'<span style="{shade}{dashed}" title="{value:+.4g}">{text}</span>'


def _legend(run: RunFolder) -> str:
    if not run.attributed:
        return ""
    return (
        "<p>Red raises what the query measures, teal (dashed) lowers it; full colour is the strongest token of each "
        "sequence. The token highlighted is the one before the token predicted.</p>"
    )


def _escaped(text: str) -> str:
    """Escaped; what cannot be seen or would move its surroundings becomes a replacement mark."""
    return html.escape(UNSEEN.sub("\ufffd", text))
