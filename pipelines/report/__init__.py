"""The report: one self-contained `report.html`, made from the run's folder alone.

    read_run      the folder's tables and records                 reading.py
    pack_*        quantised, deflated, in base64, within a budget  packing.py
    overview      what the page says without unpacking anything    overview.py
    render        the page: its own hashes are its only licence    rendering.py
    page/         what the browser runs: page.html, CSS, JavaScript

Nothing that comes from the corpus, the model or the settings ever becomes markup: it travels as JSON or as base64, and
the page's scripts put it into text nodes.
"""

from __future__ import annotations

from pathlib import Path

from conf.schema import ReportConfig
from pipelines.report.overview import overview
from pipelines.report.packing import PackedQuery, fitting, map_ranks, pack_query
from pipelines.report.reading import read_run
from pipelines.report.rendering import render

NAME = "report.html"
MARGIN = 20_000  # bytes of the budget for the elements around blobs, and for notes that are known last

__all__ = ["NAME", "write_report"]


def write_report(run_dir: Path, config: ReportConfig) -> Path:
    """Write `report.html` into the folder of a run.

    Args:
        run_dir: the folder, with `summary.json` and `top.parquet`; what else of a run is there is shown as well.
        config: title, sequences a query and side, and the megabytes (10^6 bytes) that the file may take. Where they
            do not suffice, layer × token maps of the lower ranks are left out, then sequences; the page says so.

    Returns:
        The file.

    Raises:
        ConfigError: the folder is not one of a run.
        ReportError: a file of the run cannot be read.
    """
    run = read_run(Path(run_dir), config.sequences)
    queries = [pack_query(number, query["query_id"], run) for number, query in enumerate(run.summary["queries"])]
    budget = config.megabytes * 1_000_000 - MARGIN - len(render(overview(run, queries, 0, config), []).encode())
    shown = fitting(queries, config.sequences, budget)
    queries = [query.first(shown) for query in queries]
    left = budget - sum(len(query.blob) for query in queries)
    ranks = map_ranks(queries, left)
    page = render(overview(run, queries, ranks, config), _blobs(queries, ranks))
    path = run.path / NAME
    path.write_text(page, encoding="utf-8")
    return path


def _blobs(queries: list[PackedQuery], ranks: int) -> list[tuple[str, str]]:
    """Element ids and base64 content: the sequences of each query, and its maps."""
    blobs = []
    for query in queries:
        blobs.append((f"query-{query.number}", query.blob))
        blobs.append((f"maps-{query.number}", query.maps_blob(ranks)))
    return blobs
