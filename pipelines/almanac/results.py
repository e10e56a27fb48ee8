"""The demo's results as a page of text: one table, and what its columns mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.almanac.world import CONFUSING, STATING

TRAINED = {"forward": "learnt in one order", "both": "learnt in both orders"}


def render_markdown(results: Mapping[str, Any]) -> str:
    """Write `almanac.md`, which is also what the terminal shows.

    Args:
        results: The content of `almanac.json`.
    """
    k, training, queries = results["k"], results["training"], results["queries"]
    header = ["method", f"recall@{k}", "MRR", *STATING, *(kind.replace("_", " ") for kind in CONFUSING)]
    rows = [_row(title, method["mean"]) for title, method in results["methods"].items()]
    forward_only = sum(query["order"] == "forward" for query in queries.values())
    return (
        f"# Almanac: {len(queries)} facts traced among {results['documents']:,} documents\n\n"
        f"The model ({training['parameters']:,} parameters, {training['epochs']} epochs, {training['seconds']:.0f} s) "
        f"completes {training['accuracy']:.0%} of them.\n\n"
        f"{_table(header, rows)}\n"
        f"recall@{k}: of the documents that state the fact, the share found among the {k} highest scores; then by how\n"
        "they word it: subject first as in the prompt, object first, in other words. MRR: mean of one over the rank\n"
        "of the first. The last columns are mistakes: how often a document that states a neighbour's fact, or names\n"
        "both things without stating the fact, scores above one that states it (50% is chance).\n"
        f"{forward_only} of the facts are never stated object first. BM25 reads prompt and completion.\n"
        f"{_probes(results['probes']) if 'probes' in results else ''}"
    )


def _probes(probes: Mapping[str, Any]) -> str:
    """What sequences of our own come to, by the order in which training stated the facts."""
    counts = {order: max(found["probes"] for found in partitions.values()) for order, partitions in probes.items()}
    header = ["sequences of our own", *(f"{TRAINED[order]} ({count} facts)" for order, count in counts.items())]
    names = dict.fromkeys(name for partitions in probes.values() for name in partitions)
    rows = [[name, *(_relative(partitions.get(name)) for partitions in probes.values())] for name in names]
    return (
        "\n## Probes\n\n"
        "Influence on the fact's query relative to sequences that state it as it was learnt: the median over facts,\n"
        "its 95 % interval, and in how many facts it is lower.\n\n"
        f"{_table(header, rows)}"
    )


def _relative(found: Mapping[str, Any] | None) -> str:
    if found is None or found["median"] is None:
        return "–"
    interval = "" if found["interval"] is None else " ({:.2f} to {:.2f})".format(*found["interval"])
    below = "" if found["below"] is None else f", {found['below']} of {found['defined']}"
    return f"{found['median']:.2f}{interval}{below}"


def _row(title: str, mean: Mapping[str, Any]) -> list[str]:
    by_kind = [f"{mean['recall_by_kind'][kind]:.2f}" if kind in mean["recall_by_kind"] else "–" for kind in STATING]
    mistakes = [f"{mean['outranked'][kind]:.0%}" if kind in mean["outranked"] else "–" for kind in CONFUSING]
    return [title, f"{mean['recall']:.2f}", f"{mean['reciprocal_rank']:.2f}", *by_kind, *mistakes]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = [f"{'-' * widths[0]}", *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for line in [header, rule, *rows]:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)
