"""A replica: one model, and the tasks that the driver deals to it. Runs in a Ray actor or in this process.

A task either finishes and has committed its output, or raises and has committed nothing: it can be dealt again.

Where a model is sharded, each of its ranks has a `Replica`, all of them are given the same task, and they go through
it in step. What one rank finds out alone (memory that ran out, say) ends the task for all: the others are in the
middle of a pass that needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from actors.attributing import (
    CELLS,
    STEPS,
    TOKENS,
    PartReport,
    cell_rows,
    queries_of,
    step_rows,
    token_rows,
    write_part,
)
from actors.errors import BadRecord, Cancelled, MemoryRanOut, WhenceError
from actors.factors import (
    correction_bundles,
    correction_tensors,
    covariance_bundles,
    covariance_tensors,
    fit_solver,
    gradient_file,
    part_file,
    read_token_factors,
)
from actors.holdings import HeldBases, HeldQueries
from actors.model import load_model, load_skeleton
from actors.probe_files import probe_rows, write_probe
from actors.refinement import (
    ProductTask,
    RefinementTask,
    at_a_time,
    product_tensors,
    read_direction,
    read_refined,
    row_numbers,
)
from actors.scores import ShardReport, write_scores
from actors.sequences import SequenceSource, StoredSequences, candidate_rows
from actors.sharding import unload
from actors.store import Artifact
from actors.tasks import (
    AgreementTask,
    AttributionTask,
    ConvergenceTask,
    Done,
    FidelityTask,
    GroupTask,
    ProbeTask,
    QueryTask,
    ReplicaSpec,
    ScanTask,
)
from conf.schema import Dtype as DtypeName
from conf.schema import Labels as LabelsKind
from conf.schema import ModelConfig, Offload
from influence.batch import Batch
from influence.correction import CorrectionSums
from influence.covariance import CovarianceSums
from influence.exchange import Alone, Exchange
from influence.gauss_newton import GaussNewton, LanguageNetwork, ProductSums
from influence.labels import Labels, SampledLabels, TrueLabels
from influence.layers import LayerSelection, TrackedLayer, group_inputs, select_layers
from influence.measurement import MEASUREMENTS, MeasuredQuery
from influence.scoring import LayerQueries
from influence.solvers import NoCurvature, apply
from influence.worker import NonFiniteSequences, Precision, TokenFactors, Worker

log = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S", CovarianceSums, CorrectionSums, ProductSums)

COVARIANCE_PASS = 0  # labels of the covariance and of the correction are independent draws
CORRECTION_PASS = 1
PROBE_TOKENS = 4


class _Restart(Exception):
    """Sums that were begun must be thrown away: memory ran out, or a sequence turned out not to be finite."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the allocator's, on a CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "out of memory" in text)


