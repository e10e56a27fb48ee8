"""What each step of a trace would cost: operations, memory and bytes on disk, from sizes alone.

Legend: N sequences, T positions, Q queries, K singular values kept. Pure: a `Workload` can be read off a model and a
corpus (`pipelines.plan`) or written down by hand for a model that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from conf.schema import Contraction, Dtype, RunConfig
from influence import cost
from influence.correction import GRADIENT_BYTES
from influence.layers import TrackedLayer
from influence.scoring import plan_contractions
from influence.shape import ForwardShape
from influence.solvers import SOLVERS
from pipelines.rates import ATTENTION, DECOMPOSITIONS, ELEMENTWISE, TEXT
from pipelines.stages.grouped import MIN_GROUP
from pipelines.stages.ihvp import kept

DOUBLE = 8
SINGLE = 4


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

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.query_tokens)

    @property
    def samples(self) -> int:
        """Sequences that the curvature is fitted on."""
        asked = self.config.factors.samples
        return self.sequences if asked is None else min(asked, self.sequences)

    @property
    def groups(self) -> int:
        """Groups of sequences whose sums are committed apart, as `grouped.sample_groups` cuts them."""
        return max(1, min(self.config.factors.groups, self.samples // MIN_GROUP))

    def calls(self, layer: TrackedLayer) -> int:
        """Calls of a layer in a pass."""
        return self.shape.calls.get(layer.name, 1)


@dataclass
class StepCost:
    """What a step takes.

    Attributes:
        work: Amount of each kind of work, as `pipelines.rates` names them; products by their type.
        memory: Bytes that a replica (or a task) holds at once, by what they are.
        disk: Bytes of tensors and columns in the artifact; container overhead and compression are left out.
        temporary: Bytes of partial sums, beside that, until the step is committed.
        tasks: Whether Ray tasks do the work instead of replicas.
        pieces: How many of them there are to do.
    """

    work: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    temporary: int = 0
    tasks: bool = False
    pieces: int = 1 << 30

    @property
    def flops(self) -> int:
        """Matrix products and decompositions."""
        return sum(amount for kind, amount in self.work.items() if kind not in (ATTENTION, ELEMENTWISE, TEXT))

    def seconds(self, rates: Mapping[str, float], workers: float) -> float:
        """Time at some rates, spread over workers."""
        alone = sum(amount / rates[kind] for kind, amount in self.work.items() if amount)
        return alone / max(1.0, min(workers, self.pieces))


def bytes_of(dtype: Dtype) -> int:
    """Bytes of a number."""
    return getattr(torch, dtype.name).itemsize


def contractions(load: Workload) -> dict[str, str]:
    """What the scan would choose for each layer, the ranks taken as equal in all."""
    wanted, scan = load.config.scan.contraction, load.config.scan
    if load.config.queries.rank == "full" and load.config.queries.fidelity is None:
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


def estimate(load: Workload) -> dict[str, StepCost]:
    """The cost of every step of a trace, whether cached or not.

    Returns:
        By the step's name; those that the solver does not need are there too.
    """
    makers: dict[str, Callable[[Workload], StepCost]] = {
        "layers": lambda given: StepCost(memory={"weights": weights(given)}),
        "sequences": tokenise,
        "covariance": covariance,
        "eigenbasis": eigenbasis,
        "correction": correction,
        "gradients": gradients,
        "ihvp": ihvp,
        "queries": compression,
        "candidates": candidates,
        "scores": scan,
        "top": top,
    }
    return {name: make(load) for name, make in makers.items()}


# --- parts that stages share ---


def weights(load: Workload) -> int:
    """Bytes of the model's weights."""
    return load.parameters * bytes_of(load.config.model.dtype)


def passes(load: Workload, sequences: int, tokens: int, sampled: bool) -> dict[str, int]:
    """The floor's work over some sequences."""
    floor = sequences * cost.floor_flops(load.shape, tokens)
    return {
        load.config.model.dtype.name: floor,
        ELEMENTWISE: sequences * cost.elementwise_numbers(load.shape, tokens, sampled),
        ATTENTION: sequences * cost.attention_weights(load.shape, tokens),
    }


