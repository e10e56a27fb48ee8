"""What a comparison leaves: compare.json, tables, plots and the page; and its table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipelines.comparing.agreement import Comparison, Pair
from pipelines.comparing.matching import ranks_by_key, top_keys
from pipelines.comparing.page import page
from pipelines.comparing.runs import differences, moves_nothing, names, scales_differ
from pipelines.comparing.scores import matched
from pipelines.comparing.wording import legend, printable, shown
from pipelines.export import PANELS, write_csv
from pipelines.plots import Cloud, correlations, save, scatter

DRAWN = 20_000  # points in a panel
MARKED = 10
PAIRS_OF = 3  # runs, of which every pair gets a scatter plot; of more, those with the reference


def write(comparison: Comparison, folder: Path, sequences: int) -> None:
    """Write the results into a folder; those of an earlier comparison there go.

    Args:
        comparison: What was found.
        folder: It is created.
        sequences: Shown side by side for each query.
    """
    for name, endings in (("tables", ("csv",)), ("plots", ("svg", "png"))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stale in [file for ending in endings for file in (folder / name).glob(f"*.{ending}")]:
            stale.unlink()
    text = json.dumps(record(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "compare.json").write_text(text + "\n", encoding="utf-8", errors="replace")
    for name, columns, rows in tables(comparison):
        write_csv(folder / "tables" / f"{name}.csv", columns, rows)
    drawn = []
    for name, caption, figure in plots(comparison):
        vector, _ = save(figure, folder / "plots", name)
        drawn.append((caption, vector.read_bytes()))
    html = page(comparison, drawn, sequences)
    (folder / "compare.html").write_text(html, encoding="utf-8", errors="replace")


def reference(comparison: Comparison) -> int:
    """The run that others are drawn against where not every pair is: of the highest rank, of several the first."""
    ranks = [run.rank for run in comparison.runs]
    return min(range(len(ranks)), key=lambda n: -np.inf if ranks[n] is None else -(ranks[n] or 0))


def record(comparison: Comparison) -> dict[str, Any]:
    """The content of `compare.json`."""
    labels = [run.label for run in comparison.runs]
    return {
        "runs": [
            {
                "label": run.label,
                "folder": str(run.folder),
                "name": run.summary["name"],
                "model": run.summary["config"]["model"]["path"],
                "rank": "full" if run.rank is None else run.rank,
                "fidelity": run.summary["fidelity"].get("minimum"),
                "scanned": run.scanned,
            }
            for run in comparison.runs
        ],
        "differences": {
            key: dict(zip(labels, values, strict=True)) for key, values in differences(comparison.runs).items()
        },
        "queries": comparison.shared.ids,
        "left_out": dict(comparison.shared.left_out),
        "matched_by": comparison.how.value,
        "rank_correlation": {"share_of_sequences": comparison.share, "seed": comparison.seed},
        "pairs": [
            {
                "runs": [labels[pair.first], labels[pair.second]],
                "common_sequences": pair.common,
                "ranked_sequences": pair.ranked,
                "mean": {name: pair.mean(name) for name in comparison.measures},
                "queries": {query: agreement.values() for query, agreement in pair.queries.items()},
            }
            for pair in comparison.pairs
        ],
    }


def tables(comparison: Comparison) -> Iterator[tuple[str, Sequence[str], list[dict[str, object]]]]:
    """The tables: name, columns, rows."""
    labels = [run.label for run in comparison.runs]
    rows: list[dict[str, object]] = [
        {
            "run": labels[pair.first],
            "other": labels[pair.second],
            "query_id": query,
            "common": pair.common,
            **found.values(),
        }
        for pair in comparison.pairs
        for query, found in pair.queries.items()
    ]
    yield "agreement", ("run", "other", "query_id", "common", *comparison.measures), rows
    settings: list[dict[str, object]] = [
        {"setting": key, **dict(zip(labels, values, strict=True))}
        for key, values in differences(comparison.runs).items()
    ]
    yield "settings", ("setting", *labels), settings
    ranks = [f"rank_in_{label}" for label in labels]
    columns = ("query_id", "run", "rank", "sequence_id", "feed", "score", "document_id", "offset", *ranks, "text")
    yield "sequences", columns, [row for query in comparison.shared.ids for row in _ranked(comparison, query)]


def _ranked(comparison: Comparison, query: str) -> Iterator[dict[str, object]]:
    """The top sequences of all runs, each with its rank in every one."""
    places = ranks_by_key(comparison.runs, query, comparison.how)
    for run in comparison.runs:
        for row, key in zip(run.top.get(query, []), top_keys(run, query, comparison.how), strict=True):
            elsewhere = {
                f"rank_in_{other.label}": found.get(key) for other, found in zip(comparison.runs, places, strict=True)
            }
            yield {**row, "run": run.label, **elsewhere}


def plots(comparison: Comparison) -> Iterator[tuple[str, str, Figure]]:
    """The plots: file name, caption, figure."""
    best, runs, called = reference(comparison), comparison.runs, names(comparison.runs)
    shown = [pair for pair in comparison.pairs if len(runs) <= PAIRS_OF or best in (pair.first, pair.second)]
    others = [place for place in range(len(runs)) if place != best]
    with_best = {
        (pair.first if pair.second == best else pair.second): pair
        for pair in shown
        if best in (pair.first, pair.second)
    }
    for measure, title in (("pearson", "Pearson's correlation"), ("spearman", "Rank correlation")):
        values = {
            query: [with_best[place].queries[query].values()[measure] for place in others]
            for query in comparison.shared.ids
        }
        label = f"{title} with {called[best]}"
        figure = correlations([called[place] for place in others], values, label=label, limit=1.0)
        yield (
            measure,
            f"{title} of the scores with those of {called[best]}: a dot a query, a diamond their mean.",
            figure,
        )
    for pair in shown:
        clouds = list(_clouds(comparison, pair))
        for number, start in enumerate(range(0, len(clouds), PANELS), start=1):
            first, second = called[pair.first], called[pair.second]
            same = not scales_differ(runs[pair.first], runs[pair.second])
            figure = scatter(
                clouds[start : start + PANELS], f"influence, {first}", f"influence, {second}", diagonal=same
            )
            name = f"scatter-{runs[pair.first].label}-{runs[pair.second].label}" + (f"-{number}" if number > 1 else "")
            line = ", and the dashed line is where both are the same" if same else ""
            caption = (
                f"Scores of the same sequences in {first} and {second}; circles are on the ten highest of the first, "
                f"crosses on those of the second{line}."
            )
            yield name, caption, figure


def _clouds(comparison: Comparison, pair: Pair) -> Iterator[Cloud]:
    """Sampled scores by query, and the highest ones whether or not the sample has them."""
    x_NQ, y_NQ = matched(comparison.samples[pair.first], comparison.samples[pair.second])
    some = np.random.default_rng(comparison.seed).permutation(len(x_NQ))[:DRAWN]
    for column, query in enumerate(comparison.shared.ids):
        x_N, y_N = x_NQ[:, column], y_NQ[:, column]
        best = [np.argsort(-values, kind="stable")[:MARKED] for values in (x_N, y_N)]
        rows = np.unique(np.concatenate([some, *best]))
        found = pair.queries[query]
        yield Cloud(query, x_N[rows], y_N[rows], f"r = {shown(found.pearson)}\u2003ρ = {shown(found.spearman)}")


def render(comparison: Comparison) -> str:
    """The table for a terminal."""
    called, measures = names(comparison.runs), comparison.measures
    lines = [f"{name.partition(':')[0]}  {run.folder}" for name, run in zip(called, comparison.runs, strict=True)]
    labels = [run.label for run in comparison.runs]
    for key, values in differences(comparison.runs).items():
        if not moves_nothing(key):
            lines.append(
                f"   {key}: " + ", ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))
            )
    body = [["runs", "query", "sequences", *measures]]
    for pair in comparison.pairs:
        who = f"{labels[pair.first]} {labels[pair.second]}"
        body += [[who, query, "", *map(shown, found.values().values())] for query, found in pair.queries.items()]
        body.append(
            [who, f"mean of {len(pair.queries)}", f"{pair.common:,}", *(shown(pair.mean(name)) for name in measures)]
        )
    cells = [[printable(text)[:40] for text in row] for row in body]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ["", *("  ".join(_padded(row, widths)).rstrip() for row in cells), "", legend(comparison)]
    return "\n".join(printable(line) for line in lines)


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        text.ljust(width) if at < 2 else text.rjust(width)
        for at, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
