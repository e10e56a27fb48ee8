"""A plan as text: facts, a row a step, what memory, passes and transfers consist of, and where numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conf.schema import RunConfig
from influence.layers import LayerSelection, TrackedLayer
from pipelines.progress import duration
from pipelines.rates import DECOMPOSITIONS, DOUBLES, ELEMENTWISE, TEXT, Rates
from pipelines.stepcost import StepCost
from pipelines.timing import Seconds
from pipelines.workload import Workload, contractions, queries_shared

HEADER = ("step", "state", "FLOPs", "memory a rank", "moved", "on disk", "time", "limit")
TEXT_COLUMNS = (0, 1, 7)


@dataclass(frozen=True)
class StepPlan:
    """One row of the plan.

    Attributes:
        name: Of the step.
        state: `cached`, `begun` or `to do`.
        cost: What computing it takes.
        disk: Bytes in the store: those that are there if it is cached, else those that would be.
        time: To compute it, at the stated rates; nothing if it is cached.
    """

    name: str
    state: str
    cost: StepCost
    disk: int
    time: Seconds

    @property
    def seconds(self) -> float:
        """To compute it, nothing overlapping."""
        return self.time.total


def describe(
    steps: Sequence[StepPlan],
    load: Workload,
    selection: LayerSelection,
    rates: Rates,
    notes: Iterable[str],
    warnings: Sequence[str],
) -> str:
    """The whole text."""
    waiting = [step for step in steps if step.state != "cached"]
    parts = [
        _facts(load, selection),
        _table(steps),
        _memory(waiting, rates),
        _passes(waiting),
        _transfers(waiting, load),
        [f"warning: {text}" for text in warnings],
        [*notes, *_notes(load, rates)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _facts(load: Workload, selection: LayerSelection) -> list[str]:
    config, cluster = load.config, load.config.cluster
    ranks = f" of {cluster.world_size} ranks" if cluster.world_size > 1 else ""
    return [
        f"plan of {config.name}: nothing is run",
        f"model      {config.model.path}: {selection.describe()}".replace("\n", "\n           "),
        f"corpus     {load.sequences:,} sequences of {load.tokens:,} tokens",
        f"curvature  {config.factors.solver.name}, {load.samples:,} sequences",
        f"queries    {load.queries:,}, {sum(load.query_tokens):,} tokens",
        f"candidates {load.candidates:,} sequences to scan",
        f"cluster    {cluster.max_replicas} replicas{ranks}, {cluster.cpus_per_rank} threads and "
        f"{cluster.gpus_per_rank:g} GPUs each{' rank' if ranks else ''}",
    ]


def _table(steps: Sequence[StepPlan]) -> list[str]:
    rows = [HEADER, *(_row(step) for step in steps)]
    waiting = [step for step in steps if step.state != "cached"]
    total = sum(step.seconds for step in waiting)
    rows.append(
        (
            "to do",
            f"{len(waiting)} of {len(steps)}",
            amount(sum(step.cost.flops for step in waiting), "FLOP"),
            size(max((sum(step.cost.memory.values()) for step in waiting if not step.cost.tasks), default=0)),
            _some(sum(sum(step.cost.moved.values()) for step in waiting)),
            size(sum(step.disk for step in waiting)),
            f"~{duration(total)}",
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_cells(row, widths)).rstrip() for row in rows]
    hidden = sum(step.time.overlapped for step in waiting)
    ending = [f"~{duration(hidden)} if transfers hid behind products"] if total > 1.05 * hidden else []
    return [*lines[:-1], "-" * len(lines[0]), lines[-1], *ending]


def _row(step: StepPlan) -> tuple[str, ...]:
    cost, cached = step.cost, step.state == "cached"
    return (
        step.name,
        step.state,
        amount(cost.flops, "FLOP") if cost.flops else "–",
        size(sum(cost.memory.values())) if cost.memory else "–",
        _some(sum(cost.moved.values())),
        ("" if cached else "~") + size(step.disk),
        "–" if cached else f"~{duration(step.seconds)}",
        "" if cached or step.seconds < 0.05 else step.time.limit,
    )


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column in TEXT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _memory(steps: Sequence[StepPlan], rates: Rates) -> list[str]:
    """What the memory of each step consists of."""
    limit = f", {size(rates.memory)} each" if rates.memory else ""
    lines = [f"memory, by what holds it (a task where Ray tasks do the work, else a rank{limit})"]
    for step in steps:
        if step.cost.memory:
            parts = ", ".join(f"{name} {size(held)}" for name, held in step.cost.memory.items())
            partial = f"; {size(step.cost.temporary)} of partial sums on disk meanwhile" if step.cost.temporary else ""
            lines.append(f"  {step.name:<13}{parts}{partial}")
    return lines


def _passes(steps: Sequence[StepPlan]) -> list[str]:
    """Which layers are fitted together, where the sample is gone through more than once or could be."""
    lines = []
    for step in steps:
        found = step.cost.passes
        if not found:
            continue
        if len(found) == 1:
            lines.append(f"  {step.name:<13}1 pass over all {len(found[0])} layers")
        else:
            named = ", ".join(_span(layers) for layers in found)
            lines.append(f"  {step.name:<13}{len(found)} passes: {named}")
    return ["passes over the sample", *lines] if lines else []


def _span(layers: Sequence[TrackedLayer]) -> str:
    return f"{layers[0].name} – {layers[-1].name}" if len(layers) > 1 else layers[0].name


def _transfers(steps: Sequence[StepPlan], load: Workload) -> list[str]:
    """What is moved, and the three parts of each step's time."""
    lines = ["time by what takes it, and bytes by what they are"]
    for step in steps:
        if step.seconds < 0.05:
            continue
        time = step.time
        spent = {"compute": time.compute, "network": time.network, "store": time.store}
        parts = [f"{name} {duration(value)}" for name, value in spent.items() if value >= 0.05]
        moved = [f"{name} {size(value)}" for name, value in step.cost.moved.items() if value]
        stored = [f"to and from the store {size(step.cost.stored)}"] if step.cost.stored else []
        lines.append(f"  {step.name:<13}{', '.join(parts)}; {', '.join([*moved, *stored])}".rstrip("; "))
    choice = list(contractions(load).values())
    held = "each rank holds a share of the queries" if queries_shared(load) else "all queries in each rank"
    lines.append(
        f"scan: {choice.count('factored')} layers by two thin products, {choice.count('dense')} by full gradients"
        + (f"; {held}" if load.ranks > 1 else "")
    )
    return lines


