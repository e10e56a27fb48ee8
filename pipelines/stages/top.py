"""Stage `top`: the sequences with the highest influence on each query, with their text."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.model import load_tokenizer
from actors.sequences import StoredSequences
from actors.store import Artifact
from conf.schema import ModelConfig
from pipelines.steps import StageContext, StageResult

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


def shard_top(scores: Artifact, shard: str, queries: int, count: int) -> list[list[Ranked]]:
    """The highest scores of every query in one file; ties go to the lower sequence id. Runs as a Ray task."""
    table = scores.read_table(shard)
    ids = table.column("sequence_id").to_numpy()
    feeds = table.column("feed").cast(pa.string()).to_pylist()
    values = table.column("scores").combine_chunks().flatten().to_numpy().reshape(len(ids), queries)
    found = []
    for query in range(queries):
        order = np.lexsort((ids, -values[:, query]))[:count]
        found.append([(float(values[row, query]), int(ids[row]), feeds[row]) for row in order])
    return found


def query_feeds(candidates: Artifact, query_id: str, sequence_ids: Sequence[int]) -> dict[int, float]:
    """BM25 scores of those sequences that BM25 proposed for this query itself."""
    wanted = pa.array(sequence_ids, pa.int64())
    file = candidates.open_parquet("candidates.parquet")
    found = {}
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group)
        mine = (pc.field("query_id") == query_id) & pc.field("sequence_id").isin(wanted)
        table = table.filter(mine)
        found |= dict(zip(table.column("sequence_id").to_pylist(), table.column("bm25_score").to_pylist(), strict=True))
    return found


def describe_top(
    query_id: str, ranked: Sequence[Ranked], sequences: Artifact, candidates: Artifact, model: ModelConfig
) -> list[dict]:
    """Rows of the table of one query. Runs as a Ray task."""
    tokenizer = load_tokenizer(model)
    ids = [sequence_id for _, sequence_id, _ in ranked]
    rows = StoredSequences(sequences).rows(ids, ["input_ids", "document_id", "offset"])
    proposed = query_feeds(candidates, query_id, ids)
    found = []
    for rank, ((score, sequence_id, feed), row) in enumerate(zip(ranked, rows, strict=True), start=1):
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


def run(context: StageContext) -> StageResult:
    """Write `top.parquet`."""
    scores, candidates = context.inputs["scores"], context.inputs["candidates"]
    records = scores.read_json("queries.json")
    shards = [name for name in scores.list("shard-") if name.endswith(".parquet")]
    count = context.config.scan.top
    best: list[list[Ranked]] = [[] for _ in records]
    progress = context.progress("top-k", len(shards), "shards")
    for _, found in context.cluster.map(shard_top, [(scores, shard, len(records), count) for shard in shards]):
        best = [
            heapq.nsmallest(count, old + new, key=lambda item: (-item[0], item[1]))
            for old, new in zip(best, found, strict=True)
        ]
        progress.advance(1)
    progress.close()
    arguments = [
        (record["query_id"], ranked, context.inputs["sequences"], candidates, context.config.model)
        for record, ranked in zip(records, best, strict=True)
    ]
    rows: dict[int, list[dict]] = dict(context.cluster.map(describe_top, arguments))
    table = pa.Table.from_pylist([row for index in range(len(records)) for row in rows[index]], schema=SCHEMA)
    context.artifact.write_table("top.parquet", table)
    return StageResult({"queries": len(records), "rows": table.num_rows}, {})
