"""What a replica works with: a model with its tracked layers, what it holds of the store, and its micro-batches.

The tasks are functions of a bench, each in a file with its kin; `actors.replica` lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from actors.errors import Cancelled, MemoryRanOut, WhenceError
from actors.holdings import HeldBases, HeldQueries
from actors.model import load_model, load_skeleton
from actors.sequences import SequenceSource, StoredSequences
from actors.store import Artifact
from actors.tasks import ReplicaSpec
from conf.schema import Dtype as DtypeName
from conf.schema import ModelConfig, Offload
from influence.batch import Batch
from influence.exchange import Alone, Exchange
from influence.layers import LayerSelection, group_inputs, select_layers
from influence.scoring import LayerQueries
from influence.worker import Precision, Worker

log = logging.getLogger(__name__)

R = TypeVar("R")

PROBE_TOKENS = 4


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the allocator's, on a CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "out of memory" in text)


class Bench:
    """A model with its tracked layers, and how work goes through it.

    Attributes:
        spec: what the replica is made of.
        exchange: the ranks of the replica.
        device: where its tensors are.
        batch_size: sequences of a micro-batch, for each rank; less, once memory ran out.
        finished: sequences of the current task, for progress.
        cancelled: set from outside: what is running is not wanted any more.
        committing: from the last look at `cancelled` on: the task will be committed.
        worker: the model at the run's precision.
        selection: its tracked layers.
        queries: those of an artifact, ready for the worker.
        bases: the eigenbases of an artifact.
    """

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
        self.batch_size = spec.scan.batch_size
        self.finished = 0
        self.cancelled = False
        self.committing = False
        self.worker, self.selection = self._load(spec.model, self._precision())
        self._passes: tuple[tuple[str, ...], Worker] | None = None
        self._exact: Worker | None = None  # the model in float32
        self._sources: dict[str, SequenceSource] = {}
        precision, memory = self.worker.precision, spec.cluster.memory_per_rank
        self.queries = HeldQueries(self.selection, spec.scan, precision, self.device, self.exchange, memory)
        self.bases = HeldBases(precision.product, self.device, self.exchange)

    def describe(self) -> LayerSelection:
        """Which layers are tracked."""
        return self.selection

    def progress(self) -> int:
        """Sequences that the current task has finished."""
        return self.finished

    # --- models -----------------------------------------------------------------------------------------------------

    def single_precision(self) -> Worker:
        """The model once more, in float32 throughout; whoever asks for it unloads it."""
        return self._load(self._in_float32(), Precision())[0]

    def exact_worker(self) -> Worker:
        """The model in float32 where its own type is lower; it stays, for the tasks to come."""
        if self.spec.model.dtype in (DtypeName.float32, DtypeName.float64):
            return self.worker
        if self._exact is None:
            self._exact = self.single_precision()
        return self._exact

    def worker_of(self, layers: tuple[str, ...]) -> Worker:
        """A worker that reduces some layers alone."""
        if len(layers) == len(self.selection.layers):
            return self.worker
        if self._passes is None or self._passes[0] != layers:
            selection = self.selection.only(layers)
            self._passes = (layers, Worker(self.worker.model, selection, self.worker.precision, self.exchange))
        return self._passes[1]

    def _in_float32(self) -> ModelConfig:
        return ModelConfig(**{**vars(self.spec.model), "dtype": DtypeName.float32})

    def _precision(self) -> Precision:
        return Precision(
            getattr(torch, self.spec.scan.product_dtype.name), getattr(torch, self.spec.scan.sum_dtype.name)
        )

    def _load(self, model: ModelConfig, precision: Precision) -> tuple[Worker, LayerSelection]:
        loaded = load_model(model, self.device, exchange=self.exchange)
        whole = self.exchange.size == 1 and model.offload is Offload.none
        selection = select_layers(loaded if whole else load_skeleton(model), model.layers)
        probe = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        selection = group_inputs(loaded, selection, probe)
        return Worker(loaded, selection, precision, self.exchange), selection

    # --- sequences --------------------------------------------------------------------------------------------------

    def source(self, sequences: Artifact) -> SequenceSource:
        """The sequences of an artifact."""
        if sequences.uri not in self._sources:
            self._sources[sequences.uri] = StoredSequences(sequences)
        return self._sources[sequences.uri]

    def mean_tokens(self, sequences: Artifact) -> int:
        """Tokens of a sequence, on average."""
        index = sequences.read_json("index.json")
        return max(1, round(index["tokens"] / index["sequences"]))

    def score(
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

        return self.micro_batches(ids, self.source(sequences).read(ids), score)

    def micro_batches(
        self, ids: Sequence[int], rows: Sequence[Sequence[int] | np.ndarray], run: Callable[[Batch], R]
    ) -> Iterator[tuple[list[int], R, int]]:
        """Sequences, what was found of them and their tokens; a micro-batch is halved if memory runs out."""
        order = sorted(range(len(ids)), key=lambda index: (-len(rows[index]), ids[index]))
        start, self.finished = 0, 0
        while start < len(order):
            self.check_cancelled()
            chosen = order[start : start + self.batch_size * self.exchange.size]
            batch = Batch.collate([ids[index] for index in chosen], [rows[index] for index in chosen]).to(self.device)
            try:
                found = run(batch)
            except (RuntimeError, MemoryError) as error:
                self.halve(error)
                continue
            yield [ids[index] for index in chosen], found, int(batch.lengths.sum())
            start += len(chosen)
            self.finished = start

    # --- the end of a task ------------------------------------------------------------------------------------------

    def check_cancelled(self) -> None:
        """Leave a task that is not wanted any more, all ranks at the same place.

        Raises:
            Cancelled: if any rank was told to.
        """
        if bool(self.exchange.gather(torch.tensor([self.cancelled], device=self.device)).any()):
            raise Cancelled("another replica has done this task")

    def begin_commit(self) -> None:
        """The last chance to leave; what follows writes.

        Raises:
            Cancelled: as `check_cancelled`.
        """
        self.committing = True
        self.check_cancelled()

    def halve(self, error: BaseException) -> None:
        """Go on with half the micro-batch after memory ran out; ranks of a gang cannot, and end here.

        Raises:
            MemoryRanOut: in a gang.
            WhenceError: a micro-batch of one sequence is too much.
        """
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
