"""A step of a run, as data: what it depends on, what determines its bits, and the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.store import Artifact
from conf.schema import RunConfig
from pipelines.progress import Progress


@dataclass(frozen=True)
class StageContext:
    """What a stage is given.

    Attributes:
        config: The whole run; a stage reads from it what is in its identity, and what moves no bit (batch sizes).
        cluster: The handle that gives replicas, or None in a run without Ray.
        artifact: Where to write. It may hold parts of an attempt that was cut short: use them.
        inputs: Committed artifacts, by the name of the step that made them.
        progress: `progress(name, total, unit)` opens a line of progress.
    """

    config: RunConfig
    cluster: Any
    artifact: Artifact
    inputs: Mapping[str, Artifact]
    progress: Callable[[str, int | None, str], Progress]


@dataclass
class StageResult:
    """What a stage says of its output, kept in the record.

    Attributes:
        counts: Sequences, tokens, rows, skipped records: plain numbers.
        extra: Anything else that a reader of the record may want, JSON-able.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One artifact to be made.

    Attributes:
        name: Unique in a run; errors, logs and dependants call it by this.
        kind: The folder of the store that its artifact is in.
        inputs: Names of the steps that it depends on.
        identity: JSON-able: all that determines the bits besides the inputs, with a `version` of the stage's code.
        run: The stage: a plain function.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    identity: Mapping[str, Any]
    run: Callable[[StageContext], StageResult]
