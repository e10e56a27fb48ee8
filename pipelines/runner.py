"""The runner: alone decides whether a step is skipped, waited for, resumed or run, and commits what it made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from actors.errors import ChecksumError, WhenceError
from actors.store import Artifact, Store
from conf.schema import RunConfig
from pipelines.claims import Claim, Claims
from pipelines.fingerprint import fingerprint
from pipelines.progress import Progress, duration
from pipelines.steps import StageContext, Step

logger = logging.getLogger(__name__)

REPAIRS = 8  # of one stage's unfinished work, before the damage is left to the user


class Planned(NamedTuple):
    """What a run would do with a step."""

    step: Step
    fingerprint: str
    cached: bool


@dataclass(frozen=True)
class StageOutcome:
    """What became of a step.

    Attributes:
        artifact: Committed.
        cached: Whether it was there already, or another run made it meanwhile.
        seconds: Wall time of the attempt that finished it, whenever that was.
        counts: From its record.
        extra: From its record; `resumed` says whether that attempt went on from an earlier one.
    """

    artifact: Artifact
    cached: bool
    seconds: float
    counts: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Runner:
    """Brings every step's artifact into the store.

    Args:
        store: Where artifacts are.
        steps: The steps, in any order.
        config: The run, handed to stages.
        cluster_factory: Makes the handle that stages get as `cluster`; called once, when the first step has to be
            computed. If it is a context manager it is entered then and left when the run ends.
        claims: How runs on the same store keep out of each other's way.

    Raises:
        ValueError: If two steps share a name, a step depends on one that is not there, or steps depend in a circle,
            or an identity has no canonical form.
    """

    def __init__(
        self,
        store: Store,
        steps: Sequence[Step],
        config: RunConfig,
        cluster_factory: Callable[[], Any] | None = None,
        claims: Claims | None = None,
    ) -> None:
        self._steps = in_order(steps)
        self._config = config
        self._cluster_factory = cluster_factory or (lambda: None)
        self._claims = claims or Claims(store)
        self._artifacts: dict[str, Artifact] = {}
        for step in self._steps:
            identity = {"kind": step.kind, "config": step.identity}
            self._artifacts[step.name] = store.folder(step.kind, fingerprint(identity, self._fingerprints(step)))

    def _fingerprints(self, step: Step) -> dict[str, str]:
        return {name: self._artifacts[name].fingerprint for name in step.inputs}

    def plan(self) -> list[Planned]:
        """What `run` would do, in order; computes and creates nothing.

        Raises:
            StaleArtifact: If the store holds something else where a step's artifact belongs.
        """
        return [
            Planned(step, self._artifacts[step.name].fingerprint, self._record(step) is not None)
            for step in self._steps
        ]

    def run(self) -> dict[str, StageOutcome]:
        """Compute what is missing, in order of dependency.

        An error in a stage leaves its finished parts in the store, releases the claim and carries the stage's name.

        Returns:
            The outcome of each step, by name.
        """
        with _LazyCluster(self._cluster_factory) as cluster:
            return {step.name: self._outcome(step, cluster) for step in self._steps}

    def _record(self, step: Step) -> dict[str, Any] | None:
        return self._artifacts[step.name].record(config=step.identity, inputs=self._fingerprints(step))

    def _outcome(self, step: Step, cluster: _LazyCluster) -> StageOutcome:
        artifact = self._artifacts[step.name]
        with _named(step, artifact):
            record, how = self._record(step), "cached"
            while record is None:
                claim = self._claims.acquire(artifact, done=lambda: artifact.committed, waiting=cluster.rest)
                if claim is None:
                    record, how = self._record(step), "computed by another run"
                else:
                    with claim:
                        record, how = self._repaired(step, claim, cluster), "computed"
        logger.info("%s", _line(step.name, how, record))
        return StageOutcome(artifact, how != "computed", record["seconds"], record["counts"], record["extra"])

    def _repaired(self, step: Step, claim: Claim, cluster: _LazyCluster) -> dict[str, Any]:
        """Compute a step; where its own unfinished work turns out to be damaged, that part of it is done again.

        Raises:
            ChecksumError: If an input is damaged, or what the stage writes is damaged again and again.
        """
        artifact = self._artifacts[step.name]
        for _ in range(REPAIRS):
            try:
                return self._compute(step, claim, cluster.get())
            except ChecksumError as error:
                cause: ChecksumError = getattr(error, "cause", error)  # Ray wraps what a task raises
                forgotten = artifact.forget(cause.file or "")
                if not forgotten:
                    raise
                logger.warning(
                    "%s: %s: %s; it is unfinished work, of which %d files are forgotten and made again",
                    step.name,
                    cause.file,
                    cause.message,
                    len(forgotten),
                )
        return self._compute(step, claim, cluster.get())

    def _compute(self, step: Step, claim: Claim, cluster: Any) -> dict[str, Any]:
        artifact = self._artifacts[step.name]
        parts = len(artifact.list())
        if parts:
            logger.info("%s: goes on from %d files of an earlier attempt", step.name, parts)
        start = time.monotonic()
        result = step.run(
            StageContext(
                config=self._config,
                cluster=cluster,
                artifact=artifact,
                inputs={name: self._artifacts[name] for name in step.inputs},
                progress=partial(Progress, every=self._config.cluster.progress_seconds, check=claim.check),
            )
        )
        claim.check()
        return artifact.commit(
            config=step.identity,
            inputs=self._fingerprints(step),
            counts=result.counts,
            seconds=time.monotonic() - start,
            extra={**result.extra, "resumed": parts > 0},
        )


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Sort steps so that each comes after its inputs.

    Raises:
        ValueError: If two steps share a name, an input is not there, or steps depend in a circle.
    """
    by_name = {step.name: step for step in steps}
    if len(by_name) < len(steps):
        raise ValueError(f"two steps share a name: {sorted(step.name for step in steps)}")
    for step in steps:
        if missing := [name for name in step.inputs if name not in by_name]:
            raise ValueError(f"step {step.name!r} depends on {missing}, which are no steps: {sorted(by_name)}")
    try:
        return [by_name[name] for name in TopologicalSorter({s.name: s.inputs for s in steps}).static_order()]
    except CycleError as error:
        raise ValueError(f"steps depend on each other in a circle: {error.args[1]}") from error


