"""The machines of a run: Ray, the pool of replicas on it, and plain Ray tasks; started when first needed."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.errors import ConfigError, ShardFailed
from actors.gang import raised
from actors.pool import PATIENCE_SECONDS, TICK_SECONDS, Pool, RayPool
from actors.tasks import ReplicaSpec
from conf.schema import RunConfig
from pipelines.ending import rearm

log = logging.getLogger(__name__)

TASK_ATTEMPTS = 3
SETTLE_SECONDS = 3.0  # until Ray has told all nodes that CPUs are free again
STUCK_SECONDS = 120.0  # without a result, where no CPUs are free
CONNECT_SECONDS = 10.0  # to find out whether anything listens at cluster.address


class Cluster:
    """Ray and the replicas of one run, as a context manager; nothing starts before it is asked for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._pool: Pool | None = None
        self._started_ray = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def threads(self) -> int:
        """Threads of a task or of a rank."""
        return self._config.cluster.cpus_per_rank

    def start(self) -> None:
        """Join or start Ray, unless this process has it already."""
        if ray.is_initialized():
            return
        cluster = self._config.cluster
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of ranks whose gang has been torn down
        os.environ.setdefault("RAY_task_oom_retries", str(TASK_ATTEMPTS - 1))  # Ray's own default never gives up
        if cluster.address == "local":
            needed = cluster.max_replicas * cluster.world_size * cluster.cpus_per_rank
            cores = os.cpu_count() or 1
            cpus = cluster.num_cpus or max(cores, needed) + cores  # replicas keep theirs while tasks run
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            join(cluster.address)
        rearm()
        self._started_ray = True
        log.info("Ray %s with %s CPUs", ray.__version__, int(ray.cluster_resources().get("CPU", 0)))

    @property
    def pool(self) -> Pool:
        """The replicas; asked for on first use."""
        if self._pool is None:
            self.start()
            self._pool = RayPool(ReplicaSpec(self._config.model, self._config.scan, self._config.cluster))
        return self._pool

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple], memory: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments as Ray tasks, spread over the nodes; meanwhile the pool breathes.

        Args:
            function: runs again if its worker or its node dies, so what it writes must be idempotent.
            arguments: dealt in this order: costly ones first.
            memory: bytes that each takes, in the order of arguments; a node is given no more than it has.

        Yields:
            (position, result) as they finish.

        Raises:
            ShardFailed: if workers or nodes die over one of them again and again.
            Exception: whatever a task raised.
        """
        self.make_room()
        items = list(arguments)
        remote = ray.remote(function)
        options = {"num_cpus": self.threads, "max_retries": TASK_ATTEMPTS - 1, "scheduling_strategy": "SPREAD"}
        waiting, running = deque(range(len(items))), dict[Any, int]()
        moved, tell, unlock = time.monotonic(), PATIENCE_SECONDS, STUCK_SECONDS
        try:
            while waiting or running:
                while waiting and len(running) < self._width():
                    position = waiting.popleft()
                    bytes_ = self._portion(memory[position]) if memory else None
                    running[remote.options(memory=bytes_, **options).remote(*items[position])] = position
                ready = self._any(list(running))
                still = time.monotonic() - moved
                if ready:
                    moved, tell, unlock = time.monotonic(), PATIENCE_SECONDS, STUCK_SECONDS
                elif still >= unlock:
                    unlock += PATIENCE_SECONDS
                    self._unlock()
                elif still >= tell:
                    tell *= 2  # of what goes on for long, less and less often
                    self._tell(len(running), still)
                for ref in ready:
                    position = running.pop(ref)
                    yield position, _result(ref, function.__name__, position, len(items))
        finally:
            for ref in running if ray.is_initialized() else ():
                ray.cancel(ref)  # the caller has gone; what they write is whole or not there

    def _any(self, refs: list[Any]) -> list[Any]:
        """Those that are done, after a tick at most; the pool breathes."""
        ray.wait(refs, num_returns=1, timeout=TICK_SECONDS)
        if self._pool is not None:
            self._pool.breathe()
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0]

    def _width(self) -> int:
        """Tasks to ask for at a time: as many as find room, and as many again so that none waits for the driver."""
        cluster = self._config.cluster
        room = int(ray.cluster_resources().get("CPU", 0) // self.threads)
        return 2 * max(1, room, cluster.max_replicas * cluster.world_size)  # pending ones are what an autoscaler sees

    def _portion(self, wanted: int) -> int:
        most = max((int(node["Resources"].get("memory", 0)) for node in _nodes()), default=0)
        if wanted > most > 0:
            log.warning("a task may take %s bytes of memory; no node has more than %s: it runs alone", wanted, most)
        return min(wanted, most) if most else wanted

    def _unlock(self) -> None:
        """Two runs whose tasks wait for the CPUs of each other's replicas would wait for ever."""
        if self._pool is not None and self._pool.held() and not self._cpus_are_free():
            self._let_go(f"no task has ended for {STUCK_SECONDS:g} seconds and no CPUs are free: replicas go")

    def _tell(self, tasks: int, seconds: float) -> None:
        rooms = [f"{node['Resources'].get('CPU', 0):g}" for node in _nodes()]
        log.info(
            "none of %d tasks of %d CPUs, each on one node, has ended for %.0f s: they run or wait for CPUs, of which "
            "the nodes have %s",
            tasks,
            self.threads,
            seconds,
            ", ".join(rooms) or "none",
        )

    def make_room(self) -> None:
        """See to it that tasks find CPUs: where replicas leave no node with enough, let the replicas go."""
        self.start()
        held = self._pool.held() if self._pool is not None else {}
        if not held:
            return
        free = [node["Resources"].get("CPU", 0) - held.get(node["NodeID"], 0) for node in _nodes()]
        if max(free, default=0) < self.threads:
            self._let_go(f"replicas leave no node with {self.threads} CPUs: they go while tasks run")
        elif not self._cpus_are_free(SETTLE_SECONDS):
            self._let_go("other runs hold the CPUs that are left: replicas go while tasks run")

    def rest(self, seconds: float) -> None:
        """While another run computes what this one needs: replicas go, since that run may be waiting for their CPUs.

        Args:
            seconds: For how long it has been waited for.
        """
        if self._pool is None:
            return
        self._pool.breathe()
        if seconds >= self._config.cluster.idle_seconds and self._pool.held():
            self._let_go("another run is waited for: replicas go meanwhile")

    def _let_go(self, why: str) -> None:
        assert self._pool is not None
        log.info("%s, and come back later", why)
        self._pool.close()

    def _cpus_are_free(self, patience: float = 0.0) -> bool:
        """Whether the cluster has CPUs for a task now; those of tasks that have just ended are seen a little later."""
        deadline = time.monotonic() + patience
        while ray.available_resources().get("CPU", 0) < self.threads:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    def close(self) -> None:
        """Let the replicas go, and stop Ray if this object started it."""
        if self._pool is not None and ray.is_initialized():
            self._pool.close()
        self._pool = None
        if self._started_ray and ray.is_initialized():
            ray.shutdown()
        self._started_ray = False


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _result(ref: Any, name: str, position: int, total: int) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise raised(error) from error
    except RayError as error:  # Ray has run it again as often as it may
        raise ShardFailed(
            f"{name}, task {position + 1} of {total}: workers died over it {TASK_ATTEMPTS} times; the last: {error}",
            remedy="look at the workers' logs; if memory ran out, use larger nodes or lower cluster.cpus_per_rank",
        ) from error


def join(address: str) -> None:
    """Join a cluster that is running.

    Raises:
        ConfigError: if there is none at this address, or it does not let us in.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and "//" not in host and port.isdigit():  # Ray itself tries for minutes before it gives up
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address={address}: no Ray cluster could be joined there ({error})",
            remedy="start one with `ray start --head`, give driver and cluster the same RAY_AUTH_TOKEN if they use "
            "tokens, or set cluster.address=local",
        ) from error
