"""The pool of replicas: gangs of Ray actors that are dealt tasks, and its double that runs them in this process.

One thread, the driver's, does it all: every call of the pool looks at what has happened meanwhile. Which task goes
where, and how many replicas there should be, is decided in `actors.dealing`; what the answers of a gang mean, in
`actors.verdict`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from actors.dealing import ATTEMPTS, SLOW_SECONDS, Census, Dealer, breathe
from actors.errors import WhenceError
from actors.gang import Assignment, Gang, State
from actors.rank import RANK
from actors.replica import Replica
from actors.tasks import Done, ReplicaSpec
from actors.verdict import CalledOff, Finished, Lost, Raised, TooLarge, Verdict
from influence.layers import LayerSelection

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PATIENCE_SECONDS = 30.0  # without any replica before the user is told what is waited for

OnDone = Callable[[Any, Done], None]
OnTick = Callable[[int], None]


class Pool(Protocol):
    """Replicas that work on tasks."""

    def held(self) -> Mapping[str, int]:
        """CPUs that the replicas hold now, by the id of the node."""
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

    def breathe(self) -> None:
        """Let replicas go that have had nothing to do for long; called while the driver waits for something else."""
        ...

    def close(self) -> None:
        """Let all replicas go; a pool that is used again asks for new ones."""
        ...


class LocalPool:
    """One replica in this process, without Ray; the double of `RayPool`."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._replica = Replica(spec)

    def held(self) -> Mapping[str, int]:
        """It runs where the driver runs."""
        return {}

    def describe(self) -> LayerSelection:
        """Which layers the model tracks."""
        return self._replica.describe()

    def run(self, method: str, tasks: Sequence[Any], done: OnDone, tick: OnTick) -> None:
        """Run the tasks one after the other."""
        for task in tasks:
            done(task, getattr(self._replica, method)(task))
            tick(0)

    def breathe(self) -> None:
        """Nobody to let go."""

    def close(self) -> None:
        """Nothing to let go."""


@dataclass
class _Run:
    """One call of `RayPool.run`."""

    number: int
    method: str
    tasks: Sequence[Any]
    done: OnDone
    dealer: Dealer


