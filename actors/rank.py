"""One rank of a replica, as a Ray actor: a process that holds the model, alone or with its fellows."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import ray
from transformers.utils.logging import disable_progress_bar

from actors.environment import hardware
from actors.errors import GangBroken
from actors.replica import Replica
from actors.sharding import free_address, is_communication, join
from actors.tasks import Done, ReplicaSpec
from influence.layers import LayerSelection

SIOCGIFADDR = 0x8915  # Linux: ask for the address of a network interface


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself while it works.

    Attributes:
        finished: sequences that the running task has behind it.
        batch_size: sequences of a micro-batch, now.
        kind: the hardware that it computes on.
    """

    finished: int = 0
    batch_size: int = 0
    kind: str = ""


@contextmanager
def lost_fellows(rank: int, size: int) -> Iterator[None]:
    """Turn errors of collectives into `GangBroken`: what broke the gang is another rank's to tell."""
    try:
        yield
    except RuntimeError as error:
        if size == 1 or not is_communication(error):
            raise
        raise GangBroken(f"the ranks of a replica lost one another: {error}", rank=rank) from error


def interface(ip: str) -> str | None:
    """The network interface that has an IPv4 address; None where the system does not tell (it does on Linux)."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(found[20:24]) == ip:
                return name
    return None


class RankActor:
    """A rank in a Ray actor. The model is loaded by a call, so that its errors reach the driver as they are."""

    def __init__(self) -> None:
        self._replica: Replica | None = None
        self._rank, self._size = 0, 1
        self._kind = ""
        self._lock = threading.Lock()
        self._ticket = 0  # of the task that runs or ran last
        self._called_off = 0  # of the last task that was called off

    def address(self) -> str:
        """Where the ranks may meet, if this one is the first: `ip:port`."""
        return free_address()

    def load(self, spec: ReplicaSpec, rank: int, size: int, address: str) -> LayerSelection:
        """Join the other ranks and load the model; its bars of progress would garble the driver's log."""
        disable_progress_bar()
        self._rank, self._size = rank, size
        found = hardware()
        self._kind = f"{found['machine']} {found['processor']} {found['gpus'] if spec.cluster.gpus_per_rank else ''}"
        with lost_fellows(rank, size):
            self._replica = self._load(spec, address)
        return self._replica.describe()

    def do(self, ticket: int, method: str, task: Any) -> Done:
        """Run one task; tickets number tasks, upwards."""
        assert self._replica is not None
        with self._lock:
            self._ticket = ticket
            self._replica.finished = 0
            self._replica.committing = False
            self._replica.cancelled = self._called_off == ticket
        with lost_fellows(self._rank, self._size):
            return getattr(self._replica, method)(task)

    @ray.method(concurrency_group="watch")
    def pulse(self) -> Pulse:
        """How far the running task is, and with what."""
        replica = self._replica
        return Pulse(replica.progress(), replica.batch_size, self._kind) if replica else Pulse()

    @ray.method(concurrency_group="watch")
    def cancel(self, ticket: int) -> bool:
        """Call a task off; returns whether it is certain that this rank will write nothing of it from now on."""
        with self._lock:
            self._called_off = ticket
            if self._ticket != ticket or self._replica is None:
                return True  # it has ended, or will find that it was called off
            self._replica.cancelled = True
            return not self._replica.committing  # set before the last look at `cancelled`

    def _load(self, spec: ReplicaSpec, address: str) -> Replica:
        if self._size == 1:
            return Replica(spec)
        name = interface(ray.util.get_node_ip_address())
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo asks for the host's name, often that of loopback
        cluster = spec.cluster
        timeout, gpu = cluster.collective_timeout, cluster.gpus_per_rank > 0
        return Replica(spec, join(self._rank, self._size, address, timeout, gpu))


RANK = cast(Any, ray.remote)(concurrency_groups={"watch": 1})(RankActor)
