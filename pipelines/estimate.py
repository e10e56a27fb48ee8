"""What each step of a trace would cost: operations, memory, bytes moved and bytes on disk, from sizes alone.

Legend: N ranks of a replica, B sequences of each in a micro-batch, T positions, Q queries, K singular values kept.
Pure: formulas of `influence.cost` and `influence.traffic` over a `pipelines.workload.Workload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from actors.factors import QUERY_BATCH
from actors.refinement import at_a_time, row_numbers
from conf.schema import AttributionTokens, Dtype
from influence import cost, traffic
from influence.attribution import TRIED
from influence.distribution import BINS
from influence.layers import TrackedLayer
from influence.passes import basis_share, correction_share, covariance_bytes
from influence.scoring import DENSE_COPIES
from influence.solvers import SOLVERS
from influence.tails import tail_size
from pipelines.rates import ATTENTION, DECOMPOSITIONS, DOUBLES, ELEMENTWISE, TEXT
from pipelines.stages.agreement import sample_size as agreement_size
from pipelines.stages.attribution import exact_dtype
from pipelines.stages.compression import uncompressed
from pipelines.stages.convergence import SCORED, chosen_queries, fitted_solver
from pipelines.stages.fidelity import sample_size as fidelity_size
from pipelines.stages.halves import HALVES, group_counts, sizes_of
from pipelines.stages.ihvp import kept
from pipelines.stages.refinement import COPIES, cg_sample, queries_at_a_time
from pipelines.stages.scan import shard_size
from pipelines.stages.tails import HEADS, POINTS, ROWS, SHARDS_A_TASK
from pipelines.stepcost import (
    StepCost,
    activations,
    formed_bytes,
    gathered,
    largest_memory,
    merged,
    passes,
    rank_memory,
    row_bytes,
    weights,
)
from pipelines.workload import (
    DOUBLE,
    SINGLE,
    Lockstep,
    Workload,
    bytes_of,
    contractions,
    correction_passes,
    covariance_passes,
    has_curvature,
    queries_shared,
    sampled_alike,
    total_rank,
)


def estimate(load: Workload) -> dict[str, StepCost]:
    """The cost of every step of a trace, whether cached or not.

    Returns:
        By the step's name, in the order in which they run; those that the solver does not need are there too.

    Raises:
        ValueError: If a layer's factors alone exceed `cluster.memory_per_rank`.
    """
    makers: dict[str, Callable[[Workload], StepCost]] = {
        "layers": lambda given: StepCost(memory=weights(given)),
        "sequences": tokenise,
        "covariance": covariance,
        "eigenbasis": eigenbasis,
        "correction": correction,
        "gradients": gradients,
        "convergence": convergence,
        "refinement": refinement,
        "ihvp": ihvp,
        "queries": compression,
        "candidates": candidates,
        "fidelity": fidelity,
        "scores": scan,
        "agreement": agreement,
        "top": top,
        "attribution": attribution,
        "tails": tails,
    }
    return {name: make(load) for name, make in makers.items()}


# --- steps ---


def tokenise(load: Workload) -> StepCost:
    """Token ids of 4 bytes, before compression."""
    parts = max(1, -(-load.corpus_bytes // load.config.corpus.part_bytes))
    disk = SINGLE * load.sequences * load.tokens
    return StepCost({TEXT: load.corpus_bytes}, disk=disk, stored=load.corpus_bytes + disk, tasks=True, pieces=parts)


def covariance(load: Workload, units: Sequence[int] | None = None) -> StepCost:
    """A and S over the sample, in as many passes as memory asks for; merged in float64.

    Args:
        load: the run.
        units: sequences of each group, if not those of the run's own sample.
    """
    units = load.units if units is None else units
    config, blocks, ranks, samples = load.config, load.config.factors.blocks, load.ranks, sum(units)
    each = load.in_step(units)
    product, itemsize = config.scan.product_dtype, bytes_of(config.scan.sum_dtype)
    planned = covariance_passes(load)
    extra = sum(cost.covariance_flops(layer, load.tokens, load.calls(layer), blocks, ranks) for layer in load.layers)
    floors = [passes(load, samples, load.tokens, True, layers) for layers in planned]
    parts = cost.strip_numbers(load.layers, blocks) * itemsize * len(units)
    disk = DOUBLE * cost.covariance_numbers(load.layers, blocks)

    def held(layers: Sequence[TrackedLayer]) -> dict[str, int]:
        sums = sum(covariance_bytes(layer, ranks, blocks, itemsize) for layer in layers)
        return rank_memory(load, {"rows": row_bytes(load, layers), "sums": sums}, layers)

    rows = each.own * traffic.covariance_received(load.layers, load.tokens, load.shape.calls, ranks)
    return StepCost(
        merged(*floors, {product.name: samples * extra}),
        largest_memory(planned, held),
        disk,
        parts,
        _moved(load, each, planned, ranks * rows * bytes_of(product)),
        2 * parts + disk,
        pieces=len(units) * len(planned),
        passes=planned,
    )


def _moved(load: Workload, each: Lockstep, planned: Sequence[Sequence[TrackedLayer]], rows: int) -> dict[str, int]:
    """Bytes that the ranks receive in the passes of a statistic."""
    if load.ranks == 1:
        return {}
    flags = load.ranks * (load.ranks - 1) * traffic.FLAG_BYTES * each.steps * len(planned)
    return {"weights": sum(gathered(load, each.steps, layers) for layers in planned), "rows": rows + flags}


def eigenbasis(load: Workload) -> StepCost:
    """A task a factor: the factor, its vectors and LAPACK's workspace of 2n² in float64."""
    blocks = load.config.factors.blocks
    sizes = cost.factor_sizes(load.layers).values()
    disk = cost.basis_numbers(load.layers, blocks) * bytes_of(load.config.scan.sum_dtype)
    return StepCost(
        {DECOMPOSITIONS: sum(cost.eigenbasis_operations(size, blocks) for size in sizes)},
        {"largest factor": 4 * DOUBLE * max(cost.block_squares(size, blocks) for size in sizes)},
        disk,
        stored=DOUBLE * cost.covariance_numbers(load.layers, blocks) + disk,
        tasks=True,
        pieces=len(sizes),
    )


