"""Stage `convergence`: how well scores agree when the factors are fitted on another sample, by the size of the sample.

The factors are fitted twice on disjoint samples of a few sizes, as they are fitted on the run's own, queries are
preconditioned with each fit, and a sample of the corpus is scored with both. Nothing but the summary and the report
depends on it. What two fits of the run's own size would agree in is an extrapolation, and says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.factors import load_selection
from actors.folders import ArtifactFolder
from actors.reduction import decompose, decompose_bytes
from actors.tasks import ConvergenceTask, Done
from conf.schema import FactorsConfig
from influence.convergence import extrapolated, falling_rate, needed_size
from influence.cost import factor_sizes
from influence.solvers import SOLVERS
from pipelines.progress import Progress
from pipelines.stages import correction, covariance
from pipelines.stages.agreement import agreement, sample_of, shown, summary
from pipelines.stages.eigenbasis import tokens_of
from pipelines.stages.fidelity import queries_at_full_rank
from pipelines.stages.grouped import (
    GroupTotals,
    MergeOf,
    Statistic,
    TaskOf,
    bundled,
    discard_parts,
    passes_of,
    run_groups,
    totals_of,
)
from pipelines.stages.halves import FEWEST, Fit, halves_of
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)

RECORD = "convergence.json"
SCORED = 64  # sequences that both fits score, as far as the corpus has them
QUERIES = 16  # that are scored, spread evenly over those of the run
WANTED = 0.95  # mean correlation of the run's own factors below which it warns


def fitted_solver(factors: FactorsConfig) -> str | None:
    """The solver whose factors are compared: what refines it has none of its own. None where there are no factors."""
    solver = SOLVERS[factors.solver.name]
    if not solver.needs_covariance:
        return None
    return "ekfac" if solver.needs_correction else "kfac"


def run(context: StageContext) -> StageResult:
    """Write `convergence.json`, in which there is nothing where there are no factors or nothing is to be measured.

    `samples` n of the run's own fit, and the `reason` where they are too few. Else `solver`; `scored` sequences;
    `sizes`, ascending, each with the `sequences` of a fit and `pearson` by query with `mean` and `minimum`, or the
    `reason` why there is none; `extrapolated`, the same for two fits on n, with the `rate` at which errors were seen
    to fall and are taken to go on (`influence.convergence.falling_rate`), and `at_best`, the mean if they fell as 1/n
    from the largest fits on; null if there is none; `fitted`: sequences, tokens and seconds that it took.
    """
    output, factors = context.artifact, context.config.factors
    if not factors.convergence_share or fitted_solver(factors) is None:
        output.write_json(RECORD, {})
    elif not output.exists(RECORD):
        output.write_json(RECORD, _Convergence(context).measured())
    found = output.read_json(RECORD)
    discard_parts(output)
    if found:
        _tell(found, context.inputs["sequences"].read_json("index.json")["sequences"])
    fitted = found.get("fitted", {})
    counts = {key: fitted[key] for key in ("sequences", "tokens") if key in fitted}
    return StageResult(counts, {"convergence": found, "replica_seconds": fitted.get("seconds", 0.0)})


class _Convergence:
    """The fits of a run and what they agree in. Whatever is finished is not done again after an interruption."""

    def __init__(self, context: StageContext) -> None:
        def progress(name: str, total: int | None, unit: str) -> Progress:
            return context.progress(f"convergence: {name}", total, unit)

        self._context = replace(context, progress=progress)
        self._config, self._cluster, self._output = context.config, context.cluster, context.artifact
        self._layers = load_selection(context.inputs["layers"]).layers
        self._corpus = context.inputs["sequences"].read_json("index.json")["sequences"]
        self._halves = halves_of(self._corpus, context.config.factors)

    def measured(self) -> dict[str, Any]:
        """What `convergence.json` says."""
        factors, sizes = self._config.factors, self._halves.sizes
        samples = min(self._corpus, factors.samples or self._corpus)
        solver = fitted_solver(factors)
        if not sizes or solver is None:
            return {"samples": samples, "reason": f"{samples} sequences: two fits take {FEWEST} at least"}
        totals = self._covariance()
        self._eigenbases(totals)
        fitted = [totals[fit] for fit in self._halves.of_size(len(sizes) - 1)]
        if SOLVERS[solver].needs_correction:
            fitted += self._correction().values()
        curve = self._curve(solver)
        return {
            "samples": samples,
            "solver": solver,
            "scored": min(SCORED, self._corpus),
            "sizes": curve,
            "extrapolated": beyond(curve, samples),
            "fitted": {key: sum(getattr(each, key) for each in fitted) for key in ("sequences", "tokens", "seconds")},
        }

    def _folder(self, fit: Fit, kind: str) -> ArtifactFolder:
        return ArtifactFolder.of(self._output, f"{fit.folder}/{kind}")

    def _covariance(self) -> dict[Fit, GroupTotals]:
        """A and S: each group once, whatever the number of fits that it is part of."""
        members = {fit: fit.groups for fit in self._halves.fits}
        return self._summed(
            covariance.COVARIANCE, self._halves.groups, members, covariance.task_of, covariance.merge_of
        )

    def _eigenbases(self, totals: Mapping[Fit, GroupTotals]) -> None:
        """Of all factors of all fits, after which the factors go."""
        sizes = factor_sizes(self._layers)
        wanted = sorted(((fit, name) for fit in totals for name in sizes), key=lambda each: -sizes[each[1]])
        kept = [each for each in wanted if not self._folder(each[0], "eigenbasis").exists(f"{each[1]}.safetensors")]
        dtype = getattr(torch, self._config.scan.sum_dtype.name)
        arguments = [
            (self._folder(fit, "eigenbasis"), self._folder(fit, "covariance"), name, dtype) for fit, name in kept
        ]
        memory = [decompose_bytes(sizes[name], self._config.factors.blocks) for _, name in kept]
        with self._context.progress("eigenbases", len(wanted), "factors") as progress:
            progress.resume(len(wanted) - len(kept))
            for _ in self._cluster.map(decompose, arguments, memory):
                progress.advance(1)
        for fit, found in totals.items():
            self._folder(fit, "eigenbasis").write_json("tokens.json", tokens_of(found, self._layers))
            for name in self._folder(fit, "covariance").list():
                self._folder(fit, "covariance").delete(name)

    def _correction(self) -> dict[Fit, GroupTotals]:
        """Λ: each fit has its own basis, so that groups are gone through for every fit that they are part of."""
        groups: list[Sequence[int]] = []
        members: dict[Fit, tuple[int, ...]] = {}
        owners: list[Fit] = []
        for fit in self._halves.fits:
            members[fit] = tuple(range(len(groups), len(groups) + len(fit.groups)))
            groups += [self._halves.groups[number] for number in fit.groups]
            owners += [fit] * len(fit.groups)

        def task_of(context: StageContext) -> TaskOf:
            return correction.task_of(context, lambda group: self._folder(owners[group], "eigenbasis"))

        return self._summed(correction.CORRECTION, groups, members, task_of, correction.merge_of)

    def _summed(
        self,
        statistic: Statistic,
        groups: Sequence[Sequence[int]],
        members: Mapping[Fit, Sequence[int]],
        task_of: Callable[[StageContext], TaskOf],
        merge_of: Callable[[StageContext], MergeOf],
    ) -> dict[Fit, GroupTotals]:
        """Sum a statistic over all groups, and merge the groups of each fit into its own folder."""
        sums = ArtifactFolder.of(self._output, f"parts/{statistic.method}")
        context = replace(self._context, artifact=sums)
        if sums.exists("merged.json"):
            known = sums.read_json("merged.json")
            totals = {fit: GroupTotals(**known[fit.folder]) for fit in members}
        else:
            passes = passes_of(context, statistic)
            run_groups(context, statistic, passes, groups, task_of(context))
            totals = {fit: totals_of(sums, passes, numbers) for fit, numbers in members.items()}
            merge, arguments, memory = merge_of(context), [], []
            for fit, numbers in members.items():
                into = self._folder(fit, statistic.method)
                function, found, bytes_ = merge(totals[fit], bundled(sums, statistic, passes, numbers, into))
                arguments, memory = arguments + found, memory + bytes_
            for _ in self._cluster.map(function, arguments, memory):
                pass
            sums.write_json("merged.json", {fit.folder: vars(found) for fit, found in totals.items()})
        discard_parts(sums)
        return totals

    def _curve(self, solver: str) -> list[dict[str, Any]]:
        """Agreement of the two fits of each size, on a seeded sample of the corpus."""
        records = self._context.inputs["gradients"].read_json("queries.json")
        tasks = self._tasks(solver, chosen_queries(len(records)))
        found: dict[int, list[dict[str, Any]]] = {size: [] for size in self._halves.sizes}
        progress = self._context.progress("scores", sum(len(task.queries) for task in tasks), "queries")

        def done(task: ConvergenceTask, report: Done) -> None:
            names = [records[query]["query_id"] for query in task.queries]
            if isinstance(report.result, str):
                found[task.size].append({"pearson": dict.fromkeys(names), "reason": report.result})
            else:
                first, second = (torch.tensor(scores, dtype=torch.float64) for scores in report.result)  # type: ignore[attr-defined]
                found[task.size].append(agreement(first, second, names))
            progress.advance(len(task.queries))

        self._cluster.pool.run("convergence", tasks, done, lambda _running: None)
        progress.close()
        names = [record["query_id"] for record in records]
        return [_entry(size, parts, names) for size, parts in found.items()]

    def _tasks(self, solver: str, queries: Sequence[int]) -> list[ConvergenceTask]:
        """As many queries a task as `scan.dense_memory` holds at full rank."""
        inputs, width = self._context.inputs, queries_at_full_rank(self._context)
        ids = sample_of(inputs["sequences"], SCORED, self._config.seed)
        kinds = ("eigenbasis", "correction") if SOLVERS[solver].needs_correction else ("eigenbasis",)
        return [
            ConvergenceTask(
                ids,
                inputs["sequences"],
                inputs["gradients"],
                tuple({kind: self._folder(fit, kind) for kind in kinds} for fit in self._halves.of_size(number)),
                solver,
                self._config.factors.damping_factor,
                tuple(queries[start : start + width]),
                size,
            )
            for number, size in enumerate(self._halves.sizes)
            for start in range(0, len(queries), width)
        ]


def chosen_queries(count: int) -> list[int]:
    """Which queries are scored: all, or `QUERIES` of them, spread evenly."""
    return sorted(set(np.linspace(0, count - 1, min(count, QUERIES)).round().astype(int).tolist()))


def _entry(size: int, parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What is said of a size; queries in the order of the run."""
    values = {name: value for part in parts for name, value in part["pearson"].items()}
    ordered = {name: values[name] for name in names if name in values}
    reasons = [{"reason": part["reason"]} for part in parts if "reason" in part]
    return {"sequences": size, "pearson": ordered} | summary(ordered) | (reasons[0] if reasons else {})