def merged(*parts: Mapping[str, int]) -> dict[str, int]:
    """Amounts of the same kind added up."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, 0) + amount
    return total


def activations(load: Workload, sequences: int, tokens: int) -> dict[str, int]:
    """Bytes of a micro-batch in flight: captured inputs, what autograd saves, logits with their gradient."""
    size, rows = bytes_of(load.config.model.dtype), sequences * tokens
    return {
        "captured": size * sequences * cost.captured_numbers(load.layers, tokens, load.shape.calls),
        "autograd": size * rows * load.shape.saved_numbers,
        "logits": 2 * size * rows * load.shape.vocabulary,
    }


def formed_bytes(load: Workload) -> int:
    """Bytes of the sequence gradients that a replica forms at a time, and of their rotation."""
    largest = max(SINGLE * layer.parameters for layer in load.layers)
    return 2 * min(load.config.scan.batch_size * largest, max(GRADIENT_BYTES, largest))


def _replica(load: Workload, **more: int) -> dict[str, int]:
    return {"weights": weights(load)} | activations(load, load.config.scan.batch_size, load.tokens) | more


# --- steps ---


def tokenise(load: Workload) -> StepCost:
    """Token ids of 4 bytes, before compression."""
    parts = max(1, -(-load.corpus_bytes // load.config.corpus.part_bytes))
    return StepCost({TEXT: load.corpus_bytes}, disk=SINGLE * load.sequences * load.tokens, tasks=True, pieces=parts)


def covariance(load: Workload) -> StepCost:
    """A and S over the sample; merged in float64."""
    config, blocks = load.config, load.config.factors.blocks
    extra = sum(cost.covariance_flops(layer, load.tokens, load.calls(layer), blocks) for layer in load.layers)
    numbers = cost.covariance_numbers(load.layers, blocks)
    sums = numbers * bytes_of(config.scan.sum_dtype)
    return StepCost(
        merged(passes(load, load.samples, load.tokens, True), {config.scan.product_dtype.name: load.samples * extra}),
        _replica(load, sums=sums),
        DOUBLE * numbers,
        sums * load.groups,
        pieces=load.groups,
    )


def eigenbasis(load: Workload) -> StepCost:
    """A task a factor: the factor, its vectors and LAPACK's workspace of 2n² in float64."""
    blocks = load.config.factors.blocks
    sizes = cost.factor_sizes(load.layers).values()
    return StepCost(
        {DECOMPOSITIONS: sum(cost.eigenbasis_operations(size, blocks) for size in sizes)},
        {"largest factor": 4 * DOUBLE * max(cost.block_squares(size, blocks) for size in sizes)},
        cost.basis_numbers(load.layers, blocks) * bytes_of(load.config.scan.sum_dtype),
        tasks=True,
        pieces=len(sizes),
    )


def correction(load: Workload) -> StepCost:
    """Λ over the sample; every layer's bases are held, those of a shared input once a layer."""
    config, blocks = load.config, load.config.factors.blocks
    extra = sum(cost.correction_flops(layer, load.tokens, load.calls(layer), blocks) for layer in load.layers)
    sums = cost.correction_numbers(load.layers) * bytes_of(config.scan.sum_dtype)
    sides = [side for layer in load.layers for side in (layer.columns, layer.outputs)]
    bases = sum(cost.block_squares(side, blocks) + side for side in sides) * bytes_of(config.scan.product_dtype)
    return StepCost(
        merged(passes(load, load.samples, load.tokens, True), {config.scan.product_dtype.name: load.samples * extra}),
        _replica(load, sums=sums, bases=bases, formed=formed_bytes(load)),
        sums,
        sums * load.groups,
        pieces=load.groups,
    )