def _notes(load: Workload, rates: Rates) -> list[str]:
    config, speeds = load.config, rates.of
    doubles = f"{speeds[DOUBLES] / 1e9:,.1f}" if DOUBLES in speeds else "–"
    notes = [
        "FLOPs: two a multiply-add of every matrix product, and the leading terms of decompositions",
        "on disk: numbers times their size, before compression and container overhead; of cached steps, the files",
        f"time: an estimate. {rates.how}; elementwise {speeds[ELEMENTWISE] / 1e9:.2f}·10⁹ numbers/s, decompositions "
        f"{speeds[DECOMPOSITIONS] / 1e9:,.1f} GFLOP/s and products {doubles} GFLOP/s a task, text "
        f"{speeds[TEXT] / 1e6:.1f} MB/s; {rates.workers:g} ranks and {rates.tasks:g} tasks at a time; "
        f"{_bandwidths(config, rates)}. Nothing is taken to overlap; start-up is left out",
    ]
    if not load.shape.probed:
        notes.append("FLOPs of the passes are from the module tree: the model does not run without weights")
    if config.queries.fidelity is not None:
        notes.append("ranks for a fidelity are known only after the decompositions: all that is kept is counted")
    return notes


def _bandwidths(config: RunConfig, rates: Rates) -> str:
    between = f"{rates.link / 1e9:,.1f} GB/s from rank to rank, " if config.cluster.world_size > 1 else ""
    return f"{between}{rates.store / 1e9:,.1f} GB/s to and from the store, all nodes together"


def _some(count: float) -> str:
    return size(count) if count else "–"


def amount(count: float, unit: str) -> str:
    """A number with a decimal prefix: `1.2 TFLOP`."""
    for scale, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:,.1f} {prefix}{unit}"
    return f"{count:,.0f} {unit}"


def size(count: float) -> str:
    """Bytes with a binary prefix: `1.2 GiB`."""
    for scale, prefix in ((2**50, "Pi"), (2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if count >= scale:
            return f"{count / scale:,.1f} {prefix}B"
    return f"{count:,.0f} B"
