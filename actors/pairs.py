"""Tasks that take the scores of pairs of a sequence and a query apart; the rows are those of `actors.attributing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
from actors.bench import Bench
from actors.tasks import AttributionTask, Done
from influence.batch import Batch


def cells(bench: Bench, task: AttributionTask) -> Done:
    """Write the token × layer matrix of every pair, by one pass over the sequences."""
    started = time.perf_counter()
    bench.bases.release()
    queries, wanted = bench.queries.whole(task.queries), queries_of(task.pairs)
    rows = bench.source(task.sequences).read(list(wanted))
    found = bench.micro_batches(list(wanted), rows, lambda batch: cell_rows(bench.worker, batch, wanted, queries))
    return _commit(bench, task, CELLS, list(found), started)


def token_steps(bench: Bench, task: AttributionTask) -> Done:
    """Choose the step of each query on the sequence that it is paired with."""
    queries, worker = bench.queries.whole(task.queries), bench.exact_worker()

    def run(batch: Batch) -> list[dict]:
        return step_rows(worker, batch, task.pairs, queries, task.relative)

    return _of_pairs(bench, task, STEPS, run)


def token_influence(bench: Bench, task: AttributionTask) -> Done:
    """Write the influence of output and input tokens in every pair."""
    queries, worker = bench.queries.whole(task.queries), bench.exact_worker()

    def run(batch: Batch) -> list[dict]:
        return token_rows(worker, batch, task.pairs, task.steps, queries)

    return _of_pairs(bench, task, TOKENS, run)


def _of_pairs(bench: Bench, task: AttributionTask, kind: str, run: Callable[[Batch], list[dict]]) -> Done:
    """One row of a micro-batch for each pair."""
    started = time.perf_counter()
    bench.bases.release()
    rows = bench.source(task.sequences).read([sequence_id for sequence_id, _ in task.pairs])
    found = list(bench.micro_batches(range(len(task.pairs)), rows, run))
    return _commit(bench, task, kind, found, started)


def _commit(
    bench: Bench, task: AttributionTask, kind: str, found: Sequence[tuple[list[int], list[dict], int]], started: float
) -> Done:
    bench.begin_commit()
    report = PartReport(sum(tokens for _, _, tokens in found), time.perf_counter() - started)
    if bench.exchange.rank == 0:
        write_part(task.output, kind, task.part, [row for _, rows, _ in found for row in rows], report)
    return Done(len(task.pairs), report.tokens, report.seconds)
