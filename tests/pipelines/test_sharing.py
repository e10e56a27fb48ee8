"""Two runs on one cluster: each lets its replicas go rather than wait for CPUs that the other's replicas hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.store import Store
from conf.schema import ClusterConfig, RunConfig
from pipelines import cluster as cluster_module
from pipelines.claims import Claims
from pipelines.cluster import Cluster
from pipelines.runner import Runner
from pipelines.steps import StageResult, Step


class Holding:
    """A pool whose replicas hold CPUs of the session's Ray until it is closed."""

    def __init__(self, cpus: int) -> None:
        self._holders = [_Holder.remote() for _ in range(cpus)]
        ray.get([holder.ready.remote() for holder in self._holders])
        self.breaths = 0

    def held(self) -> Mapping[str, int]:
        return {ray.nodes()[0]["NodeID"]: len(self._holders)} if self._holders else {}

    def breathe(self) -> None:
        self.breaths += 1

    def close(self) -> None:
        while self._holders:
            ray.kill(self._holders.pop())


@ray.remote(num_cpus=1)
class _Holder:
    def ready(self) -> None:
        """It has its CPU."""


@pytest.fixture
def other(ray_session: None) -> Iterator[Holding]:
    """Another run's replicas, which hold two of the four CPUs."""
    found = Holding(2)
    yield found
    found.close()


def negative(number: int) -> int:
    return -number


def run(pool: Any, **settings: Any) -> Cluster:
    found = Cluster(RunConfig(cluster=ClusterConfig(cpus_per_rank=1, **settings)))
    found._pool = pool
    return found


def settle(free: float) -> None:
    limit = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) != free:
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_replicas_go_where_another_run_has_the_rest(other: Holding) -> None:
    mine = Holding(2)
    settle(0)
    run(mine).make_room()
    assert not mine.held()


def test_replicas_stay_while_cpus_are_free(other: Holding) -> None:
    mine = Holding(1)
    settle(1)
    run(mine).make_room()
    assert mine.held()
    mine.close()


def test_tasks_that_find_no_cpus_get_those_of_the_replicas(other: Holding, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"TICK_SECONDS": 0.1, "PATIENCE_SECONDS": 0.5, "STUCK_SECONDS": 1.0}.items():
        monkeypatch.setattr(cluster_module, name, seconds)
    mine = Holding(2)
    settle(0)
    cluster = run(mine)
    monkeypatch.setattr(cluster, "make_room", lambda: None)  # they were free when it looked
    assert dict(cluster.map(negative, [(3,)])) == {0: -3}
    assert not mine.held()


def test_who_waits_for_another_run_rests(ray_session: None) -> None:
    mine = Holding(1)
    cluster = run(mine, idle_seconds=5.0)
    cluster.rest(4.0)
    assert (mine.breaths, bool(mine.held())) == (1, True)
    cluster.rest(5.0)
    assert not mine.held()


def test_the_runner_says_how_long_it_has_waited(tmp_path: Path) -> None:
    rested: list[float] = []

    class Noting:
        def rest(self, seconds: float) -> None:
            rested.append(seconds)

    config, store = RunConfig(), Store(str(tmp_path))
    claims = Claims(store, poll=0.05)
    steps = [
        Step(name=name, kind=name, inputs=inputs, identity={}, run=lambda context: StageResult({}, {}))
        for name, inputs in (("first", ()), ("second", ("first",)))
    ]
    runner = Runner(store, steps, config, Noting, claims)
    second = runner._artifacts["second"]
    with claims.acquire(second, done=lambda: False) or pytest.fail("nobody else wants it"):
        thread = threading.Thread(target=runner.run)
        thread.start()
        limit = time.monotonic() + 60
        while len(rested) < 3:
            assert time.monotonic() < limit
            time.sleep(0.01)
    thread.join()
    assert rested == sorted(rested)
    assert second.committed
