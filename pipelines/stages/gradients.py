"""Stage `gradients`: the exact gradient of each query's measurement, as factors over tokens."""

from __future__ import annotations

from actors.factors import QUERY_BATCH
from actors.queries import read_queries
from actors.tasks import Done, QueryTask
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `layers/<layer>/queries-0000.safetensors` and `queries.json`, one entry a query with its measured value."""
    output, config = context.artifact, context.config
    queries = read_queries(config)
    starts = range(0, len(queries), QUERY_BATCH)
    progress = context.progress("query gradients", len(queries), "queries")
    finished = 0

    def done(task: QueryTask, _report: Done) -> None:
        nonlocal finished
        finished += len(task.queries)
        progress.advance_to(finished)

    tasks = []
    for batch, start in enumerate(starts):
        chosen = range(start, min(start + QUERY_BATCH, len(queries)))
        if output.exists(f"parts/batch-{batch:04d}.json"):
            finished += len(chosen)
            continue
        rows = tuple((index, queries[index].query_id, queries[index].measured()) for index in chosen)
        tasks.append(QueryTask(output, batch, rows, config.queries.measurement))
    progress.resume(finished)
    if tasks:
        context.cluster.pool.run(
            "query_gradients", tasks, done, lambda running: progress.advance_to(finished + running)
        )
    progress.close()
    values, tokens = {}, 0
    for batch in range(len(starts)):
        report = output.read_json(f"parts/batch-{batch:04d}.json")
        values |= report["queries"]
        tokens += report["tokens"]
    output.write_json("queries.json", [query.record() | {"measured": values[query.query_id]} for query in queries])
    return StageResult({"queries": len(queries), "tokens": tokens}, {})
