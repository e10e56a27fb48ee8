"""Sums over fixed groups of sequences: the part that the covariance and the correction stage share.

The sample is cut into groups that depend on the configuration alone. A replica sums a group from zero and commits it
as one part; what is committed is never computed again; parts are merged in the order of groups. Where the factors of
all layers are more than a rank may hold, the sample is gone through in several passes, each with some of the layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from actors.errors import ConfigError, NonFiniteShare
from actors.factors import load_selection, part_folder
from actors.reduction import Parts
from actors.store import Artifact
from actors.tasks import Done, GroupTask
from conf.schema import Dtype, FactorsConfig
from influence.layers import TrackedLayer
from influence.passes import plan_passes
from pipelines.steps import StageContext, StageResult

MIN_GROUP = 32  # sequences; a smaller sample has fewer groups

log = logging.getLogger(__name__)

TaskOf = Callable[["Part"], GroupTask]
Merge = tuple[Callable[..., Any], list[tuple], list[int]]  # a function, its arguments, and the memory of each
Bundled = Iterator[tuple[Parts, tuple[TrackedLayer, ...]]]
MergeOf = Callable[["GroupTotals", Bundled], Merge]
Bundles = Callable[[Sequence[TrackedLayer]], list[tuple[TrackedLayer, ...]]]


@dataclass(frozen=True)
class Part:
    """One unit of work: a group of sequences in the layers of a pass.

    Attributes:
        layers: of the pass, in the order of the model.
        group: number of the group.
        sequence_ids: its sequences.
        excluded: those that another pass set aside, with the reason.
    """

    layers: tuple[str, ...]
    group: int
    sequence_ids: Sequence[int]
    excluded: dict[int, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where in the artifact its sums are."""
        return part_folder(self.layers, self.group)


@dataclass(frozen=True)
class Statistic:
    """What tells the covariance from the correction.

    Attributes:
        method: the replica's method, which is also what progress calls the work.
        bytes_of: bytes that a rank holds for a layer: (layer, ranks, blocks, bytes of a number).
        bundles: which layers share a file.
    """

    method: str
    bytes_of: Callable[[TrackedLayer, int, int, int], int]
    bundles: Bundles


@dataclass
class GroupTotals:
    """What all groups of a stage add up to."""

    groups: int
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rows: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict:
        """Counts for the artifact's record."""
        return {"sequences": self.sequences, "tokens": self.tokens, "excluded": len(self.excluded)}

    def extra(self) -> dict:
        """Details for the artifact's record; seconds are summed over replicas."""
        return {"excluded": self.excluded, "replica_seconds": self.seconds}


def sample_groups(corpus: int, factors: FactorsConfig) -> list[Sequence[int]]:
    """The sequences that curvature is fitted on, a seeded sample without replacement, in ascending groups.

    Args:
        corpus: number of sequences in the corpus.
        factors: samples, seed and groups; samples of None or more than the corpus takes all, as ranges.
    """
    if factors.samples is None or factors.samples >= corpus:
        starts = _bounds(corpus, factors.groups)
        return [range(start, stop) for start, stop in pairwise(starts)]
    ids = np.sort(np.random.default_rng(factors.seed).choice(corpus, factors.samples, replace=False))
    starts = _bounds(len(ids), factors.groups)
    return [tuple(ids[start:stop].tolist()) for start, stop in pairwise(starts)]


