"""Stage `refinement`: IHVPs of all queries by conjugate gradients on exact Gauss-Newton products (`ekfac_cg`).

The queries of a batch advance together: one pass over the sample an iteration serves them all. Replicas sum the
products over the fixed groups of the sample; parts are merged in the order of groups, so that who works moves no bit.
Vectors stay in the store, and the driver holds a few numbers a query. An iteration that is committed is never done
again.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.factors import load_selection
from actors.refinement import Direction, ProductTask, RefinementTask, Scalars, Systems
from actors.tasks import Done
from conf.schema import Dtype, FactorsConfig, RunConfig
from influence.conjugate_gradients import Recursion
from influence.layers import LayerSelection, TrackedLayer
from pipelines.progress import Progress
from pipelines.stages.grouped import check_share, discard_parts, sample_groups
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)

TOLERANCE = {Dtype.float32: 1e-6, Dtype.float64: 1e-12}  # relative residuals at which a query stops
GROWTH = 2.0  # times its least so far, above which a residual is said to have grown; they fall in another norm
COPIES = 2  # of a batch's vectors that a rank holds: directions, and sums of products


def cg_sample(factors: FactorsConfig) -> FactorsConfig:
    """The settings of the sample that the exact curvature is averaged over."""
    return dataclasses.replace(factors, samples=factors.cg_samples or factors.samples)


def queries_at_a_time(config: RunConfig, layers: Sequence[TrackedLayer]) -> int:
    """Queries of a batch: as many as `scan.dense_memory` (and `cluster.memory_per_rank`) holds, at least one."""
    itemsize = getattr(torch, config.scan.sum_dtype.name).itemsize
    each = COPIES * itemsize * sum(layer.parameters for layer in layers)
    room = config.scan.dense_memory
    if config.cluster.memory_per_rank is not None:
        room = min(room, config.cluster.memory_per_rank)
    return max(1, room // each)


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>/queries-<start>-<stop>.safetensors` and `residuals.json`.

    `residuals.json` has the relative residuals of each query by iteration, and its `gains`, as in `_gains`.

    Raises:
        NonFiniteShare: if more sequences were set aside than `scan.nonfinite_share` allows.
    """
    config, output = context.config, context.artifact
    selection = load_selection(context.inputs["layers"])
    records = context.inputs["gradients"].read_json("queries.json")
    width = queries_at_a_time(config, selection.layers)
    batches = [(start, min(start + width, len(records))) for start in range(0, len(records), width)]
    sample = _Sample(context)
    total = len(batches) * config.factors.cg_iterations * sample.size
    found: dict[str, list[float]] = {}
    gains: dict[str, float | None] = {}
    with context.progress("conjugate gradients", total, "sequences") as progress:
        for start, stop in batches:
            names = [record["query_id"] for record in records[start:stop]]
            record = _Batch(context, selection, sample, (start, stop), names, progress).solve()
            histories = zip(*record["residuals"], strict=True)
            found |= {name: list(history) for name, history in zip(names, histories, strict=True)}
            gains |= dict(zip(names, record.get("gains", [None] * len(names)), strict=True))
    check_share(sample.excluded, sample.size, config.scan.nonfinite_share)
    output.write_json("residuals.json", {"batches": batches, "residuals": found, "gains": gains})
    discard_parts(output)
    counts = {"queries": len(records), "iterations": max(map(len, found.values())) - 1, "sequences": sample.size}
    return StageResult(counts, {"residuals": found, "excluded": sample.excluded, "replica_seconds": sample.seconds})


