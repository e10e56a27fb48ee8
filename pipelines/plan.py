"""`whence plan`: what a trace would do and what that would cost. Runs nothing, starts no Ray, loads no weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from actors.factors import load_selection
from actors.model import load_skeleton
from actors.store import Artifact, Store
from conf.schema import Dtype, RunConfig
from influence.layers import LayerSelection, group_inputs, select_layers
from influence.shape import ForwardShape, forward_shape
from pipelines.estimate import StepCost, Workload, contractions, estimate
from pipelines.extent import Extent, candidate_extent, corpus_extent, query_tokens
from pipelines.graph import build_steps
from pipelines.progress import duration
from pipelines.rates import DECOMPOSITIONS, ELEMENTWISE, TEXT, Rates, rates_for
from pipelines.runner import Planned, Runner

log = logging.getLogger(__name__)

PROBE_TOKENS = 4


@dataclass(frozen=True)
class StepPlan:
    """One row of the plan.

    Attributes:
        name: Of the step.
        state: `cached`, `begun` or `to do`.
        cost: What computing it takes.
        disk: Bytes in the store: those that are there if it is cached, else those that would be.
        seconds: To compute it, at the stated rates; 0 if it is cached.
    """

    name: str
    state: str
    cost: StepCost
    disk: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a trace would do.

    Attributes:
        steps: In the order in which they would run.
        load: The sizes that costs were computed from.
        selection: The tracked layers.
        notes: Where estimated sizes and rates come from, for people.
    """

    steps: tuple[StepPlan, ...]
    load: Workload
    selection: LayerSelection
    notes: tuple[str, ...]

    def text(self) -> str:
        """The plan, for a terminal."""
        return "\n".join([*_facts(self), "", *_table(self.steps), "", *_memory(self), "", *self.notes])


def run_plan(config: RunConfig) -> str:
    """What `whence plan` prints.

    Raises:
        WhenceError: For a model, a corpus or queries that cannot be used, as far as can be seen without running.
        StaleArtifact: If the store holds something else where an artifact belongs.
    """
    return make_plan(config).text()


def make_plan(config: RunConfig, rates: Rates | None = None) -> Plan:
    """Find what is cached and estimate the rest.

    Args:
        config: The run.
        rates: How fast work goes; measured or assumed if None.
    """
    store = Store(config.store)
    planned = Runner(store, build_steps(config), config).plan()
    artifacts = {item.step.name: store.folder(item.step.kind, item.fingerprint) for item in planned}
    ready = {item.step.name: artifacts[item.step.name] for item in planned if item.cached}
    extent = corpus_extent(config, ready.get("sequences"))
    selection, shape = _model(config, ready.get("layers"))
    tokens = query_tokens(config)
    candidates, from_feeds = candidate_extent(config, extent, len(tokens), ready.get("candidates"))
    load = Workload(
        config,
        selection.layers,
        shape,
        selection.total_parameters,
        extent.sequences,
        extent.tokens,
        candidates,
        tokens,
        extent.corpus_bytes,
    )
    dtypes = [config.model.dtype.name, config.scan.product_dtype.name, Dtype.float64.name]
    rates = rates or rates_for(config.cluster, dtypes, _typical_product(load))
    speeds = dict(rates.of) | {TEXT: extent.bytes_a_second}
    costs = estimate(load)
    steps = tuple(_step_plan(item, artifacts[item.step.name], costs[item.step.name], speeds, rates) for item in planned)
    return Plan(steps, load, selection, _notes(extent, from_feeds, load, rates, speeds))


def _typical_product(load: Workload) -> tuple[int, int, int]:
    """Rows, inputs and outputs of the tracked layer that a micro-batch spends most on."""
    layer = max(load.layers, key=lambda layer: layer.parameters)
    return load.config.scan.batch_size * load.tokens, layer.inputs, layer.outputs


def _model(config: RunConfig, layers: Artifact | None) -> tuple[LayerSelection, ForwardShape]:
    """Tracked layers, from their artifact if there is one, and the shape of a pass, from the model without weights."""
    skeleton = load_skeleton(config.model)
    selection = load_selection(layers) if layers is not None else _selection(skeleton, config.model.layers)
    return selection, forward_shape(skeleton, selection)


