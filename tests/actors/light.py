"""A rank of a replica that holds no model: its tasks are words that say how it should behave."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray

from actors.errors import BadRecord, Cancelled, GangBroken, MemoryRanOut


def light_spec(loading: str = "well", batch_size: int = 8, **cluster: Any) -> Any:
    """What a light rank is made of; classes of a function, so that Ray ships them whole and workers import nothing."""

    @dataclass(frozen=True)
    class Scan:
        batch_size: int

    @dataclass(frozen=True)
    class Cluster:
        min_replicas: int = 1
        max_replicas: int = 1
        idle_seconds: float = 60.0
        world_size: int = 1
        collective_timeout: float = 60.0
        cpus_per_rank: float = 0.5
        gpus_per_rank: float = 0.0

    @dataclass(frozen=True)
    class Spec:
        loading: str
        scan: Any
        cluster: Any

    return Spec(loading, Scan(batch_size), Cluster(**cluster))


def light_rank() -> Any:
    """An actor with the methods of `RankActor`.

    A task is a word, or `RANK:word PATH`: the rank of that number does as the word says if it is the first to create
    the file, while its fellows wait for it as in a collective.
    """

    @ray.remote(concurrency_groups={"watch": 1})
    class Light:
        def __init__(self) -> None:
            self.running, self.called_off, self.committing, self.spec = 0, 0, False, None
            self.awake = threading.Event()

        def address(self) -> str:
            return "nowhere:1"

        def load(self, spec: Any, rank: int, size: int, address: str) -> str:
            self.spec, self.rank, self.size = spec, rank, size
            if spec.loading == "badly":
                raise BadRecord("no such model")
            if spec.loading == "dies" or (spec.loading.startswith("once") and self.first(spec.loading)):
                os._exit(1)
            assert address == ("nowhere:1" if size > 1 else "")
            return "selection"

        def do(self, ticket: int, method: str, task: str) -> tuple[str, str, int, int, int]:
            self.running, self.committing = 0, False
            word = task
            if ":" in task.partition(" ")[0]:
                who, _, word = task.partition(":")
                first = self.first(f"{task}-{self.rank}")
                if first and int(who) != self.rank:
                    time.sleep(60)
                word = word if first else "well"
            self.behave(word.partition(" ")[0], ticket)
            return method, task, os.getpid(), self.rank, self.spec.scan.batch_size

        def behave(self, word: str, ticket: int) -> None:
            if word == "deadly":
                os._exit(1)
            if word == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if word == "bad":
                raise BadRecord("it is bad", file="corpus.jsonl", row=7)
            if word == "wrong":
                raise ZeroDivisionError("by zero")
            if word == "broken":
                raise GangBroken("the ranks of a replica lost one another", rank=self.rank)
            if word == "large" and self.spec.scan.batch_size > 2:
                error = MemoryRanOut("memory ran out")
                error.batch_size = self.spec.scan.batch_size
                raise error
            if word == "huge":
                error = MemoryRanOut("memory ran out")
                error.batch_size = 1
                raise error
            if word == "slow":
                self.running = 5
                time.sleep(1.5)
            if word == "late":
                self.running = 5
                self.wait_until_called_off(ticket)
            if word == "writing":
                self.committing = True
                time.sleep(8)

        def wait_until_called_off(self, ticket: int) -> None:
            for _ in range(600):
                time.sleep(0.1)
                if self.called_off == ticket:
                    raise Cancelled("called off")

        @staticmethod
        def first(task: str) -> bool:
            try:
                os.close(os.open(task.partition(" ")[2], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            return True

        @ray.method(concurrency_group="watch")
        def pulse(self) -> Any:
            batch_size = self.spec.scan.batch_size if self.spec else 0
            return SimpleNamespace(finished=self.running, batch_size=batch_size, kind="")

        @ray.method(concurrency_group="watch")
        def cancel(self, ticket: int) -> bool:
            self.called_off = ticket
            return not self.committing

        @ray.method(concurrency_group="watch")
        def process(self) -> int:
            return os.getpid()

    return Light
