"""Memory of the driver and of a single task while the corpus grows tenfold, from the candidates to the ranking."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows
from actors.store import Store
from actors.tasks import Done, ScanTask
from conf.schema import PrefilterConfig, PrefilterKind, QueriesConfig, RunConfig, UnfilteredConfig, UnfilteredKind
from influence.bm25 import TopK
from pipelines import tracing
from pipelines.progress import Progress
from pipelines.stages import candidates, scan, tails, top
from pipelines.stages.unfiltered import choose
from pipelines.steps import StageContext

SEQUENCES = 12_000
QUERIES = 3
ID_BYTES = 8
POOLS: list[Any] = []  # of Arrow's memory; they must live as long as the buffers


@dataclass
class Meter:
    """Peaks of what Python, NumPy and Arrow allocate, apart for the driver and for what runs as a task.

    Stands in for the cluster as well: tasks run here, one after the other.
    """

    driver: int = 0
    task: int = 0
    depth: int = 0
    before: int = 0
    base: int = 0

    def _reading(self) -> int:
        return tracemalloc.get_traced_memory()[1] + POOLS[-1].max_memory()

    def _begin(self) -> None:
        POOLS.append(pa.proxy_memory_pool(pa.system_memory_pool()))
        pa.set_memory_pool(POOLS[-1])
        tracemalloc.reset_peak()
        self.before = tracemalloc.get_traced_memory()[0]

    @contextmanager
    def driving(self) -> Iterator[None]:
        given = pa.default_memory_pool()
        tracemalloc.start()
        self._begin()
        self.base = self.before
        yield
        self.driver = max(self.driver, self._reading() - self.base)
        tracemalloc.stop()
        pa.set_memory_pool(given)

    def work(self, function: Callable[..., Any], *given: Any) -> Any:
        self.driver = max(self.driver, self._reading() - self.base)
        self._begin()
        result = function(*given)
        self.task = max(self.task, self._reading() - self.before)
        self._begin()
        return result

    @property
    def pool(self) -> Meter:
        return self

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple], *_: Any) -> Iterator[tuple[int, Any]]:
        for position, given in enumerate(arguments):
            yield position, self.work(function, *given)

    def run(self, method: str, tasks: list[ScanTask], done: Any, tick: Any) -> None:
        for task in tasks:
            done(task, self.work(score, task))
            tick(0)


def score(task: ScanTask) -> Done:
    """What a replica writes, with scores that say the sequence's number."""
    ids, feeds = candidate_rows(task.candidates, task.first, task.stop)
    assert len(ids) == task.count
    values = np.repeat(ids, QUERIES).astype(np.float32).reshape(-1, QUERIES)
    write_scores(task.output, task.shard, ids, feeds, values, ShardReport(len(ids), 1))
    return Done(len(ids))


def traced(sequences: int, folder: Path, kind: UnfilteredKind) -> Meter:
    """Candidates, scan, ranking and run folder of a corpus of which only the number of sequences is there."""
    store = Store(str(folder / "store"))
    config = RunConfig(
        queries=QueriesConfig(path="-"),
        prefilter=PrefilterConfig(kind=PrefilterKind.none),
        unfiltered=UnfilteredConfig(kind=kind, sequences=sequences // 2),
    )
    corpus, queries = (store.folder(kind, "0" * 64) for kind in ("sequences", "queries"))
    corpus.write_json("index.json", {"sequences": sequences, "shards": []})
    queries.write_json("queries.json", [{"query_id": str(query)} for query in range(QUERIES)])
    inputs = {"sequences": corpus, "queries": queries}
    meter = Meter()

    def context(name: str) -> StageContext:
        progress = partial(Progress, every=1e9, terminal=False)
        return StageContext(config, meter, store.folder(name, "0" * 64), inputs, progress)

    with meter.driving():
        given = context("candidates")
        best = [TopK(np.arange(0, 2000, 2), np.ones(1000)) for _ in range(QUERIES)]
        names = [str(query) for query in range(QUERIES)]
        index = candidates.write_blocks(given, names, best, choose(config.unfiltered, sequences), sequences)
        given.artifact.write_json("index.json", index)
        inputs["candidates"] = given.artifact
        given = context("scores")
        result = scan.run(given)
        given.artifact.commit({}, {}, result.counts, 0.0)
        inputs["scores"] = given.artifact
        found = top.ranked(context("top"), QUERIES)
        context("top").artifact.write_table("top.parquet", pa.table({"rank": [1]}))
        tracing._fill(folder, context("top").artifact, given.artifact)
        described = tails.summarised(context("tails"), names)
    assert result.counts["sequences"] == index["sequences"]
    expected = choose(config.unfiltered, sequences).within(0, sequences)[: -config.scan.top - 1 : -1].tolist()
    assert [scores.unfiltered.count for scores in described] == [index["per_feed"]["unfiltered"]] * QUERIES
    assert [scores.bm25.count for scores in described] == [1000] * QUERIES
    assert [[number for _, number, _ in ranked] for ranked in found] == [expected] * QUERIES
    return meter


@pytest.mark.parametrize("kind", [UnfilteredKind.all, pytest.param(UnfilteredKind.sample, marks=pytest.mark.slow)])
def test_the_driver_holds_less_than_an_id_a_sequence_and_a_task_no_more_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: UnfilteredKind
):
    monkeypatch.setattr(candidates, "BLOCK", 2048)
    monkeypatch.setattr("pipelines.stages.unfiltered._BLOCK", 2048)
    monkeypatch.setattr(top, "SHARDS_A_TASK", 16)
    monkeypatch.setattr(tails, "SHARDS_A_TASK", 16)
    monkeypatch.setattr(tails, "ROWS", 2048)
    monkeypatch.setattr(scan, "REPORTS_A_TASK", 16)
    small = traced(SEQUENCES, tmp_path / "small", kind)
    large = traced(10 * SEQUENCES, tmp_path / "large", kind)
    assert large.driver - small.driver < ID_BYTES * 9 * SEQUENCES
    assert large.task < 1.25 * small.task


def test_once_the_shards_are_as_many_as_they_get_the_driver_holds_no_more_for_ten_times_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scan, "MOST_SHARDS", 16)
    monkeypatch.setattr(top, "SHARDS_A_TASK", 4)
    monkeypatch.setattr(scan, "REPORTS_A_TASK", 4)
    small = traced(SEQUENCES, tmp_path / "small", UnfilteredKind.all)
    large = traced(10 * SEQUENCES, tmp_path / "large", UnfilteredKind.all)
    assert large.driver < 1.25 * small.driver
