"""The machines of a run: Ray, the pool of replicas on it, and plain Ray tasks; started when first needed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.errors import ConfigError
from actors.pool import PATIENCE_SECONDS, Pool, RayPool, raised
from actors.tasks import ReplicaSpec
from conf.schema import RunConfig

log = logging.getLogger(__name__)

TASK_ATTEMPTS = 3
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
        if cluster.address == "local":
            needed = cluster.max_replicas * cluster.cpus_per_rank
            cores = os.cpu_count() or 1
            cpus = cluster.num_cpus or max(cores, needed) + cores  # replicas keep theirs while tasks run
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            join(cluster.address)
        self._started_ray = True
        log.info("Ray %s with %s CPUs", ray.__version__, int(ray.cluster_resources().get("CPU", 0)))

    @property
    def pool(self) -> Pool:
        """The replicas; asked for on first use."""
        if self._pool is None:
            self.start()
            self._pool = RayPool(ReplicaSpec(self._config.model, self._config.scan, self._config.cluster))
        return self._pool

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments as Ray tasks; yields (position, result) as they finish.

        Raises:
            Exception: whatever a task raised; tasks whose node died are run again by Ray.
        """
        self.make_room()
        remote = ray.remote(function).options(num_cpus=self.threads, max_retries=TASK_ATTEMPTS)
        waiting = iter(list(enumerate(arguments)))
        width = max(1, int(ray.cluster_resources().get("CPU", 1) // self.threads)) * 2
        running: dict[Any, int] = {}
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < width:
                item = next(waiting, None)
                if item is None:
                    exhausted = True
                else:
                    running[remote.remote(*item[1])] = item[0]
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE_SECONDS)
            if not ready:
                log.info("%d tasks of %d CPUs, each on one node, run or wait for them", len(running), self.threads)
            for ref in ready:
                position = running.pop(ref)
                try:
                    yield position, ray.get(ref)
                except RayTaskError as error:
                    raise raised(error) from error

    def make_room(self) -> None:
        """See to it that tasks find CPUs: where replicas hold all of them, let the replicas go."""
        self.start()
        if self._pool is not None and ray.cluster_resources().get("CPU", 0) - self._pool.cpus < self.threads:
            log.info("replicas hold all CPUs: they leave while tasks run, and load the model again after that")
            self._pool.close()
            self._pool = None

    def close(self) -> None:
        """Let the replicas go, and stop Ray if this object started it."""
        if self._pool is not None and ray.is_initialized():
            self._pool.close()
        self._pool = None
        if self._started_ray and ray.is_initialized():
            ray.shutdown()
        self._started_ray = False


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
