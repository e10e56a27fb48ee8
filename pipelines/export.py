"""Tables as CSV and plots as SVG and PNG beside a run's report, from the files of its folder alone.

A cell of text that a spreadsheet would take for a formula begins with an apostrophe; numbers are written as they are.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.plots import (
    Curve,
    LayerShares,
    PowerLaw,
    Tail,
    TokenMap,
    influence_share,
    layer_shares,
    save,
    slug,
    survival,
    token_map,
)
from pipelines.plots.style import number as number_text
from pipelines.report.reading import RunFolder, read_run

log = logging.getLogger(__name__)

TABLES, PLOTS = "tables", "plots"
EVERY = 2**31 - 1  # ranks
LAYER_SEQUENCES = 50  # top sequences in a distribution over layers, as in Figures 19 and 35
BARS = 16  # groups of layers in a panel
MAP_ROWS = 32  # groups of layers in a token × layer map
PANELS = 16  # queries in a figure
MAPS = 40  # queries whose first sequence gets a token × layer map
FORMULA = "=+-@＝＋－＠"  # what makes a spreadsheet compute a cell; the wide forms where they are typed


@dataclass(frozen=True)
class Attributed:
    """What `attribution.parquet` says of one sequence, without its matrix."""

    query_id: str
    side: str
    rank: int
    row: Mapping[str, Any]
    layers_L: np.ndarray
    tokens: int


def export(run_dir: Path) -> list[Path]:
    """Write `tables/*.csv` and `plots/*.svg` and `*.png` into a run's folder; those of an earlier export go.

    What an older run or a step that was turned off did not leave is left out.

    Args:
        run_dir: Of a finished run.

    Returns:
        The files, tables first.

    Raises:
        ConfigError: It is not the folder of a finished run.
        ReportError: One of its files cannot be read.
    """
    run = read_run(Path(run_dir), EVERY)
    for name, endings in ((TABLES, ("csv",)), (PLOTS, ("svg", "png"))):
        folder = run.path / name
        folder.mkdir(exist_ok=True)
        for stale in [file for ending in endings for file in folder.glob(f"*.{ending}")]:
            stale.unlink()
    attributed = list(_attributed(run))
    written = [write_csv(run.path / TABLES / f"{name}.csv", *table) for name, table in _tables(run, attributed)]
    for name, figure in _plots(run, attributed):
        written += save(figure, run.path / PLOTS, name)
    log.info("%d tables and plots in %s and %s", len(written), run.path / TABLES, run.path / PLOTS)
    return written


# CSV


def cell(value: object) -> object:
    """A value as a CSV cell: numbers as they are, nothing for what is undefined, text that no spreadsheet computes."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return value
    text = str(value).replace("\0", "\ufffd")
    return f"'{text}" if text.lstrip()[:1] in tuple(FORMULA) or text[:1] in ("\t", "\r", "\n") else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Path:
    """Write a table; a half surrogate, which UTF-8 has no bytes for, becomes a question mark."""
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([cell(name) for name in columns])
        writer.writerows([cell(row.get(name)) for name in columns] for row in rows)
    return path


Table = tuple[Sequence[str], Iterable[Mapping[str, object]]]


def _tables(run: RunFolder, attributed: Sequence[Attributed]) -> Iterator[tuple[str, Table]]:
    queries = ("query_id", "prompt", "completion", "contrast", "measured", "predicted_fidelity", "total_rank")
    yield "queries", (queries, run.summary["queries"])
    for side in ("top", "bottom"):
        file = run.path / f"{side}.parquet"
        if file.exists():
            rows = [row for (_, found), rows in run.rows.items() if found == side for row in rows]
            yield side, (pq.read_schema(file).names, rows)
    if attributed:
        yield "attribution", _attribution_table(run, attributed)
        yield "layers", _layer_table(run, attributed)
    if run.tails:
        yield from _tail_tables(run)


def _attribution_table(run: RunFolder, attributed: Sequence[Attributed]) -> Table:
    found = {(row["query_id"], side, row["rank"]): row for (_, side), rows in run.rows.items() for row in rows}
    columns = ("query_id", "side", "rank", "sequence_id", "feed", "score", "total", "sparsity", "spurious", "tokens")
    rows = (
        {
            **item.row,
            "feed": found.get((item.query_id, item.side, item.rank), {}).get("feed"),
            "tokens": item.tokens,
        }
        for item in attributed
    )
    return columns, rows


def _layer_table(run: RunFolder, attributed: Sequence[Attributed]) -> Table:
    columns = ("query_id", "side", "layer", "group", "kind", "sequences", "influence", "share")
    rows = []
    for (query_id, side), items in _by_query(attributed).items():
        layers_NL = np.stack([item.layers_L for item in items])
        shares_NL = shares(layers_NL)
        for at, layer in enumerate(run.layers.names):
            numbers = {"sequences": len(shares_NL), "influence": float(layers_NL[:, at].sum())}
            share = float(shares_NL[:, at].mean()) if len(shares_NL) else None
            place = {"layer": layer, "group": run.layers.groups[at], "kind": run.layers.kinds[at]}
            rows.append({"query_id": query_id, "side": side, **place, **numbers, "share": share})
    return columns, rows


