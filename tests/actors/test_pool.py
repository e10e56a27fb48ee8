"""The pool of replicas on Ray: dealing, death and replacement, with light actors that hold no model."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError

from actors import pool as pool_module
from actors.errors import BadRecord, ShardFailed, WhenceError
from actors.pool import RayPool

Make = Callable[..., RayPool]


def light_actor() -> Any:
    """An actor with the methods of `ReplicaActor`; defined here so that Ray ships it whole and it imports nothing."""

    @ray.remote(concurrency_groups={"watch": 1})
    class Light:
        def load(self, spec: Any) -> str:
            self.running = 0
            if spec.fails:
                raise spec.fails
            if spec.dies:
                os._exit(1)
            return "selection"

        def do(self, method: str, task: str) -> tuple[str, str, int]:
            if task == "deadly" or (task.startswith("once") and self.first(task)):
                os._exit(1)
            if task == "bad":
                raise BadRecord("it is bad", file="corpus.jsonl", row=7)
            if task == "wrong":
                raise ZeroDivisionError("by zero")
            if task.startswith("slow"):
                self.running = 5
                time.sleep(1.5)
            return method, task, os.getpid()

        @staticmethod
        def first(task: str) -> bool:
            try:
                os.close(os.open(task.partition(" ")[2], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            return True

        @ray.method(concurrency_group="watch")
        def progress(self) -> int:
            return self.running

    return Light


@pytest.fixture
def make(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make(replicas, fails=None, dies=False)`: a pool of light actors."""
    monkeypatch.setattr(pool_module, "_REMOTE", light_actor())
    monkeypatch.setattr(pool_module, "TICK_SECONDS", 0.2)
    made = []

    def pool(replicas: int = 1, fails: Exception | None = None, dies: bool = False) -> RayPool:
        cluster = SimpleNamespace(replicas=replicas, cpus_per_rank=0.5, gpus_per_rank=0)
        found = RayPool(SimpleNamespace(cluster=cluster, fails=fails, dies=dies))  # type: ignore[arg-type]
        made.append(found)
        return found

    yield pool
    for each in made:
        each.close()


def run(pool: RayPool, tasks: list[str]) -> list[tuple[str, Any]]:
    done: list[tuple[str, Any]] = []
    pool.run("method", tasks, lambda task, report: done.append((task, report)), lambda _running: None)
    return done


def test_every_task_is_done_once_by_the_method_asked_for(make: Make):
    pool = make(2)
    assert pool.describe() == "selection"
    tasks = [f"task {number}" for number in range(20)]
    done = run(pool, tasks)
    assert sorted(task for task, _ in done) == sorted(tasks)
    assert all(report[:2] == ("method", task) for task, report in done)
    assert run(pool, []) == []


def test_all_replicas_work(make: Make):
    done = run(make(2), ["slow 1", "slow 2"])
    assert len({report[2] for _, report in done}) == 2


def test_a_tick_tells_what_running_tasks_have_behind_them(make: Make):
    ticks: list[int] = []
    make().run("method", ["slow"], lambda task, report: None, ticks.append)
    assert max(ticks) == 5


def test_a_task_whose_replica_died_is_done_by_another(make: Make, tmp_path: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        done = run(make(), ["first", f"once {tmp_path}/mark", "last"])
    assert [task.partition(" ")[0] for task, _ in done] == ["first", "once", "last"]
    assert len({report[2] for _, report in done}) == 2
    assert "a replica died" in caplog.text


def test_a_task_that_kills_every_replica_is_named_after_three(make: Make, caplog: pytest.LogCaptureFixture):
    done: list[str] = []
    with caplog.at_level(logging.WARNING), pytest.raises(ShardFailed) as caught:
        make().run("method", ["harmless", "deadly"], lambda task, _: done.append(task), lambda _running: None)
    assert str(caught.value).startswith("deadly: 3 replicas died over it; the last: ")
    assert "lower scan.batch_size" in str(caught.value)
    assert done == ["harmless"]
    assert caplog.text.count("a replica died") == 3


def test_errors_of_a_task_come_as_they_were_raised(make: Make):
    pool = make()
    with pytest.raises(BadRecord) as caught:
        run(pool, ["bad"])
    assert (caught.value.file, caught.value.row, caught.value.message) == ("corpus.jsonl", 7, "it is bad")


def test_an_unforeseen_error_keeps_the_remote_traceback(make: Make):
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        run(make(), ["wrong"])
    assert any("raised in a worker of Ray" in note and "in do" in note for note in caught.value.__notes__)


def test_an_error_of_loading_comes_as_it_was_raised(make: Make):
    with pytest.raises(BadRecord, match="no such model"):
        make(fails=BadRecord("no such model")).describe()


def test_replicas_that_die_while_loading_are_tried_three_times(make: Make):
    with pytest.raises(WhenceError, match="replicas die while they load the model") as caught:
        make(dies=True).describe()
    assert caught.value.remedy == "check that the model fits into a replica's memory"


def test_a_replica_that_ray_kills_for_its_memory_is_replaced(make: Make, monkeypatch: pytest.MonkeyPatch):
    pool = make()
    pool.describe()
    given, calls = ray.get, []

    def get(ref: Any) -> Any:
        if not calls:
            calls.append(ref)
            raise OutOfMemoryError("the node runs low on memory")
        return given(ref)

    monkeypatch.setattr(pool_module.ray, "get", get)
    assert [task for task, _ in run(pool, ["a", "b"])] == ["a", "b"]


def test_a_pool_that_is_closed_leaves_no_actor(make: Make):
    pool = make(2)
    pool.describe()
    actors = [member.actor for member in pool._members]
    pool.close()
    pool.close()
    for actor in actors:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.progress.remote(), timeout=20)