def in_short(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `summary.json` says of `residuals.json`: by query, iterations, the last relative residual, and the gain."""
    residuals = record["residuals"]
    return {
        "iterations": {name: _iterations(history) for name, history in residuals.items()},
        "residual": {name: history[-1] for name, history in residuals.items()},
        "gain": {name: record.get("gains", {}).get(name) for name in residuals},
    }


def _iterations(history: Sequence[float]) -> int:
    """Those that moved a query: the residual of one that has stopped is told again and again."""
    last = len(history) - 1
    while last and history[last] == history[last - 1]:
        last -= 1
    return last


class _Sample:
    """The groups of sequences that products are averaged over."""

    def __init__(self, context: StageContext) -> None:
        self.sequences = context.inputs["sequences"]
        corpus = self.sequences.read_json("index.json")["sequences"]
        fitted = context.inputs["correction"].read_json("merged.json")["excluded"]
        self.groups = sample_groups(corpus, cg_sample(context.config.factors))
        self.size = sum(map(len, self.groups))
        mine = {index for group in self.groups for index in group} if fitted else set()
        self.fitted = {int(key): why for key, why in fitted.items() if int(key) in mine}
        self.excluded: dict[str, str] = {str(key): why for key, why in self.fitted.items()}
        self.seconds = 0.0


class _Batch:
    """One batch of queries, from the last iteration that is committed to the end."""

    def __init__(
        self,
        context: StageContext,
        selection: LayerSelection,
        sample: _Sample,
        queries: tuple[int, int],
        names: Sequence[str],
        progress: Progress,
    ) -> None:
        config, inputs = context.config, context.inputs
        factors = {name: inputs[name] for name in ("eigenbasis", "correction")}
        dtype = getattr(torch, config.scan.sum_dtype.name)
        solver = (config.factors.solver.name, config.factors.damping_factor)
        self._systems = Systems(context.artifact, inputs["gradients"], factors, *solver, *queries, dtype)
        self._bundles = self._systems.bundles(selection.layers)
        self._output, self._cluster = context.artifact, context.cluster
        self._sample, self._names, self._progress = sample, names, progress
        self._iterations, self._memory = config.factors.cg_iterations, config.scan.dense_memory
        self._tolerance = TOLERANCE[config.scan.sum_dtype]
        self._before = progress.done  # by other batches

    def solve(self) -> dict[str, Any]:
        """The record of the last iteration; its `residuals` are a list for each, the first of them before any."""
        finished = f"parts/{self._systems.name}.json"
        if self._output.exists(finished):
            record = self._output.read_json(finished)
            self._progress.resume(self._iterations * self._sample.size)
        else:
            record = self._finish()
            self._output.write_json(finished, record)
            self._forget(self._iterations + 1)
            self._progress.advance_to(self._before + self._iterations * self._sample.size)  # some may not be needed
        self._sample.excluded |= record["excluded"]
        self._sample.seconds += record["seconds"]
        return record

    def _finish(self) -> dict[str, Any]:
        record = self._latest() or self._begin()
        chosen = _recursion(record).open(self._tolerance)
        while record["iteration"] < self._iterations and len(chosen):
            record = self._advance(record, chosen)
            chosen = _recursion(record).open(self._tolerance)
        self._work("keep", record["iteration"])
        return record

    def _latest(self) -> dict[str, Any] | None:
        """The record of the last iteration that is committed."""
        for iteration in range(self._iterations, -1, -1):
            name = f"{self._systems.folder('iteration', iteration)}/done.json"
            if self._output.exists(name):
                self._forget(iteration)
                self._progress.resume(iteration * self._sample.size)
                return self._output.read_json(name)
        return None

    def _begin(self) -> dict[str, Any]:
        scalars = self._work("begin")
        rz_K, rr_K = _added(scalars, "rz"), _added(scalars, "rr")
        zeros_K = torch.zeros_like(rz_K)
        return self._commit(0, Recursion.begun(rz_K, rr_K), zeros_K, zeros_K, None, _Pass([], 0, {}, 0.0))

    def _advance(self, record: dict[str, Any], chosen: Tensor) -> dict[str, Any]:
        """One iteration: a pass over the sample, and two rounds over the layers."""
        recursion, beta = _recursion(record), torch.tensor(record["beta"], dtype=torch.float64)[chosen]
        direction = Direction(record["iteration"], tuple(chosen.tolist()), tuple(beta.tolist()))
        through = self._products(direction)
        alpha = recursion.step_lengths(
            chosen, _added(self._work("curve", direction, through.parts, through.sequences), "pq")
        )
        energy_K = torch.tensor(record["energy"], dtype=torch.float64)
        energy_K[chosen] += alpha * recursion.rz_K[chosen]
        scalars = self._work("step", direction, tuple(alpha.tolist()))
        rz_K, rr_K = _added(scalars, "rz"), _added(scalars, "rr")
        recursion, following = recursion.advanced(chosen, alpha, rz_K[chosen], rr_K[chosen])
        beta_K = torch.zeros_like(rz_K).index_copy(0, chosen, following)
        done = self._commit(record["iteration"] + 1, recursion, beta_K, energy_K, record, through)
        self._forget(done["iteration"])
        self._tell(done, chosen)
        return done

    def _products(self, direction: Direction) -> _Pass:
        """A pass over the sample by the replicas."""
        sample = self._sample
        tasks = [
            ProductTask(self._systems, direction, group, ids, sample.sequences, sample.fitted, self._memory)
            for group, ids in enumerate(sample.groups)
        ]
        waiting = [task for task in tasks if not self._output.exists(f"{task.folder}/done.json")]
        behind = self._before + (direction.iteration + 1) * sample.size
        behind -= sum(len(task.sequence_ids) for task in waiting)

        def done(task: ProductTask, _report: Done) -> None:
            nonlocal behind
            behind += len(task.sequence_ids)
            self._progress.advance_to(behind)

        if waiting:
            self._cluster.pool.run(
                "products", waiting, done, lambda running: self._progress.advance_to(behind + running)
            )
        reports = [self._output.read_json(f"{task.folder}/done.json") for task in tasks]
        return _Pass(
            [(task.folder, report["ranks"]) for task, report in zip(tasks, reports, strict=True)],
            sum(report["sequences"] for report in reports),
            {key: why for report in reports for key, why in report["excluded"].items()},
            sum(report["seconds"] for report in reports),
        )

    def _work(self, name: str, *more: Any) -> list[Scalars]:
        """What each bundle of layers reports of its part of an iteration, in their order."""
        found: dict[int, Scalars] = {}

        def done(task: RefinementTask, report: Done) -> None:
            found[task.number] = report.result  # type: ignore[assignment]

        tasks = [
            RefinementTask(name, self._systems, layers, number, more) for number, layers in enumerate(self._bundles)
        ]
        self._cluster.pool.run("refine", tasks, done, lambda _running: None)
        return [found[number] for number in range(len(tasks))]

    # --- records ----------------------------------------------------------------------------------------------------

    def _commit(
        self,
        iteration: int,
        recursion: Recursion,
        beta_K: Tensor,
        energy_K: Tensor,
        before: dict[str, Any] | None,
        through: _Pass,
    ) -> dict[str, Any]:
        """Write what vouches for the state after an iteration.

        The energy is ∇fᵀx = Σ α ⟨r, z⟩: it grows to that of the solution as the error in the norm of G + λ falls.
        """
        gains = _gains(before, energy_K.tolist())
        before = before or {"residuals": [], "excluded": {}, "seconds": 0.0}
        record = {
            "iteration": iteration,
            "rz": recursion.rz_K.tolist(),
            "norm": recursion.norm_K.tolist(),
            "residual": recursion.residual_K.tolist(),
            "halted": recursion.halted_K.tolist(),
            "beta": beta_K.tolist(),
            "energy": energy_K.tolist(),
            "gains": gains,
            "residuals": [*before["residuals"], recursion.residual_K.tolist()],
            "excluded": before["excluded"] | through.excluded,
            "seconds": before["seconds"] + through.seconds,
        }
        self._output.write_json(f"{self._systems.folder('iteration', iteration)}/done.json", record)
        return record

    def _forget(self, iteration: int) -> None:
        """Delete what was written before an iteration and is no longer needed; what vouches for it first."""
        kept = (self._systems.folder("iteration", iteration), self._systems.folder("product", iteration))
        names = [name for name in self._output.list(f"parts/{self._systems.name}/") if not name.startswith(kept)]
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            self._output.delete(name)

    def _tell(self, record: dict[str, Any], chosen: Tensor) -> None:
        """Say how far the residuals have fallen and what the iteration has added, and which residuals began to grow."""
        residuals = torch.tensor(record["residuals"], dtype=torch.float64)
        after = residuals[-1]
        gained = [gain for number in chosen.tolist() if (gain := record["gains"][number]) is not None]
        log.info(
            "conjugate gradients, queries %d to %d, iteration %d of %d: relative residual %.3g (median), %.3g (worst); "
            "of gradientᵀ answer, %.1f %% (median) came in this one",
            self._systems.start + 1,
            self._systems.stop,
            record["iteration"],
            self._iterations,
            statistics.median(after.tolist()),
            float(after.max()),
            100 * statistics.median(gained or [0.0]),
        )
        best = residuals[:-1].min(0).values
        grown = [k for k in chosen.tolist() if after[k] > GROWTH * best[k] >= residuals[-2, k]]
        if grown:
            worst = max(grown, key=lambda k: float(after[k] / best[k]))
            log.warning(
                "conjugate gradients: the residual of %d of %d queries grew in iteration %d, most that of %r, to %.3g "
                "from %.3g at best. It falls in another norm: what each iteration brings says how far there is to go. "
                "Growth that lasts asks for more factors.cg_iterations or a higher factors.damping_factor",
                len(grown),
                len(chosen),
                record["iteration"],
                self._names[worst],
                float(after[worst]),
                float(best[worst]),
            )


@dataclass(frozen=True)
class _Pass:
    """What the replicas report of one pass over the sample: folder and ranks of each group's sums, and counts."""

    parts: list[tuple[str, int]]
    sequences: int
    excluded: dict[str, str]
    seconds: float


def _gains(before: Mapping[str, Any] | None, energy: Sequence[float]) -> list[float | None]:
    """The share of ∇fᵀx that the last iteration of each query has brought; None before the first."""
    if before is None:
        return [None] * len(energy)
    told = zip(before["energy"], energy, before.get("gains", [None] * len(energy)), strict=True)
    return [1 - old / new if new != old and new else earlier for old, new, earlier in told]


def _recursion(record: dict[str, Any]) -> Recursion:
    rz_K, norm_K, residual_K = (torch.tensor(record[key], dtype=torch.float64) for key in ("rz", "norm", "residual"))
    return Recursion(rz_K, norm_K, residual_K, torch.tensor(record["halted"], dtype=torch.bool))


def _added(scalars: Sequence[Scalars], key: str) -> Tensor:
    """Σ over bundles, in their order."""
    return torch.tensor([each[key] for each in scalars], dtype=torch.float64).sum(0)
