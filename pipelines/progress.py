"""Progress with rate and ETA: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

WINDOW_LINES = 6  # the rate is that of the last few lines: replicas come and go


class Progress:
    """Counts work and says how far it is; close it, or use it in a `with` block.

    In a log: `covariance 1,234/10,000 sequences · 45.1/s · 120k tokens/s · ETA 3m12s`, a line every `every` seconds.

    Args:
        name: What is being done.
        total: Units of work, or None where nobody knows.
        unit: What is counted, in the plural.
        every: Seconds between lines in a log.
        terminal: Whether to draw a bar; None asks whether standard error is a terminal.
        clock: Seconds, monotonic.
        check: Called at each advance; raises if the work should stop.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        every: float = 10.0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.tokens = 0
        self._resumed = 0
        self._every, self._clock, self._check = every, clock, check
        self._started = self._said = clock()
        self._seen = deque([(self._started, 0, 0)], maxlen=WINDOW_LINES)
        self._bar: tqdm | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = tqdm(desc=name, total=total, unit=f" {unit}", dynamic_ncols=True)

    def resume(self, done: int) -> None:
        """Count work of an earlier attempt: it is done, and it is no part of the rate."""
        self.done += done
        self._resumed += done
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = self.done
            self._bar.refresh()

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """Count work done now.

        Args:
            count: Units of work.
            tokens: Tokens in them, where tokens per second mean something.
        """
        self._check()
        self.done += count
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(count)
            return
        now = self._clock()
        if now - self._said >= self._every:
            logger.info("%s", self._line(now))
            self._said = now
            self._seen.append((now, self.done - self._resumed, self.tokens))

    def advance_to(self, done: int) -> None:
        """Count work up to a total; a total that went back (a replica was lost) counts as no progress."""
        self.advance(max(0, done - self.done))

    def close(self) -> None:
        """Say the last line, unless the work was over before it was worth one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._said > self._started:
            seconds = self._clock() - self._started
            rates = self._rates(seconds, self.done - self._resumed, self.tokens)
            logger.info("%s", " · ".join([self._count(), *rates, f"after {duration(seconds)}"]))
            self._said = self._started  # nothing more to say

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, now: float) -> str:
        then, count, tokens = self._seen[0]
        seconds, count = now - then, self.done - self._resumed - count
        parts = [self._count(), *self._rates(seconds, count, self.tokens - tokens)]
        if self.total is not None and count > 0:
            parts.append(f"ETA {duration(max(self.total - self.done, 0) * seconds / count)}")
        return " · ".join(parts)

    def _count(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        return f"{self.name} {self.done:,}{of} {self.unit}"

    def _rates(self, seconds: float, count: int, tokens: int) -> list[str]:
        if seconds <= 0:
            return []
        return [f"{short(count / seconds)}/s"] + ([f"{short(tokens / seconds)} tokens/s"] if tokens else [])


def short(number: float) -> str:
    """A rate in three digits: 0.0123, 4.56, 45.1, 789, 12.3k, 120k, 3.40M."""
    suffixes = ["G", "M", "k", ""]
    while number >= 999.5 and len(suffixes) > 1:
        number /= 1000
        suffixes.pop()
    decimals = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return (f"{number:.{decimals}f}" if number >= 0.995 else f"{number:.3g}") + suffixes[-1]


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4s, 12s, 3m12s, 2h05m, 3d04h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes == 0:
        return f"{whole}s"
    if hours == 0:
        return f"{minutes}m{whole % 60:02d}s"
    if days == 0:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"
