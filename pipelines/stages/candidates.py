"""Stage `candidates`: the two feeds of the scan, which sequences BM25 proposes to each query, and which go unfiltered.

BM25 takes two Ray Data pipelines over the tokenised corpus: document frequencies of the queries' tokens, then scores
and the best of a group of shards. Both merge exactly, with ties broken by sequence id, so that the grouping and the
order of tasks move nothing. A sequence that shares no token with a query is never its candidate: where fewer than
`prefilter.top` share one, fewer are proposed. Legend: Q queries, U distinct query tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from actors.errors import BadRecord, ConfigError
from actors.queries import TokenisedQuery, read_queries
from actors.store import Artifact
from actors.tokeniser import load_tokeniser
from conf.schema import PrefilterKind, UnfilteredConfig, UnfilteredKind
from influence.bm25 import DocumentFrequencies, QueryTokens, TopK, presence, scores, top_k
from pipelines.steps import StageContext, StageResult
from pipelines.streaming import prepare, stream

TABLE = "candidates.parquet"
ROW_GROUP = 65_536
SHARDS_A_TASK = 16
_SAMPLE_BLOCK = 2**20

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),  # null where unfiltered
        ("sequence_id", pa.int64()),
        ("feed", pa.string()),
        ("bm25_score", pa.float64()),  # null where unfiltered
    ]
)


def run(context: StageContext) -> StageResult:
    """Write `candidates.parquet`, sorted by sequence_id, and `index.json`.

    Raises:
        ConfigError: Both feeds are off.
        BadRecord: The feeds that are on have no sequence.
    """
    config, sequences = context.config, context.inputs["sequences"]
    if config.prefilter.kind is PrefilterKind.none and config.unfiltered.kind is UnfilteredKind.none:
        raise ConfigError(
            "prefilter.kind=none and unfiltered.kind=none leave nothing to scan",
            remedy="set prefilter.kind=bm25, or unfiltered.kind=sample or all",
        )
    queries = read_queries(config)
    best = [TopK.empty() for _ in queries]
    if config.prefilter.kind is PrefilterKind.bm25:
        prepare(context.cluster)
        best = bm25_candidates(context, sequences, queries)
    names = [query.query_id for query in queries]
    arguments = (context.artifact, names, best, config.unfiltered, _index(sequences)["sequences"])
    if context.cluster is None:
        index = write_candidates(*arguments)
    else:  # in a task: the table grows with the unfiltered feed, and the driver holds nothing that grows
        ((_, index),) = context.cluster.map(write_candidates, [arguments])
    if index["rows"] == 0:
        raise BadRecord(
            "no sequence shares a token with any query, and there is no unfiltered feed",
            file=config.queries.path,
            remedy="set unfiltered.kind=sample or all",
        )
    context.artifact.write_json("index.json", index)
    return StageResult({name: index[name] for name in ("per_feed", "sequences", "rows")})


def write_candidates(
    output: Artifact, query_ids: Sequence[str], best: Sequence[TopK], feed: UnfilteredConfig, sequences: int
) -> dict:
    """Put both feeds together, write the table, and count it. Runs as a Ray task."""
    unfiltered = unfiltered_sequences(feed, sequences)
    table = candidates_table(query_ids, best, unfiltered)
    output.write_table(TABLE, table, ROW_GROUP)
    proposed = np.unique(np.concatenate([top.sequence_ids for top in best]))
    return {
        "per_feed": {"bm25": len(proposed), "unfiltered": len(unfiltered)},
        "per_query": {query: len(top.sequence_ids) for query, top in zip(query_ids, best, strict=True)},
        "sequences": len(np.union1d(proposed, unfiltered)),
        "rows": len(table),
    }


def bm25_candidates(context: StageContext, sequences: Artifact, queries: Sequence[TokenisedQuery]) -> list[TopK]:
    """Find the `prefilter.top` sequences with the highest BM25 score for each query."""
    special = load_tokeniser(context.config.model).special
    tokens = QueryTokens.build([query.input_ids for query in queries], exclude=special)
    index, count = _index(sequences), context.config.prefilter.top
    groups = [index["shards"][i : i + SHARDS_A_TASK] for i in range(0, len(index["shards"]), SHARDS_A_TASK)]
    frequencies = DocumentFrequencies.empty(len(tokens.tokens_U))
    with context.progress("document frequencies", index["sequences"], "sequences") as progress:
        for table in stream(partial(frequencies_task, sequences=sequences, tokens_U=tokens.tokens_U), groups):
            record = table.to_pylist()[0]
            counts_U = np.asarray(record["counts"], dtype=np.int64)
            frequencies = frequencies.merge(DocumentFrequencies(record["documents"], counts_U))
            progress.advance(record["documents"])
    best = [TopK.empty() for _ in queries]
    task = partial(
        best_task,
        sequences=sequences,
        tokens_U=tokens.tokens_U,
        weights_UQ=tokens.weights(frequencies),
        count=count,
    )
    with context.progress("bm25", index["sequences"], "sequences") as progress:
        for table in stream(task, groups):
            for query, found in enumerate(_unpacked(table)):
                best[query] = best[query].merge(found, count)
            progress.advance(table.column("documents")[0].as_py())
    return best


def frequencies_task(shards: list[dict], sequences: Artifact, tokens_U: np.ndarray) -> pa.Table:
    """Count the sequences of some shards that hold each query token."""
    total = DocumentFrequencies.empty(len(tokens_U))
    for _, values, offsets in _documents(sequences, shards):
        total = total.merge(DocumentFrequencies.of(presence(tokens_U, values, offsets)))
    return pa.table({"documents": [total.documents], "counts": pa.array([total.counts_U], pa.list_(pa.int64()))})


def best_task(
    shards: list[dict], sequences: Artifact, tokens_U: np.ndarray, weights_UQ: np.ndarray, count: int
) -> pa.Table:
    """Find the best `count` sequences of some shards for each query."""
    best = [TopK.empty() for _ in range(weights_UQ.shape[1])]
    documents = 0
    for ids_D, values, offsets in _documents(sequences, shards):
        scores_DQ = scores(presence(tokens_U, values, offsets), weights_UQ)
        best = [top.merge(top_k(scores_DQ[:, query], ids_D, count), count) for query, top in enumerate(best)]
        documents += len(ids_D)
    return pa.table(
        {
            "documents": [documents],
            "lengths": pa.array([[len(top.scores) for top in best]], pa.list_(pa.int64())),
            "sequence_ids": pa.array([np.concatenate([top.sequence_ids for top in best])], pa.large_list(pa.int64())),
            "scores": pa.array([np.concatenate([top.scores for top in best])], pa.large_list(pa.float64())),
        }
    )


def unfiltered_sequences(config: UnfilteredConfig, sequences: int) -> np.ndarray:
    """Choose the unfiltered sequences (int64, ascending): all, none, or a sample that only the seed and ids decide.

    Each sequence has a key, a hash of the seed and its id; a sample of N is those with the N smallest keys. So a larger
    sample holds every smaller one of the same seed. Cost: a hash a sequence, memory for N and one block.
    """
    if config.kind is UnfilteredKind.none:
        return np.empty(0, dtype=np.int64)
    if config.kind is UnfilteredKind.all or config.sequences >= sequences:
        return np.arange(sequences, dtype=np.int64)
    ids, keys = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    for start in range(0, sequences, _SAMPLE_BLOCK):
        block = np.arange(start, min(start + _SAMPLE_BLOCK, sequences), dtype=np.int64)
        ids, keys = np.concatenate((ids, block)), np.concatenate((keys, _hash(block, config.seed)))
        smallest = np.lexsort((ids, keys))[: config.sequences]
        ids, keys = ids[smallest], keys[smallest]
    return np.sort(ids)


def _hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser, on the id and then on the sum with the hashed seed: one to one in the id."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64))
    return _mix(_mix(ids.astype(np.uint64)) + start)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def candidates_table(query_ids: Sequence[str], best: Sequence[TopK], unfiltered: np.ndarray) -> pa.Table:
    """Put both feeds in one table, sorted by sequence id, then `bm25` before `unfiltered`, then by query."""
    lengths = [len(top.sequence_ids) for top in best]
    proposed, plain = sum(lengths), len(unfiltered)
    query = np.repeat(np.arange(len(best) + 1), [*lengths, plain])  # unfiltered sorts after every query
    sequence_ids = np.concatenate([*(top.sequence_ids for top in best), unfiltered])
    values = np.concatenate([*(top.scores for top in best), np.zeros(plain)])
    order = np.lexsort((query, sequence_ids))
    is_plain = (np.arange(proposed + plain) >= proposed)[order]
    names = pa.DictionaryArray.from_arrays(
        pa.array(query[order], pa.int32(), mask=is_plain), pa.array(list(query_ids), pa.string())
    )
    feeds = pa.DictionaryArray.from_arrays(pa.array(is_plain.astype(np.int32)), pa.array(["bm25", "unfiltered"]))
    columns = [names.cast(pa.string()), pa.array(sequence_ids[order]), feeds.cast(pa.string())]
    return pa.table([*columns, pa.array(values[order], mask=is_plain)], schema=SCHEMA)


def _documents(sequences: Artifact, shards: list[dict]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read shards one by one: sequence ids, all their tokens, and where each sequence begins and ends in them."""
    for shard in shards:
        column = sequences.read_table(shard["name"], columns=["input_ids"]).column("input_ids")
        lists = column.combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        first = shard["first_sequence_id"]
        yield np.arange(first, first + len(lists)), lists.flatten().to_numpy(), offsets - offsets[0]


def _unpacked(table: pa.Table) -> Iterator[TopK]:
    ids = table.column("sequence_ids").combine_chunks().flatten().to_numpy()
    values = table.column("scores").combine_chunks().flatten().to_numpy()
    start = 0
    for length in table.column("lengths")[0].as_py():
        yield TopK(ids[start : start + length], values[start : start + length])
        start += length


def _index(sequences: Artifact) -> dict:
    index = sequences.read_json("index.json")
    assert isinstance(index, dict)
    return index
