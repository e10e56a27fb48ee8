"""The task that differentiates the measurements of queries."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from actors.bench import Bench
from actors.errors import BadRecord
from actors.factors import gradient_file
from actors.tasks import Done, QueryTask
from influence.measurement import MEASUREMENTS, MeasuredQuery
from influence.worker import NonFiniteSequences, TokenFactors


def query_gradients(bench: Bench, task: QueryTask) -> Done:
    """Write the exact gradient of each query's measurement, as factors over tokens; ranks share the queries."""
    started, exchange = time.perf_counter(), bench.exchange
    mine: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in bench.selection.layers}
    values: dict[str, float] = {}
    for start in range(0, len(task.queries), exchange.size):
        bench.check_cancelled()
        index, query_id, query = task.queries[min(start + exchange.rank, len(task.queries) - 1)]
        value, factors = _gradient(bench, task, query_id, query)
        for name, factor in factors.items():  # a rank that is left over repeats the last query: the same tensors
            mine[name][f"{index}/grad"] = factor.grad_TO.cpu().contiguous()
            mine[name][f"{index}/act"] = factor.act_TI.cpu().contiguous()
        for found in exchange.agree({query_id: value}):
            values |= found
        bench.finished = min(start + exchange.size, len(task.queries))
    bench.begin_commit()
    for name, tensors in mine.items():
        gathered = exchange.collect(tensors)
        if gathered:
            task.output.write_tensors(gradient_file(name, task.batch), _united(gathered))
    tokens = sum(int(query.batch.lengths.sum()) for _, _, query in task.queries)
    seconds = time.perf_counter() - started
    if exchange.rank == 0:
        done = {"queries": values, "tokens": tokens, "seconds": seconds}
        task.output.write_json(f"parts/batch-{task.batch:04d}.json", done)
    return Done(len(task.queries), tokens, seconds, result=values)


def _gradient(
    bench: Bench, task: QueryTask, query_id: str, query: MeasuredQuery
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
        factors = bench.worker.token_factors(query.batch.to(bench.device), objective)
    except NonFiniteSequences as error:
        reasons = "; ".join(dict.fromkeys(error.reasons.values()))
        problem = f"query {query_id!r} cannot be traced: {reasons.replace('loss', 'measurement')}"
    problems = [found for found in bench.exchange.agree(problem) if found]
    if problems:
        raise BadRecord(problems[0], remedy="correct or remove this query, or try model.dtype=float32")
    return measured[-1], factors


def _united(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for part in parts for key, tensor in part.items()}