def _selection(skeleton: nn.Module, wanted: str) -> LayerSelection:
    selection = select_layers(skeleton, wanted)
    try:
        return group_inputs(skeleton, selection, torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta"))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        log.warning("layers with the same input could not be found without weights (%s): each is counted alone", error)
        return selection


def _step_plan(
    item: Planned, artifact: Artifact, cost: StepCost, speeds: Mapping[str, float], rates: Rates
) -> StepPlan:
    if item.cached:
        record = artifact.record()
        assert record is not None
        disk = sum(file["bytes"] for file in record["files"].values())
        return StepPlan(item.step.name, "cached", cost, disk, 0.0)
    seconds = cost.seconds(speeds, rates.tasks if cost.tasks else rates.workers)
    return StepPlan(item.step.name, "begun" if artifact.list() else "to do", cost, cost.disk, seconds)


# --- what is printed ---


def _facts(plan: Plan) -> list[str]:
    load, config = plan.load, plan.load.config
    return [
        f"plan of {config.name}: nothing is run",
        f"model      {config.model.path}: {plan.selection.describe()}".replace("\n", "\n           "),
        f"corpus     {load.sequences:,} sequences of {load.tokens:,} tokens",
        f"curvature  {config.factors.solver.name}, {load.samples:,} sequences",
        f"queries    {load.queries:,}, {sum(load.query_tokens):,} tokens",
        f"candidates {load.candidates:,} sequences to scan",
        f"cluster    {config.cluster.max_replicas} replicas, {config.cluster.cpus_per_rank} threads and "
        f"{config.cluster.gpus_per_rank:g} GPUs each",
    ]


def _table(steps: Sequence[StepPlan]) -> list[str]:
    rows = [("step", "state", "FLOPs", "memory a replica", "on disk", "time")]
    for step in steps:
        work = step.cost.flops
        rows.append(
            (
                step.name,
                step.state,
                amount(work, "FLOP") if work else "–",
                size(sum(step.cost.memory.values())) if step.cost.memory else "–",
                ("" if step.state == "cached" else "~") + size(step.disk),
                "–" if step.state == "cached" else f"~{duration(step.seconds)}",
            )
        )
    open_steps = [step for step in steps if step.state != "cached"]
    rows.append(
        (
            "to do",
            f"{len(open_steps)} of {len(steps)}",
            amount(sum(step.cost.flops for step in open_steps), "FLOP"),
            size(max((sum(step.cost.memory.values()) for step in open_steps), default=0)),
            size(sum(step.disk for step in open_steps)),
            f"~{duration(sum(step.seconds for step in open_steps))}",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_cells(row, widths)).rstrip() for row in rows]
    return [*lines[:-1], "-" * len(lines[0]), lines[-1]]


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _memory(plan: Plan) -> list[str]:
    """What the memory of each step consists of."""
    lines = ["memory, by what holds it (a task where Ray tasks do the work, else a replica)"]
    for step in plan.steps:
        if step.cost.memory and step.state != "cached":
            parts = ", ".join(f"{name} {size(held)}" for name, held in step.cost.memory.items())
            partial = f"; {size(step.cost.temporary)} of partial sums on disk meanwhile" if step.cost.temporary else ""
            lines.append(f"  {step.name:<11}{parts}{partial}")
    choice = list(contractions(plan.load).values())
    lines.append(
        f"scan: {choice.count('factored')} layers by two thin products, {choice.count('dense')} by full gradients"
    )
    return lines


def _notes(
    extent: Extent, from_feeds: str, load: Workload, rates: Rates, speeds: Mapping[str, float]
) -> tuple[str, ...]:
    config = load.config
    notes = [
        f"sequences: {extent.how}",
        f"candidates: {from_feeds}",
        "FLOPs: two a multiply-add of every matrix product, and the leading terms of decompositions",
        "on disk: numbers times their size, before compression and container overhead; of cached steps, the files",
        f"time: an estimate. {rates.how}; elementwise {speeds[ELEMENTWISE] / 1e9:.2f}·10⁹ numbers/s, decompositions "
        f"{speeds[DECOMPOSITIONS] / 1e9:,.1f} GFLOP/s, text {speeds[TEXT] / 1e6:.1f} MB/s; {rates.workers:g} replicas "
        f"and {rates.tasks:g} tasks at a time. Start-up, reading and writing are left out",
    ]
    if not load.shape.probed:
        notes.append("FLOPs of the passes are from the module tree: the model does not run without weights")
    if config.queries.fidelity is not None:
        notes.append("ranks for a fidelity are known only after the decompositions: all that is kept is counted")
    return tuple(notes)


def amount(count: float, unit: str) -> str:
    """A number with a decimal prefix: `1.2 TFLOP`."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:,.1f} {prefix}{unit}"
    return f"{count:,.0f} {unit}"


def size(count: float) -> str:
    """Bytes with a binary prefix: `1.2 GiB`."""
    for scale, prefix in ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if count >= scale:
            return f"{count / scale:,.1f} {prefix}B"
    return f"{count:,.0f} B"