def gradients(load: Workload) -> StepCost:
    """One pass a query. All tokens but the last may have a gradient; on disk at most that."""
    work = merged(*(passes(load, 1, tokens, False) for tokens in load.query_tokens))
    numbers = sum(
        cost.token_factor_numbers(layer, (tokens - 1) * load.calls(layer))
        for layer in load.layers
        for tokens in load.query_tokens
    )
    held = activations(load, 1, max(load.query_tokens))
    return StepCost(
        work,
        {"weights": weights(load)} | held,
        numbers * bytes_of(load.config.model.dtype),
        pieces=-(-load.queries // 16),
    )


def ihvp(load: Workload) -> StepCost:
    """A task a layer: products and decompositions in float64."""
    most, _, full = kept(load.config.queries)
    curvature, blocks = SOLVERS[load.config.factors.solver.name].needs_covariance, load.config.factors.blocks
    products = decompositions = disk = largest = 0
    for layer in load.layers:
        for tokens in load.query_tokens:
            rows = (tokens - 1) * load.calls(layer)
            products += cost.ihvp_flops(layer, rows, most, full, curvature, blocks)
            decompositions += 0 if full else cost.svd_operations(layer.outputs, layer.columns, most)
        held = SINGLE * cost.dense_numbers(layer, load.queries)
        if not full:
            values = cost.kept_values(layer, most)
            held = load.queries * (SINGLE * cost.factored_numbers(layer, values) + DOUBLE * (values + 1))
        disk += held
        squares = cost.block_squares(layer.columns, blocks) + cost.block_squares(layer.outputs, blocks)
        largest = max(largest, held + (DOUBLE + SINGLE) * squares * curvature + 5 * DOUBLE * layer.parameters)
    work = {Dtype.float64.name: products, DECOMPOSITIONS: decompositions}
    return StepCost(work, {"largest layer": largest}, disk, tasks=True, pieces=len(load.layers))


def compression(load: Workload) -> StepCost:
    """Packing, and the fidelity: a sample scored by full matrices of compressed and of uncompressed queries."""
    wanted, scan_config = load.config.queries, load.config.scan
    full = wanted.rank == "full" and wanted.fidelity is None
    sample = 0 if full else min(wanted.fidelity_sample, load.sequences)
    if full:
        return StepCost(disk=SINGLE * load.queries * cost.correction_numbers(load.layers), tasks=True)
    ranks = {layer.name: total_rank(load, layer) for layer in load.layers}
    disk = sum(SINGLE * (cost.factored_numbers(layer, ranks[layer.name]) + ranks[layer.name]) for layer in load.layers)
    if not sample:
        return StepCost(disk=disk, tasks=True)
    matrices = SINGLE * cost.correction_numbers(load.layers)
    width = max(1, min(load.queries, scan_config.dense_memory // (2 * matrices)))
    rounds = -(-load.queries // width)
    formed = sum(cost.scan_flops(layer, "dense", load.tokens, 0, width, load.calls(layer)) for layer in load.layers)
    blocks, curvature = load.config.factors.blocks, SOLVERS[load.config.factors.solver.name].needs_covariance
    again = sum(
        cost.ihvp_flops(layer, (tokens - 1) * load.calls(layer), None, True, curvature, blocks)
        for layer in load.layers
        for tokens in load.query_tokens
    )
    work = merged(
        passes(load, 2 * rounds * sample, load.tokens, False),
        {scan_config.product_dtype.name: 2 * rounds * sample * formed},
        {Dtype.float64.name: again},
    )
    return StepCost(work, _replica(load, queries=4 * width * matrices, formed=formed_bytes(load)), disk, pieces=rounds)


def candidates(load: Workload) -> StepCost:
    """BM25 and the sample; a row has an id, a score and two dictionary indices."""
    prefilter = load.config.prefilter
    proposed = load.queries * min(prefilter.top, load.sequences) if prefilter.kind.name == "bm25" else 0
    return StepCost(disk=24 * (proposed + load.candidates), tasks=True)


def scan(load: Workload) -> StepCost:
    """The gradient scan, each layer by its cheaper contraction."""
    config, choice = load.config, contractions(load)
    product, sums = bytes_of(config.scan.product_dtype), bytes_of(config.scan.sum_dtype)
    extra = factored = dense = 0
    for layer in load.layers:
        rank = total_rank(load, layer)
        how = choice[layer.name]
        extra += cost.scan_flops(layer, how, load.tokens, rank, load.queries, load.calls(layer))
        if how == "dense":
            dense += 2 * sums * cost.dense_numbers(layer, load.queries)  # as matrices and as columns
        else:
            factored += product * cost.factored_numbers(layer, rank)
    held = {name: size for name, size in (("queries factored", factored), ("queries dense", dense)) if size}
    return StepCost(
        merged(
            passes(load, load.candidates, load.tokens, False),
            {config.scan.product_dtype.name: load.candidates * extra},
        ),
        _replica(load) | held | ({"formed": formed_bytes(load)} if dense else {}),
        load.candidates * (8 + 4 + SINGLE * load.queries),
        pieces=max(1, -(-load.candidates // config.scan.shard_sequences)),
    )


def top(load: Workload) -> StepCost:
    """The best of each query with their text, taken as four bytes a token."""
    rows = load.queries * min(load.config.scan.top, load.candidates)
    return StepCost(disk=rows * (64 + 4 * load.tokens), tasks=True)
