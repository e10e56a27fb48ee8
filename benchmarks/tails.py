"""Speed and memory of the tails as scores grow in number: summaries of files, their merging, fits.

    python -m benchmarks.tails 1000000 10000000

Scores are drawn from Student's t with 3 degrees of freedom for 8 queries, in files of as many rows as the
scan's; each query has 10,000 proposals of BM25. Each size runs in a process of its own, tasks one after the
other in it, so that its peak over what imports take is that of driver and task together.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows
from actors.store import Store
from conf.schema import PrefilterConfig, RunConfig, UnfilteredConfig, UnfilteredKind
from influence.bm25 import TopK
from pipelines.progress import Progress
from pipelines.stages import candidates, scan, tails
from pipelines.stages.unfiltered import choose
from pipelines.steps import StageContext

QUERIES = 8
NAMES = [f"query {number}" for number in range(QUERIES)]


def context(folder: str, name: str, inputs: dict[str, Any] | None = None) -> StageContext:
    config = RunConfig(unfiltered=UnfilteredConfig(kind=UnfilteredKind.all))

    def one_by_one(function: Any, arguments: Any) -> Any:
        return ((position, function(*given)) for position, given in enumerate(arguments))

    progress = partial(Progress, every=1e9, terminal=False)
    cluster = None if name == "candidates" else SimpleNamespace(map=one_by_one)
    return StageContext(config, cluster, Store(folder).folder(name, "0" * 64), inputs or {}, progress)


def make(folder: str, rows: int) -> None:
    """Candidates and scores."""
    given, rng = context(folder, "candidates"), np.random.default_rng(0)
    top = PrefilterConfig().top
    best = [TopK(rng.choice(rows, min(top, rows), replace=False), np.ones(min(top, rows))) for _ in NAMES]
    index = candidates.write_blocks(given, NAMES, best, choose(given.config.unfiltered, rows), rows)
    given.artifact.write_json("index.json", index)
    scores = context(folder, "scores").artifact
    size = scan.shard_size(rows, given.config.scan.shard_sequences)
    for shard, first in enumerate(range(0, rows, size)):
        ids, feeds = candidate_rows(given.artifact, first, min(first + size, rows))
        values = rng.standard_t(3, (len(ids), QUERIES)).astype(np.float32)
        write_scores(scores, shard, ids, feeds, values, ShardReport(len(ids), 1))
    scores.write_json("queries.json", [{"query_id": name} for name in NAMES])
    scores.commit({}, {}, {}, 0.0)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(folder: str, rows: int) -> None:
    """Print a row of the table."""
    inputs = {name: context(folder, name).artifact for name in ("candidates", "scores")}
    given, before = context(folder, "tails", inputs), peak()
    start = time.process_time()
    found = tails.summarised(given, NAMES)
    summarised = time.process_time()
    for name, scores in zip(NAMES, found, strict=True):
        tails.describe_query(name, scores, inputs["candidates"], given.config.tails, ["unfiltered", "bm25"])
    described = time.process_time()
    tail = max(len(scores.unfiltered.largest_K) for scores in found)
    rate, each = rows / (summarised - start), (described - summarised) / QUERIES
    print(
        f"| {rows:,} | {summarised - start:.1f} s | {rate:,.0f} | {rate * QUERIES / 1e6:.1f} million | "
        f"{tail:,} | {each:.2f} s | {peak() - before:.0f} MiB |",
        flush=True,
    )


def main() -> None:
    print(f"{QUERIES} queries; seconds and rates are of one process's CPU time")
    print("| rows | summaries | rows a second | scores a second | kept a query | fits, a query | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    processes = multiprocessing.get_context("spawn")
    for rows in map(int, sys.argv[1:] or ["1000000"]):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            for work in (make, measure):
                process = processes.Process(target=work, args=(folder, rows))
                process.start()
                process.join()


if __name__ == "__main__":
    main()