def beyond(curve: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any] | None:
    """Agreement of two fits on `samples` sequences each, extrapolated from the largest fits; None if it has none."""
    largest = curve[-1]
    if largest["mean"] is None:
        return None
    rate = falling_rate([entry["sequences"] for entry in curve], [entry["mean"] for entry in curve])

    def reached(power: float) -> dict[str, float | None]:
        return {
            name: None if value is None else extrapolated(value, largest["sequences"], samples, power)
            for name, value in largest["pearson"].items()
        }

    found = {"sequences": samples, "rate": rate, "pearson": reached(rate)} | summary(reached(rate))
    return found | {"at_best": summary(reached(1.0))["mean"]}


def in_words(found: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    if not found:
        return "not measured"
    if "reason" in found:
        return f"not measured: {found['reason']}"
    largest, outlook = found["sizes"][-1], found["extrapolated"]
    text = (
        f"scores by two fits on {largest['sequences']:,} sequences each: correlation {shown(largest['mean'])} on "
        f"average, {shown(largest['minimum'])} at worst"
    )
    if outlook is None:
        return text + (f" ({largest['reason']})" if "reason" in largest else "")
    return (
        f"{text}; on {outlook['sequences']:,} each, as here, it would be {shown(outlook['mean'])} to "
        f"{shown(outlook['at_best'])} on average, {shown(outlook['minimum'])} at worst (extrapolated)"
    )


def low(found: Mapping[str, Any], corpus: int) -> str | None:
    """What to do where the run's own factors would not be found again by another sample.

    Args:
        found: as in `convergence.json`.
        corpus: number of sequences in the corpus.
    """
    outlook = found.get("extrapolated")
    if outlook is None or outlook["mean"] >= WANTED:
        return None
    largest = found["sizes"][-1]
    needed = needed_size(largest["mean"], largest["sequences"], WANTED, outlook["rate"])
    enough = f"about {math.ceil(needed):,} would reach {WANTED}" if needed < 1e12 else f"none would reach {WANTED}"
    remedy = (
        "raise factors.samples"
        if found["samples"] < corpus
        else "factors.samples takes all of the corpus: give more text, or a higher factors.damping_factor"
    )
    return (
        f"another sample of {found['samples']:,} sequences may give factors whose scores correlate with those of "
        f"this run by {outlook['mean']:.3f} only (mean over queries, extrapolated from {largest['mean']:.3f} for fits "
        f"on {largest['sequences']:,}): {remedy}; {enough}"
    )


def _tell(found: Mapping[str, Any], corpus: int) -> None:
    log.info("convergence: %s", in_words(found))
    warning = low(found, corpus)
    if warning is not None:
        log.warning("%s", warning)
