"""A rank in its process: which errors mean that ranks lost one another, and what a cancellation promises."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray.util
import torch
import torch.distributed as dist

from actors.errors import Cancelled, GangBroken, MemoryRanOut
from actors.rank import RankActor, interface, is_communication, lost_fellows


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistNetworkError("The client socket has timed out after 600000ms"), True),
        (dist.DistBackendError("NCCL error: unhandled system error"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Watchdog caught collective operation timeout: ProcessGroupNCCL"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (MemoryRanOut("memory ran out; see ProcessGroupNCCL"), False),
        (ConnectionResetError("connection reset by peer"), False),  # of a store, say, which no other rank can mend
    ],
)
def test_errors_of_collectives_are_told_from_others(error: BaseException, expected: bool):
    assert is_communication(error) == expected


def test_a_rank_that_lost_its_fellows_says_so_with_its_number():
    with pytest.raises(GangBroken, match=r"rank 3: .* lost one another: .*gloo") as caught, lost_fellows(3, 4):
        raise RuntimeError("[gloo] Connection closed by peer")
    assert caught.value.rank == 3


def test_a_replica_of_one_process_has_nobody_to_lose():
    with pytest.raises(RuntimeError, match="gloo"), lost_fellows(0, 1):
        raise RuntimeError("gloo")


def test_the_interface_of_an_address_is_found():
    assert interface("127.0.0.1") == "lo"
    assert interface(ray.util.get_node_ip_address()) is not None
    assert interface("203.0.113.7") is None


class Waiting:
    """A replica whose task waits between its look at `cancelled` and its first write, for as long as is wanted."""

    batch_size = 4

    def __init__(self) -> None:
        self.finished, self.cancelled, self.committing = 7, True, True
        self.running, self.go_on = threading.Event(), threading.Event()

    def progress(self) -> int:
        return self.finished

    def work(self, task: str) -> str:
        self.committing = task == "writes"
        self.running.set()
        assert self.go_on.wait(20)
        if self.cancelled and not self.committing:
            raise Cancelled("called off")
        return "done"


@pytest.fixture
def rank() -> Any:
    actor = RankActor()
    actor._replica = Waiting()  # type: ignore[assignment]
    return actor


def running(rank: Any, ticket: int, task: str) -> tuple[threading.Thread, list[str]]:
    """A task in a thread of its own, as beside the concurrency group that watches it, and how it ends."""
    ends: list[str] = []

    def work() -> None:
        try:
            ends.append(rank.do(ticket, "work", task))
        except Cancelled:
            ends.append("cancelled")

    rank._replica.running.clear()
    rank._replica.go_on.clear()
    thread = threading.Thread(target=work)
    thread.start()
    assert rank._replica.running.wait(20)
    return thread, ends


def finish(rank: Any, thread: threading.Thread) -> None:
    rank._replica.go_on.set()
    thread.join(20)


def test_a_task_starts_afresh(rank: Any):
    thread, ends = running(rank, 1, "computes")
    assert (rank.pulse().finished, rank.pulse().batch_size) == (0, 4)
    finish(rank, thread)
    assert ends == ["done"]


def test_a_task_that_computes_promises_to_write_nothing(rank: Any):
    thread, ends = running(rank, 1, "computes")
    assert rank.cancel(1)
    finish(rank, thread)
    assert ends == ["cancelled"]


def test_a_task_that_writes_promises_nothing(rank: Any):
    thread, ends = running(rank, 1, "writes")
    assert not rank.cancel(1)
    finish(rank, thread)
    assert ends == ["done"]


def test_a_task_that_is_called_off_before_it_starts_finds_out(rank: Any):
    assert rank.cancel(2)
    thread, ends = running(rank, 2, "computes")
    finish(rank, thread)
    assert ends == ["cancelled"]


def test_calling_off_a_task_that_is_over_leaves_the_next_alone(rank: Any):
    thread, ends = running(rank, 5, "computes")
    assert rank.cancel(4)
    finish(rank, thread)
    assert ends == ["done"]