class _LazyCluster:
    """Makes the cluster when it is first asked for, and shuts it down at the end."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self._stack = ExitStack()
        self._made: list[Any] = []

    def __enter__(self) -> _LazyCluster:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def rest(self, seconds: float) -> None:
        """Tell the cluster, if there is one and it wants to know, that another run has been waited for so long."""
        for made in self._made:
            getattr(made, "rest", lambda _: None)(seconds)

    def get(self) -> Any:
        if not self._made:
            made = self._factory()
            self._made = [self._stack.enter_context(made) if isinstance(made, AbstractContextManager) else made]
        return self._made[0]


@contextmanager
def _named(step: Step, artifact: Artifact) -> Iterator[None]:
    """Attach the step's name to whatever goes wrong."""
    try:
        yield
    except BaseException as error:
        ours = getattr(error, "cause", error)  # Ray wraps what a task raises, and delegates its attributes
        if isinstance(ours, WhenceError) and ours.stage is None:
            ours.stage = step.name
        error.add_note(f"in stage {step.name!r}; its finished parts are kept in {artifact.uri} for the next run")
        raise


def _line(name: str, how: str, record: Mapping[str, Any]) -> str:
    sizes = [f"{value:,} {key}" for key, value in record["counts"].items() if isinstance(value, int)]
    took = f" in {duration(record['seconds'])}" if how == "computed" else ""
    return f"{name}: {how}{took}" + (f" ({', '.join(sizes)})" if sizes else "")
