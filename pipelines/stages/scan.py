"""Stage `scores`: the gradient scan over the candidates of both feeds, one Parquet file a shard."""

from __future__ import annotations

import logging

import torch

from actors.sequences import candidate_rows
from actors.store import Artifact
from actors.tasks import AgreementTask, Done, ScanTask
from conf.schema import Dtype
from pipelines.stages.agreement import agreement, sample_of, shown
from pipelines.stages.grouped import check_share
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)


def scan_ranges(candidates: Artifact, sequences: Artifact, size: int) -> list[tuple[int, int, int]]:
    """Cut the candidates into ranges [first, stop) of at most `size` distinct sequences; runs as a Ray task."""
    ranges = []
    for shard in sequences.read_json("index.json")["shards"]:
        first = shard["first_sequence_id"]
        ids, _ = candidate_rows(candidates, first, first + shard["rows"])
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            ranges.append((int(part[0]), int(part[-1]) + 1, len(part)))
    return ranges


def run(context: StageContext) -> StageResult:
    """Write `shard-000000.parquet` with sequence_id, feed and the scores of all queries, and `agreement.json`."""
    output, config = context.artifact, context.config
    sequences, candidates, queries = (context.inputs[name] for name in ("sequences", "candidates", "queries"))
    size = config.scan.shard_sequences
    ((_, ranges),) = context.cluster.map(scan_ranges, [(candidates, sequences, size)])
    tasks = [
        ScanTask(output, shard, first, stop, count, sequences, candidates, queries)
        for shard, (first, stop, count) in enumerate(ranges)
    ]
    total = sum(count for _, _, count in ranges)
    open_tasks = [task for task in tasks if not output.exists(_report(task.shard))]
    behind = total - sum(task.count for task in open_tasks)
    progress = context.progress("gradient scan", total, "sequences")
    progress.resume(behind)
    excluded: dict[str, str] = {}

    def done(task: ScanTask, report: Done) -> None:
        nonlocal behind
        behind += task.count
        progress.advance_to(behind)
        excluded.update({str(key): why for key, why in report.excluded.items()})
        check_share(excluded, total, config.scan.nonfinite_share)

    if open_tasks:
        context.cluster.pool.run("scan", open_tasks, done, lambda running: progress.advance_to(behind + running))
    progress.close()
    return _finish(context, len(tasks), total)


def _finish(context: StageContext, shards: int, total: int) -> StageResult:
    output, scan = context.artifact, context.config.scan
    excluded, tokens, seconds = {}, 0, 0.0
    for shard in range(shards):
        report = output.read_json(_report(shard))
        excluded |= report["excluded"]
        tokens += report["tokens"]
        seconds += report["seconds"]
    check_share(excluded, total, scan.nonfinite_share)
    agreed = _agreement(context)
    output.write_json("agreement.json", agreed)
    output.write_json("queries.json", context.inputs["queries"].read_json("queries.json"))
    counts = {"sequences": total, "tokens": tokens, "excluded": len(excluded), "shards": shards}
    return StageResult(counts, {"excluded": excluded, "replica_seconds": seconds, "agreement": agreed})


def _report(shard: int) -> str:
    return f"parts/shard-{shard:06d}.json"


def _agreement(context: StageContext) -> dict:
    """Where a precision is below float32: correlation with float32 scores on a seeded sample, by query."""
    config, sequences = context.config, context.inputs["sequences"]
    exact = (Dtype.float32, Dtype.float64)
    precise = config.model.dtype in exact and config.scan.product_dtype in exact
    if precise or config.scan.agreement_sample == 0:
        return {}
    sample = sample_of(sequences, config.scan.agreement_sample, config.seed)
    task = AgreementTask(sample, sequences, context.inputs["queries"])
    reports: list[Done] = []
    context.cluster.pool.run("agreement", [task], lambda _task, report: reports.append(report), lambda _running: None)
    run_scores, exact_scores = (torch.tensor(scores) for scores in reports[0].result)  # type: ignore[attr-defined]
    records = context.inputs["queries"].read_json("queries.json")
    found = agreement(run_scores, exact_scores, [record["query_id"] for record in records])
    log.info("agreement with float32 scores: correlation %s at worst", shown(found["minimum"]))
    return found
