"""Which replica gets which task, and how many replicas there should be: policy alone, without Ray."""

from __future__ import annotations

import statistics
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.errors import ShardFailed

ATTEMPTS = 3  # replicas that may die over one task before the stage fails
TYPICAL = 3  # finished tasks that tell how long a task typically takes
SLOW_FACTOR = 2.0  # a task that runs longer than this many typical times is worth a copy
SLOW_SECONDS = 5.0  # and at least this long: a copy costs a replica's work


@dataclass
class Dealer:
    """Deals tasks by number, in order; a task whose replica died goes back to the front of the queue.

    Attributes:
        names: what each task is called in messages.
        attempts: how many replicas may die over one task.
        patience: seconds that a task runs before a copy of it may be dealt.
        clock: tells seconds.
    """

    names: list[str]
    attempts: int = ATTEMPTS
    patience: float = SLOW_SECONDS
    clock: Callable[[], float] = time.monotonic
    _waiting: deque[int] = field(default_factory=deque)
    _runs: dict[int, int] = field(default_factory=dict)  # replicas that are on a task
    _since: dict[int, float] = field(default_factory=dict)  # when a running task was dealt
    _losses: dict[int, int] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)  # of finished tasks, ascending

    def __post_init__(self) -> None:
        self._waiting.extend(range(len(self.names)))

    @property
    def unfinished(self) -> int:
        """Tasks that wait or run."""
        return len(self._waiting) + len(self._runs)

    def deal(self) -> int | None:
        """The next task, or None when all are dealt."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        self._runs[task], self._since[task] = 1, self.clock()
        return task

    def copy(self, suits: Callable[[int], bool]) -> int | None:
        """A running task that an idle replica should do as well, so that a slow one does not hold up the end.

        It is the one that runs longest, once nothing waits, if it has run much longer than finished tasks took.
        A task has one copy at most.

        Args:
            suits: whether the idle replica would give the same result for a task.
        """
        if self._waiting or len(self._seconds) < TYPICAL:
            return None
        limit = max(self.patience, SLOW_FACTOR * statistics.median(self._seconds))
        oldest = self.clock() - limit
        slow = [task for task, runs in self._runs.items() if runs == 1 and self._since[task] < oldest and suits(task)]
        if not slow:
            return None
        task = min(slow, key=self._since.__getitem__)
        self._runs[task] += 1
        return task

    def finished(self, task: int) -> None:
        """A task is done, whoever else is on it."""
        del self._runs[task]
        insort(self._seconds, self.clock() - self._since.pop(task))

    def returned(self, task: int) -> None:
        """A replica gave a task back through no fault of the task."""
        self._runs[task] -= 1
        self._since[task] = self.clock()
        if self._runs[task] == 0:
            del self._runs[task], self._since[task]
            self._waiting.appendleft(task)

    def lost(self, task: int, cause: str) -> None:
        """A replica died over a task.

        Raises:
            ShardFailed: if as many have as is allowed and no other is on it.
        """
        self._losses[task] = self._losses.get(task, 0) + 1
        self.returned(task)
        if self._losses[task] >= self.attempts and task not in self._runs:
            raise ShardFailed(
                f"{self.names[task]}: {self._losses[task]} replicas died over it; the last: {cause}",
                remedy="look at the replica's log; if memory ran out, lower scan.batch_size or give replicas more",
            )


@dataclass(frozen=True)
class Census:
    """The replicas of a pool.

    Attributes:
        pending: that wait for room in the cluster.
        held: that have it: they load, work or are idle.
        rested: of these, idle for so long that they may leave.
    """

    pending: int
    held: int
    rested: int


@dataclass(frozen=True)
class Breath:
    """How a pool should change.

    Attributes:
        ask: replicas to ask the cluster for.
        withdraw: pending ones that are not needed any more.
        leave: rested ones that are not needed any more.
    """

    ask: int
    withdraw: int
    leave: int


def breathe(unfinished: int, census: Census, least: int, most: int) -> Breath:
    """Fit a pool to its work: a replica for each unfinished task, between `least` and `most`.

    A replica for which no task is left is not asked for. Those that wait for room go before those that have
    loaded the model.
    """
    wanted = min(most, max(least, unfinished))
    live = census.pending + census.held
    return Breath(
        ask=max(0, wanted - live),
        withdraw=min(census.pending, max(0, live - wanted)),
        leave=min(census.rested, max(0, census.held - wanted)),
    )
