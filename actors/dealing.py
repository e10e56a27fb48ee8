"""Which replica gets which task: policy alone, without Ray."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from actors.errors import ShardFailed

ATTEMPTS = 3  # replicas that may die over one task before the stage fails


@dataclass
class Dealer:
    """Deals tasks by number, in order; a task whose replica died goes back to the front of the queue.

    Attributes:
        names: what each task is called in messages.
        attempts: how many replicas may die over one task.
    """

    names: list[str]
    attempts: int = ATTEMPTS
    _waiting: deque[int] = field(default_factory=deque)
    _running: set[int] = field(default_factory=set)
    _losses: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting.extend(range(len(self.names)))

    @property
    def unfinished(self) -> bool:
        """Whether any task is waiting or running."""
        return bool(self._waiting or self._running)

    def deal(self) -> int | None:
        """The next task, or None when all are dealt."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        self._running.add(task)
        return task

    def finished(self, task: int) -> None:
        """A task is done."""
        self._running.remove(task)

    def lost(self, task: int, cause: str) -> None:
        """The replica of a task died.

        Raises:
            ShardFailed: if the task has now lost as many replicas as is allowed.
        """
        self._running.remove(task)
        self._losses[task] = self._losses.get(task, 0) + 1
        if self._losses[task] >= self.attempts:
            raise ShardFailed(
                f"{self.names[task]}: {self._losses[task]} replicas died over it; the last: {cause}",
                remedy="look at the replica's log; if memory ran out, lower scan.batch_size or give replicas more",
            )
        self._waiting.appendleft(task)
