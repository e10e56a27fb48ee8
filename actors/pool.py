"""The pool of replicas: Ray actors that are dealt tasks, and its double that runs them in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from transformers.utils.logging import disable_progress_bar

from actors.dealing import ATTEMPTS, Dealer
from actors.errors import WhenceError
from actors.replica import Replica
from actors.tasks import Done, ReplicaSpec
from influence.layers import LayerSelection

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PATIENCE_SECONDS = 30.0  # without any replica before the user is told what is waited for

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)  # Ray's monitor of memory kills with the second

OnDone = Callable[[Any, Done], None]
OnTick = Callable[[int], None]


class Pool(Protocol):
    """Replicas that work on tasks."""

    @property
    def cpus(self) -> int:
        """CPUs of the cluster that the replicas hold now."""
        ...

    def describe(self) -> LayerSelection:
        """Which layers the replicas' model tracks."""
        ...

    def run(self, method: str, tasks: Sequence[Any], done: OnDone, tick: OnTick) -> None:
        """Run a replica's method on every task.

        Args:
            method: name of a method of `Replica`.
            tasks: its arguments; finished in any order.
            done: called in this process with a task and what it reported.
            tick: called now and then with the sequences that unfinished tasks have behind them.

        Raises:
            ShardFailed: if replicas die over one task again and again.
            Exception: whatever a task raised.
        """
        ...

    def close(self) -> None:
        """Let the replicas go."""
        ...


class LocalPool:
    """One replica in this process, without Ray; the double of `RayPool`."""

    cpus = 0  # it runs where the driver runs

    def __init__(self, spec: ReplicaSpec) -> None:
        self._replica = Replica(spec)

    def describe(self) -> LayerSelection:
        """Which layers the model tracks."""
        return self._replica.describe()

    def run(self, method: str, tasks: Sequence[Any], done: OnDone, tick: OnTick) -> None:
        """Run the tasks one after the other."""
        for task in tasks:
            done(task, getattr(self._replica, method)(task))
            tick(0)

    def close(self) -> None:
        """Nothing to let go."""


class ReplicaActor:
    """A replica in a Ray actor. The model is loaded by a call, so that its errors reach the driver as they are."""

    def __init__(self) -> None:
        self._replica: Replica | None = None

    def load(self, spec: ReplicaSpec) -> LayerSelection:
        """Load the model; its bars of progress would garble the driver's log."""
        disable_progress_bar()
        self._replica = Replica(spec)
        return self._replica.describe()

    def do(self, method: str, task: Any) -> Done:
        """Run one task."""
        assert self._replica is not None
        self._replica.finished = 0
        return getattr(self._replica, method)(task)

    @ray.method(concurrency_group="watch")
    def progress(self) -> int:
        """Sequences that the running task has finished."""
        return self._replica.progress() if self._replica else 0


_REMOTE = cast(Any, ray.remote)(concurrency_groups={"watch": 1})(ReplicaActor)


@dataclass
class _Member:
    """A replica of the pool: its actor and the task it is on; None while it is idle or loading."""

    actor: Any
    loaded: bool = False
    task: int | None = None