def correction(load: Workload, units: Sequence[int] | None = None) -> StepCost:
    """Λ over the sample, in as many passes as memory asks for; every rank reads the bases, to keep its share.

    Args:
        load: the run.
        units: as in `covariance`.
    """
    units = load.units if units is None else units
    config, blocks, ranks, samples = load.config, load.config.factors.blocks, load.ranks, sum(units)
    each = load.in_step(units)
    product, itemsize = config.scan.product_dtype, bytes_of(config.scan.sum_dtype)
    planned = correction_passes(load)
    extra = sum(
        cost.correction_flops(layer, load.tokens, load.calls(layer), blocks, ranks=ranks) for layer in load.layers
    )
    floors = [passes(load, samples, load.tokens, True, layers) for layers in planned]
    disk = cost.correction_numbers(load.layers) * itemsize

    def held(layers: Sequence[TrackedLayer]) -> dict[str, int]:
        sums = sum(correction_share(layer, ranks) for layer in layers) * itemsize
        sides = [side for layer in layers for side in (layer.columns, layer.outputs)]
        bases = sum(basis_share(side, ranks, blocks) for side in sides) * bytes_of(product)
        more = {"rows": row_bytes(load, layers), "sums": sums, "bases": bases, "formed": formed_bytes(load)}
        return rank_memory(load, more, layers)

    received = traffic.correction_received(load.layers, load.tokens, load.shape.calls, ranks)
    rows = ranks * each.own * received * bytes_of(product)
    readers = load.ranks * min(load.replicas, len(units))
    read = readers * cost.basis_numbers(load.layers, blocks) * itemsize
    return StepCost(
        merged(*floors, {product.name: samples * extra}),
        largest_memory(planned, held),
        disk,
        disk * len(units),
        _moved(load, each, planned, rows),
        2 * disk * len(units) + disk + read,
        pieces=len(units) * len(planned),
        passes=planned,
    )


