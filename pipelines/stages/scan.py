"""Stage `scores`: the gradient scan over the candidates of both feeds, one Parquet file a shard.

A shard is a run of consecutive candidates. How many is decided by how many candidates there are and by
`scan.shard_sequences` alone, never by who works: `shard_size`. The driver holds two numbers a shard, and its record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from actors.scores import finished_shards, read_report, score_file
from actors.sequences import candidate_files, candidate_ids
from actors.store import Artifact
from actors.tasks import Done, ScanTask
from pipelines.stages.grouped import check_share
from pipelines.steps import StageContext, StageResult

SHARDS = 64  # that few candidates are cut into, so that there is work for many replicas
LEAST = 32  # candidates a shard, below which reading and committing outweigh the scan
MOST_SHARDS = 8192  # so that what the driver holds, and a folder of the store, stay bounded
REPORTS_A_TASK = 256


def shard_size(candidates: int, most: int) -> int:
    """Candidates in a shard: so many that there are `SHARDS` of them, but at least `LEAST` and at most `most`.

    More than `most` where there would be more than `MOST_SHARDS` shards.
    """
    wanted = min(most, max(LEAST, -(-candidates // SHARDS)))
    return max(wanted, -(-candidates // MOST_SHARDS))


def scan_ranges(
    run_each: Callable[..., Iterable[tuple[int, tuple[np.ndarray, np.ndarray]]]], candidates: Artifact, size: int
) -> list[tuple[int, int]]:
    """Cut the candidates into ranges of sequence ids [first, stop), each with `size` candidates but for the last.

    Args:
        run_each: `Cluster.map`; each file of candidates is read by a task of its own.
        candidates: The artifact.
        size: Candidates a range.
    """
    files = candidate_files(candidates)
    total, before, arguments = sum(file["sequences"] for file in files), 0, []
    for file in files:
        arguments.append((candidates, file["name"], before, size, total))
        before += file["sequences"]
    cut = dict(run_each(cuts, arguments))
    firsts, stops = (np.concatenate([cut[position][side] for position in range(len(files))]) for side in (0, 1))
    return list(zip(firsts.tolist(), stops.tolist(), strict=True))


def cuts(candidates: Artifact, name: str, before: int, size: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Where ranges begin and where they end in one file, `before` candidates after the first; runs as a Ray task."""
    ids = candidate_ids(candidates, name)
    place = before + np.arange(len(ids))
    return ids[place % size == 0], ids[(place % size == size - 1) | (place == total - 1)] + 1


def run(context: StageContext) -> StageResult:
    """Write `shard-000000.parquet` with sequence_id, feed and the scores of all queries, for every shard."""
    output, config = context.artifact, context.config
    sequences, candidates, queries = (context.inputs[name] for name in ("sequences", "candidates", "queries"))
    total = sum(file["sequences"] for file in candidate_files(candidates))
    size = shard_size(total, config.scan.shard_sequences)
    ranges = scan_ranges(context.cluster.map, candidates, size)
    finished = finished_shards(output)
    tasks = [
        ScanTask(output, shard, first, stop, min(size, total - shard * size), sequences, candidates, queries)
        for shard, (first, stop) in enumerate(ranges)
        if score_file(shard) not in finished
    ]
    behind = total - sum(task.count for task in tasks)
    progress = context.progress("gradient scan", total, "sequences")
    progress.resume(behind)
    excluded: dict[str, str] = {}

    def done(task: ScanTask, report: Done) -> None:
        nonlocal behind
        behind += task.count
        progress.advance_to(behind)
        excluded.update({str(key): why for key, why in report.excluded.items()})
        check_share(excluded, total, config.scan.nonfinite_share)

    if tasks:
        context.cluster.pool.run("scan", tasks, done, lambda running: progress.advance_to(behind + running))
    progress.close()
    return _finish(context, len(ranges), total)


def _finish(context: StageContext, shards: int, total: int) -> StageResult:
    output, excluded, tokens, seconds = context.artifact, {}, 0, 0.0
    arguments = [(output, start, min(start + REPORTS_A_TASK, shards)) for start in range(0, shards, REPORTS_A_TASK)]
    tallies = dict(context.cluster.map(tally, arguments))
    for position in range(len(arguments)):  # in order, so that seconds add up the same
        tally_excluded, tally_tokens, tally_seconds = tallies[position]
        excluded |= tally_excluded
        tokens += tally_tokens
        seconds += tally_seconds
    check_share(excluded, total, context.config.scan.nonfinite_share)
    output.write_json("queries.json", context.inputs["queries"].read_json("queries.json"))
    counts = {"sequences": total, "tokens": tokens, "excluded": len(excluded), "shards": shards}
    return StageResult(counts, {"excluded": excluded, "replica_seconds": seconds})


def tally(output: Artifact, first: int, stop: int) -> tuple[dict[str, str], int, float]:
    """What shards [first, stop) report in all: sequences set aside, tokens, seconds; runs as a Ray task.

    The files are read to be verified, so that one which was damaged before a resumed scan ended is scored again.
    """
    excluded, tokens, seconds = {}, 0, 0.0
    for shard in range(first, stop):
        report = read_report(output, score_file(shard))
        excluded |= report.excluded
        tokens += report.tokens
        seconds += report.seconds
    return excluded, tokens, seconds