def _tail_tables(run: RunFolder) -> Iterator[tuple[str, Table]]:
    tails, fits, shares_, prefilter = [], [], [], []
    for query_id, record in run.tails.items():
        for feed, found in record.get("feeds", {}).items():
            where = {"query_id": query_id, "feed": feed}
            law = found.get("fits", {}).get("power_law", {})
            low, high = law.get("interval") or (None, None)
            tail = {f"tail_{name}": value for name, value in (found.get("tail") or {}).items()}
            tails.append({**where, **found, **tail, **law, "alpha_low": low, "alpha_high": high})
            fits += [
                {**where, **_fit(name, fit, found.get("comparisons", {}))}
                for name, fit in found.get("fits", {}).items()
            ]
        shares_ += [{"query_id": query_id, "percent": p, "share": share} for p, share in record.get("share") or []]
        prefilter.append({"query_id": query_id, **_needed(record.get("needed") or {}), **_recall(record)})
    counts = ("query_id", "feed", "count", "positive", "negative", "sum_positive")
    law = ("best", "alpha", "alpha_low", "alpha_high", "xmin", "ks", "p_value", "bootstraps")
    yield "tails", ((*counts, "tail_n", "tail_cutoff", "tail_chosen_by", *law, "reason"), tails)
    ratio = ("ratio_to_power_law", "ratio_p_value")
    yield "fits", (("query_id", "feed", "distribution", "loglikelihood", "aic", *ratio, "parameters"), fits)
    yield "share", (("query_id", "percent", "share"), shares_)
    depths = dict.fromkeys(name for row in prefilter for name in row if name.startswith("recall_"))
    by_method = ("needed_power_law", "needed_empirical")
    needed = ("needed", "needed_low", "needed_high", *by_method, "threshold", "scanned", "method", "needed_reason")
    yield "prefilter", (("query_id", *depths, *needed), prefilter)
    if run.survival:
        points = [
            {"query_id": query_id, "feed": feed, "influence": influence, "survival": part}
            for query_id, feeds in run.survival.items()
            for feed, (influences, parts) in feeds.items()
            for influence, part in zip(influences, parts, strict=True)
        ]
        yield "survival", (("query_id", "feed", "influence", "survival"), points)


def _fit(name: str, fit: Mapping[str, Any], comparisons: Mapping[str, Any]) -> dict[str, object]:
    compared = comparisons.get(name) or {}
    judged = ("loglikelihood", "aic", "ks", "p_value", "bootstraps", "interval")
    parameters = {key: value for key, value in fit.items() if key not in judged}
    return {
        "distribution": name,
        "loglikelihood": fit.get("loglikelihood"),
        "aic": fit.get("aic"),
        "ratio_to_power_law": compared.get("loglikelihood_ratio"),
        "ratio_p_value": compared.get("p_value"),
        "parameters": json.dumps(parameters),
    }


def _needed(needed: Mapping[str, Any]) -> dict[str, object]:
    low, high = needed.get("interval") or (None, None)
    found = {"needed": needed.get("sequences"), "needed_low": low, "needed_high": high}
    estimates = needed.get("estimates") or {}
    return {
        **found,
        **{f"needed_{method}": estimate["sequences"] for method, estimate in estimates.items()},
        **{name: needed.get(name) for name in ("threshold", "scanned", "method")},
        "needed_reason": needed.get("reason"),
    }


def _recall(record: Mapping[str, Any]) -> dict[str, object]:
    return {f"recall_{depth}": value for depth, value in (record.get("recall") or {}).items()}


# Attribution


def _attributed(run: RunFolder) -> Iterator[Attributed]:
    """The rows of `attribution.parquet` in small: a row group at a time, without matrices."""
    if not run.attributed:
        return
    names = ["query_id", "side", "rank", "sequence_id", "score", "total", "sparsity", "spurious"]
    with pq.ParquetFile(run.path / "attribution.parquet") as file:
        for batch in file.iter_batches(columns=[*names, "layers", "pieces"], batch_size=256):
            sizes = np.diff(batch.column("pieces").offsets.to_numpy())
            layers = batch.column("layers")
            for index, row in enumerate(batch.select(names).to_pylist()):
                values_L = np.asarray(layers[index].values, dtype=np.float64)
                yield Attributed(row["query_id"], row["side"], row["rank"], row, values_L, int(sizes[index]))


