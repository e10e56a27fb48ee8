"""Tasks that score sequences: shards of candidates, sequences that somebody wrote, and samples in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from actors.bench import Bench
from actors.factors import fit_solver, read_token_factors
from actors.probe_files import probe_rows, write_probe
from actors.refinement import read_refined
from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows
from actors.sharding import unload
from actors.store import Artifact
from actors.tasks import AgreementTask, ConvergenceTask, Done, FidelityTask, ProbeTask, ScanTask
from influence.batch import Batch
from influence.layers import TrackedLayer
from influence.scoring import LayerQueries
from influence.solvers import NoCurvature, apply
from influence.worker import Worker

Queries = dict[str, LayerQueries]
Way = tuple[Callable[[], Queries], Worker, bool]  # queries, model, and whether each rank has a share of the queries


def scan(bench: Bench, task: ScanTask) -> Done:
    """Score one shard of candidates and commit a file of scores; scores that are not finite are set aside."""
    started = time.perf_counter()
    bench.bases.release()
    ids, feeds = candidate_rows(task.candidates, task.first, task.stop)
    queries = bench.queries.planned(task.queries, bench.mean_tokens(task.sequences))
    order, blocks, tokens = [], [], 0
    for chosen, block, read in bench.score(task.sequences, ids.tolist(), queries, bench.worker, bench.queries.shared):
        order += chosen
        blocks.append(block)
        tokens += read
    bench.begin_commit()
    position = np.argsort(np.asarray(order))
    scores = torch.cat(blocks).numpy()[position]  # in the type of the sums
    finite = np.asarray(np.isfinite(scores).all(axis=1))
    excluded = dict.fromkeys(ids[~finite].tolist(), "its loss or gradient is not finite")
    seconds = time.perf_counter() - started
    if bench.exchange.rank == 0:
        named = {str(key): why for key, why in excluded.items()}
        report = ShardReport(len(ids), tokens, seconds, named)
        found = np.asarray(feeds, object)[finite].tolist()
        write_scores(task.output, task.shard, ids[finite], found, scores[finite], report)
    return Done(len(ids), tokens, seconds, excluded)


def probe(bench: Bench, task: ProbeTask) -> Done:
    """Score a probe's sequences: on all queries as the scan does, on its own query by layer and by token too."""
    started = time.perf_counter()
    bench.bases.release()
    queries, shared = bench.queries.planned(task.queries, task.tokens), bench.queries.shared
    own = bench.queries.chosen(task.queries, [task.probe])

    def score(batch: Batch) -> list[dict]:
        scores_BQ = bench.worker.scores(batch, queries, shared=shared).scores_BQ
        return probe_rows(batch, scores_BQ, bench.worker.scores(batch, own, per_token=True, shared=shared))

    found = list(bench.micro_batches(range(len(task.rows)), task.rows, score))
    bench.begin_commit()
    if bench.exchange.rank == 0:
        write_probe(task.output, task.probe, [row for _, rows, _ in found for row in rows])
    tokens = sum(read for _, _, read in found)
    return Done(len(task.rows), tokens, time.perf_counter() - started)


# --- a sample in several ways -------------------------------------------------------------------------------------


def agreement(bench: Bench, task: AgreementTask) -> Done:
    """Scores of a sample at the run's precision and in float32: two [N, Q] tensors, as lists."""
    exact = bench.single_precision()

    def planned() -> Queries:
        return bench.queries.planned(task.queries, bench.mean_tokens(task.sequences))

    def stored() -> Queries:
        held = bench.queries.stored(task.queries)
        if bench.queries.shared:
            held = {name: value.share(bench.exchange.rank, bench.exchange.size) for name, value in held.items()}
        return {name: value.to(torch.float32, torch.float32, bench.device) for name, value in held.items()}

    shared = bench.queries.shared
    try:
        return _compared(bench, task, (planned, bench.worker, shared), (stored, exact, shared))
    finally:
        unload(exact.model)


def fidelity(bench: Bench, task: FidelityTask) -> Done:
    """Scores of a sample by compressed and by full-rank queries: two [N, Q] tensors, as lists."""
    bench.bases.release()

    def full() -> Queries:
        return {layer.name: _full_queries(bench, task, layer) for layer in bench.selection.layers}

    def compressed() -> Queries:
        return bench.queries.some(task.compressed, task.queries)

    return _compared(bench, task, (compressed, bench.worker, True), (full, bench.worker, True))


def convergence(bench: Bench, task: ConvergenceTask) -> Done:
    """Scores of a sample by the full-rank queries of each fit: as many [N, Q] tensors, as lists.

    Text in their place, where a fit has no curvature in some layer, which a small sample may not have.
    """
    bench.bases.release()

    def preconditioned(factors: Mapping[str, Artifact]) -> Callable[[], Queries]:
        return lambda: {layer.name: _preconditioned(bench, task, factors, layer) for layer in bench.selection.layers}

    try:
        return _compared(bench, task, *((preconditioned(factors), bench.worker, True) for factors in task.fits))
    except NoCurvature as error:
        return Done(result=str(error))


def _compared(bench: Bench, task: FidelityTask | ConvergenceTask | AgreementTask, *ways: Way) -> Done:
    """Score a sample in each way, one after the other, so that only one set of queries is made at a time."""
    started = time.perf_counter()
    found = []
    for queries, worker, shared in ways:
        scored = bench.score(task.sequences, task.sequence_ids, queries(), worker, shared)
        found.append(torch.cat([block for _, block, _ in scored]).double().tolist())
    return Done(len(task.sequence_ids), 0, time.perf_counter() - started, result=found)


def _full_queries(bench: Bench, task: FidelityTask, layer: TrackedLayer) -> LayerQueries:
    if task.refined is not None:
        full = list(read_refined(task.refined, layer.name, task.queries))
    else:
        state, _ = fit_solver(task.solver, task.factors, layer, task.damping_factor)
        factors = read_token_factors(task.gradients, layer.name, task.queries)
        full = [apply(state, factor.gradient()) for factor in factors]
    return bench.queries.placed(LayerQueries(len(task.queries), dense_QOI=torch.stack(full)), shared=True)


def _preconditioned(
    bench: Bench, task: ConvergenceTask, factors: Mapping[str, Artifact], layer: TrackedLayer
) -> LayerQueries:
    """Full matrices of a task's queries in one layer, computed on the device in the type of the sums."""
    state, _ = fit_solver(task.solver, factors, layer, task.damping_factor)
    dtype, found = bench.worker.precision.sums, read_token_factors(task.gradients, layer.name, task.queries)
    state = state.to(dtype, bench.device)
    dense_QOI = torch.stack([apply(state, factor.gradient().to(bench.device, dtype)) for factor in found])
    return bench.queries.placed(LayerQueries(len(task.queries), dense_QOI=dense_QOI), shared=True)
