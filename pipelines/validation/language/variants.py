"""Variants of a run that differ in a few settings, by the real steps of a trace, and how well their scores agree.

Variants share a store, so that what they have in common (sequences, factors, gradients, candidates) is computed once,
and one handle to the cluster, so that replicas are loaded once. Legend: Q queries, N sequences that were scored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.store import Artifact, Store
from conf.schema import RunConfig
from pipelines.cluster import Cluster
from pipelines.graph import build_steps, steps_up_to
from pipelines.runner import Runner, StageOutcome
from pipelines.tracing import score_files
from pipelines.validation.language.intervals import correlations, over_queries

SCORES = ("scores",)


@dataclass(frozen=True)
class Scores:
    """The scores of one variant.

    Attributes:
        sequence_ids_N: ascending.
        scores_QN: in float64; a sequence that was set aside has NaN.
    """

    sequence_ids_N: np.ndarray
    scores_QN: np.ndarray


def run_variants(
    configs: Mapping[str, RunConfig], names: Collection[str] = SCORES, cluster: Any = None
) -> dict[str, dict[str, StageOutcome]]:
    """Run the steps of a trace up to the named ones, one variant after the other.

    Args:
        configs: the variants by name. They may differ in what a replica is not made of: not in `model`, `scan` or
            `cluster`.
        names: of the steps that are wanted; they run with all that they depend on.
        cluster: what stages get as `cluster`; it stays open. Without one, a `Cluster` is made and closed at the end.

    Returns:
        For each variant, the outcomes of its steps by name.

    Raises:
        ValueError: if replicas of one variant would not do for another.
        WhenceError: as a trace.
    """
    first = next(iter(configs.values()))
    if any((c.model, c.scan, c.cluster) != (first.model, first.scan, first.cluster) for c in configs.values()):
        raise ValueError(f"variants {list(configs)} differ in what a replica is made of: model, scan or cluster")
    with ExitStack() as stack:
        handle = stack.enter_context(Cluster(first)) if cluster is None else cluster
        return {
            variant: Runner(
                Store(config.store), steps_up_to(build_steps(config), names), config, lambda: nullcontext(handle)
            ).run()
            for variant, config in configs.items()
        }


def identity(configs: Mapping[str, RunConfig], names: Collection[str] = SCORES) -> dict[str, dict[str, str]]:
    """What determines the bits of the named steps of every variant: their fingerprints, by variant and step."""
    found = {}
    for variant, config in configs.items():
        planned = Runner(Store(config.store), steps_up_to(build_steps(config), names), config).plan()
        found[variant] = {plan.step.name: plan.fingerprint for plan in planned if plan.step.name in names}
    return found


def read_scores(scores: Artifact) -> Scores:
    """All scores of a committed `scores` artifact, in the order of sequence ids."""
    tables = [scores.read_table(name, columns=["sequence_id", "scores"]) for name, _ in score_files(scores)]
    ids_N = np.concatenate([table.column("sequence_id").to_numpy() for table in tables])
    flat = np.concatenate([table.column("scores").combine_chunks().flatten().to_numpy() for table in tables])
    order = np.argsort(ids_N, kind="stable")
    return Scores(ids_N[order], flat.astype(np.float64).reshape(len(ids_N), -1)[order].T)


def agreement(scores_QN: np.ndarray, reference_QN: np.ndarray, query_ids: Sequence[str]) -> dict[str, Any]:
    """Pearson's correlation of two matrices of scores over all sequences, query by query.

    Args:
        scores_QN: of one variant.
        reference_QN: of another; sequences that either set aside are left out.
        query_ids: names of the queries.

    Returns:
        `mean` over queries with its `interval`, `by_query` (null where scores are constant), and the `minimum`.
    """
    finite_N = np.isfinite(scores_QN).all(axis=0) & np.isfinite(reference_QN).all(axis=0)
    found = over_queries(correlations(scores_QN[:, finite_N], reference_QN[:, finite_N]), query_ids)
    defined = [value for value in found["by_query"].values() if value is not None]
    return found | {"minimum": min(defined, default=None)}


def file_bytes(artifact: Artifact, *prefixes: str) -> int:
    """Bytes of the files of a committed artifact whose names begin with one of the prefixes."""
    files = (artifact.record() or {"files": {}})["files"]
    return sum(entry["bytes"] for name, entry in files.items() if name.startswith(prefixes))


def seconds(outcomes: Mapping[str, StageOutcome], *names: str) -> dict[str, float]:
    """Wall time of steps, of the attempt that finished each, whenever that was."""
    return {name: outcomes[name].seconds for name in names}
