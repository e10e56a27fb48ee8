"""Tasks that sum a statistic over one fixed group of sequences, and commit the sums as a part: A and S, and Λ."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from actors.bench import Bench
from actors.factors import (
    correction_bundles,
    correction_tensors,
    covariance_bundles,
    covariance_tensors,
    part_file,
)
from actors.refinement import ProductTask
from actors.tasks import Done, GroupTask
from conf.schema import Labels as LabelsKind
from influence.batch import Batch
from influence.correction import CorrectionSums
from influence.covariance import CovarianceSums
from influence.gauss_newton import ProductSums
from influence.labels import Labels, SampledLabels, TrueLabels
from influence.worker import NonFiniteSequences

log = logging.getLogger(__name__)

S = TypeVar("S", CovarianceSums, CorrectionSums, ProductSums)

COVARIANCE_PASS = 0  # labels of the covariance and of the correction are independent draws
CORRECTION_PASS = 1


class _Restart(Exception):
    """Sums that were begun must be thrown away: memory ran out, or a sequence turned out not to be finite."""


def covariance(bench: Bench, task: GroupTask) -> Done:
    """Sum A and S over one group and commit the sums."""
    started, worker = time.perf_counter(), bench.worker_of(task.layers)
    labels, ranks = _labels(task, COVARIANCE_PASS), (bench.exchange.rank, bench.exchange.size)

    def begin() -> CovarianceSums:
        return CovarianceSums.empty(worker.selection, task.blocks, worker.precision.sums, bench.device, *ranks)

    def step(batch: Batch, sums: CovarianceSums) -> None:
        worker.accumulate_covariance(batch, labels, sums)

    sums = sum_group(bench, task, begin, step)
    rows: dict[str, int] = {}
    for number, layers in enumerate(covariance_bundles(worker.selection.layers)):
        tensors, counts = covariance_tensors(sums, layers)
        rows |= counts
        write_part(bench, task, number, tensors)
    return commit_part(bench, task, sums, rows, started)


def correction(bench: Bench, task: GroupTask) -> Done:
    """Sum Λ over one group and commit the sums."""
    assert task.bases is not None
    started, worker = time.perf_counter(), bench.worker_of(task.layers)
    labels, ranks = _labels(task, CORRECTION_PASS), (bench.exchange.rank, bench.exchange.size)
    bases = bench.bases.of(task.bases, worker.selection.layers)

    def begin() -> CorrectionSums:
        return CorrectionSums.empty(worker.selection, worker.precision.sums, bench.device, *ranks)

    def step(batch: Batch, sums: CorrectionSums) -> None:
        worker.accumulate_correction(batch, labels, bases, sums)

    sums = sum_group(bench, task, begin, step)
    for number, layers in enumerate(correction_bundles(worker.selection.layers)):
        write_part(bench, task, number, correction_tensors(sums, layers, *ranks))
    return commit_part(bench, task, sums, {}, started)


def _labels(task: GroupTask, pass_index: int) -> Labels:
    return TrueLabels() if task.labels is LabelsKind.empirical else SampledLabels(task.seed, pass_index)


# --- a group ------------------------------------------------------------------------------------------------------


def sum_group(
    bench: Bench, task: GroupTask | ProductTask, begin: Callable[[], S], step: Callable[[Batch, S], None]
) -> S:
    """Sum a statistic over a group, in the order of sequence ids; begun anew without sequences that fail."""
    excluded = dict(task.excluded)
    while True:
        sums = begin()
        try:
            _add_group(bench, task, sums, step, excluded)
        except _Restart:
            del sums  # before they are begun anew: both sets may not fit
            continue
        sums.excluded |= excluded
        bench.begin_commit()
        return sums


def _add_group(
    bench: Bench,
    task: GroupTask | ProductTask,
    sums: S,
    step: Callable[[Batch, S], None],
    excluded: dict[int, str],
) -> None:
    ids = [index for index in task.sequence_ids if index not in excluded]
    rows = bench.source(task.sequences).read(ids)
    size = bench.batch_size * bench.exchange.size
    bench.finished = 0
    for start in range(0, len(ids), size):
        bench.check_cancelled()
        stop = min(start + size, len(ids))
        batch = Batch.collate(ids[start:stop], rows[start:stop]).to(bench.device)
        try:
            step(batch, sums)
        except NonFiniteSequences as error:
            log.warning("%s: set aside: %s", task, error)
            excluded |= error.reasons
            raise _Restart from error
        except (RuntimeError, MemoryError) as error:
            bench.halve(error)
            raise _Restart from error
        bench.finished = stop


def write_part(bench: Bench, task: GroupTask | ProductTask, number: int, tensors: dict[str, Tensor]) -> None:
    """Write this rank's tensors of one bundle of layers."""
    name = part_file(task.folder, bench.exchange.rank, number)
    task.output.write_tensors(name, {key: value.cpu().contiguous() for key, value in tensors.items()})


def commit_part(bench: Bench, task: GroupTask | ProductTask, sums: S, rows: dict[str, int], started: float) -> Done:
    """Commit a group's sums once every rank has written its own."""
    bench.exchange.barrier()
    seconds = time.perf_counter() - started
    done = {
        "ranks": bench.exchange.size,
        "sequences": sums.sequences,
        "tokens": sums.tokens,
        "rows": rows,
        "excluded": {str(key): why for key, why in sums.excluded.items()},
        "seconds": seconds,
    }
    if bench.exchange.rank == 0:
        task.output.write_json(f"{task.folder}/done.json", done)
    return Done(sums.sequences, sums.tokens, seconds, dict(sums.excluded))