def _bounds(count: int, groups: int) -> list[int]:
    """Where groups of nearly equal size begin and end, the longer ones first."""
    groups = max(1, min(groups, count // MIN_GROUP))
    small, longer = divmod(count, groups)
    return [index * small + min(index, longer) for index in range(groups + 1)]


def passes_of(context: StageContext, statistic: Statistic) -> list[tuple[TrackedLayer, ...]]:
    """The layers of each pass over the sample.

    Raises:
        ConfigError: if a layer's factors alone exceed `cluster.memory_per_rank`.
    """
    config = context.config
    layers = load_selection(context.inputs["layers"]).layers
    itemsize = 8 if config.scan.sum_dtype is Dtype.float64 else 4

    def bytes_of(layer: TrackedLayer) -> int:
        return statistic.bytes_of(layer, config.cluster.world_size, config.factors.blocks, itemsize)

    try:
        return list(plan_passes(layers, bytes_of, config.cluster.memory_per_rank))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run_statistic(context: StageContext, statistic: Statistic, task_of: TaskOf, merge_of: MergeOf) -> StageResult:
    """Sum a statistic over all groups, merge the sums as Ray tasks, and discard the parts.

    Args:
        context: of the stage; its artifact gets the merged files and, when they are all there, `merged.json`.
        statistic: which one.
        task_of: the task of a part.
        merge_of: from the totals and the bundles of parts, the function that merges, with its arguments and the
            memory that it takes for each.

    Raises:
        NonFiniteShare: if more sequences were set aside than `scan.nonfinite_share` allows.
    """
    output, config = context.artifact, context.config
    if output.exists("merged.json"):
        totals = GroupTotals(**output.read_json("merged.json"))
    else:
        passes = passes_of(context, statistic)
        groups = sample_groups(context.inputs["sequences"].read_json("index.json")["sequences"], config.factors)
        run_groups(context, statistic, passes, groups, task_of)
        totals = totals_of(output, passes, range(len(groups)))
        check_share(totals.excluded, sum(map(len, groups)), config.scan.nonfinite_share)
        for _ in context.cluster.map(*merge_of(totals, bundled(output, statistic, passes, range(len(groups))))):
            pass
        output.write_json("merged.json", vars(totals))
    discard_parts(output)
    return StageResult(totals.counts(), totals.extra())


def bundled(
    output: Artifact,
    statistic: Statistic,
    passes: Sequence[Sequence[TrackedLayer]],
    groups: Sequence[int],
    into: Artifact | None = None,
) -> Bundled:
    """The committed sums of some groups, bundle by bundle, to be merged.

    Args:
        output: where they are.
        statistic: which one.
        passes: the layers of each pass.
        groups: their numbers, in the order in which they are added.
        into: where what they add up to goes; None is beside them.
    """
    for layers in passes:
        names = tuple(layer.name for layer in layers)
        folders = [part_folder(names, group) for group in groups]
        written = [(folder, output.read_json(f"{folder}/done.json")["ranks"]) for folder in folders]
        for number, bundle in enumerate(statistic.bundles(layers)):
            yield Parts(output, written, number, into), bundle


def run_groups(
    context: StageContext,
    statistic: Statistic,
    passes: Sequence[Sequence[TrackedLayer]],
    groups: Sequence[Sequence[int]],
    task_of: TaskOf,
) -> None:
    """Deal the parts that are not committed yet, and wait until all are, and passes agree on what is set aside.

    Args:
        context: of the stage; its artifact gets the parts.
        statistic: which one.
        passes: the layers of each pass.
        groups: sequences of each group.
        task_of: the task of a part.
    """
    output, sample = context.artifact, sum(map(len, groups))
    parts = [
        Part(tuple(layer.name for layer in layers), group, ids) for layers in passes for group, ids in enumerate(groups)
    ]
    if len(passes) > 1:
        log.info("%s: %d passes over %d sequences", statistic.method, len(passes), sample)
    progress = context.progress(statistic.method, sample * len(passes), "sequences")
    waiting = [part for part in parts if not output.exists(f"{part.folder}/done.json")]
    behind = sample * len(passes) - sum(len(part.sequence_ids) for part in waiting)
    progress.resume(behind)

    def done(task: GroupTask, _report: Done) -> None:
        nonlocal behind
        behind += len(task.sequence_ids)
        progress.advance_to(behind)

    def tick(running: int) -> None:
        progress.advance_to(behind + running)

    while True:
        if waiting:
            context.cluster.pool.run(statistic.method, [task_of(part) for part in waiting], done, tick)
        waiting = _disagreeing(output, parts)
        if not waiting:
            break
        behind -= sum(len(part.sequence_ids) for part in waiting)
    progress.close()


def _disagreeing(output: Artifact, parts: Sequence[Part]) -> list[Part]:
    """Parts that added sequences which another pass over the same group set aside; they have to begin anew.

    A gradient that is not finite shows only in the pass that tracks its layer, and a sequence must count in all layers
    or in none.
    """
    found = [_excluded(output, part) for part in parts]
    by_group: dict[int, dict[int, str]] = {}
    for part, excluded in zip(parts, found, strict=True):
        by_group.setdefault(part.group, {}).update(excluded)
    anew = []
    for part, excluded in zip(parts, found, strict=True):
        wanted = by_group[part.group]
        if excluded.keys() != wanted.keys():
            output.delete(f"{part.folder}/done.json")
            anew.append(replace(part, excluded=wanted))
    return anew


def _excluded(output: Artifact, part: Part) -> dict[int, str]:
    done = output.read_json(f"{part.folder}/done.json")
    return {int(key): why for key, why in done["excluded"].items()}


def totals_of(output: Artifact, passes: Sequence[Sequence[TrackedLayer]], groups: Sequence[int]) -> GroupTotals:
    """What the committed parts of some groups say, added up over groups and passes."""
    totals = GroupTotals(len(groups))
    for number, layers in enumerate(passes):
        names = tuple(layer.name for layer in layers)
        for group in groups:
            done = output.read_json(f"{part_folder(names, group)}/done.json")
            if number == 0:  # every pass counts the same sequences
                totals.sequences += done["sequences"]
                totals.tokens += done["tokens"]
                totals.excluded |= done["excluded"]
            totals.seconds += done["seconds"]
            for key, rows in done["rows"].items():
                totals.rows[key] = totals.rows.get(key, 0) + rows
    return totals


def check_share(excluded: dict[str, str], asked: int, share: float) -> None:
    """Fail where too many sequences were set aside for a loss or gradient that is not finite."""
    if len(excluded) > share * asked:
        named = ", ".join(f"{sequence} ({why})" for sequence, why in list(excluded.items())[:5])
        raise NonFiniteShare(
            f"{len(excluded)} of {asked} sequences are not finite, more than scan.nonfinite_share={share} allows; "
            f"the first: {named}",
            remedy="look at these sequences, try model.dtype=float32, or raise scan.nonfinite_share",
        )


def discard_parts(output: Artifact) -> None:
    """Delete partial sums once what they add up to is written."""
    for name in output.list("parts/"):
        output.delete(name)
