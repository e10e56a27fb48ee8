"""Stage `candidates`: the two feeds of the scan, which sequences BM25 proposes to each query, and which go unfiltered.

BM25 takes two Ray Data pipelines over the tokenised corpus: document frequencies of the queries' tokens, then scores
and the best of a group of shards. Both merge exactly, with ties broken by sequence id, so that the grouping and the
order of tasks move nothing. A sequence that shares no token with a query is never its candidate: where fewer than
`prefilter.top` share one, fewer are proposed. Legend: Q queries, U distinct query tokens.

The table is written in files by blocks of sequence ids, a task each; `index.json` says what each holds. The driver
holds what is proposed, at most Q times `prefilter.top` ids and scores, and a line a file: nothing that grows with the
unfiltered feed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from actors.errors import BadRecord, ConfigError
from actors.queries import TokenisedQuery, read_queries
from actors.sequences import CANDIDATES
from actors.store import Artifact
from actors.tokeniser import load_tokeniser
from conf.schema import PrefilterKind, UnfilteredKind
from influence.bm25 import DocumentFrequencies, QueryTokens, TopK, presence, scores, top_k
from pipelines.stages.unfiltered import Unfiltered, choose
from pipelines.steps import StageContext, StageResult
from pipelines.streaming import prepare, stream

BLOCK = 65_536  # sequence ids that one file covers, whatever the shards of the corpus
ROW_GROUP = 8192
SHARDS_A_TASK = 16


def run(context: StageContext) -> StageResult:
    """Write `block-00000.parquet`, ..., each sorted by sequence_id, and `index.json`.

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
    corpus = _index(sequences)["sequences"]
    index = write_blocks(
        context, [query.query_id for query in queries], best, choose(config.unfiltered, corpus), corpus
    )
    if index["rows"] == 0:
        raise BadRecord(
            "no sequence shares a token with any query, and there is no unfiltered feed",
            file=config.queries.path,
            remedy="set unfiltered.kind=sample or all",
        )
    context.artifact.write_json("index.json", index)
    return StageResult({name: index[name] for name in ("per_feed", "sequences", "rows")})


def write_blocks(
    context: StageContext, query_ids: Sequence[str], best: Sequence[TopK], unfiltered: Unfiltered, corpus: int
) -> dict[str, Any]:
    """Write the files of all blocks that hold a candidate, and count what is in them: the content of `index.json`."""
    arguments = [
        (context.artifact, first, stop, query_ids, proposed, unfiltered)
        for first, stop, proposed in _blocks(best, corpus)
        if unfiltered.count or any(len(top.scores) for top in proposed)
    ]
    run_each = _in_process if context.cluster is None else context.cluster.map
    found: list[dict[str, Any]] = [{} for _ in arguments]
    with context.progress("candidates", len(arguments), "blocks") as progress:
        for position, block in run_each(write_block, arguments):
            found[position] = block
            progress.advance(1)
    files = [block for block in found if block["rows"]]
    return {
        "per_feed": {feed: sum(block[feed] for block in files) for feed in ("bm25", "unfiltered")},
        "per_query": {query: len(top.sequence_ids) for query, top in zip(query_ids, best, strict=True)},
        "sequences": sum(block["sequences"] for block in files),
        "rows": sum(block["rows"] for block in files),
        "files": files,
    }


def _in_process(function: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
    """The double of `Cluster.map`, for a stage without a cluster."""
    for position, given in enumerate(arguments):
        yield position, function(*given)


def _blocks(best: Sequence[TopK], corpus: int) -> Iterator[tuple[int, int, list[TopK]]]:
    """Cut the corpus into blocks, with what is proposed to each query in them."""
    borders = np.append(np.arange(0, corpus, BLOCK), corpus)
    ordered = []
    for top in best:
        order = np.argsort(top.sequence_ids)
        ids, values = top.sequence_ids[order], top.scores[order]
        ordered.append((ids, values, np.searchsorted(ids, borders)))
    for block, (first, stop) in enumerate(pairwise(borders.tolist())):
        cuts = [(ids, values, slice(places[block], places[block + 1])) for ids, values, places in ordered]
        yield first, stop, [TopK(ids[mine], values[mine]) for ids, values, mine in cuts]


def write_block(
    output: Artifact, first: int, stop: int, query_ids: Sequence[str], best: Sequence[TopK], unfiltered: Unfiltered
) -> dict[str, Any]:
    """Put both feeds of the sequences in [first, stop) together, write them, and count them. Runs as a Ray task."""
    plain = unfiltered.within(first, stop)
    table = candidates_table(query_ids, best, plain)
    name = f"block-{first // BLOCK:05d}.parquet"
    if len(table):
        output.write_table(name, table, ROW_GROUP)
    proposed = np.unique(np.concatenate([np.empty(0, np.int64), *(top.sequence_ids for top in best)]))
    place = {"name": name, "first_sequence_id": first, "stop": stop, "rows": len(table)}
    counts = {"sequences": len(np.union1d(proposed, plain)), "bm25": len(proposed), "unfiltered": len(plain)}
    return place | counts


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
    return pa.table([*columns, pa.array(values[order], mask=is_plain)], schema=CANDIDATES)


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
