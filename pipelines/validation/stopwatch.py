"""Wall clock and CPU time of the phases of a method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds by phase; a phase that is entered again adds to what it has.

    CPU time is that of all threads of the process: on a machine that does something else besides, it says what the wall
    clock would have been.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside the `with` block."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - wall, time.process_time() - cpu)

    def add(self, name: str, seconds: float, cpu_seconds: float) -> None:
        """Count time that was taken elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + cpu_seconds

    def as_json(self) -> dict[str, dict[str, float]]:
        """Both, each with its total."""
        both = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {name: {**phases, "total": sum(phases.values())} for name, phases in both.items()}