def gradients(load: Workload) -> StepCost:
    """One pass a query, each rank one at a time. All tokens but the last may have a gradient; on disk at most that."""
    work = merged(*(passes(load, 1, tokens, False) for tokens in load.query_tokens))
    numbers = sum(
        cost.token_factor_numbers(layer, (tokens - 1) * load.calls(layer))
        for layer in load.layers
        for tokens in load.query_tokens
    )
    disk = numbers * bytes_of(load.config.model.dtype)
    batches = -(-load.queries // QUERY_BATCH)
    steps = sum(-(-min(QUERY_BATCH, load.queries - at) // load.ranks) for at in range(0, load.queries, QUERY_BATCH))
    moved = {"weights": gathered(load, steps), "gradients": disk} if load.ranks > 1 else {}
    held = weights(load) | activations(load, 1, max(load.query_tokens))
    return StepCost(work, held, disk, moved=moved, stored=disk, pieces=batches)


def refinement(load: Workload) -> StepCost:
    """A pass over the sample for each iteration and batch of queries; vectors x, r, z and p, and p and q, in the store.

    Each rank holds all vectors of a batch twice: directions, and sums of products. Work on the vectors themselves is
    left out, but for what of them is read and written.
    """
    config, sample = load.config, sampled_alike(load, cg_sample(load.config.factors))
    product, itemsize = config.scan.product_dtype, bytes_of(config.scan.sum_dtype)
    width = min(load.queries, queries_at_a_time(config, load.layers))
    batches = [min(width, load.queries - at) for at in range(0, load.queries, width)]
    numbers = row_numbers(load.layers, load.tokens, load.shape.vocabulary)
    rows = config.scan.dense_memory // (bytes_of(product) * numbers)
    together, _ = at_a_time(width, config.scan.batch_size, rows)
    through, iterations = sample.samples * config.factors.cg_iterations, config.factors.cg_iterations
    flops = sum(
        cost.product_flops(load.shape, load.layers, load.tokens, size, -(-size // together)) for size in batches
    )
    forwards = sum(2 * -(-size // together) for size in batches)
    elementwise = cost.elementwise_numbers(load.shape, load.tokens, False) * (forwards + 2 * load.queries)
    vectors = itemsize * cost.correction_numbers(load.layers)
    parts = load.ranks * sample.groups * vectors * width
    held = weights(load) | activations(load, 1, load.tokens)
    held |= {"vectors": COPIES * vectors * width, "rows": bytes_of(product) * numbers * min(rows, together)}
    moved = {"weights": forwards * iterations * gathered(load, sample.sampled().steps)} if load.ranks > 1 else {}
    traffic_of_one = 2 * load.ranks * sample.groups + 16  # parts, and states and directions, written and read again
    return StepCost(
        {
            config.model.dtype.name: through * flops,
            ELEMENTWISE: through * elementwise,
            ATTENTION: through * cost.attention_weights(load.shape, load.tokens) * (len(batches) + load.queries),
        },
        held,
        vectors * load.queries,
        parts + 6 * vectors * width,
        moved,
        traffic_of_one * vectors * load.queries * iterations,
        pieces=sample.groups * iterations,
    )


def ihvp(load: Workload) -> StepCost:
    """A task a layer: products and decompositions in float64."""
    most, _, full = kept(load.config.queries)
    curvature, blocks = has_curvature(load), load.config.factors.blocks
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
    work = {DOUBLES: products, DECOMPOSITIONS: decompositions}
    read = cost.basis_numbers(load.layers, blocks) + cost.correction_numbers(load.layers) if curvature else 0
    stored = disk + read * bytes_of(load.config.scan.sum_dtype)
    return StepCost(work, {"largest layer": largest}, disk, stored=stored, tasks=True, pieces=len(load.layers))


def compression(load: Workload) -> StepCost:
    """Packing."""
    if uncompressed(load.config.queries):
        disk = SINGLE * load.queries * cost.correction_numbers(load.layers)
        return StepCost(disk=disk, stored=2 * disk, tasks=True)
    ranks = {layer.name: total_rank(load, layer) for layer in load.layers}
    disk = sum(SINGLE * (cost.factored_numbers(layer, ranks[layer.name]) + ranks[layer.name]) for layer in load.layers)
    return StepCost(disk=disk, stored=disk, tasks=True)


def fidelity(load: Workload) -> StepCost:
    """A sample scored by full matrices of compressed and of uncompressed queries; each rank holds a share of them."""
    sample = min(fidelity_size(load.config.queries), load.sequences)
    return _at_full_rank(load, sample, load.query_tokens, 2, {DOUBLES: 1}) if sample else StepCost()


def _at_full_rank(
    load: Workload, sample: int, query_tokens: Sequence[int], ways: int, solved: Mapping[str, int]
) -> StepCost:
    """A sample scored by full matrices of some queries.

    Args:
        load: the run.
        sample: sequences.
        query_tokens: positions of each query.
        ways: how many times, with as many matrices of each query.
        solved: how many of these are preconditioned for it, by kind of work; by each rank, which then keeps its share.
    """
    scan_config, blocks = load.config.scan, load.config.factors.blocks
    matrices = SINGLE * cost.correction_numbers(load.layers)
    width = max(1, min(len(query_tokens), scan_config.dense_memory // (DENSE_COPIES * matrices)))
    rounds, shared = -(-len(query_tokens) // width), load.ranks > 1
    formed = sum(
        cost.scan_flops(layer, "dense", load.tokens, 0, width, load.calls(layer), shared) for layer in load.layers
    )
    again = sum(
        cost.ihvp_flops(layer, (tokens - 1) * load.calls(layer), None, True, has_curvature(load), blocks)
        for layer in load.layers
        for tokens in query_tokens
    )
    work = merged(
        passes(load, ways * rounds * sample, load.tokens, False),
        {scan_config.product_dtype.name: ways * rounds * sample * formed},
        {kind: times * again * load.ranks for kind, times in solved.items()},
    )
    queries = 2 * DENSE_COPIES * width * matrices // load.ranks
    more = {"queries": queries, "formed": formed_bytes(load), "rows": row_bytes(load, load.layers)}
    held, each = rank_memory(load, more), load.in_step([sample] * (ways * rounds))
    return StepCost(work, held, moved=_scan_moved(load, each, True), pieces=rounds)


def convergence(load: Workload) -> StepCost:
    """Two fits of each size: A and S once for all of them, bases and Λ for each; and a sample that all of them score.

    The time counts decompositions as work of the replicas, though tasks do it. Partial sums and bases are on disk
    until the last sample is scored.
    """
    factors, solver = load.config.factors, fitted_solver(load.config.factors)
    sizes = sizes_of(load.samples, factors.convergence_share)
    if solver is None or not sizes:
        return StepCost()
    parts, blocks = group_counts(load.samples, factors.groups, sizes), factors.blocks
    fits = HALVES * [[piece for part in parts[: size + 1] for piece in part] for size in range(len(sizes))]
    first = covariance(load, HALVES * fits[-1])
    bases = eigenbasis(load)
    second = [correction(load, units) for units in fits] if SOLVERS[solver].needs_correction else []
    tokens = [load.query_tokens[query] for query in chosen_queries(load.queries)]
    solved = {load.config.scan.sum_dtype.name: len(fits)}
    scored = _at_full_rank(load, min(SCORED, load.sequences), tokens, len(fits), solved)
    every = [first, *second, *[bases] * len(fits), scored]
    largest = max((first, *second, scored), key=lambda each: sum(each.memory.values()))
    held = len(fits) * bases.disk
    temporary = max(
        first.temporary + len(fits) * DOUBLE * cost.covariance_numbers(load.layers, blocks),
        held + sum(each.temporary + each.disk for each in second),
    )
    return StepCost(
        merged(*(each.work for each in every)),
        largest.memory,
        0,
        temporary,
        merged(*(each.moved for each in every)),
        sum(each.stored for each in every),
        pieces=first.pieces,
    )


def agreement(load: Workload) -> StepCost:
    """A sample scored at the run's precision and in float32 by a second model; the products of scores are left out."""
    sample = min(agreement_size(load.config), load.sequences)
    if not sample:
        return StepCost()
    each = Lockstep.over([sample], load.ranks, load.config.scan.batch_size)
    queries, owners = held_queries(load), load.ranks if queries_shared(load) else 1
    exact = SINGLE * (-(-load.parameters // load.ranks) - (-compression(load).disk // (SINGLE * owners)))
    moved = merged(*(_scan_moved(load, each, queries_shared(load), copy) for copy in (None, Dtype.float32)))
    held = rank_memory(load, queries | {"weights and queries in float32": exact}, copy=Dtype.float32)
    work = merged(*(passes(load, sample, load.tokens, False, copy=copy) for copy in (None, Dtype.float32)))
    return StepCost(work, held, moved=moved, pieces=1)


def candidates(load: Workload) -> StepCost:
    """BM25 and the sample; a row has an id, a score and two dictionary indices."""
    prefilter = load.config.prefilter
    proposed = load.queries * min(prefilter.top, load.sequences) if prefilter.kind.name == "bm25" else 0
    disk = 24 * (proposed + load.candidates)
    return StepCost(disk=disk, stored=disk, tasks=True)


def held_queries(load: Workload) -> dict[str, int]:
    """Bytes of the queries that a rank holds for the scan, as thin factors and as full matrices."""
    product, sums = bytes_of(load.config.scan.product_dtype), bytes_of(load.config.scan.sum_dtype)
    choice, owners = contractions(load), load.ranks if queries_shared(load) else 1
    numbers = {"factored": 0, "dense": 0}
    for layer in load.layers:
        if choice[layer.name] == "dense":
            numbers["dense"] += DENSE_COPIES * sums * cost.dense_numbers(layer, load.queries)
        else:
            numbers["factored"] += product * cost.factored_numbers(layer, total_rank(load, layer))
    return {f"{how} queries": -(-size // owners) for how, size in numbers.items()}


def scan(load: Workload) -> StepCost:
    """The gradient scan, each layer by its cheaper contraction; every rank reads the queries."""
    config, choice, shared, queries = load.config, contractions(load), queries_shared(load), held_queries(load)
    extra = sum(
        cost.scan_flops(
            layer,
            choice[layer.name],
            load.tokens,
            total_rank(load, layer),
            load.queries,
            load.calls(layer),
            shared,
        )
        for layer in load.layers
    )
    rows = row_bytes(load, load.layers) if shared else 0
    formed = formed_bytes(load) if queries["dense queries"] else 0
    held = rank_memory(load, {"rows": rows, "formed": formed} | queries)
    disk = load.candidates * (8 + 4 + SINGLE * load.queries)
    read = load.ranks * min(load.replicas, load.shards) * compression(load).disk
    return StepCost(
        merged(
            passes(load, load.candidates, load.tokens, False),
            {config.scan.product_dtype.name: load.candidates * extra},
        ),
        held,
        disk,
        moved=_scan_moved(load, load.scanned(), shared),
        stored=disk + read + SINGLE * load.candidates * load.tokens,
        pieces=load.shards,
    )


def _scan_moved(load: Workload, each: Lockstep, shared: bool, copy: Dtype | None = None) -> dict[str, int]:
    """Bytes that the ranks receive in a scan: weights, scores, and the rows where each holds a share of the queries.

    Weights are those of a copy of the model in another type, where one does the work.
    """
    if load.ranks == 1:
        return {}
    scan_config, everyone = load.config.scan, load.ranks * each.own
    scores = traffic.scores_received(load.queries, load.ranks, shared) * bytes_of(scan_config.sum_dtype)
    moved = {"weights": gathered(load, each.steps, copy=copy), "scores": everyone * scores}
    if shared:
        rows = traffic.rows_received(load.layers, load.tokens, load.shape.calls, load.ranks)
        moved["rows"] = everyone * (rows * bytes_of(scan_config.product_dtype) + load.ranks - 1)
    return moved


def top(load: Workload) -> StepCost:
    """The best of each query with their text, taken as four bytes a token."""
    chosen = min(load.config.scan.top, load.candidates) + min(load.config.scan.bottom, load.candidates)
    rows = load.queries * chosen
    disk = rows * (64 + 4 * load.tokens)
    read = load.candidates * (8 + 4 + SINGLE * load.queries)
    return StepCost(disk=disk, stored=disk + read, tasks=True)


def attribution(load: Workload) -> StepCost:
    """One pass over the top and bottom sequences; two down to the embeddings for each pair of one with its query.

    And as many for each step that is tried for a query. Weights that are gathered are counted as in the scan, those of
    the copy in float32 at its size.
    """
    config, scan_config, model = load.config.attribution, load.config.scan, load.config.model
    if not config.top:
        return StepCost()
    chosen = min(config.top, scan_config.top, load.candidates) + min(scan_config.bottom, load.candidates)
    pairs, layers = load.queries * chosen, len(load.layers)
    sequences = min(pairs, load.candidates)
    exact = exact_dtype(load.config)
    each = sum(cost.direction_flops(layer, load.tokens, _rank(load, layer), load.calls(layer)) for layer in load.layers)
    work = merged(passes(load, sequences, load.tokens, False), {scan_config.product_dtype.name: pairs * each})
    tried = load.queries * (TRIED[getattr(torch, exact.name)] if config.step is None else 3)
    walks = 2 * (pairs + tried) if config.tokens is AttributionTokens.all else 0
    through = cost.through_flops(load.shape, load.tokens) + 2 * each
    scales = load.queries * (cost.forward_flops(load.shape, load.tokens) + each) if walks else 0
    elementwise = walks * cost.elementwise_numbers(load.shape, load.tokens, False)
    attended = walks * cost.attention_weights(load.shape, load.tokens)
    size = shard_size(max(sequences, walks // 2), scan_config.shard_sequences)
    numbers = load.tokens * (layers + 1 + 2 * bool(walks)) + layers
    cells = bytes_of(scan_config.sum_dtype) * scan_config.batch_size * load.tokens * layers
    more = {"queries": _queries_at_hand(load), "cells": cells}
    copy = exact if walks and exact is not model.dtype else None
    if copy:
        more["weights in float32"] = SINGLE * -(-load.parameters // load.ranks)
    own, walked = (Lockstep.over([count], load.ranks, scan_config.batch_size) for count in (sequences, walks))
    passed = gathered(load, own.steps) + gathered(load, walked.steps, copy=copy)
    received = load.ranks * (load.ranks - 1) * own.own * load.tokens * layers * bytes_of(scan_config.sum_dtype)
    disk = pairs * (SINGLE * numbers + 4 * load.tokens)
    return StepCost(
        merged(work, {exact.name: walks * through + scales, ELEMENTWISE: elementwise, ATTENTION: attended}),
        rank_memory(load, more, copy=copy),
        disk,
        SINGLE * pairs * numbers,
        {"weights": passed, "cells": received} if load.ranks > 1 else {},
        disk + 2 * SINGLE * pairs * numbers,
        pieces=max(1, -(-max(sequences, walks // 2) // size)),
    )


def _queries_at_hand(load: Workload) -> int:
    """Bytes of the queries as they are stored; beside a GPU they stay in the host's memory, but for one of a layer."""
    if load.config.cluster.gpus_per_rank == 0:
        return compression(load).disk
    ranks = {layer: _rank(load, layer) for layer in load.layers}
    return SINGLE * max(
        cost.dense_numbers(layer, 1) if rank is None else cost.factored_numbers(layer, rank)
        for layer, rank in ranks.items()
    )


def _rank(load: Workload, layer: TrackedLayer) -> int | None:
    """The rank of a query in a layer, on average; None where it is a full matrix."""
    return None if uncompressed(load.config.queries) else -(-total_rank(load, layer) // load.queries)


def tails(load: Workload) -> StepCost:
    """Reading all scores; a task holds a summary of each query and feed, and a block of rows."""
    most = max(tail_size(load.candidates, load.config.tails.share, load.config.tails.count), *HEADS)
    summaries = 2 * 2 * DOUBLE * load.queries * (BINS + min(most, load.candidates))
    block = (2 * SINGLE + DOUBLE) * load.queries * min(ROWS, load.candidates)
    read = load.candidates * (8 + 4 + SINGLE * load.queries)
    pieces = max(1, -(-load.shards // SHARDS_A_TASK))
    held, disk = {"summaries": summaries, "rows": block}, 2 * POINTS * 2 * DOUBLE * load.queries
    return StepCost(memory=held, disk=disk, stored=read, tasks=True, pieces=pieces)
