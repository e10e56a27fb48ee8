"""The pool of replicas on Ray: dealing, death, breathing and the short tail, with ranks that hold no model."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util import placement_group_table

from actors import gang as gang_module
from actors import pool as pool_module
from actors.errors import BadRecord, MemoryRanOut, ShardFailed, WhenceError
from actors.gang import State
from actors.pool import RayPool
from tests.actors.light import light_rank, light_spec

Make = Callable[..., RayPool]
Done = list[tuple[str, Any]]


@pytest.fixture
def make(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make(replicas, **settings)`: a pool of light ranks; afterwards no actor and no room may be left of it."""
    monkeypatch.setattr(pool_module, "TICK_SECONDS", 0.2)
    made = []

    def pool(replicas: int = 1, loading: str = "well", patience: float = 60.0, **cluster: Any) -> RayPool:
        found = RayPool(light_spec(loading, max_replicas=replicas, **cluster), light_rank(), patience)
        made.append(found)
        return found

    yield pool
    for each in made:
        each.close()
    wait_until(lambda: not groups("PENDING", "CREATED", "RESCHEDULING"))


def wait_until(reached: Callable[[], Any], seconds: float = 30.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.1)
    return found


def groups(*states: str) -> list[Any]:
    """Placement groups in any of these states."""
    return [group for group in placement_group_table().values() if group["state"] in states]


def run(pool: RayPool, tasks: list[str]) -> Done:
    done: Done = []
    pool.run("method", tasks, lambda task, report: done.append((task, report)), lambda _running: None)
    return done


def processes(pool: RayPool) -> list[list[int]]:
    """Process ids of all ranks, gang by gang."""
    return [[ray.get(actor.process.remote()) for actor in gang._actors] for gang in pool._gangs]


def states(pool: RayPool) -> list[State]:
    return [gang.state for gang in pool._gangs]


# --- dealing ----------------------------------------------------------------------------------------------------------


def test_every_task_is_done_once_by_the_method_asked_for(make: Make):
    pool = make(2)
    assert pool.describe() == "selection"
    tasks = [f"task{number}" for number in range(20)]
    done = run(pool, tasks)
    assert sorted(task for task, _ in done) == sorted(tasks)
    assert all(report[:2] == ("method", task) for task, report in done)
    assert run(pool, []) == []


def test_all_replicas_work(make: Make):
    done = run(make(2, min_replicas=2), ["slow", "slow"])
    assert len({report[2] for _, report in done}) == 2


def test_a_tick_tells_what_running_tasks_have_behind_them(make: Make):
    ticks: list[int] = []
    make().run("method", ["slow"], lambda task, report: None, ticks.append)
    assert max(ticks) == 5


def test_a_gang_does_a_task_together_and_the_first_rank_reports(make: Make):
    pool = make(world_size=2)
    done = run(pool, ["a", "b"])
    assert [(task, report[3]) for task, report in done] == [("a", 0), ("b", 0)]
    (pids,) = processes(pool)
    assert len(set(pids)) == 2
    assert pool.held() == {ray.nodes()[0]["NodeID"]: 1.0}


# --- death ------------------------------------------------------------------------------------------------------------


def test_a_task_whose_replica_died_is_done_by_another(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        done = run(make(), ["first", f"0:deadly {tmp_path}/mark", "last"])
    assert [task.partition(" ")[0] for task, _ in done] == ["first", "0:deadly", "last"]
    assert len({report[2] for _, report in done}) == 2
    assert "a replica died" in caplog.text


@pytest.mark.parametrize("how", ["1:deadly", "0:deadly", "0:broken", "1:broken"])
def test_a_gang_whose_rank_died_is_torn_down_whole(make: Make, tmp_path: Path, how: str):
    pool = make(2, min_replicas=2, world_size=2)
    pool.describe()
    wait_until(lambda: pool.breathe() or states(pool) == [State.idle] * 2)
    before = processes(pool)
    tasks = [f"{how} {tmp_path}/mark", *(f"task{number}" for number in range(6))]
    done = run(pool, tasks)
    assert sorted(task for task, _ in done) == sorted(tasks)
    torn = [pids for pids in before if not any(map(alive, pids))] or wait_until(
        lambda: [pids for pids in before if not any(map(alive, pids))]
    )
    assert len(torn) == 1
    kept = next(pids for pids in before if pids not in torn)
    others = {report[2] for task, report in done if task.startswith("task")}
    assert kept[0] in others
    assert others <= {kept[0], *(pids[0] for pids in processes(pool))}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_task_that_kills_every_replica_is_named_after_three(make: Make, caplog: pytest.LogCaptureFixture):
    done: list[str] = []
    with caplog.at_level(logging.WARNING), pytest.raises(ShardFailed) as caught:
        make().run("method", ["harmless", "deadly"], lambda task, _: done.append(task), lambda _running: None)
    assert str(caught.value).startswith("deadly: 3 replicas died over it; the last: ")
    assert "lower scan.batch_size" in str(caught.value)
    assert done == ["harmless"]
    assert caplog.text.count("a replica died") == 3


def test_replicas_that_die_while_loading_are_tried_three_times(make: Make):
    with pytest.raises(WhenceError, match="replicas die while they load the model") as caught:
        make(loading="dies").describe()
    assert caught.value.remedy == "check that every node has this whence, and the memory for its share of the model"


def test_a_replica_that_ray_kills_for_its_memory_is_replaced(make: Make, monkeypatch: pytest.MonkeyPatch):
    pool = make()
    pool.describe()
    given, calls = ray.get, []

    def get(ref: Any) -> Any:
        if not calls:
            calls.append(ref)
            raise OutOfMemoryError("the node runs low on memory")
        return given(ref)

    monkeypatch.setattr(gang_module.ray, "get", get)
    assert [task for task, _ in run(pool, ["a", "b"])] == ["a", "b"]


def test_an_idle_replica_that_died_costs_no_task_an_attempt(make: Make, caplog: pytest.LogCaptureFixture):
    pool = make()
    pool.describe()
    ((pid,),) = processes(pool)
    os.kill(pid, 9)
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: pool.breathe() or not pool._gangs)
        assert [task for task, _ in run(pool, ["a"])] == ["a"]
    assert "an idle replica died" in caplog.text
    assert "its task is dealt again" not in caplog.text


