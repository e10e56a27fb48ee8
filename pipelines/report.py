"""The report: one self-contained HTML file with the top sequences of every query; all from outside is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import ReportConfig
from pipelines.progress import duration, short
from pipelines.stages.agreement import shown

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --mark: #c0392b22; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p.note { color: var(--soft); margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
td.text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 16rem; unicode-bidi: isolate; }
.query { background: var(--mark); border-left: .25rem solid #c0392b; padding: .5rem .75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.query b { font-weight: 700; }
dl { display: grid; gap: .15rem 1rem; grid-template-columns: max-content 1fr; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
details summary { cursor: pointer; }
@media (max-width: 40rem) {
  body { padding: .75rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  .top thead { display: none; } .top td { border: 0; display: inline-block; padding: .1rem .4rem; }
  .top td.text { display: block; min-width: 0; }
  .top tr { border-bottom: 1px solid var(--line); display: block; padding: .4rem 0; }
}
@media print { body { max-width: none; } details > * { display: block; } }
"""


def write_report(
    path: Path, summary: Mapping[str, Any], top: Sequence[Mapping[str, Any]], config: ReportConfig
) -> None:
    """Write the report.

    Args:
        path: the file.
        summary: the run's summary.
        top: rows of `top.parquet`.
        config: title, and how many sequences a query are shown.
    """
    title = config.title or f"whence: {summary['name']}"
    body = [f"<h1>{_text(title)}</h1>", _overview(summary), _index(summary["queries"])]
    for number, query in enumerate(summary["queries"]):
        rows = [row for row in top if row["query_id"] == query["query_id"]][: config.sequences]
        contrast = query["contrast"] if summary["config"]["queries"]["measurement"] == "contrast" else None
        body.append(_query(number, query, rows, summary["fidelity"], contrast))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _text(value: object) -> str:
    """Escaped text; control characters, which have no place in HTML, become visible replacement marks."""
    cleaned = "".join(char if char in "\n\t" or char >= " " else "\ufffd" for char in str(value))
    return html.escape(cleaned.replace("\x7f", "\ufffd"))


def _overview(summary: Mapping[str, Any]) -> str:
    config, corpus = summary["config"], summary["corpus"]
    skipped = sum(corpus["skipped"].values())
    facts = {
        "model": config["model"]["path"],
        "layers": summary["layers"],
        "corpus": f"{config['corpus']['path']}: {corpus['documents']:,} documents, {corpus['sequences']:,} sequences, "
        f"{corpus['tokens']:,} tokens" + (f"; {skipped:,} records skipped {corpus['skipped']}" if skipped else ""),
        "solver": f"{config['factors']['solver']}, damping factor {config['factors']['damping_factor']}, "
        f"{config['factors']['blocks']} block(s), labels {config['factors']['labels']}",
        "scanned": f"{summary['stages']['scores']['counts']['sequences']:,} sequences; candidates by feed: "
        + ", ".join(f"{feed} {count:,}" for feed, count in summary["candidates"]["per_feed"].items()),
        "fidelity": _fidelity(summary["fidelity"]),
        "unit": summary["score_unit"],
    }
    if summary["agreement"]:
        facts["precision"] = f"correlation with float32 scores at worst {shown(summary['agreement']['minimum'])}"
    if summary["excluded"]:
        facts["set aside"] = ", ".join(f"{stage}: {len(named)}" for stage, named in summary["excluded"].items())
    entries = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items())
    return f"<dl>{entries}</dl>{_stages(summary['stages'])}"


def _fidelity(fidelity: Mapping[str, Any]) -> str:
    if not fidelity:
        return "full-rank queries, or not measured"
    return (
        f"correlation with full-rank scores {shown(fidelity['mean'])} on average, {shown(fidelity['minimum'])} at "
        f"worst, on {fidelity['sample']} sequences"
    )


def _stages(stages: Mapping[str, Any]) -> str:
    rows = []
    for name, stage in stages.items():
        rate = stage.get("tokens_per_second")
        rows.append(
            f"<tr><td>{_text(name)}</td><td>{'cached' if stage['cached'] else 'computed'}</td>"
            f'<td class="number">{duration(stage["seconds"])}</td>'
            f'<td class="number">{short(rate) if rate else ""}</td></tr>'
        )
    head = "<tr><th>stage</th><th></th><th>time when computed</th><th>tokens/s</th></tr>"
    return f"<details><summary>Stages and timings</summary><table>{head}{''.join(rows)}</table></details>"


def _index(queries: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f'<li><a href="#query-{number}">{_text(query["query_id"])}</a> — {_text(query["prompt"])} '
        f"<b>{_text(query['completion'])}</b></li>"
        for number, query in enumerate(queries)
    )
    return f"<h2>Queries</h2><ol>{items}</ol>"


def _query(
    number: int,
    query: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    fidelity: Mapping[str, Any],
    contrast: str | None,
) -> str:
    measured = f"measured value {query['measured']:.4f} nats"
    if fidelity:
        measured += f" · fidelity {shown(fidelity['pearson'][query['query_id']])}"
    lines = "".join(
        f'<tr><td class="number">{row["rank"]}</td><td class="number">{row["score"]:.5g}</td>'
        f'<td>{_text(row["feed"])}</td><td class="number">{row["sequence_id"]}</td>'
        f'<td>{_text(row["document_id"])}</td><td class="text">{_text(row["text"])}</td></tr>'
        for row in rows
    )
    head = "<tr><th>rank</th><th>influence</th><th>feed</th><th>sequence</th><th>document</th><th>text</th></tr>"
    against = "" if contrast is None else f" <i>against</i> <b>{_text(contrast)}</b>"
    return (
        f'<h2 id="query-{number}">{_text(query["query_id"])}</h2>'
        f'<div class="query">{_text(query["prompt"])}<b>{_text(query["completion"])}</b>{against}</div>'
        f'<p class="note">{measured}</p>'
        f'<div class="wide"><table class="top"><thead>{head}</thead><tbody>{lines}</tbody></table></div>'
    )
