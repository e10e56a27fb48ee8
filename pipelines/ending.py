"""How a command ends: its exit status, errors on their way past Hydra, and SIGTERM as an orderly way out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FAILED = 1  # the run stopped at an error that has a name
REFUSED = 2  # the command or its configuration is wrong; nothing was started
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM  # what `ray job stop`, Kubernetes and a batch system send first
KEPT = "What was committed stays; the same command goes on from there."

_HANDLERS: list[Callable[[int, Any], None]] = []


class JobFailed(Exception):
    """The error of a sweep's job as text, since not every error gets from one process into another.

    Attributes:
        status: The exit status that the error would have given a run of its own.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class JobStopped(BaseException):
    """Carries a job's error past Hydra, which would add lines of its own; the error is in the log already."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Terminated(BaseException):
    """Unwinds the stack after SIGTERM, so that claims and replicas are let go on the way, as after Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the main thread, where this process has no handler of another's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if not arrived:  # a second one would cut the way out short
            arrived.append(number)
            sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, handler)
    _HANDLERS.append(handler)
    try:
        yield
    except SystemExit as end:
        if arrived:  # Ray passes the exit on with a code of its own
            raise Terminated from end
        raise
    finally:
        _HANDLERS.pop()
        signal.signal(signal.SIGTERM, before)


def rearm() -> None:
    """Put the handler of `terminable` back: Ray replaces it when it starts. Does nothing outside of one."""
    if _HANDLERS and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _HANDLERS[-1])