# --- what hangs -------------------------------------------------------------------------------------------------------


def test_a_rank_that_stands_still_is_ended_with_its_gang(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pool = make(world_size=2, collective_timeout=4.0)
    pool.describe()
    ((_, second),) = processes(pool)
    with caplog.at_level(logging.WARNING):
        done = run(pool, [f"1:stopped {tmp_path}/mark"])
    assert len(done) == 1
    assert "rank 1 has not answered for 4 s (cluster.collective_timeout)" in caplog.text
    wait_until(lambda: not alive(second))


def test_a_rank_that_is_not_done_long_after_its_fellows_is_ended(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pool = make(world_size=2, collective_timeout=3.0)
    with caplog.at_level(logging.WARNING):
        done = run(pool, [f"1:well {tmp_path}/mark"])  # rank 0 waits for a minute, though rank 1 has returned
    assert len(done) == 1
    assert "rank 0 is not done 3 s after the others (cluster.collective_timeout)" in caplog.text


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_of_a_task_come_as_they_were_raised(make: Make, ranks: int, tmp_path: Path):
    pool = make(world_size=ranks)
    with pytest.raises(BadRecord) as caught:
        run(pool, [f"0:bad {tmp_path}/mark"])
    assert (caught.value.file, caught.value.row, caught.value.message) == ("corpus.jsonl", 7, "it is bad")
    assert [task for task, _ in run(pool, ["good"])] == ["good"]


def test_an_unforeseen_error_keeps_the_remote_traceback(make: Make):
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        run(make(), ["wrong"])
    assert any("raised in a worker of Ray" in note and "in do" in note for note in caught.value.__notes__)


def test_an_error_of_loading_comes_as_it_was_raised(make: Make):
    with pytest.raises(BadRecord, match="no such model"):
        make(loading="badly").describe()


def test_an_error_in_the_driver_leaves_a_pool_that_can_be_closed_or_used(make: Make):
    pool = make(2, min_replicas=2)
    pool.describe()

    def done(task: str, _: Any) -> None:
        raise KeyError(task)

    with pytest.raises(KeyError, match="quick"):
        pool.run("method", ["late", "quick"], done, lambda _running: None)
    assert sorted(task for task, _ in run(pool, ["a", "b", "c"])) == ["a", "b", "c"]


def test_memory_that_runs_out_in_a_gang_halves_its_batches_and_counts_no_death(
    make: Make, caplog: pytest.LogCaptureFixture
):
    pool = make(world_size=2)
    with caplog.at_level(logging.WARNING):
        done = run(pool, ["small", "large", "small again"])
    assert [(task, report[4]) for task, report in done] == [("small", 8), ("large", 2), ("small again", 2)]
    assert "next time set scan.batch_size=4" in caplog.text
    assert "next time set scan.batch_size=2" in caplog.text
    assert "died" not in caplog.text


def test_memory_that_runs_out_with_one_sequence_fails_the_stage(make: Make):
    with pytest.raises(MemoryRanOut, match="memory ran out"):
        run(make(world_size=2), ["huge"])


# --- breathing --------------------------------------------------------------------------------------------------------


def test_no_more_replicas_are_asked_for_than_there_are_tasks(make: Make):
    pool = make(3, min_replicas=0)
    assert pool._gangs == []
    run(pool, ["slow", "slow"])
    assert len(pool._gangs) == 2


def test_idle_replicas_leave_down_to_the_least(make: Make, caplog: pytest.LogCaptureFixture):
    pool = make(3, idle_seconds=1.0)
    run(pool, ["slow"] * 6)
    assert states(pool) == [State.idle] * 3
    with caplog.at_level(logging.INFO):
        wait_until(lambda: pool.breathe() or len(pool._gangs) == 1)
    time.sleep(1.2)
    pool.breathe()
    assert len(pool._gangs) == 1
    assert "idle replicas leave" in caplog.text
    assert len(groups("CREATED")) == 1


def test_a_replica_joins_when_a_node_does_and_is_given_work(make: Make):
    pool = make(2, cpus_per_rank=3)  # the cluster has room for one
    pool.describe()
    ticks: list[list[State]] = []
    done: Done = []

    def tick(_: int) -> None:
        ticks.append(states(pool))
        if len(ticks) == 2:
            nodes.append(join_node(cpus=3))
            wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 120)

    nodes: list[subprocess.Popen] = []
    try:
        pool.run("method", ["slow"] * 30, lambda task, report: done.append((task, report)), tick)
        assert ticks[1] == [State.busy, State.pending]
        assert len(done) == 30
        assert len({report[2] for _, report in done}) == 2
        assert len(pool.held()) == 2
    finally:
        pool.close()
        for node in nodes:
            end(node)
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, 120)  # other tests count CPUs


