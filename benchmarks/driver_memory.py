"""Memory of the driver as the corpus grows: candidates, scan, ranking and run folder, with everything scanned.

    python -m benchmarks.driver_memory 1000000 10000000

Each size is measured in a process of its own that does what the driver does. Tasks and replicas are one other process,
which writes scores without a model: the driver never sees a model or a score anyway. BM25 is left out; its best lists
are bounded by `prefilter.top`. Prints the peak of the resident memory over what imports take.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows
from actors.store import Store
from actors.tasks import Done, ScanTask
from conf.schema import PrefilterConfig, PrefilterKind, QueriesConfig, RunConfig, UnfilteredConfig, UnfilteredKind
from influence.bm25 import TopK
from pipelines import tracing
from pipelines.progress import Progress
from pipelines.stages import candidates, scan, top
from pipelines.stages.unfiltered import choose
from pipelines.steps import StageContext

QUERIES = 8
AHEAD = 64  # tasks that wait in the other process


class Elsewhere:
    """Stands in for the cluster and its pool of replicas: one other process."""

    def __init__(self) -> None:
        self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    @property
    def pool(self) -> Elsewhere:
        """The replicas."""
        return self

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple], *_: Any) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments, some ahead of what is taken."""
        given, waiting = enumerate(arguments), []
        for position, argument in given:
            waiting.append((position, self._executor.submit(function, *argument)))
            if len(waiting) == AHEAD:
                position, future = waiting.pop(0)
                yield position, future.result()
        for position, future in waiting:
            yield position, future.result()

    def run(self, _method: str, tasks: list[ScanTask], done: Callable[[ScanTask, Done], None], _tick: Any) -> None:
        """Run the scan's tasks."""
        for position, report in self.map(score, ((task,) for task in tasks)):
            done(tasks[position], report)

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()


def score(task: ScanTask) -> Done:
    """Write what a replica writes."""
    ids, feeds = candidate_rows(task.candidates, task.first, task.stop)
    values = np.random.default_rng(task.shard).standard_normal((len(ids), QUERIES), dtype=np.float32)
    write_scores(task.output, task.shard, ids, feeds, values, ShardReport(len(ids), 1))
    return Done(len(ids))


def measure(sequences: int, folder: Path) -> dict[str, float]:
    """Peak of this process after each stage, in MiB over what it was before, and the shards."""
    store, elsewhere, before, peaks = Store(str(folder / "store")), Elsewhere(), _peak(), {}
    config = RunConfig(
        queries=QueriesConfig(path="-"),
        prefilter=PrefilterConfig(kind=PrefilterKind.none),
        unfiltered=UnfilteredConfig(kind=UnfilteredKind.all),
    )
    names = [str(query) for query in range(QUERIES)]
    inputs = {kind: store.folder(kind, "0" * 64) for kind in ("sequences", "queries")}
    inputs["sequences"].write_json("index.json", {"sequences": sequences, "shards": []})
    inputs["queries"].write_json("queries.json", [{"query_id": name} for name in names])

    def context(kind: str) -> StageContext:
        progress = partial(Progress, every=1e9, terminal=False)
        return StageContext(config, elsewhere, store.folder(kind, "0" * 64), inputs, progress)

    given = context("candidates")
    unfiltered = choose(config.unfiltered, sequences)
    index = candidates.write_blocks(given, names, [TopK.empty() for _ in names], unfiltered, sequences)
    given.artifact.write_json("index.json", index)
    inputs["candidates"], peaks["candidates"] = given.artifact, _peak() - before
    given = context("scores")
    result = scan.run(given)
    inputs["scores"], peaks["scan"] = given.artifact, _peak() - before
    given.artifact.commit({}, {}, result.counts, 0.0)
    peaks["commit"] = _peak() - before
    top.ranked(context("top"), QUERIES)
    peaks["top"] = _peak() - before
    context("top").artifact.write_table("top.parquet", pa.table({"rank": [1]}))
    tracing._fill(folder, context("top").artifact, given.artifact)
    peaks["run folder"] = _peak() - before
    elsewhere.close()
    return {"imports": before, **peaks, "shards": result.counts["shards"]}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure each size that the command line names."""
    spawn = multiprocessing.get_context("spawn")
    for size in map(int, sys.argv[1:]):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as executor:
            found = executor.submit(measure, size, Path(folder)).result()
        line = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
        print(f"{size:,} sequences in {time.perf_counter() - started:.0f} s: MiB at most: {line}", flush=True)


if __name__ == "__main__":
    main()
