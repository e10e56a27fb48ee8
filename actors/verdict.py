"""What became of a call that all ranks of a replica make together: policy alone, without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from actors.errors import Cancelled, GangBroken, MemoryRanOut, WhenceError

GRACE_SECONDS = 5.0  # after a first error that may be a consequence, for its cause to show


@dataclass(frozen=True)
class Finished:
    """All ranks returned: `results`, in the order of ranks."""

    results: list[Any]


@dataclass(frozen=True)
class Lost:
    """The replica is no more, or no longer one: a rank died, hangs, or lost touch with the others."""

    cause: str


@dataclass(frozen=True)
class Raised:
    """A rank raised an error that is nobody's death."""

    error: BaseException


@dataclass(frozen=True)
class TooLarge:
    """A rank of several ran out of memory with a micro-batch of this many sequences."""

    batch_size: int
    error: MemoryRanOut


@dataclass(frozen=True)
class CalledOff:
    """All ranks left the task because they were told to."""


Verdict = Finished | Lost | Raised | TooLarge | CalledOff


@dataclass
class Wave:
    """One call of all ranks, as its answers come in.

    Attributes:
        ranks: how many were called.
        results: what ranks returned.
        failures: what ranks raised.
        gone: ranks that are no more, with the cause.
        ended: when the first rank returned or raised.
        failed: when the first rank raised.
    """

    ranks: int
    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    gone: dict[int, str] = field(default_factory=dict)
    ended: float | None = None
    failed: float | None = None

    def returned(self, rank: int, result: Any, now: float) -> None:
        """A rank returned."""
        self.results[rank] = result
        self.ended = now if self.ended is None else self.ended

    def raised(self, rank: int, error: BaseException, now: float) -> None:
        """A rank raised."""
        self.failures[rank] = error
        self.ended = now if self.ended is None else self.ended
        self.failed = now if self.failed is None else self.failed

    @property
    def silent(self) -> list[int]:
        """Ranks that have neither returned nor raised."""
        answered = (self.results, self.failures, self.gone)
        return [rank for rank in range(self.ranks) if not any(rank in found for found in answered)]

    def verdict(self, now: float, timeout: float | None = None) -> Verdict | None:
        """What became of the call; None while it is open.

        A death, or memory that ran out, decides at once, and so does an error of ours. Anything else that is raised may
        follow from a death that has not shown yet, since the fellows of a dead rank are the first to notice: it
        decides when all ranks have answered or the grace is over.

        Args:
            now: seconds.
            timeout: how long ranks that are done wait for the others before these count as hanging.
        """
        if self.gone:
            return Lost(self.gone[min(self.gone)])
        if self.failures:
            return self._failure(now, timeout)
        if not self.silent:
            return Finished([self.results[rank] for rank in range(self.ranks)])
        return self._hanging(now, timeout)

    def _failure(self, now: float, timeout: float | None) -> Verdict | None:
        errors = [self.failures[rank] for rank in sorted(self.failures)]
        for error in errors:
            if isinstance(error, MemoryRanOut):
                return TooLarge(error.batch_size, error)
        if all(isinstance(error, Cancelled) for error in errors):
            return self._hanging(now, timeout) if self.silent else CalledOff()
        real = [error for error in errors if not isinstance(error, (GangBroken, Cancelled))]
        ours = [error for error in real if isinstance(error, WhenceError)]
        assert self.failed is not None
        if not ours and self.silent and now - self.failed < GRACE_SECONDS:
            return None
        if real:
            return Raised((ours or real)[0])
        return Lost("; ".join(str(error) for error in errors if isinstance(error, GangBroken)))

    def _hanging(self, now: float, timeout: float | None) -> Lost | None:
        if timeout is None or self.ended is None or now - self.ended <= timeout:
            return None
        names = ", ".join(map(str, self.silent))
        return Lost(f"rank {names} is not done {timeout:g} s after the others (cluster.collective_timeout)")
