"""Tasks on the cluster: where they find room, what becomes of those that die; a cluster that is not there."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.errors import BadRecord, ConfigError, ShardFailed
from conf.schema import ClusterConfig, RunConfig
from pipelines import cluster as cluster_module
from pipelines.cluster import Cluster, join

Make = Callable[..., Cluster]


class Resting:
    """A pool that holds CPUs of nodes and counts what is asked of it."""

    def __init__(self, held: dict[str, int]) -> None:
        self._held = held
        self.breaths, self.closed = 0, 0

    def held(self) -> dict[str, int]:
        return self._held

    def breathe(self) -> None:
        self.breaths += 1

    def close(self) -> None:
        self.closed += 1
        self._held = {}


@pytest.fixture
def make(ray_session: None) -> Iterator[Make]:
    """`make(pool=None, **settings)`: tasks of one CPU on the session's Ray, beside a pool."""

    def cluster(pool: Resting | None = None, **settings: Any) -> Cluster:
        found = Cluster(RunConfig(cluster=ClusterConfig(**({"cpus_per_rank": 1} | settings))))
        found._pool = pool  # type: ignore[assignment]
        return found

    return cluster


def double(number: int) -> int:
    return 2 * number


def test_results_come_with_their_positions(make: Make):
    found = dict(make().map(double, [(number,) for number in range(20)]))
    assert found == {number: 2 * number for number in range(20)}
    assert list(make().map(double, [])) == []


def test_costly_ones_are_dealt_first(make: Make, tmp_path: Path):
    def mark(number: int) -> float:
        time.sleep(0.1)
        return time.time()

    at = dict(make(cpus_per_rank=4).map(mark, [(number,) for number in range(5)]))
    assert [at[number] for number in range(5)] == sorted(at.values())


def test_a_task_whose_worker_dies_runs_again(make: Make, tmp_path: Path):
    def once(path: str) -> str:
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(1)
        return "done"

    assert list(make().map(once, [(str(tmp_path / "mark"),)])) == [(0, "done")]


def test_a_task_that_kills_its_workers_is_named(make: Make):
    def deadly(number: int) -> int:
        if number == 1:
            os._exit(1)
        return number

    with pytest.raises(ShardFailed, match="deadly, task 2 of 2: workers died over it 3 times; the last: ") as caught:
        list(make().map(deadly, [(0,), (1,)]))
    assert "lower cluster.cpus_per_rank" in str(caught.value)


def test_an_error_comes_as_it_was_raised(make: Make):
    def bad(number: int) -> int:
        raise BadRecord("it is bad", file="corpus.jsonl", row=number)

    with pytest.raises(BadRecord) as caught:
        list(make().map(bad, [(3,)]))
    assert caught.value.row == 3


def test_memory_that_tasks_take_keeps_them_apart(make: Make):
    memory = int(ray.nodes()[0]["Resources"]["memory"])

    def span(number: int) -> tuple[float, float]:
        started = time.time()
        time.sleep(0.5)
        return started, time.time()

    alone = make().map(span, [(0,), (1,)], memory=[int(0.6 * memory)] * 2)
    (_, one), (_, other) = sorted(alone, key=lambda found: found[1])
    assert one[1] <= other[0]
    together = make().map(span, [(0,), (1,)], memory=[int(0.1 * memory)] * 2)
    (_, one), (_, other) = sorted(together, key=lambda found: found[1])
    assert one[1] > other[0]


def test_a_task_that_takes_more_memory_than_any_node_has_runs_alone(make: Make, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert list(make().map(double, [(1,)], memory=[10**15])) == [(0, 2)]
    assert "a task may take 1000000000000000 bytes of memory; no node has more than" in caplog.text


def test_the_pool_breathes_while_tasks_run(make: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster_module, "TICK_SECONDS", 0.1)
    pool = Resting({})

    def wait(seconds: float) -> None:
        time.sleep(seconds)

    list(make(pool).map(wait, [(1.5,)]))
    assert pool.breaths >= 5


@pytest.mark.parametrize(("nodes", "threads", "leaves"), [((4,), 1, True), ((3,), 1, False), ((3,), 2, True)])
def test_replicas_leave_when_no_node_has_room_for_a_task(make: Make, nodes: tuple[int], threads: int, leaves: bool):
    held = {node["NodeID"]: cpus for node, cpus in zip(ray.nodes(), nodes, strict=False)}
    pool = Resting(held)
    make(pool, cpus_per_rank=threads).make_room()
    assert bool(pool.closed) == leaves


def test_room_is_looked_for_on_one_node(make: Make, monkeypatch: pytest.MonkeyPatch):
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("a", "b")]
    monkeypatch.setattr(cluster_module.ray, "nodes", lambda: nodes)
    spread, packed = Resting({"a": 3, "b": 3}), Resting({"a": 4, "b": 2})
    make(spread, cpus_per_rank=2).make_room()  # two are free, one on each node
    make(packed, cpus_per_rank=2).make_room()
    assert (spread.closed, packed.closed) == (1, 0)


def test_an_address_where_nothing_listens_is_refused_by_name():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"cluster.address={address}: no Ray cluster.*ray start --head"):
        join(address)
