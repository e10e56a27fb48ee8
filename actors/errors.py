"""What goes wrong, said so that the reader can act: where it happened, in which file and row, and the remedy.

The classes cross process borders (Ray actors, worker processes), so each holds only its message and plain fields;
`BaseException.__reduce__` then rebuilds it whole. Subclasses add no arguments of their own.
"""

from __future__ import annotations


class WhenceError(Exception):
    """An error with its place and its remedy.

    `str(error)` reads `stage: file, row 17: message. Remedy: ...`, leaving out what is not known.

    Args:
        message: What is wrong, and with which value.
        stage: The step that was running; the runner fills it in where the stage did not.
        file: The file, as a path or URI.
        row: The row or line in that file, as the reader would count it.
        rank: The rank or replica that met it.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        file: str | None = None,
        row: int | None = None,
        rank: int | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.file = file
        self.row = row
        self.rank = rank
        self.remedy = remedy

    def __str__(self) -> str:
        place = [self.file] if self.file else []
        place += [f"row {self.row}"] if self.row is not None else []
        place += [f"rank {self.rank}"] if self.rank is not None else []
        text = ": ".join(part for part in (self.stage, ", ".join(place), self.message) if part)
        if self.remedy is None:
            return text
        return f"{text.rstrip('.')}. Remedy: {self.remedy}"


class BadRecord(WhenceError, ValueError):
    """A record of the corpus or of the queries that cannot be used: malformed, empty, too long, out of vocabulary."""


class ConfigError(WhenceError, ValueError):
    """A setting that is not allowed; the message names the key, the value and what is allowed."""


class StaleArtifact(WhenceError):
    """A committed artifact whose record is not the one that is wanted. It is never served."""


class ChecksumError(WhenceError):
    """A file of the store that is truncated, altered or missing."""


class WriteFailed(WhenceError):
    """A file of the store could not be written, for want of space or otherwise; nothing of it was committed."""


class Unreachable(WhenceError, OSError):
    """An object store that does not answer, or refuses. Files there may be as they should."""


class ClaimLost(WhenceError):
    """Another process took over the artifact that this one was computing."""


class NonFiniteShare(WhenceError):
    """More sequences than allowed have a loss or a gradient that is not finite."""


class ShardFailed(WhenceError):
    """A shard of work failed more often than is worth retrying."""


class GangBroken(WhenceError):
    """The ranks of a replica lost one another: a collective failed or ran out of time. The work is dealt again."""


class MemoryRanOut(WhenceError):
    """A rank of a sharded replica ran out of memory in the middle of a pass, which its fellows cannot leave.

    Attributes:
        batch_size: Sequences of the micro-batch that did not fit.
    """

    batch_size: int = 0


class Cancelled(WhenceError):
    """A task was called off because another replica has done it; nothing of it was committed."""