class RayPool:
    """Replicas as Ray actors. One that dies is replaced, and the task it was on is dealt again."""

    def __init__(self, spec: ReplicaSpec) -> None:
        """Ask Ray for the replicas; they load while the caller goes on."""
        self._spec = spec
        self._refs: dict[Any, _Member] = {}
        self._members: list[_Member] = []
        self._selection: LayerSelection | None = None
        self._deaths = 0  # of replicas that were still loading
        for _ in range(spec.cluster.max_replicas):
            self._start_member()

    @property
    def cpus(self) -> int:
        """CPUs that replicas hold now; those that wait for theirs hold none."""
        return self._spec.cluster.cpus_per_rank * sum(member.loaded for member in self._members)

    def describe(self) -> LayerSelection:
        """Which layers the replicas' model tracks; waits for the first replica."""
        while self._selection is None:
            self._step(None, [], "", lambda task, done: None)
        return self._selection

    def run(self, method: str, tasks: Sequence[Any], done: OnDone, tick: OnTick) -> None:
        """Deal the tasks to whichever replica is idle."""
        dealer, asked = Dealer([str(task) for task in tasks]), time.monotonic()
        while dealer.unfinished:
            self._deal(dealer, method, tasks)
            self._step(dealer, tasks, method, done)
            if time.monotonic() - asked >= TICK_SECONDS:
                tick(self._progress())
                asked = time.monotonic()

    def close(self) -> None:
        """Kill the actors."""
        for member in self._members:
            ray.kill(member.actor)
        self._members, self._refs = [], {}

    def _start_member(self) -> None:
        cluster = self._spec.cluster
        actor = _REMOTE.options(num_cpus=cluster.cpus_per_rank, num_gpus=cluster.gpus_per_rank).remote()
        member = _Member(actor)
        self._members.append(member)
        self._refs[actor.load.remote(self._spec)] = member

    def _deal(self, dealer: Dealer, method: str, tasks: Sequence[Any]) -> None:
        for member in self._members:
            if member.loaded and member.task is None:
                member.task = dealer.deal()
                if member.task is None:
                    return
                self._refs[member.actor.do.remote(method, tasks[member.task])] = member

    def _step(self, dealer: Dealer | None, tasks: Sequence[Any], method: str, done: OnDone) -> None:
        """Wait for one event, at most a tick: a replica that has loaded, a task that is done, or a death."""
        ready = self._wait()
        for ref in ready:
            member = self._refs.pop(ref)
            try:
                result: Any = ray.get(ref)
            except RayTaskError as error:
                raise raised(error) from error
            except DEATHS as error:
                self._replace(member, dealer, str(error))
                continue
            if not member.loaded:
                member.loaded, self._selection, self._deaths = True, result, 0
            else:
                assert dealer is not None
                assert member.task is not None
                task, member.task = member.task, None
                dealer.finished(task)
                done(tasks[task], result)

    def _wait(self) -> list[Any]:
        limit = TICK_SECONDS if any(member.loaded for member in self._members) else PATIENCE_SECONDS
        ready, _ = ray.wait(list(self._refs), num_returns=1, timeout=limit)
        if not ready and limit == PATIENCE_SECONDS:
            cluster = self._spec.cluster
            log.warning(
                "waiting for a replica: each needs %s CPUs and %s GPUs; the cluster has %s free",
                cluster.cpus_per_rank,
                cluster.gpus_per_rank,
                {key: value for key, value in ray.available_resources().items() if key in ("CPU", "GPU")},
            )
        return ready

    def _replace(self, member: _Member, dealer: Dealer | None, cause: str) -> None:
        self._members.remove(member)
        ray.kill(member.actor)  # one that is only out of reach must not go on beside its successor
        if not member.loaded:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise WhenceError(
                    f"replicas die while they load the model; the last: {cause}",
                    remedy="check that the model fits into a replica's memory",
                )
        log.warning("a replica died (%s); a new one takes over", cause.splitlines()[0] if cause else "no cause given")
        self._start_member()
        if dealer is not None and member.task is not None:
            dealer.lost(member.task, cause)

    def _progress(self) -> int:
        """Sequences behind the running tasks; a replica that does not answer in time counts as none."""
        busy = [member.actor.progress.remote() for member in self._members if member.task is not None]
        if not busy:
            return 0
        ready, _ = ray.wait(busy, num_returns=len(busy), timeout=0.2)
        total = 0
        for ref in ready:
            try:
                total += ray.get(ref)
            except DEATHS:
                continue  # its death is seen, and its task dealt again, by `_step`
        return total


def raised(error: RayTaskError) -> BaseException:
    """What the task itself raised, with the remote traceback kept as a note."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if cause is not error and not isinstance(cause, WhenceError):
        cause.add_note(f"(raised in a worker of Ray)\n{error}")  # whose text is the remote traceback
    return cause
