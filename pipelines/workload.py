"""The sizes of a run, and what follows from them alone: contractions, passes over the sample, micro-batches.

Legend: N ranks of a replica, B sequences of each in a micro-batch, T positions, Q queries. Pure: a `Workload` can be
read off a model and a corpus (`pipelines.plan`) or written down by hand for a model that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from conf.schema import Contraction, Dtype, FactorsConfig, RunConfig
from influence import cost
from influence.layers import TrackedLayer
from influence.passes import Passes, correction_bytes, covariance_bytes, plan_passes
from influence.scoring import plan_contractions
from influence.shape import ForwardShape
from influence.solvers import SOLVERS
from pipelines.stages.compression import uncompressed
from pipelines.stages.grouped import MIN_GROUP
from pipelines.stages.ihvp import kept
from pipelines.stages.scan import shard_size

DOUBLE = 8
SINGLE = 4

ShapeOf = Callable[[Sequence[TrackedLayer]], ForwardShape]


@dataclass(frozen=True)
class Lockstep:
    """What each rank of the replicas goes through together: micro-batches, and sequences of its own.

    Both are summed over all replicas: a replica that does all the work would count the same.
    """

    steps: int
    own: int

    @staticmethod
    def over(units: Iterable[int], ranks: int, batch: int) -> Lockstep:
        """Units of so many sequences each, in micro-batches of `batch` a rank; a last one is filled up."""
        steps = own = 0
        for count in units:
            full, rest = divmod(count, ranks * batch)
            steps += full + (rest > 0)
            own += full * batch + -(-rest // ranks)
        return Lockstep(steps, own)


@dataclass(frozen=True)
class Workload:
    """The sizes of a run.

    Attributes:
        config: The run.
        layers: Tracked layers, input groups known.
        shape: Of a pass over one sequence.
        parameters: Of the whole model.
        sequences: N of the corpus.
        tokens: Mean T.
        candidates: Distinct sequences that are scanned.
        query_tokens: Positions of each query, over both completions of a contrast.
        corpus_bytes: To tokenise.
        shape_of: The shape of a pass that tracks some of the layers alone; None takes `shape` for it, which bounds it.
    """

    config: RunConfig
    layers: tuple[TrackedLayer, ...]
    shape: ForwardShape
    parameters: int
    sequences: int
    tokens: int
    candidates: int
    query_tokens: tuple[int, ...]
    corpus_bytes: int = 0
    shape_of: ShapeOf | None = None

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.query_tokens)

    @property
    def ranks(self) -> int:
        """N."""
        return self.config.cluster.world_size

    @property
    def replicas(self) -> int:
        """Replicas, at most."""
        return self.config.cluster.max_replicas

    @property
    def samples(self) -> int:
        """Sequences that the curvature is fitted on."""
        asked = self.config.factors.samples
        return self.sequences if asked is None else min(asked, self.sequences)

    @property
    def groups(self) -> int:
        """Groups of sequences whose sums are committed apart, as `grouped.sample_groups` cuts them."""
        return max(1, min(self.config.factors.groups, self.samples // MIN_GROUP))

    @property
    def shards(self) -> int:
        """Units of the scan."""
        return max(1, -(-self.candidates // self._shard))

    @property
    def _shard(self) -> int:
        return shard_size(self.candidates, self.config.scan.shard_sequences)

    def calls(self, layer: TrackedLayer) -> int:
        """Calls of a layer in a pass."""
        return self.shape.calls.get(layer.name, 1)

    def shape_for(self, layers: Sequence[TrackedLayer]) -> ForwardShape:
        """The shape of a pass that tracks these layers alone."""
        if self.shape_of is None or len(layers) == len(self.layers):
            return self.shape
        return self.shape_of(layers)

    @property
    def units(self) -> list[int]:
        """Sequences of each group of the sample."""
        small, longer = divmod(self.samples, self.groups)
        return [small + (index < longer) for index in range(self.groups)]

    def in_step(self, units: Iterable[int]) -> Lockstep:
        """One pass over groups of so many sequences each."""
        return Lockstep.over(units, self.ranks, self.config.scan.batch_size)

    def sampled(self) -> Lockstep:
        """One pass over the sample."""
        return self.in_step(self.units)

    def scanned(self) -> Lockstep:
        """The scan."""
        units = [min(self._shard, self.candidates - at) for at in range(0, self.candidates, self._shard)]
        return Lockstep.over(units, self.ranks, self.config.scan.batch_size)


def bytes_of(dtype: Dtype) -> int:
    """Bytes of a number."""
    return getattr(torch, dtype.name).itemsize


def sampled_alike(load: Workload, factors: FactorsConfig) -> Workload:
    """The same run, with another sample of sequences."""
    return replace(load, config=replace(load.config, factors=factors))


def covariance_passes(load: Workload) -> Passes:
    """The layers of each pass of the covariance.

    Raises:
        ValueError: If a layer alone exceeds `cluster.memory_per_rank`.
    """
    return _passes(load, covariance_bytes)


def correction_passes(load: Workload) -> Passes:
    """The layers of each pass of the correction.

    Raises:
        ValueError: If a layer alone exceeds `cluster.memory_per_rank`.
    """
    return _passes(load, correction_bytes)


def _passes(load: Workload, held: Callable[[TrackedLayer, int, int, int], int]) -> Passes:
    config, itemsize = load.config, bytes_of(load.config.scan.sum_dtype)

    def bytes_in_rank(layer: TrackedLayer) -> int:
        return held(layer, load.ranks, config.factors.blocks, itemsize)

    return plan_passes(load.layers, bytes_in_rank, config.cluster.memory_per_rank)


def has_curvature(load: Workload) -> bool:
    """Whether the solver has an eigenbasis."""
    return SOLVERS[load.config.factors.solver.name].needs_covariance


def contractions(load: Workload) -> dict[str, str]:
    """What the scan would choose for each layer, the ranks taken as equal in all."""
    wanted, scan = load.config.scan.contraction, load.config.scan
    if uncompressed(load.config.queries):
        return dict.fromkeys((layer.name for layer in load.layers), "dense")
    if wanted is not Contraction.auto:
        return dict.fromkeys((layer.name for layer in load.layers), wanted.name)
    ranks = [total_rank(load, layer) for layer in load.layers]
    return plan_contractions(load.layers, ranks, load.queries, load.tokens, scan.dense_memory)


def total_rank(load: Workload, layer: TrackedLayer) -> int:
    """ΣR of a layer over queries: the mean rank; for a fidelity, whose ranks are not known, all that may be kept."""
    most, _, _ = kept(load.config.queries)
    wanted = load.config.queries
    if wanted.fidelity is not None or wanted.rank == "full":
        return load.queries * cost.kept_values(layer, most)
    return load.queries * min(int(wanted.rank), cost.kept_values(layer, most))


def queries_shared(load: Workload) -> bool:
    """Whether each rank holds a share of the queries: where those in the store exceed `cluster.memory_per_rank`."""
    limit = load.config.cluster.memory_per_rank
    if load.ranks == 1 or limit is None:
        return False
    if uncompressed(load.config.queries):
        numbers = load.queries * cost.correction_numbers(load.layers)
        return numbers * bytes_of(load.config.scan.sum_dtype) > limit
    numbers = sum(cost.factored_numbers(layer, total_rank(load, layer)) for layer in load.layers)
    return numbers * bytes_of(load.config.scan.product_dtype) > limit
