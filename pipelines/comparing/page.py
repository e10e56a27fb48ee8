"""compare.html: one file without scripts, in the look of the report; everything from a corpus is escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.comparing.agreement import Comparison, Pair
from pipelines.comparing.matching import Matching, ranks_by_key, top_keys
from pipelines.comparing.runs import ComparedRun, differences, moves_nothing
from pipelines.comparing.wording import legend, shown
from pipelines.report.rendering import style_text

LONG = 260  # characters of a sequence, of which more are folded
STYLE = """
main h2 { font: 600 1.25rem/1.3 var(--serif); margin: 2.5rem 0 .7rem; }
.compared { background: var(--raised); border: 1px solid var(--line); border-radius: 10px; }
.compared { border-collapse: separate; border-spacing: 0; }
.compared tr:last-child td { border-bottom: 0; }
.compared td { overflow-wrap: anywhere; vertical-align: top; unicode-bidi: isolate; }
.compared td.numeric { overflow-wrap: normal; white-space: nowrap; }
.compared td:not(.numeric) { min-width: 9rem; } .compared td.pair { min-width: 0; white-space: nowrap; }
.compared .idle { color: var(--soft); }
.compared .mean td { border-top: 2px solid var(--line); font-weight: 600; }
.letter { background: var(--sunken); border-radius: 5px; font-weight: 650; padding: 0 .45rem; }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plots figure.broad { grid-column: 1 / -1; }
.plots img { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .6rem; }
.plots img { display: block; height: auto; max-width: 100%; }
@media screen and (max-width: 44rem) {
  .plots .broad { overflow-x: auto; } .plots .broad img { max-width: none; width: 44rem; }
  .plots .broad figcaption { left: 0; max-width: calc(100vw - 1.6rem); position: sticky; }
}
.plots figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; max-width: 46rem; }
.side { table-layout: fixed; }
.side th:first-child, .side td:first-child { width: 3rem; }
.side td { vertical-align: top; }
.side .text { font-size: .95rem; line-height: 1.5; margin: .2rem 0 0; }
.side .text summary { list-style-position: outside; }
.alone { color: var(--accent); }
@media (max-width: 44rem) { .side { min-width: 40rem; } }
@media print { details.shapes > * { display: block; } .plots img { border: 0; padding: 0; } }
"""


def page(comparison: Comparison, plots: Sequence[tuple[str, bytes]], sequences: int) -> str:
    """The page.

    Args:
        comparison: What was found.
        plots: Captions and SVG files.
        sequences: Shown side by side for each query.
    """
    runs = comparison.runs
    style = f"{style_text()}\n{STYLE}"
    policy = f"default-src 'none'; style-src '{_digest(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    title = f"{len(runs)} runs compared: {', '.join(dict.fromkeys(str(run.summary['name']) for run in runs))}"
    parts = [
        f'<div class="hero"><h1>{text(title)}</h1><p class="lead">{text(_lead(comparison))}</p></div>',
        "<h2>The runs</h2>",
        _runs(runs),
        "<h2>What differs between their settings</h2>",
        _settings(runs),
        "<h2>How far they agree</h2>",
        _means(comparison),
        "<h2>By query</h2>",
        _queries(comparison),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_figure(*plot) for plot in plots)}</div>',
        "<h2>Side by side</h2>",
        f'<p class="note">{text(_side_note(comparison, sequences))}</p>',
        *(_side(comparison, query, sequences, not number) for number, query in enumerate(comparison.shared.queries)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def text(value: object) -> str:
    """Escaped; control characters, which have no place in HTML, and half surrogates become replacement marks."""
    cleaned = "".join("\ufffd" if _odd(char) else char for char in str(value))
    return html.escape(cleaned)


def _odd(char: str) -> bool:
    return (char < " " and char not in "\n\t") or "\x7f" <= char < "\xa0" or "\ud800" <= char <= "\udfff"


def _lead(comparison: Comparison) -> str:
    queries = len(comparison.shared.queries)
    return f"{queries} {'query' if queries == 1 else 'queries'} of all runs. {legend(comparison)}"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th{' class=numeric' if name[:1] == '#' else ''}>{text(name.lstrip('#'))}</th>" for name in head)
    return (
        f'<div class="wide"><table class="compared"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _numeric(values: Sequence[object]) -> str:
    return "".join(f'<td class="numeric">{text(shown(value))}</td>' for value in values)


def _letter(label: str) -> str:
    return f'<span class="letter">{text(label)}</span>'


def _letters(comparison: Comparison, pair: Pair) -> str:
    return " ".join(_letter(comparison.runs[place].label) for place in (pair.first, pair.second))


def _runs(runs: Sequence[ComparedRun]) -> str:
    rows = []
    for run in runs:
        rank = "full" if run.rank is None else f"{run.rank:.3g}"
        fidelity = run.summary["fidelity"].get("minimum")
        rows.append(
            f'<tr><td class="pair">{_letter(run.label)}</td><td>{text(run.folder)}</td>'
            f"<td>{text(run.summary['config']['model']['path'])}</td>"
            f"{_numeric([rank, fidelity, f'{run.scanned:,}'])}</tr>"
        )
    return _table(("run", "folder", "model", "#rank", "#fidelity, worst query", "#sequences scanned"), rows)


def _settings(runs: Sequence[ComparedRun]) -> str:
    found = differences(runs)
    if not found:
        return '<p class="note">Nothing: the runs have the same settings.</p>'
    rows = [
        f"<tr{' class=idle' if moves_nothing(key) else ''}><td>{text(key)}</td>"
        + "".join(f"<td>{text('–' if value is None else value)}</td>" for value in values)
        + "</tr>"
        for key, values in found.items()
    ]
    return _table(("setting", *(run.label for run in runs)), rows)


def _means(comparison: Comparison) -> str:
    rows = [
        f'<tr><td class="pair">{_letters(comparison, pair)}</td>'
        + _numeric([f"{pair.common:,}", *(pair.mean(name) for name in comparison.measures)])
        + "</tr>"
        for pair in comparison.pairs
    ]
    return _table(("runs", "#sequences of both", *(f"#{name}" for name in comparison.measures)), rows) + (
        '<p class="note">Means over queries.</p>'
    )


def _queries(comparison: Comparison) -> str:
    rows: list[str] = []
    for query in comparison.shared.ids:
        rows += [
            f'<tr><td>{text(query)}</td><td class="pair">{_letters(comparison, pair)}</td>'
            f"{_numeric(list(pair.queries[query].values().values()))}</tr>"
            for pair in comparison.pairs
        ]
    return _table(("query", "runs", *(f"#{name}" for name in comparison.measures)), rows)


def _figure(caption: str, svg: bytes) -> str:
    """A picture as data: nothing in it can run, and its ids are its own."""
    data = base64.b64encode(svg).decode("ascii")
    broad = ' class="broad"' if caption.startswith("Scores") else ""
    return (
        f'<figure{broad}><img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _side_note(comparison: Comparison, sequences: int) -> str:
    same = "the same document" if comparison.how is Matching.document else "the same sequence"
    return (
        f"The first {sequences} sequences of each run. Letters say at which rank {same} is among the others' top "
        "sequences; where none does, the run has it alone."
    )


def _side(comparison: Comparison, query: Mapping[str, Any], sequences: int, opened: bool) -> str:
    runs, name = comparison.runs, query["query_id"]
    places = ranks_by_key(runs, name, comparison.how)
    columns = []
    for run in runs:
        rows = run.top.get(name, [])[:sequences]
        keys = top_keys(run, name, comparison.how)[:sequences]
        columns.append([_cell(run, row, key, runs, places) for row, key in zip(rows, keys, strict=True)])
    depth = max(map(len, columns), default=0)
    body = "".join(
        f'<tr><td class="numeric">{rank + 1}</td>'
        + "".join(f"<td>{column[rank] if rank < len(column) else ''}</td>" for column in columns)
        + "</tr>"
        for rank in range(depth)
    )
    head = "".join(f"<th>{_letter(run.label)}</th>" for run in runs)
    return (
        f'<details class="shapes"{" open" if opened else ""}><summary>{text(name)}</summary>'
        f'<blockquote>{text(query["prompt"])}<b class="completion">{text(query["completion"])}</b></blockquote>'
        f'<div class="wide"><table class="compared side"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _cell(
    run: ComparedRun,
    row: Mapping[str, Any],
    key: object,
    runs: Sequence[ComparedRun],
    places: Sequence[Mapping[object, int]],
) -> str:
    elsewhere = [
        f"{other.label} {found[key]}"
        for other, found in zip(runs, places, strict=True)
        if other is not run and key in found
    ]
    others = text(", ".join(elsewhere)) if elsewhere else f'<span class="alone">{text(run.label)} alone</span>'
    return (
        f"<b>{row['score']:.4g}</b> <small>{text(row['feed'])} · {text(row['document_id'])} · "
        f"sequence {row['sequence_id']} · {others}</small>{_sequence(row['text'])}"
    )


def _sequence(given: str) -> str:
    if len(given) <= LONG:
        return f'<p class="text">{text(given)}</p>'
    head = given[:LONG].rstrip()
    return f'<details class="text"><summary>{text(head)}…</summary>{text(given)}</details>'


def _digest(style: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode('utf-8')).digest()).decode('ascii')}"
