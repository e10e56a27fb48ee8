"""The driver's side of one replica: a gang of ranks in one placement group, that starts, works and ends as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.errors import WhenceError
from actors.rank import Pulse
from actors.tasks import ReplicaSpec
from actors.verdict import Finished, Lost, Verdict, Wave
from influence.layers import LayerSelection

CANCEL_SECONDS = 10.0  # a rank that does not answer a cancellation for so long is killed
COMMIT_SECONDS = 60.0  # as is one that is still writing what was called off
CREDIT_SECONDS = 5.0  # of silence, at most, that one look at a rank can add: the driver may have been away itself


class State(Enum):
    """Where a gang is in its life."""

    pending = "waits for room in the cluster"
    starting = "its processes start"
    loading = "loads the model"
    idle = "has nothing to do"
    busy = "works on a task"


@dataclass(frozen=True)
class Assignment:
    """The task that a gang is on.

    Attributes:
        ticket: number of this dealing of it.
        run: the pool's run that it belongs to.
        task: its number there.
    """

    ticket: int
    run: int
    task: int


class Gang:
    """N ranks that hold one model: created together, called together, ended together."""

    def __init__(self, spec: ReplicaSpec, rank_class: Any, now: float) -> None:
        """Ask the cluster for room; the processes start when it is there.

        Args:
            spec: what the ranks load.
            rank_class: the remote class of `actors.rank.RankActor`, or its double.
            now: seconds.
        """
        cluster = spec.cluster
        bundle: dict[str, float] = {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank}
        bundle = {name: amount for name, amount in bundle.items() if amount}
        self.spec, self.size = spec, cluster.world_size
        self.state, self.since = State.pending, now  # in this state
        self.selection: LayerSelection | None = None
        self.work: Assignment | None = None
        self.called_off: float | None = None  # when
        self.nodes: dict[str, int] = {}  # ranks on each node
        self._rank_class, self._actors = rank_class, []
        self._pulses: list[Pulse | None] = [None] * self.size
        self._asked: dict[Any, int] = {}  # pulses that are waited for, by rank
        self._silence = [0.0] * self.size
        self._felt = self._now = now
        self._cancels: list[Any] = []
        self._placement = placement_group([bundle] * self.size, strategy="PACK")
        self._expect([self._placement.ready()], self._placed)

    # --- events -----------------------------------------------------------------------------------------------------

    @property
    def refs(self) -> list[Any]:
        """What the gang waits for."""
        return list(self._refs)

    @property
    def is_loaded(self) -> bool:
        """Whether it can work, or does."""
        return self.state in (State.idle, State.busy)

    def take(self, ref: Any, now: float) -> None:
        """Look at an answer that is there."""
        rank = self._refs.pop(ref)
        try:
            self._wave.returned(rank, ray.get(ref), now)
        except RayTaskError as error:
            self._wave.raised(rank, raised(error), now)
        except RayError as error:  # Ray itself says why there will be no answer
            self._wave.gone[rank] = str(error)

    def advance(self, now: float) -> Verdict | None:
        """Go on to the next step of the start, or tell what became of the task or of the gang.

        Returns:
            None while there is nothing to tell; `Finished` without results when the model is loaded.
        """
        self._now = now
        if self.state is State.idle:
            return None
        working = self.state in (State.loading, State.busy)
        timeout = self.spec.cluster.collective_timeout if working else None
        verdict = self._wave.verdict(now, timeout) or self._frozen(timeout)
        if not isinstance(verdict, Finished):
            return verdict
        if self._then is None:
            return verdict
        self._then(verdict.results)
        return Finished([]) if self.state is State.idle else None

    # --- work -------------------------------------------------------------------------------------------------------

    def start(self, work: Assignment, method: str, task: Any, now: float) -> None:
        """Run a method with a task on all ranks."""
        self.work, self.called_off = work, None
        self._enter(State.busy, now)
        argument = ray.put(task) if self.size > 1 else task
        self._expect([actor.do.remote(work.ticket, method, argument) for actor in self._actors], None)

    def rest(self, now: float) -> None:
        """The task is over."""
        self.work, self.called_off, self._cancels = None, None, []
        self._enter(State.idle, now)

    def call_off(self, now: float) -> None:
        """Tell the ranks to leave their task; whatever comes of it is nobody's."""
        assert self.work is not None
        self.called_off = now
        self._cancels = [actor.cancel.remote(self.work.ticket) for actor in self._actors]

    def is_harmless(self, now: float) -> bool | None:
        """Whether a task that was called off is certain to write nothing more; None: kill the gang to make sure."""
        if self.called_off is None:
            return True
        ready, open_ = ray.wait(self._cancels, num_returns=len(self._cancels), timeout=0)
        for ref in ready:
            try:
                if ray.get(ref):  # one rank that leaves takes the others with it
                    return True
            except RayError:
                return None
        limit = CANCEL_SECONDS if open_ else COMMIT_SECONDS
        return None if now - self.called_off > limit else False

    def twin(self, other: Gang) -> bool:
        """Whether both would compute the same bits, as far as is known now."""
        mine, theirs = self._pulses, other._pulses
        return None not in mine and [(p.batch_size, p.kind) for p in mine if p] == [
            (p.batch_size, p.kind) for p in theirs if p
        ]

    @property
    def finished(self) -> int:
        """Sequences that the running task has behind it, when last heard."""
        first = self._pulses[0]
        return first.finished if first and self.state is State.busy else 0

    # --- life and death ---------------------------------------------------------------------------------------------

    def feel(self, now: float) -> str | None:
        """Ask each rank how it is, and hear what it answered; never waits.

        Returns:
            Why an idle gang is no more, if it is; a busy one's death is told by its task.
        """
        elapsed, self._felt = min(now - self._felt, CREDIT_SECONDS), now
        if self.state in (State.pending, State.starting):
            return None
        dead = self._hear()
        waited_for = set(self._asked.values())
        for rank, actor in enumerate(self._actors):
            self._silence[rank] = self._silence[rank] + elapsed if rank in waited_for else 0.0
            if rank not in waited_for:
                self._asked[actor.pulse.remote()] = rank
        return dead if self.state is State.idle else None

    def kill(self) -> None:
        """End all ranks and give their room back: the one way out."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)
        self._actors, self._refs, self._asked, self._cancels = [], {}, {}, []

    def _hear(self) -> str | None:
        dead = None
        if self._asked:
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in ready:
                rank = self._asked.pop(ref)
                try:
                    self._pulses[rank] = ray.get(ref)
                except RayTaskError as error:
                    raise raised(error) from error
                except RayError as error:
                    dead = str(error)
        return dead

    def _frozen(self, timeout: float | None) -> Lost | None:
        """A process that answers nothing at all, not even how it is, is stopped or stuck."""
        if timeout is None or max(self._silence) <= timeout:
            return None
        rank = max(range(self.size), key=self._silence.__getitem__)
        return Lost(f"rank {rank} has not answered for {timeout:g} s (cluster.collective_timeout)")

    # --- start ------------------------------------------------------------------------------------------------------

    def _placed(self, _: list[Any]) -> None:
        for node in placement_group_table(self._placement)["bundles_to_node_id"].values():
            self.nodes[node] = self.nodes.get(node, 0) + 1
        cluster = self.spec.cluster
        for rank in range(self.size):
            place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            options = self._rank_class.options(
                num_cpus=cluster.cpus_per_rank, num_gpus=cluster.gpus_per_rank, scheduling_strategy=place
            )
            self._actors.append(options.remote())
        self._enter(State.starting, self._now)
        self._expect([actor.pulse.remote() for actor in self._actors], self._started)

    def _started(self, _: list[Any]) -> None:
        if self.size == 1:
            self._load([""])
        else:
            self._expect([self._actors[0].address.remote()], self._load)

    def _load(self, addresses: list[Any]) -> None:
        self._enter(State.loading, self._now)
        load = [actor.load.remote(self.spec, rank, self.size, addresses[0]) for rank, actor in enumerate(self._actors)]
        self._expect(load, self._loaded)

    def _loaded(self, selections: list[Any]) -> None:
        self.selection = selections[0]
        self._enter(State.idle, self._now)

    def _expect(self, calls: list[Any], then: Callable[[list[Any]], None] | None) -> None:
        self._refs = {ref: rank for rank, ref in enumerate(calls)}
        self._wave, self._then = Wave(len(calls)), then

    def _enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now
        self._pulses, self._asked = [None] * self.size, {}  # what was said before is not true any more
        self._silence = [0.0] * self.size


def raised(error: RayTaskError) -> BaseException:
    """What the task itself raised, with the remote traceback kept as a note."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if cause is not error and not isinstance(cause, WhenceError):
        cause.add_note(f"(raised in a worker of Ray)\n{error}")  # whose text is the remote traceback
    return cause
