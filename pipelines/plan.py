"""`whence plan`: what a trace would do and what that would cost. Runs nothing, starts no Ray, loads no weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from actors.errors import ConfigError
from actors.factors import load_selection
from actors.model import load_skeleton
from actors.store import Artifact, Store
from conf.schema import RunConfig
from influence.layers import LayerSelection, TrackedLayer, group_inputs, select_layers
from influence.shape import ForwardShape, forward_shape
from influence.solvers import SOLVERS
from pipelines.advice import advice, too_large
from pipelines.estimate import estimate
from pipelines.extent import candidate_extent, corpus_extent, query_tokens
from pipelines.graph import build_steps
from pipelines.rates import TEXT, Rates, rates_for
from pipelines.runner import Planned, Runner
from pipelines.stages.attribution import exact_dtype
from pipelines.stepcost import StepCost
from pipelines.tables import StepPlan, describe
from pipelines.timing import Seconds, seconds
from pipelines.workload import ShapeOf, Workload

log = logging.getLogger(__name__)

PROBE_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What a trace would do.

    Attributes:
        steps: In the order in which they would run.
        load: The sizes that costs were computed from.
        selection: The tracked layers.
        rates: How fast work was taken to go.
        notes: Where estimated sizes and rates come from, for people.
        warnings: What would not work, or not well, with the remedy.
    """

    steps: tuple[StepPlan, ...]
    load: Workload
    selection: LayerSelection
    rates: Rates
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """The plan, for a terminal."""
        return describe(self.steps, self.load, self.selection, self.rates, self.notes, self.warnings)


def run_plan(config: RunConfig) -> str:
    """What `whence plan` prints.

    Raises:
        WhenceError: For a model, a corpus or queries that cannot be used, as far as can be seen without running.
        StaleArtifact: If the store holds something else where an artifact belongs.
    """
    return make_plan(config).text()


def make_plan(config: RunConfig, rates: Rates | None = None) -> Plan:
    """Find what is cached and estimate the rest. Where numbers stand in for files, nothing is looked up in the store.

    Args:
        config: The run.
        rates: How fast work goes; measured or assumed if None.

    Raises:
        ConfigError: If a layer's factors alone exceed `cluster.memory_per_rank`.
    """
    found = _Found() if _stands_in(config) else _look_up(config)
    extent = corpus_extent(config, found.ready("sequences"))
    selection, shape, shape_of = _model(config, found.ready("layers"))
    tokens = query_tokens(config)
    candidates, from_feeds = candidate_extent(config, extent, len(tokens), found.ready("candidates"))
    sizes = (extent.sequences, extent.tokens, candidates, tokens, extent.corpus_bytes)
    load = Workload(config, selection.layers, shape, selection.total_parameters, *sizes, shape_of)
    scan = config.scan
    kinds = (config.model.dtype, scan.product_dtype, scan.sum_dtype, exact_dtype(config))
    dtypes = [dtype.name for dtype in kinds]
    rates = rates or rates_for(config.cluster, dtypes, _typical_product(load), config.plan)
    rates = replace(rates, of=dict(rates.of) | {TEXT: extent.bytes_a_second * config.cluster.cpus_per_rank})
    try:
        costs = estimate(load)
    except ValueError as error:
        raise ConfigError(str(error), remedy=too_large(load)) from error
    steps = tuple(found.step(name, costs[name], rates, load.ranks) for name in found.planned or step_names(config))
    notes = (f"sequences: {extent.how}", f"candidates: {from_feeds}")
    taken = {step.name: costs[step.name] for step in steps}
    return Plan(steps, load, selection, rates, notes, tuple(advice(load, taken, rates)))


def step_names(config: RunConfig) -> list[str]:
    """The steps of a trace that nothing is looked up for, in an order in which they can run."""
    solver = SOLVERS[config.factors.solver.name]
    factors = ["covariance", "eigenbasis"] * solver.needs_covariance + ["correction"] * solver.needs_correction
    refined = ["refinement"] * solver.refined
    queries = [
        "gradients",
        "convergence",
        *refined,
        "ihvp",
        "queries",
        "candidates",
        "fidelity",
        "scores",
        "agreement",
        "top",
        "attribution",
        "tails",
    ]
    return ["layers", "sequences", *factors, *queries]


@dataclass(frozen=True)
class _Found:
    """What the store has of each step; nothing, where it was not looked up."""

    planned: Mapping[str, Planned] | None = None
    artifacts: Mapping[str, Artifact] | None = None

    def ready(self, name: str) -> Artifact | None:
        """The finished artifact of a step."""
        if self.planned is None or self.artifacts is None or not self.planned[name].cached:
            return None
        return self.artifacts[name]

    def step(self, name: str, cost: StepCost, rates: Rates, world_size: int) -> StepPlan:
        """The row of a step."""
        artifact = self.ready(name)
        if artifact is not None:
            record = artifact.record()
            assert record is not None
            disk = sum(file["bytes"] for file in record["files"].values())
            return StepPlan(name, "cached", cost, disk, Seconds())
        begun = self.artifacts is not None and bool(self.artifacts[name].list())
        return StepPlan(name, "begun" if begun else "to do", cost, cost.disk, seconds(cost, rates, world_size))


def _stands_in(config: RunConfig) -> bool:
    return config.plan.sequences is not None or config.plan.queries is not None


def _look_up(config: RunConfig) -> _Found:
    store = Store(config.store)
    planned = {item.step.name: item for item in Runner(store, build_steps(config), config).plan()}
    return _Found(planned, {name: store.folder(item.step.kind, item.fingerprint) for name, item in planned.items()})


def _typical_product(load: Workload) -> tuple[int, int, int]:
    """Rows, inputs and outputs of the tracked layer that a micro-batch spends most on."""
    layer = max(load.layers, key=lambda layer: layer.parameters)
    return load.config.scan.batch_size * load.tokens, layer.inputs, layer.outputs


def _model(config: RunConfig, layers: Artifact | None) -> tuple[LayerSelection, ForwardShape, ShapeOf]:
    """Tracked layers, from their artifact if there is one, and the shape of a pass, from the model without weights."""
    skeleton = load_skeleton(config.model)
    selection = load_selection(layers) if layers is not None else _selection(skeleton, config.model.layers)
    known: dict[tuple[str, ...], ForwardShape] = {}

    def shape_of(tracked: Sequence[TrackedLayer]) -> ForwardShape:
        names = tuple(layer.name for layer in tracked)
        if names not in known:
            known[names] = forward_shape(skeleton, replace(selection, layers=tuple(tracked)))
        return known[names]

    return selection, shape_of(selection.layers), shape_of


def _selection(skeleton: nn.Module, wanted: str) -> LayerSelection:
    selection = select_layers(skeleton, wanted)
    try:
        return group_inputs(skeleton, selection, torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta"))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        log.warning("layers with the same input could not be found without weights (%s): each is counted alone", error)
        return selection
