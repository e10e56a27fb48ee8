"""Stage `top`: the sequences with the highest influence on each query, and on request the most negative, with text.

Only negative scores are ranked at the bottom: what does not lower the measurement is not among what lowers it most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.model import load_tokenizer
from actors.sequences import StoredSequences, proposals
from actors.store import Artifact
from conf.schema import ModelConfig
from pipelines.steps import StageContext, StageResult

SHARDS_A_TASK = 64

Ranked = tuple[float, int, str]  # score, sequence_id, feed of the scan

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("feed", pa.string()),
        ("score", pa.float64()),  # holds those of either type of sums as they are
        ("bm25_score", pa.float32()),
        ("document_id", pa.string()),
        ("offset", pa.int64()),
        ("text", pa.string()),
    ]
)


def shard_top(scores: Artifact, shard: str, queries: int, count: int, sign: int = 1) -> list[list[Ranked]]:
    """The highest scores of every query in one file, or with a sign of -1 the lowest; ties go to the lower id."""
    table = scores.read_table(shard)
    ids = table.column("sequence_id").to_numpy()
    feeds = table.column("feed").cast(pa.string()).to_pylist()
    values = table.column("scores").combine_chunks().flatten().to_numpy().reshape(len(ids), queries)
    found = []
    for query in range(queries):
        order = np.lexsort((ids, -sign * values[:, query]))[:count]
        if sign < 0:
            order = order[values[order, query] < 0]
        found.append([(float(values[row, query]), int(ids[row]), feeds[row]) for row in order])
    return found


def shards_top(scores: Artifact, shards: Sequence[str], queries: int, count: int, sign: int = 1) -> list[list[Ranked]]:
    """The highest (or lowest) scores of every query in some files. Runs as a Ray task."""
    best: list[list[Ranked]] = [[] for _ in range(queries)]
    for shard in shards:
        best = merged(best, shard_top(scores, shard, queries, count, sign), count, sign)
    return best


def merged(best: list[list[Ranked]], found: list[list[Ranked]], count: int, sign: int = 1) -> list[list[Ranked]]:
    """The highest (or lowest) `count` of two rankings of every query."""
    both = zip(best, found, strict=True)
    return [heapq.nsmallest(count, old + new, key=lambda item: (-sign * item[0], item[1])) for old, new in both]


def describe_top(
    query_id: str, best: Sequence[Ranked], sequences: Artifact, candidates: Artifact, model: ModelConfig
) -> list[dict]:
    """Rows of the table of one query. Runs as a Ray task."""
    tokenizer = load_tokenizer(model)
    ids = [sequence_id for _, sequence_id, _ in best]
    rows = StoredSequences(sequences).rows(ids, ["input_ids", "document_id", "offset"])
    proposed = proposals(candidates, query_id, ids)
    found = []
    for rank, ((score, sequence_id, feed), row) in enumerate(zip(best, rows, strict=True), start=1):
        found.append(
            {
                "query_id": query_id,
                "rank": rank,
                "sequence_id": sequence_id,
                "feed": feed_for(feed, sequence_id in proposed),
                "score": score,
                "bm25_score": proposed.get(sequence_id),
                "document_id": row["document_id"],
                "offset": row["offset"],
                "text": tokenizer.decode(
                    row["input_ids"].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
            }
        )
    return found


def feed_for(scanned: str, proposed: bool) -> str:
    """How a sequence reached this query.

    `bm25`, `unfiltered` or `both`; `other` if BM25 proposed it for another query only, whose scan scored it for this
    one too.
    """
    if scanned == "unfiltered" or (scanned == "both" and not proposed):
        return "unfiltered"
    if scanned == "both":
        return "both"
    return "bm25" if proposed else "other"


def ranked(context: StageContext, queries: int, sign: int = 1) -> list[list[Ranked]]:
    """The highest (or lowest) scores of every query in all files; the driver holds those of one task more."""
    scores, scan = context.inputs["scores"], context.config.scan
    count = scan.top if sign > 0 else scan.bottom
    shards = [name for name in scores.list("shard-") if name.endswith(".parquet")]
    groups = [shards[start : start + SHARDS_A_TASK] for start in range(0, len(shards), SHARDS_A_TASK)]
    best: list[list[Ranked]] = [[] for _ in range(queries)]
    with context.progress("top-k" if sign > 0 else "bottom-k", len(shards), "shards") as progress:
        arguments = [(scores, group, queries, count, sign) for group in groups]
        for position, found in context.cluster.map(shards_top, arguments):
            best = merged(best, found, count, sign)
            progress.advance(len(groups[position]))
    return best


def run(context: StageContext) -> StageResult:
    """Write `top.parquet`, and `bottom.parquet` where it is asked for."""
    records = context.inputs["scores"].read_json("queries.json")
    counts = {"queries": len(records), "rows": _write(context, "top.parquet", ranked(context, len(records)))}
    if context.config.scan.bottom:
        counts["bottom_rows"] = _write(context, "bottom.parquet", ranked(context, len(records), sign=-1))
    return StageResult(counts, {})


def _write(context: StageContext, name: str, found: Sequence[Sequence[Ranked]]) -> int:
    """Write the table of a ranking; returns its rows."""
    sequences, candidates = context.inputs["sequences"], context.inputs["candidates"]
    records = context.inputs["scores"].read_json("queries.json")
    arguments = [
        (record["query_id"], best, sequences, candidates, context.config.model)
        for record, best in zip(records, found, strict=True)
    ]
    rows: dict[int, list[dict]] = dict(context.cluster.map(describe_top, arguments))
    table = pa.Table.from_pylist([row for index in range(len(records)) for row in rows[index]], schema=SCHEMA)
    context.artifact.write_table(name, table)
    return table.num_rows