def join_node(cpus: int) -> subprocess.Popen:
    """A second node of the session's cluster, as a process."""
    words = ["start", f"--address={ray.get_runtime_context().gcs_address}", f"--num-cpus={cpus}", "--block"]
    return subprocess.Popen(
        [sys.executable, "-c", "import ray.scripts.scripts as s; s.main()", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end(process: subprocess.Popen) -> None:
    """End a process with all that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)


def test_what_is_waited_for_is_said(make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(pool_module, "PATIENCE_SECONDS", 0.5)
    blocker = make(cpus_per_rank=3)
    blocker.describe()
    pool = make(cpus_per_rank=2, world_size=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            pool._step(None)
    assert "each needs 2 processes of 2 CPUs and 0.0 GPUs; the cluster has {'CPU': 1.0, 'GPU': 0.0} free" in caplog.text
    assert "of {'CPU': 4.0" in caplog.text


# --- the tail ---------------------------------------------------------------------------------------------------------


def test_a_straggler_is_done_by_an_idle_replica_as_well_and_called_off(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pool = make(2, min_replicas=2, patience=1.0)
    wait_until(lambda: pool.breathe() or states(pool) == [State.idle] * 2)
    tasks = [f"0:late {tmp_path}/mark", "a", "b", "c"]
    started = time.monotonic()
    with caplog.at_level(logging.INFO):
        done = run(pool, tasks)
    assert time.monotonic() - started < 30  # the first replica alone would need a minute
    assert sorted(task for task, _ in done) == sorted(tasks)
    assert "takes long: an idle replica does it as well" in caplog.text
    before = processes(pool)
    wait_until(lambda: pool.breathe() or states(pool) == [State.idle] * 2)
    assert sorted(task for task, _ in run(pool, ["d", "e"])) == ["d", "e"]
    assert processes(pool) == before


def test_a_gang_that_straggles_is_called_off_too(make: Make, tmp_path: Path):
    pool = make(2, min_replicas=2, patience=1.0, world_size=2, collective_timeout=5.0)
    wait_until(lambda: pool.breathe() or states(pool) == [State.idle] * 2)
    tasks = [f"1:late {tmp_path}/mark", "a", "b", "c"]
    assert sorted(task for task, _ in run(pool, tasks)) == sorted(tasks)
    assert sorted(task for task, _ in run(pool, ["d", "e", "f"])) == ["d", "e", "f"]


def test_a_stage_ends_only_when_a_loser_cannot_write_any_more(make: Make, tmp_path: Path):
    pool = make(2, min_replicas=2, patience=1.0)
    wait_until(lambda: pool.breathe() or states(pool) == [State.idle] * 2)
    started = time.monotonic()
    done = run(pool, [f"0:writing {tmp_path}/mark", "a", "b", "c"])
    assert len(done) == 4
    assert 7 < time.monotonic() - started < 30
    assert states(pool) == [State.idle] * 2


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_pool_that_is_closed_leaves_no_actor_and_no_room(make: Make):
    pool = make(2, min_replicas=2)
    pool.describe()
    actors = [actor for gang in pool._gangs for actor in gang._actors]
    pool.close()
    pool.close()
    for actor in actors:
        with pytest.raises(RayActorError):
            ray.get(actor.pulse.remote(), timeout=20)
    wait_until(lambda: not groups("PENDING", "CREATED", "RESCHEDULING"))


def test_a_pool_that_was_closed_can_be_used_again(make: Make):
    pool = make()
    pool.describe()
    pool.close()
    assert [task for task, _ in run(pool, ["a"])] == ["a"]