def _by_query(attributed: Sequence[Attributed]) -> dict[tuple[str, str], list[Attributed]]:
    """The first sequences of each query and side."""
    found: dict[tuple[str, str], list[Attributed]] = {}
    for item in sorted(attributed, key=lambda item: item.rank):
        mine = found.setdefault((item.query_id, item.side), [])
        if len(mine) < LAYER_SEQUENCES:
            mine.append(item)
    return found


def shares(parts_NG: np.ndarray) -> np.ndarray:
    """What share of a sequence's influence each part has, for those whose influence has the sign of all together."""
    totals_N = parts_NG.sum(1)
    kept = totals_N * np.sign(totals_N.sum()) > 0
    return parts_NG[kept] / totals_N[kept, None]


def layer_bins(groups: Sequence[str], most: int) -> tuple[list[str], np.ndarray]:
    """Neighbouring groups of layers in at most `most` bins: names, and the bin of each layer [L]."""
    order = list(dict.fromkeys(groups))
    together = -(-len(order) // most) if order else 1
    runs = [order[start : start + together] for start in range(0, len(order), together)]
    place = {group: index for index, run in enumerate(runs) for group in run}
    return [_span(run) for run in runs], np.array([place[group] for group in groups], int)


def _span(run: Sequence[str]) -> str:
    """`block 0`, or `block 0–3`."""
    if len(run) == 1:
        return run[0]
    head, _, last = run[-1].rpartition(" ")
    return f"{run[0]}–{last if run[0].rpartition(' ')[0] == head else run[-1]}"


def binned(values_XL: np.ndarray, bins_L: np.ndarray, count: int) -> np.ndarray:
    """Sums over the layers of each bin, [X, G]."""
    return values_XL @ np.eye(count)[bins_L]


# Plots


def _plots(run: RunFolder, attributed: Sequence[Attributed]) -> Iterator[tuple[str, Any]]:
    tails = [_tail(query_id, run) for query_id in run.tails if query_id in run.survival]
    for name, page in _pages("survival", tails):
        yield name, survival(page)
    shares_ = {query_id: record["share"] for query_id, record in run.tails.items() if record.get("share")}
    if shares_:
        yield "share", influence_share(shares_)
    names, bins_L = layer_bins(run.layers.groups, BARS)
    for name, page in _pages("layers", list(_layer_shares(names, bins_L, attributed))):
        yield name, layer_shares(page, LAYER_SEQUENCES)
    for query_id, given in _maps(run):
        yield f"map-{slug(query_id)}", token_map(given)


def _pages(name: str, items: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    for number, start in enumerate(range(0, len(items), PANELS), start=1):
        yield name if number == 1 else f"{name}-{number}", items[start : start + PANELS]


def _tail(query_id: str, run: RunFolder) -> Tail:
    curves = {feed: Curve(*_positive(*points)) for feed, points in run.survival[query_id].items()}
    feed = run.tails[query_id].get("feeds", {}).get("unfiltered") or {}
    law = (feed.get("fits") or {}).get("power_law")
    curve = curves.get("unfiltered")
    if not law or not curve or not curve.influences:
        return Tail(query_id, curves, note=feed.get("reason") or "")
    at = np.argsort(curve.influences)
    x, y = np.log(np.asarray(curve.influences)[at]), np.log(np.asarray(curve.survivals)[at])
    share = float(np.exp(np.interp(math.log(law["xmin"]), x, y)))
    tested = f", p = {law['p_value']:.2g}" if law.get("p_value") is not None else ""
    return Tail(query_id, curves, PowerLaw(law["alpha"], law["xmin"], share), f"α = {law['alpha']:.2f}{tested}")


def _positive(influences: Sequence[float], parts: Sequence[float]) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in zip(influences, parts, strict=True) if x > 0 and y > 0]
    return [x for x, _ in kept], [y for _, y in kept]


def _layer_shares(names: Sequence[str], bins_L: np.ndarray, attributed: Sequence[Attributed]) -> Iterator[LayerShares]:
    for (query_id, side), items in _by_query(attributed).items():
        shares_NG = shares(binned(np.stack([item.layers_L for item in items]), bins_L, len(names)))
        if side == "top" and len(shares_NG):
            low, high = np.quantile(shares_NG, (0.25, 0.75), axis=0)
            yield LayerShares(query_id, names, shares_NG.mean(0).tolist(), low.tolist(), high.tolist())


def _maps(run: RunFolder) -> Iterator[tuple[str, TokenMap]]:
    """The token × layer map of each query's first sequence."""
    names, bins_L = layer_bins(run.layers.groups, MAP_ROWS)
    for query in run.summary["queries"][:MAPS]:
        for side, found in run.attributions(query["query_id"], 1):
            if side == "top":
                score = number_text(float(f"{found.row['score']:.4g}"))
                title = f"{query['query_id']}: sequence {found.row['sequence_id']}, influence {score}"
                yield (
                    query["query_id"],
                    TokenMap(title, found.pieces, names, binned(found.matrix_TL, bins_L, len(names))),
                )