class Replica:
    """A model with its tracked layers, and what can be asked of it."""

    def __init__(self, spec: ReplicaSpec, exchange: Exchange | None = None) -> None:
        """Load the model.

        Args:
            spec: what the replica is made of.
            exchange: the other ranks of a sharded model; None if this process holds all of it.
        """
        torch.set_num_threads(spec.cluster.cpus_per_rank)
        self.spec = spec
        self.exchange = exchange or Alone()
        self.device = torch.device("cuda" if spec.cluster.gpus_per_rank > 0 else "cpu")
        self.batch_size = spec.scan.batch_size  # sequences a rank
        self.finished = 0  # sequences of the current task, for progress
        self.cancelled = False  # set from outside: what is running is not wanted any more
        self.committing = False  # from the last look at `cancelled` on: the task will be committed
        self.worker, self.selection = self._load(spec.model, self._precision())
        self._passes: tuple[tuple[str, ...], Worker] | None = None
        self._exact: Worker | None = None  # the model in float32
        self._sources: dict[str, SequenceSource] = {}
        precision, memory = self.worker.precision, spec.cluster.memory_per_rank
        self._queries = HeldQueries(self.selection, spec.scan, precision, self.device, self.exchange, memory)
        self._bases = HeldBases(precision.product, self.device, self.exchange)

    def describe(self) -> LayerSelection:
        """Which layers are tracked."""
        return self.selection

    def progress(self) -> int:
        """Sequences that the current task has finished."""
        return self.finished

    # --- statistics -------------------------------------------------------------------------------------------------

    def covariance(self, task: GroupTask) -> Done:
        """Sum A and S over one group and commit the sums."""
        started, worker = time.perf_counter(), self._worker_of(task)
        labels, ranks = self._labels(task, COVARIANCE_PASS), (self.exchange.rank, self.exchange.size)

        def begin() -> CovarianceSums:
            return CovarianceSums.empty(worker.selection, task.blocks, worker.precision.sums, self.device, *ranks)

        def step(batch: Batch, sums: CovarianceSums) -> None:
            worker.accumulate_covariance(batch, labels, sums)

        sums = self._sum_group(task, begin, step)
        rows: dict[str, int] = {}
        for number, layers in enumerate(covariance_bundles(worker.selection.layers)):
            tensors, counts = covariance_tensors(sums, layers)
            rows |= counts
            self._write_part(task, number, tensors)
        return self._commit_part(task, sums, rows, started)

    def correction(self, task: GroupTask) -> Done:
        """Sum Λ over one group and commit the sums."""
        assert task.bases is not None
        started, worker = time.perf_counter(), self._worker_of(task)
        labels, ranks = self._labels(task, CORRECTION_PASS), (self.exchange.rank, self.exchange.size)
        bases = self._bases.of(task.bases, worker.selection.layers)

        def begin() -> CorrectionSums:
            return CorrectionSums.empty(worker.selection, worker.precision.sums, self.device, *ranks)

        def step(batch: Batch, sums: CorrectionSums) -> None:
            worker.accumulate_correction(batch, labels, bases, sums)

        sums = self._sum_group(task, begin, step)
        for number, layers in enumerate(correction_bundles(worker.selection.layers)):
            self._write_part(task, number, correction_tensors(sums, layers, *ranks))
        return self._commit_part(task, sums, {}, started)

    # --- queries ----------------------------------------------------------------------------------------------------

    def query_gradients(self, task: QueryTask) -> Done:
        """Write the exact gradient of each query's measurement, as factors over tokens; ranks share the queries."""
        started, ranks = time.perf_counter(), self.exchange.size
        mine: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in self.selection.layers}
        values: dict[str, float] = {}
        for start in range(0, len(task.queries), ranks):
            self._check_cancelled()
            index, query_id, query = task.queries[min(start + self.exchange.rank, len(task.queries) - 1)]
            value, factors = self._query_gradient(task, query_id, query)
            for name, factor in factors.items():  # a rank that is left over repeats the last query: the same tensors
                mine[name][f"{index}/grad"] = factor.grad_TO.cpu().contiguous()
                mine[name][f"{index}/act"] = factor.act_TI.cpu().contiguous()
            for found in self.exchange.agree({query_id: value}):
                values |= found
            self.finished = min(start + ranks, len(task.queries))
        self._begin_commit()
        for name, tensors in mine.items():
            gathered = self.exchange.collect(tensors)
            if gathered:
                task.output.write_tensors(gradient_file(name, task.batch), _united(gathered))
        tokens = sum(int(query.batch.lengths.sum()) for _, _, query in task.queries)
        seconds = time.perf_counter() - started
        if self.exchange.rank == 0:
            done = {"queries": values, "tokens": tokens, "seconds": seconds}
            task.output.write_json(f"parts/batch-{task.batch:04d}.json", done)
        return Done(len(task.queries), tokens, seconds, result=values)

    def fidelity(self, task: FidelityTask) -> Done:
        """Scores of a sample by compressed and by full-rank queries: two [N, Q] tensors, as lists."""
        self._bases.release()

        def full() -> dict[str, LayerQueries]:
            return {layer.name: self._full_queries(task, layer) for layer in self.selection.layers}

        def compressed() -> dict[str, LayerQueries]:
            return self._queries.some(task.compressed, task.queries)

        return self._compared(task, (compressed, self.worker, True), (full, self.worker, True))

    def convergence(self, task: ConvergenceTask) -> Done:
        """Scores of a sample by the full-rank queries of each fit: as many [N, Q] tensors, as lists.

        Text in their place, where a fit has no curvature in some layer, which a small sample may not have.
        """
        self._bases.release()

        def preconditioned(factors: Mapping[str, Artifact]) -> Callable[[], dict[str, LayerQueries]]:
            return lambda: {layer.name: self._preconditioned(task, factors, layer) for layer in self.selection.layers}

        try:
            return self._compared(task, *((preconditioned(factors), self.worker, True) for factors in task.fits))
        except NoCurvature as error:
            return Done(result=str(error))

    # --- conjugate gradients ----------------------------------------------------------------------------------------

    def products(self, task: ProductTask) -> Done:
        """Sum Jᵀ H J p over one group, p of all queries of a batch that have not stopped, and commit the sums."""
        started, systems, layers = time.perf_counter(), task.systems, self.selection.layers
        self._bases.release()
        vectors = read_direction(systems, task.direction, self.selection, self.device)
        newton = GaussNewton(LanguageNetwork(self.worker.model), layers, self.worker.precision.product)
        itemsize = self.worker.precision.product.itemsize
        config: Any = self.worker.model.config
        vocabulary = config.get_text_config().vocab_size

        def begin() -> ProductSums:
            return ProductSums.like(vectors)

        def step(batch: Batch, sums: ProductSums) -> None:
            ranks, tokens = self.exchange.size, batch.input_ids.shape[1]
            held = task.memory * self.batch_size // self.spec.scan.batch_size  # less, once memory ran out
            rows = held // (itemsize * row_numbers(layers, tokens, vocabulary))
            width, most = at_a_time(len(task.direction.chosen), self.batch_size, rows)
            local = batch.filled(ranks).part(self.exchange.rank, ranks) if ranks > 1 else batch
            for start in range(0, len(local), most):
                newton.add(local.rows(start, start + most), vectors, sums, width)

        sums = self._sum_group(task, begin, step)
        self._agree_on(sums)
        for number, bundle in enumerate(systems.bundles(layers)):
            self._write_part(task, number, product_tensors(sums, bundle))
        return self._commit_part(task, sums, {}, started)

    def refine(self, task: RefinementTask) -> Done:
        """One bundle's part of an iteration; of several ranks, the first does it."""
        started = time.perf_counter()
        self._begin_commit()
        found = task.run() if self.exchange.rank == 0 else {}
        return Done(seconds=time.perf_counter() - started, result=found)

    # --- scan -------------------------------------------------------------------------------------------------------

    def scan(self, task: ScanTask) -> Done:
        """Score one shard of candidates and commit a file of scores; scores that are not finite are set aside."""
        started = time.perf_counter()
        self._bases.release()
        ids, feeds = candidate_rows(task.candidates, task.first, task.stop)
        queries = self._queries.planned(task.queries, self._tokens(task.sequences))
        order, blocks, tokens = [], [], 0
        shared = self._queries.shared
        for chosen, block, read in self._score(task.sequences, ids.tolist(), queries, self.worker, shared):
            order += chosen
            blocks.append(block)
            tokens += read
        self._begin_commit()
        position = np.argsort(np.asarray(order))
        scores = torch.cat(blocks).numpy()[position]  # in the type of the sums
        finite = np.asarray(np.isfinite(scores).all(axis=1))
        excluded = dict.fromkeys(ids[~finite].tolist(), "its loss or gradient is not finite")
        seconds = time.perf_counter() - started
        if self.exchange.rank == 0:
            named = {str(key): why for key, why in excluded.items()}
            report = ShardReport(len(ids), tokens, seconds, named)
            found = np.asarray(feeds, object)[finite].tolist()
            write_scores(task.output, task.shard, ids[finite], found, scores[finite], report)
        return Done(len(ids), tokens, seconds, excluded)

    def agreement(self, task: AgreementTask) -> Done:
        """Scores of a sample at the run's precision and in float32: two [N, Q] tensors, as lists."""
        reference = ModelConfig(**{**vars(self.spec.model), "dtype": DtypeName.float32})
        exact, _ = self._load(reference, Precision())

        def planned() -> dict[str, LayerQueries]:
            return self._queries.planned(task.queries, self._tokens(task.sequences))

        def stored() -> dict[str, LayerQueries]:
            held = self._queries.stored(task.queries)
            if self._queries.shared:
                held = {name: value.share(self.exchange.rank, self.exchange.size) for name, value in held.items()}
            return {name: value.to(torch.float32, torch.float32, self.device) for name, value in held.items()}

        shared = self._queries.shared
        try:
            return self._compared(task, (planned, self.worker, shared), (stored, exact, shared))
        finally:
            unload(exact.model)

    def probe(self, task: ProbeTask) -> Done:
        """Score a probe's sequences: on all queries as the scan does, on its own query by layer and by token too."""
        started = time.perf_counter()
        self._bases.release()
        queries, shared = self._queries.planned(task.queries, task.tokens), self._queries.shared
        own = self._queries.chosen(task.queries, [task.probe])

        def score(batch: Batch) -> list[dict]:
            scores_BQ = self.worker.scores(batch, queries, shared=shared).scores_BQ
            return probe_rows(batch, scores_BQ, self.worker.scores(batch, own, per_token=True, shared=shared))

        found = list(self._micro_batches(range(len(task.rows)), task.rows, score))
        self._begin_commit()
        if self.exchange.rank == 0:
            write_probe(task.output, task.probe, [row for _, rows, _ in found for row in rows])
        tokens = sum(read for _, _, read in found)
        return Done(len(task.rows), tokens, time.perf_counter() - started)

    # --- attribution ------------------------------------------------------------------------------------------------

    def cells(self, task: AttributionTask) -> Done:
        """Write the token × layer matrix of every pair, by one pass over the sequences."""
        started = time.perf_counter()
        self._bases.release()
        queries, wanted = self._queries.whole(task.queries), queries_of(task.pairs)
        rows = self._source(task.sequences).read(list(wanted))
        found = self._micro_batches(list(wanted), rows, lambda batch: cell_rows(self.worker, batch, wanted, queries))
        return self._commit_pairs(task, CELLS, list(found), started)

    def token_steps(self, task: AttributionTask) -> Done:
        """Choose the step of each query on the sequence that it is paired with."""
        queries, worker = self._queries.whole(task.queries), self._exact_worker()

        def run(batch: Batch) -> list[dict]:
            return step_rows(worker, batch, task.pairs, queries, task.relative)

        return self._of_pairs(task, STEPS, run)

    def token_influence(self, task: AttributionTask) -> Done:
        """Write the influence of output and input tokens in every pair."""
        queries, worker = self._queries.whole(task.queries), self._exact_worker()

        def run(batch: Batch) -> list[dict]:
            return token_rows(worker, batch, task.pairs, task.steps, queries)

        return self._of_pairs(task, TOKENS, run)

    def _of_pairs(self, task: AttributionTask, kind: str, run: Callable[[Batch], list[dict]]) -> Done:
        """One row of a micro-batch for each pair."""
        started = time.perf_counter()
        self._bases.release()
        rows = self._source(task.sequences).read([sequence_id for sequence_id, _ in task.pairs])
        found = list(self._micro_batches(range(len(task.pairs)), rows, run))
        return self._commit_pairs(task, kind, found, started)

    def _commit_pairs(
        self, task: AttributionTask, kind: str, found: Sequence[tuple[list[int], list[dict], int]], started: float
    ) -> Done:
        self._begin_commit()
        report = PartReport(sum(tokens for _, _, tokens in found), time.perf_counter() - started)
        if self.exchange.rank == 0:
            write_part(task.output, kind, task.part, [row for _, rows, _ in found for row in rows], report)
        return Done(len(task.pairs), report.tokens, report.seconds)

    def _exact_worker(self) -> Worker:
        """The model in float32 where its own type is lower; it stays, for the tasks to come."""
        if self.spec.model.dtype in (DtypeName.float32, DtypeName.float64):
            return self.worker
        if self._exact is None:
            reference = ModelConfig(**{**vars(self.spec.model), "dtype": DtypeName.float32})
            self._exact, _ = self._load(reference, Precision())
        return self._exact

    # --- parts ------------------------------------------------------------------------------------------------------

    def _compared(
        self, task: FidelityTask | ConvergenceTask | AgreementTask, *ways: tuple[Callable[[], dict], Worker, bool]
    ) -> Done:
        """Score a sample in each way, one after the other, so that only one set of queries is made at a time."""
        started = time.perf_counter()
        found = []
        for queries, worker, shared in ways:
            scored = self._score(task.sequences, task.sequence_ids, queries(), worker, shared)
            found.append(torch.cat([block for _, block, _ in scored]).double().tolist())
        return Done(len(task.sequence_ids), 0, time.perf_counter() - started, result=found)

    def _load(self, model: ModelConfig, precision: Precision) -> tuple[Worker, LayerSelection]:
        loaded = load_model(model, self.device, exchange=self.exchange)
        whole = self.exchange.size == 1 and model.offload is Offload.none
        selection = select_layers(loaded if whole else load_skeleton(model), model.layers)
        probe = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        selection = group_inputs(loaded, selection, probe)
        return Worker(loaded, selection, precision, self.exchange), selection

    def _worker_of(self, task: GroupTask) -> Worker:
        """A worker that reduces the layers of the task's pass alone."""
        if len(task.layers) == len(self.selection.layers):
            return self.worker
        if self._passes is None or self._passes[0] != task.layers:
            selection = self.selection.only(task.layers)
            worker = Worker(self.worker.model, selection, self.worker.precision, self.exchange)
            self._passes = (task.layers, worker)
        return self._passes[1]

    def _precision(self) -> Precision:
        return Precision(
            getattr(torch, self.spec.scan.product_dtype.name), getattr(torch, self.spec.scan.sum_dtype.name)
        )

    def _query_gradient(
        self, task: QueryTask, query_id: str, query: MeasuredQuery
    ) -> tuple[float, dict[str, TokenFactors]]:
        """The value of one query's measurement, and its gradient."""
        measure = MEASUREMENTS[task.measurement.name]
        measured: list[float] = []

        def objective(logits_BTV: Tensor) -> Tensor:
            values_B = measure(logits_BTV, query)
            measured.append(float(values_B.detach().sum()))
            return values_B

        problem, factors = None, {}
        try:
            factors = self.worker.token_factors(query.batch.to(self.device), objective)
        except NonFiniteSequences as error:
            reasons = "; ".join(dict.fromkeys(error.reasons.values()))
            problem = f"query {query_id!r} cannot be traced: {reasons.replace('loss', 'measurement')}"
        problems = [found for found in self.exchange.agree(problem) if found]
        if problems:
            raise BadRecord(problems[0], remedy="correct or remove this query, or try model.dtype=float32")
        return measured[-1], factors

    def _labels(self, task: GroupTask, pass_index: int) -> Labels:
        return TrueLabels() if task.labels is LabelsKind.empirical else SampledLabels(task.seed, pass_index)

    def _source(self, sequences: Artifact) -> SequenceSource:
        if sequences.uri not in self._sources:
            self._sources[sequences.uri] = StoredSequences(sequences)
        return self._sources[sequences.uri]

    def _tokens(self, sequences: Artifact) -> int:
        index = sequences.read_json("index.json")
        return max(1, round(index["tokens"] / index["sequences"]))

    def _full_queries(self, task: FidelityTask, layer: TrackedLayer) -> LayerQueries:
        if task.refined is not None:
            full = list(read_refined(task.refined, layer.name, task.queries))
        else:
            state, _ = fit_solver(task.solver, task.factors, layer, task.damping_factor)
            factors = read_token_factors(task.gradients, layer.name, task.queries)
            full = [apply(state, factor.gradient()) for factor in factors]
        return self._queries.placed(LayerQueries(len(task.queries), dense_QOI=torch.stack(full)), shared=True)

    def _preconditioned(
        self, task: ConvergenceTask, factors: Mapping[str, Artifact], layer: TrackedLayer
    ) -> LayerQueries:
        """Full matrices of a task's queries in one layer, computed on the device in the type of the sums."""
        state, _ = fit_solver(task.solver, factors, layer, task.damping_factor)
        dtype, found = self.worker.precision.sums, read_token_factors(task.gradients, layer.name, task.queries)
        state = state.to(dtype, self.device)
        dense_QOI = torch.stack([apply(state, factor.gradient().to(self.device, dtype)) for factor in found])
        return self._queries.placed(LayerQueries(len(task.queries), dense_QOI=dense_QOI), shared=True)

    def _score(
        self,
        sequences: Artifact,
        ids: Sequence[int],
        queries: dict[str, LayerQueries],
        worker: Worker,
        shared: bool = False,
    ) -> Iterator[tuple[list[int], Tensor, int]]:
        """Sequences, their scores and their tokens, a micro-batch at a time."""

        def score(batch: Batch) -> Tensor:
            return worker.scores(batch, queries, shared=shared).scores_BQ.cpu()

        return self._micro_batches(ids, self._source(sequences).read(ids), score)

    def _micro_batches(
        self, ids: Sequence[int], rows: Sequence[Sequence[int] | np.ndarray], run: Callable[[Batch], R]
    ) -> Iterator[tuple[list[int], R, int]]:
        """Sequences, what was found of them and their tokens; a micro-batch is halved if memory runs out."""
        order = sorted(range(len(ids)), key=lambda index: (-len(rows[index]), ids[index]))
        start, self.finished = 0, 0
        while start < len(order):
            self._check_cancelled()
            chosen = order[start : start + self.batch_size * self.exchange.size]
            batch = Batch.collate([ids[index] for index in chosen], [rows[index] for index in chosen]).to(self.device)
            try:
                found = run(batch)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            yield [ids[index] for index in chosen], found, int(batch.lengths.sum())
            start += len(chosen)
            self.finished = start

    def _sum_group(self, task: GroupTask | ProductTask, begin: Callable[[], S], step: Callable[[Batch, S], None]) -> S:
        """Sum a statistic over a group, in the order of sequence ids; begun anew without sequences that fail."""
        excluded = dict(task.excluded)
        while True:
            sums = begin()
            try:
                self._add_group(task, sums, step, excluded)
            except _Restart:
                del sums  # before they are begun anew: both sets may not fit
                continue
            sums.excluded |= excluded
            self._begin_commit()
            return sums

    def _add_group(
        self, task: GroupTask | ProductTask, sums: S, step: Callable[[Batch, S], None], excluded: dict[int, str]
    ) -> None:
        ids = [index for index in task.sequence_ids if index not in excluded]
        rows = self._source(task.sequences).read(ids)
        size = self.batch_size * self.exchange.size
        self.finished = 0
        for start in range(0, len(ids), size):
            self._check_cancelled()
            stop = min(start + size, len(ids))
            batch = Batch.collate(ids[start:stop], rows[start:stop]).to(self.device)
            try:
                step(batch, sums)
            except NonFiniteSequences as error:
                log.warning("%s: set aside: %s", task, error)
                excluded |= error.reasons
                raise _Restart from error
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                raise _Restart from error
            self.finished = stop

    def _check_cancelled(self) -> None:
        """Leave a task that is not wanted any more, all ranks at the same place.

        Raises:
            Cancelled: if any rank was told to.
        """
        if bool(self.exchange.gather(torch.tensor([self.cancelled], device=self.device)).any()):
            raise Cancelled("another replica has done this task")

    def _begin_commit(self) -> None:
        """The last chance to leave; what follows writes.

        Raises:
            Cancelled: as `_check_cancelled`.
        """
        self.committing = True
        self._check_cancelled()

    def _halve(self, error: BaseException) -> None:
        """Go on with half the micro-batch after memory ran out; ranks of a gang cannot, and end here."""
        if not out_of_memory(error):
            raise error
        if self.exchange.size > 1:
            ran_out = MemoryRanOut(
                f"memory ran out with a micro-batch of {self.batch_size} sequences a rank", rank=self.exchange.rank
            )
            ran_out.batch_size = self.batch_size
            raise ran_out from error
        if self.batch_size == 1:
            raise WhenceError(
                "memory ran out with a micro-batch of one sequence",
                remedy="shorten corpus.sequence_length, lower model.dtype, or use a larger machine",
            ) from error
        self.batch_size //= 2
        log.warning(
            "memory ran out: the micro-batch is now %d sequences; next time set scan.batch_size=%d",
            self.batch_size,
            self.batch_size,
        )

    def _write_part(self, task: GroupTask | ProductTask, number: int, tensors: dict[str, Tensor]) -> None:
        name = part_file(task.folder, self.exchange.rank, number)
        task.output.write_tensors(name, {key: value.cpu().contiguous() for key, value in tensors.items()})

    def _agree_on(self, sums: ProductSums) -> None:
        """Count what all ranks have added, each its own sequences."""
        found = self.exchange.agree((sums.sequences, sums.tokens, sums.excluded))
        sums.sequences = sum(sequences for sequences, _, _ in found)
        sums.tokens = sum(tokens for _, tokens, _ in found)
        sums.excluded = {key: why for _, _, excluded in found for key, why in excluded.items()}

    def _commit_part(self, task: GroupTask | ProductTask, sums: S, rows: dict[str, int], started: float) -> Done:
        """Commit a group's sums once every rank has written its own."""
        self.exchange.barrier()
        seconds = time.perf_counter() - started
        done = {
            "ranks": self.exchange.size,
            "sequences": sums.sequences,
            "tokens": sums.tokens,
            "rows": rows,
            "excluded": {str(key): why for key, why in sums.excluded.items()},
            "seconds": seconds,
        }
        if self.exchange.rank == 0:
            task.output.write_json(f"{task.folder}/done.json", done)
        return Done(sums.sequences, sums.tokens, seconds, dict(sums.excluded))


def _united(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for part in parts for key, tensor in part.items()}
