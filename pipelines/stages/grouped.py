"""Sums over fixed groups of sequences: the part that the covariance and the correction stage share.

The sample is cut into groups that depend on the configuration alone. A replica sums a group from zero and commits it
as one part; what is committed is never computed again; parts are merged in the order of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.errors import NonFiniteShare
from actors.factors import part_folder
from actors.store import Artifact
from actors.tasks import Done, GroupTask
from conf.schema import FactorsConfig
from pipelines.steps import StageContext, StageResult

MIN_GROUP = 32  # sequences; a smaller sample has fewer groups

TaskOf = Callable[[int, tuple[int, ...]], GroupTask]
Merge = tuple[Callable[..., Any], list[tuple]]
MergeOf = Callable[["GroupTotals"], Merge]


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


def sample_groups(corpus: int, factors: FactorsConfig) -> list[tuple[int, ...]]:
    """The sequences that curvature is fitted on, a seeded sample without replacement, in ascending groups.

    Args:
        corpus: number of sequences in the corpus.
        factors: samples, seed and groups; samples of None or more than the corpus takes all.
    """
    if factors.samples is None or factors.samples >= corpus:
        ids = np.arange(corpus)
    else:
        ids = np.sort(np.random.default_rng(factors.seed).choice(corpus, factors.samples, replace=False))
    groups = max(1, min(factors.groups, len(ids) // MIN_GROUP))
    return [tuple(part.tolist()) for part in np.array_split(ids, groups)]


def run_statistic(context: StageContext, method: str, task_of: TaskOf, merge_of: MergeOf) -> StageResult:
    """Sum a statistic over all groups, merge the sums as Ray tasks, and discard the parts.

    Args:
        context: of the stage; its artifact gets the merged files and, when they are all there, `merged.json`.
        method: the replica's method, which is also what progress calls the work.
        task_of: the task of a group, from its number and its sequences.
        merge_of: the function that merges, and its arguments, one tuple a bundle of layers.

    Raises:
        NonFiniteShare: if more sequences were set aside than `scan.nonfinite_share` allows.
    """
    output = context.artifact
    if output.exists("merged.json"):
        totals = GroupTotals(**output.read_json("merged.json"))
    else:
        totals = run_groups(context, method, task_of)
        function, arguments = merge_of(totals)
        for _ in context.cluster.map(function, arguments):
            pass
        output.write_json("merged.json", vars(totals))
    discard_parts(output)
    return StageResult(totals.counts(), totals.extra())


def run_groups(context: StageContext, method: str, task_of: TaskOf) -> GroupTotals:
    """Deal the groups that are not committed yet, wait for all, and add up what they report.

    Raises:
        NonFiniteShare: if more sequences were set aside than `scan.nonfinite_share` allows.
    """
    sequences = context.inputs["sequences"]
    corpus = sequences.read_json("index.json")["sequences"]
    groups = sample_groups(corpus, context.config.factors)
    output = context.artifact
    open_groups = [index for index in range(len(groups)) if not _is_done(output, index)]
    total = sum(len(group) for group in groups)
    progress = context.progress(method, total, "sequences")
    behind = total - sum(len(groups[index]) for index in open_groups)
    progress.resume(behind)

    def done(task: GroupTask, _report: Done) -> None:
        nonlocal behind
        behind += len(task.sequence_ids)
        progress.advance_to(behind)

    tasks = [task_of(index, groups[index]) for index in open_groups]
    if tasks:
        context.cluster.pool.run(method, tasks, done, lambda running: progress.advance_to(behind + running))
    progress.close()
    return _totals(output, len(groups), total, context.config.scan.nonfinite_share)


def _is_done(output: Artifact, group: int) -> bool:
    return output.exists(f"{part_folder(group)}/done.json")


def _totals(output: Artifact, groups: int, asked: int, share: float) -> GroupTotals:
    totals = GroupTotals(groups)
    for group in range(groups):
        done = output.read_json(f"{part_folder(group)}/done.json")
        totals.sequences += done["sequences"]
        totals.tokens += done["tokens"]
        totals.seconds += done["seconds"]
        totals.excluded |= done["excluded"]
        for key, rows in done["rows"].items():
            totals.rows[key] = totals.rows.get(key, 0) + rows
    check_share(totals.excluded, asked, share)
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