class RayPool:
    """Replicas as gangs of Ray actors, between `cluster.min_replicas` and `cluster.max_replicas` of them.

    A gang that dies is replaced if there is work for it, and the task it was on is dealt again.
    """

    def __init__(self, spec: ReplicaSpec, rank_class: Any = RANK, patience: float = SLOW_SECONDS) -> None:
        """Ask the cluster for the least number of replicas; they load while the caller goes on.

        Args:
            spec: what a replica is made of.
            rank_class: the remote class of a rank, or its double.
            patience: seconds that a task runs before another replica may be given a copy of it.
        """
        self._spec, self._rank_class, self._patience = spec, rank_class, patience
        self._gangs: list[Gang] = []
        self._selection: LayerSelection | None = None
        self._deaths = 0  # of replicas that were still loading, in a row
        self._tickets, self._runs = itertools.count(1), itertools.count(1)
        self._felt = self._told = time.monotonic()
        self._breathe(0)

    def held(self) -> Mapping[str, int]:
        """CPUs that replicas hold now, by node; those that wait for theirs hold none."""
        held: dict[str, int] = {}
        for gang in self._gangs:
            for node, ranks in gang.nodes.items():
                held[node] = held.get(node, 0) + ranks * self._spec.cluster.cpus_per_rank
        return held

    def describe(self) -> LayerSelection:
        """Which layers the replicas' model tracks; waits for the first replica."""
        while self._selection is None:
            self._breathe(1)
            self._step(None)
        return self._selection

    def run(self, method: str, tasks: Sequence[Any], done: OnDone, tick: OnTick) -> None:
        """Deal the tasks to whichever replica is idle."""
        dealer = Dealer([str(task) for task in tasks], patience=self._patience)
        run, told = _Run(next(self._runs), method, tasks, done, dealer), time.monotonic()
        try:
            while dealer.unfinished:
                self._breathe(dealer.unfinished)
                self._deal(run)
                self._step(run)
                if time.monotonic() - told >= TICK_SECONDS:
                    tick(self._progress(run))
                    told = time.monotonic()
        except BaseException:
            self._call_off(run)
            raise
        self._settle()
        self._breathe(0, ask=False)

    def breathe(self) -> None:
        """Let replicas go that were idle for `cluster.idle_seconds`, and take back what is not placed yet."""
        self._step(None, wait=False)
        self._breathe(0, ask=False)

    def close(self) -> None:
        """Kill all ranks and give their room back."""
        while self._gangs:
            self._gangs.pop().kill()

    # --- size -------------------------------------------------------------------------------------------------------

    def _breathe(self, unfinished: int, ask: bool = True) -> None:
        cluster, now = self._spec.cluster, time.monotonic()
        pending = [gang for gang in self._gangs if gang.state is State.pending]
        rested = [gang for gang in self._gangs if gang.state is State.idle and now - gang.since >= cluster.idle_seconds]
        census = Census(len(pending), len(self._gangs) - len(pending), len(rested))
        breath = breathe(unfinished, census, cluster.min_replicas, cluster.max_replicas)
        for gang in pending[len(pending) - breath.withdraw :] + rested[: breath.leave]:
            self._discard(gang)
        if breath.leave:
            log.info("%d idle replicas leave; %d stay", breath.leave, census.held - breath.leave)
        tired = self._deaths >= ATTEMPTS and census.held > 0  # those that work go on without more
        for _ in range(breath.ask if ask and not tired else 0):
            self._gangs.append(Gang(self._spec, self._rank_class, now))

    def _discard(self, gang: Gang) -> None:
        self._gangs.remove(gang)
        gang.kill()  # one that is only out of reach must not go on beside its successor

    # --- dealing ----------------------------------------------------------------------------------------------------

    def _deal(self, run: _Run) -> None:
        for gang in self._gangs:
            if gang.state is not State.idle:
                continue
            task = run.dealer.deal()
            if task is None:
                task = self._copy(gang, run)
            if task is not None:
                work = Assignment(next(self._tickets), run.number, task)
                gang.start(work, run.method, run.tasks[task], time.monotonic())

    def _copy(self, gang: Gang, run: _Run) -> int | None:
        """A task that runs for too long, for an idle gang that would do it with the same bits."""
        task = run.dealer.copy(lambda task: any(gang.twin(other) for other in self._on(run, task)))
        if task is not None:
            log.info("%s takes long: an idle replica does it as well", run.dealer.names[task])
        return task

    def _on(self, run: _Run, task: int | None = None) -> list[Gang]:
        """The gangs that are on a task of a run, or on any, and were not called off."""
        return [
            gang
            for gang in self._gangs
            if gang.work is not None
            and gang.called_off is None
            and gang.work.run == run.number
            and task in (None, gang.work.task)
        ]

    # --- events -----------------------------------------------------------------------------------------------------

    def _step(self, run: _Run | None, wait: bool = True) -> None:
        """Wait for events, at most a tick, and act on all that are there."""
        gangs = {ref: gang for gang in self._gangs for ref in gang.refs}
        ready = self._wait(list(gangs), wait)
        now = time.monotonic()
        for ref in ready:
            gangs[ref].take(ref, now)
        if now - self._felt >= TICK_SECONDS:
            self._feel(now)
        for gang in list(self._gangs):
            verdict = gang.advance(now)
            if verdict is not None:
                self._act(gang, verdict, run)

    def _wait(self, refs: list[Any], wait: bool) -> list[Any]:
        if not refs:
            time.sleep(TICK_SECONDS if wait else 0)
            return []
        if wait:
            ray.wait(refs, num_returns=1, timeout=TICK_SECONDS)
            self._tell()
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return ready

    def _feel(self, now: float) -> None:
        self._felt = now
        for gang in list(self._gangs):
            cause = gang.feel(now)
            if cause is not None:
                log.warning("an idle replica died (%s)", first_line(cause))
                self._discard(gang)

    def _act(self, gang: Gang, verdict: Verdict, run: _Run | None) -> None:
        if gang.work is None:
            self._loaded(gang, verdict)
        elif gang.called_off is not None or run is None or gang.work.run != run.number:
            self._unwanted(gang, verdict)
        else:
            self._worked(gang, gang.work.task, verdict, run)

    def _loaded(self, gang: Gang, verdict: Verdict) -> None:
        match verdict:
            case Finished():
                self._selection, self._deaths = gang.selection, 0
                return
            case Lost(cause):
                self._discard(gang)
                self._deaths += 1
                if self._deaths >= ATTEMPTS and not any(other.is_loaded for other in self._gangs):
                    raise WhenceError(
                        f"replicas die while they load the model; the last: {cause}",
                        remedy="check that every node has this whence, and the memory for its share of the model",
                    )
                log.warning("a replica died while it loaded the model (%s)", first_line(cause))
            case Raised(error) | TooLarge(_, error):
                self._discard(gang)
                raise error
            case CalledOff():
                raise AssertionError("loading is not called off")

    def _unwanted(self, gang: Gang, verdict: Verdict) -> None:
        """The end of a task that another replica did, or whose stage failed: whatever it says, nobody listens."""
        whole = isinstance(verdict, (Finished, CalledOff)) or (isinstance(verdict, Raised) and gang.size == 1)
        if whole:
            gang.rest(time.monotonic())
        else:
            self._discard(gang)

    def _worked(self, gang: Gang, task: int, verdict: Verdict, run: _Run) -> None:
        match verdict:
            case Finished(results):
                gang.rest(time.monotonic())
                run.dealer.finished(task)
                for other in self._on(run, task):
                    other.call_off(time.monotonic())
                run.done(run.tasks[task], results[0])
            case Lost(cause):
                self._discard(gang)
                log.warning("a replica died (%s); its task is dealt again", first_line(cause))
                run.dealer.lost(task, cause)
            case TooLarge(batch_size, error):
                self._discard(gang)
                self._halve(batch_size, error)
                run.dealer.returned(task)
            case Raised(error):
                if gang.size == 1:
                    gang.rest(time.monotonic())
                else:
                    self._discard(gang)  # its fellows wait for it in the middle of a pass
                raise error
            case CalledOff():
                raise AssertionError("nobody called this task off")

    def _halve(self, batch_size: int, error: BaseException) -> None:
        """Make all replicas to come with a smaller micro-batch."""
        scan = self._spec.scan
        if batch_size <= 1:
            raise error
        smaller = min(scan.batch_size, batch_size // 2)
        self._spec = dataclasses.replace(self._spec, scan=dataclasses.replace(scan, batch_size=smaller))
        log.warning(
            "memory ran out in a rank: its replica starts again with micro-batches of %d sequences; "
            "next time set scan.batch_size=%d",
            smaller,
            smaller,
        )

    # --- ends -------------------------------------------------------------------------------------------------------

    def _call_off(self, run: _Run) -> None:
        for gang in self._on(run):
            gang.call_off(time.monotonic())

    def _settle(self) -> None:
        """Wait until nothing that was called off can write any more, so that the next stage finds what it expects."""
        while True:
            now = time.monotonic()
            ends = [(gang, gang.is_harmless(now)) for gang in self._gangs]
            for gang, harmless in ends:
                if harmless is None:
                    log.warning("a replica does not leave a task that was called off; it is replaced")
                    self._discard(gang)
            if all(harmless is not False for _, harmless in ends):
                return
            self._step(None)

    def _progress(self, run: _Run) -> int:
        """Sequences behind the running tasks, as last heard; of two replicas on one task the faster counts."""
        found: dict[int, int] = {}
        for gang in self._on(run):
            assert gang.work is not None
            found[gang.work.task] = max(found.get(gang.work.task, 0), gang.finished)
        return sum(found.values())

    def _tell(self) -> None:
        """Say what is waited for while there is no replica."""
        now = time.monotonic()
        if any(gang.state not in (State.pending, State.starting) for gang in self._gangs):
            self._told = now
        if now - self._told < PATIENCE_SECONDS:
            return
        self._told, cluster = now, self._spec.cluster
        log.warning(
            "waiting for a replica: each needs %s of %s CPUs and %s GPUs; the cluster has %s free, of %s",
            "1 process" if cluster.world_size == 1 else f"{cluster.world_size} processes",
            cluster.cpus_per_rank,
            cluster.gpus_per_rank,
            _counted(ray.available_resources()),
            _counted(ray.cluster_resources()),
        )


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {key: resources.get(key, 0.0) for key in ("CPU", "GPU")}


def first_line(cause: str) -> str:
    """The first line of what Ray says of a death."""
    return cause.splitlines()[0] if cause else "no cause given"
