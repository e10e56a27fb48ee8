"""Stage `sequences`: the corpus, tokenised and packed, in uniform shards of numbered sequences.

Two Ray Data pipelines. The first tokenises parts of the corpus, each into `parts/000000-00000.parquet`, ... and, last,
a summary `parts/000000.json`, by which an attempt that was cut short goes on. Summaries give every sequence its number;
the second pipeline copies slices of parts into `shard-00000.parquet`, .... Parts are cut by bytes and sequences are
numbered in the order of the corpus, so neither CPUs nor the order in which tasks finish move a bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from actors.corpus import CorpusFile, Part, Plan, plan_parts, with_limits
from actors.errors import BadRecord, ConfigError
from actors.packing import PartSummary, count_documents, tokenise_part
from actors.store import Artifact
from actors.tokeniser import Limits, load_tokeniser, model_limits
from conf.schema import CorpusFormat, RunConfig, plain
from pipelines.steps import StageContext, StageResult
from pipelines.streaming import prepare, stream

ROW_GROUP = 256
INDEX = "index.json"
_THREADS = 8
_COUNTED_AT_ONCE = 256


def run(context: StageContext) -> StageResult:
    """Write `shard-00000.parquet`, ... and `index.json`.

    Raises:
        ConfigError: `corpus.sequence_length` exceeds the model's context, or there is no corpus.
        BadRecord: A record or file cannot be used and `corpus.on_bad_record` is `fail`, or nothing is left to use.
    """
    output, config = context.artifact, context.config
    if not output.exists(INDEX):
        limits = check_length(config)
        prepare(context.cluster)
        plan = _limited(plan_parts(config.corpus), config)
        summaries = _tokenise(context, plan, limits)
        _write_index(context, plan, summaries)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(output.delete, output.list("parts/")))
    index = output.read_json(INDEX)
    assert isinstance(index, dict)
    counts = {name: index[name] for name in ("sequences", "tokens", "documents", "skipped", "vocabulary")}
    return StageResult(counts | {"shards": len(index["shards"])})


def check_length(config: RunConfig) -> Limits:
    """Read the model's limits, and refuse a sequence length that it cannot take.

    Raises:
        ConfigError: It is longer than the context, or less than 2: a lone token predicts nothing.
    """
    limits, length = model_limits(config.model), config.corpus.sequence_length
    if length < 2 or (limits.context is not None and length > limits.context):
        allowed = "2 or more" if limits.context is None else f"2 to {limits.context}, the model's context"
        raise ConfigError(f"corpus.sequence_length={length} is not allowed", remedy=f"give {allowed}")
    return limits


def _limited(plan: Plan, config: RunConfig) -> Plan:
    """Cut the plan after `corpus.limit` documents: parts are counted in waves of tasks, each twice the last."""
    limit = config.corpus.limit
    if limit is None:
        return plan
    counts: dict[int, int] = {}
    count, wave = ray.remote(_counted), 1
    while len(counts) < len(plan.parts) and sum(counts.values()) < limit:
        some = plan.parts[len(counts) : len(counts) + wave]
        waiting: list[Any] = [count.remote(plain(part), config, limit) for part in some]
        for found, error in ray.get(waiting):
            if sum(counts.values()) >= limit:  # what comes after the limit is nobody's concern, nor are its errors
                break
            if error is not None:
                raise error
            counts |= found
        wave = min(2 * wave, _COUNTED_AT_ONCE)
    return Plan(with_limits(plan.parts, counts, limit), plan.skipped)


def _counted(record: Any, config: RunConfig, limit: int) -> tuple[dict[int, int], BadRecord | None]:
    try:
        return count_documents((_part(record),), config.corpus, limit), None
    except BadRecord as error:
        return {}, error


def _tokenise(context: StageContext, plan: Plan, limits: Limits) -> list[PartSummary]:
    """Tokenise the parts, and give their summaries in the order of the corpus."""
    summaries = []
    task = partial(tokenise_task, output=context.artifact, config=context.config, limits=limits)
    with context.progress("tokenise", sum(part.bytes for part in plan.parts), "bytes") as progress:
        for table in stream(task, [plain(part) for part in plan.parts]):
            record = json.loads(table.column("summary")[0].as_py())
            resumed = record.pop("resumed")
            summary = PartSummary(**record)
            size = plan.parts[summary.index].bytes
            if resumed:
                progress.resume(size)
            else:
                progress.advance(size, summary.tokens)
            summaries.append(summary)
    return sorted(summaries, key=lambda summary: summary.index)


def tokenise_task(record: dict, output: Artifact, config: RunConfig, limits: Limits) -> pa.Table:
    """Tokenise one part into chunks and, when they are all written, a summary; what is there already is used."""
    part = _part(record)
    done = f"parts/{part.index:06d}.json"
    if output.exists(done):
        summary: Any = output.read_json(done)
        return _summary(summary | {"resumed": True})
    tokeniser = load_tokeniser(config.model)
    result = tokenise_part(
        part,
        config.corpus,
        tokeniser,
        limits,
        emit=lambda chunk, table: output.write_table(_chunk(part.index, chunk), table, ROW_GROUP),
    )
    output.write_json(done, asdict(result))
    return _summary(asdict(result) | {"resumed": False})


def _summary(record: dict) -> pa.Table:
    return pa.table({"summary": [json.dumps(record)]})


def _chunk(part: int, chunk: int) -> str:
    return f"parts/{part:06d}-{chunk:05d}.parquet"


def _part(record: dict) -> Part:
    fields: dict[str, Any] = dict(record["file"])
    fields["format"] = CorpusFormat[fields["format"]]
    return Part(**{**record, "file": CorpusFile(**fields)})


def _write_index(context: StageContext, plan: Plan, summaries: Sequence[PartSummary]) -> None:
    """Write the shards, then the index: from then on the parts are not needed."""
    sequences = sum(sum(summary.chunks) for summary in summaries)
    skipped = Counter(plan.skipped)
    for summary in summaries:
        skipped.update(summary.skipped)
    if not sequences:
        left_out = f"; left out: {dict(skipped)}" if skipped else ""
        raise BadRecord(f"the corpus has no tokens{left_out}", file=context.config.corpus.path)
    shards = shard_slices(plan.parts, summaries, context.config.corpus.shard_sequences)
    tokens = {}
    with context.progress("number sequences", sequences, "sequences") as progress:
        for table in stream(partial(shard_task, output=context.artifact), shards):
            record = table.to_pylist()[0]
            tokens[record["name"]] = record["tokens"]
            progress.advance(record["rows"], record["tokens"])
    index = {
        "shards": [
            {name: shard[name] for name in ("name", "first_sequence_id", "rows")} | {"tokens": tokens[shard["name"]]}
            for shard in shards
        ],
        "sequences": sequences,
        "tokens": sum(tokens.values()),
        "documents": sum(summary.documents for summary in summaries),
        "skipped": dict(sorted(skipped.items())),
        "vocabulary": model_limits(context.config.model).vocabulary,
    }
    context.artifact.write_json(INDEX, index)


def shard_slices(parts: Sequence[Part], summaries: Sequence[PartSummary], size: int) -> list[dict]:
    """Plan shards of `size` sequences: which rows of which chunks, under which numbers.

    Args:
        parts: In the order of the corpus.
        summaries: Of the same parts, in the same order.
        size: Sequences a shard; the last may have fewer.

    Returns:
        For each shard its name, first_sequence_id, rows, and slices: [chunk, start, stop, file, rows of the file before
        the part].
    """
    shards: list[dict] = []
    rows_before: Counter[str] = Counter()
    for part, summary in zip(parts, summaries, strict=True):
        for chunk, rows in enumerate(summary.chunks):
            start = 0
            while start < rows:
                if not shards or shards[-1]["rows"] == size:
                    name = f"shard-{len(shards):05d}.parquet"
                    shards.append({"name": name, "first_sequence_id": len(shards) * size, "rows": 0, "slices": []})
                taken = min(rows - start, size - shards[-1]["rows"])
                origin = [part.file.name, rows_before[part.file.path]]
                shards[-1]["slices"].append([_chunk(part.index, chunk), start, start + taken, *origin])
                shards[-1]["rows"] += taken
                start += taken
        rows_before[part.file.path] += summary.rows
    return shards


def shard_task(shard: dict, output: Artifact) -> pa.Table:
    """Write one shard."""
    pieces = []
    for chunk, start, stop, file, rows_before in shard["slices"]:
        piece = output.read_table(chunk).slice(start, stop - start)
        pieces.append(piece.set_column(1, "document", _document_ids(piece, file, rows_before)))
    rows = pa.concat_tables(pieces)
    first = shard["first_sequence_id"]
    table = pa.table(
        {
            "sequence_id": pa.array(range(first, first + len(rows)), pa.int64()),
            "input_ids": rows.column("input_ids"),
            "document_id": rows.column("document"),
            "offset": rows.column("offset"),
        }
    )
    output.write_table(shard["name"], table.combine_chunks(), ROW_GROUP)
    tokens = sum(len(chunk.flatten()) for chunk in rows.column("input_ids").chunks)
    return pa.table({"name": [shard["name"]], "rows": [len(rows)], "tokens": [tokens]})


def _document_ids(piece: pa.Table, file: str, rows_before: int) -> pa.Array:
    """Name documents: as the corpus does, or `file:row`, counting rows from 1."""
    names, rows = piece.column("document").to_pylist(), piece.column("row").to_pylist()
    numbered = (name or f"{file}:{rows_before + row + 1}" for name, row in zip(names, rows, strict=True))
    return pa.array(list(numbered), pa.string())
