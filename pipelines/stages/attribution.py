"""Stage `attribution`: which layers and tokens the scores of the top and bottom sequences come from.

Three passes, each dealt in parts that are committed one by one: the token × layer matrices (Equation 31) of all pairs
of a sequence and a query by one pass over the sequences; the step of each query's finite difference, tried on its most
influential sequence; the influence of output and input tokens (Equations 36 and 38) of all pairs. A task a query then
puts its rows together with the text, as `query-000000.parquet` by `SCHEMA`. Only the summary and the report read them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow.compute as pc

from actors.attributing import (
    CELLS,
    STEPS,
    TOKENS,
    Pair,
    finished_parts,
    json_number,
    part_file,
    queries_of,
    read_part_report,
    read_steps,
)
from actors.factors import load_selection
from actors.store import Artifact
from actors.tasks import AttributionTask, Done
from conf.schema import AttributionTokens, Dtype, RunConfig
from influence.attribution import Step
from pipelines.stages.agreement import EXACT
from pipelines.stages.attributed import Entry, Job, describe
from pipelines.stages.scan import shard_size
from pipelines.steps import StageContext, StageResult

QUERIES_A_TASK = 8  # whose steps are chosen in one part
TOLERANCE = 0.01  # of the norm: a finite difference that is wrong by more is warned of
RECORD = "attribution.json"
SIDES = {"top": "top.parquet", "bottom": "bottom.parquet"}
METHODS = {CELLS: "cells", STEPS: "token_steps", TOKENS: "token_influence"}  # of a replica
NAMES = {CELLS: "layers and tokens", STEPS: "steps", TOKENS: "output and input tokens"}

log = logging.getLogger(__name__)


def run(context: StageContext) -> StageResult:
    """Write the rows of every query, and `attribution.json`: what the summary says and what the tables mean."""
    output = context.artifact
    entries = ranked(context) if context.config.attribution.top else {}
    if not output.exists(RECORD):
        output.write_json(RECORD, _attributed(context, entries) if entries else {})
    for name in output.list("parts/"):
        output.delete(name)
    record = output.read_json(RECORD)
    counts = {key: record[key] for key in ("pairs", "sequences", "tokens")} if record else {"pairs": 0}
    return StageResult(counts, {"replica_seconds": record.get("replica_seconds", 0.0)})


def exact_dtype(config: RunConfig) -> Dtype:
    """The type in which the model is differentiated along queries: its own, or float32 where that is lower."""
    return config.model.dtype if config.model.dtype in EXACT else Dtype.float32


def ranked(context: StageContext) -> dict[int, list[Entry]]:
    """The top and bottom sequences of each query that are to be taken apart, by its number."""
    numbers = {record["query_id"]: number for number, record in enumerate(_queries(context))}
    top, found = context.inputs["top"], {}
    for side, name in SIDES.items():
        if not top.exists(name):
            continue
        table = top.read_table(name, ["query_id", "rank", "sequence_id", "score"])
        most = context.config.attribution.top if side == "top" else context.config.scan.bottom
        for row in table.filter(pc.field("rank") <= most).to_pylist():
            entry = Entry(side, row["rank"], row["sequence_id"], row["score"])
            found.setdefault(numbers[row["query_id"]], []).append(entry)
    return found


def _queries(context: StageContext) -> list[dict[str, Any]]:
    return context.inputs["queries"].read_json("queries.json")


def _attributed(context: StageContext, entries: Mapping[int, Sequence[Entry]]) -> dict[str, Any]:
    """Do all passes, and say what came of them."""
    config, output = context.config, context.artifact
    pairs = sorted({(entry.sequence_id, query) for query, mine in entries.items() for entry in mine})
    _deal(context, CELLS, _cut_by_sequence(pairs, config.scan.shard_sequences), len(queries_of(pairs)), "sequences")
    steps: dict[int, Step] = {}
    if config.attribution.tokens is AttributionTokens.all:
        steps = _steps(context, entries)
        by_query = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        size = shard_size(len(by_query), config.scan.shard_sequences)
        cut = [by_query[start : start + size] for start in range(0, len(by_query), size)]
        _deal(context, TOKENS, cut, len(by_query), "pairs", {query: step.alpha for query, step in steps.items()})
    found = _described(context, entries)
    reports = [read_part_report(output, name) for name in sorted(finished_parts(output))]
    ids = {number: record["query_id"] for number, record in enumerate(_queries(context))}
    return {
        "pairs": sum(map(len, entries.values())),
        "sequences": len(queries_of(pairs)),
        "tokens": sum(report.tokens for report in reports),
        "replica_seconds": sum(report.seconds for report in reports),
        "spurious": {ids[query]: tally["spurious"] for query, tally in sorted(found.items())},
        "not_finite": sum(tally["not_finite"] for tally in found.values()),
        "step": _step_record(config, steps, found, ids) if steps else None,
        "layers": layer_names([layer.name for layer in load_selection(context.inputs["layers"]).layers]),
    }


# --- passes -------------------------------------------------------------------------------------------------------


def _cut_by_sequence(pairs: Sequence[Pair], most: int) -> list[list[Pair]]:
    """Pairs in parts of so many sequences, all queries of a sequence in the same one."""
    by_sequence = list(queries_of(pairs).items())
    size = shard_size(len(by_sequence), most)
    return [
        [(sequence_id, query) for sequence_id, queries in by_sequence[start : start + size] for query in queries]
        for start in range(0, len(by_sequence), size)
    ]


def _deal(
    context: StageContext,
    kind: str,
    cut: Sequence[Sequence[Pair]],
    total: int,
    unit: str,
    steps: Mapping[int, float] | None = None,
) -> None:
    """Run the parts that are not finished yet.

    Args:
        context: of the stage.
        kind: of the parts.
        cut: the pairs of each part.
        total: units of work in all.
        unit: what a replica counts: sequences or pairs.
        steps: α of each query.
    """
    output, count = context.artifact, _count_of(unit)
    finished = finished_parts(output)
    tasks = [
        AttributionTask(
            output,
            part,
            tuple(pairs),
            context.inputs["sequences"],
            context.inputs["queries"],
            tuple(steps[query] for _, query in pairs) if steps else (),
            context.config.attribution.step,
        )
        for part, pairs in enumerate(cut)
        if part_file(kind, part) not in finished
    ]
    behind = total - sum(count(task.pairs) for task in tasks)
    progress = context.progress(f"attribution, {NAMES[kind]}", total, unit)
    progress.resume(behind)

    def done(task: AttributionTask, _report: Done) -> None:
        nonlocal behind
        behind += count(task.pairs)
        progress.advance_to(behind)

    if tasks:
        context.cluster.pool.run(METHODS[kind], tasks, done, lambda running: progress.advance_to(behind + running))
    progress.close()


def _count_of(unit: str) -> Callable[[Sequence[Pair]], int]:
    return len if unit == "pairs" else lambda pairs: len(queries_of(pairs))


def _steps(context: StageContext, entries: Mapping[int, Sequence[Entry]]) -> dict[int, Step]:
    """The step of every query, tried on its most influential sequence."""
    first = [(mine[0].sequence_id, query) for query, mine in sorted(entries.items())]
    cut = [first[start : start + QUERIES_A_TASK] for start in range(0, len(first), QUERIES_A_TASK)]
    _deal(context, STEPS, cut, len(first), "pairs")
    return read_steps(context.artifact)


def _described(context: StageContext, entries: Mapping[int, Sequence[Entry]]) -> dict[int, dict[str, Any]]:
    """Put the rows of every query together, a Ray task each; what each says of them."""
    queries, config = _queries(context), context.config
    whole = config.attribution.tokens is AttributionTokens.all
    jobs = [
        Job(context.artifact, query, queries[query]["query_id"], tuple(mine), context.inputs["sequences"], whole)
        for query, mine in sorted(entries.items())
    ]
    found = {}
    with context.progress("attribution, text", len(jobs), "queries") as progress:
        for position, tally in context.cluster.map(describe, [(job, config) for job in jobs]):
            found[jobs[position].query] = tally
            progress.advance(1)
    return found


# --- what is said of it -------------------------------------------------------------------------------------------


def _step_record(
    config: RunConfig, steps: Mapping[int, Step], found: Mapping[int, dict[str, Any]], ids: Mapping[int, str]
) -> dict[str, Any]:
    """The steps that were taken and how far they can be trusted; a query that is beyond tolerance is warned of."""
    doubtful = [ids[query] for query, step in sorted(steps.items()) if step.error > TOLERANCE]
    if doubtful:
        worst = max(step.error for step in steps.values())
        log.warning(
            "influence of output and input tokens: the finite differences are wrong by up to %.1f %% of the norm, for "
            "%s: their heatmaps are rough. Try model.dtype=float64, or set attribution.step",
            100 * worst,
            ", ".join(map(repr, doubtful)),
        )
    by_query = {
        ids[query]: {name: json_number(value) for name, value in asdict(step).items()}
        | {"discrepancy": json_number(step.error), "sum": json_number(found[query]["sum"])}
        for query, step in sorted(steps.items())
    }
    return {
        "method": "central differences along the preconditioned gradient",
        "dtype": exact_dtype(config).name,
        "chosen": "for each query" if config.attribution.step is None else "attribution.step",
        "tolerance": TOLERANCE,
        "worst": json_number(max(step.error for step in steps.values())),
        "doubtful": doubtful,
        "queries": by_query,
    }


def layer_names(names: Sequence[str]) -> dict[str, list[str]]:
    """The layers' names, their groups (`block 3`, or the name where it has no number) and kinds (`down_proj`)."""
    blocks = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    groups = [f"block {block[1]}" if block else name for name, block in zip(names, blocks, strict=True)]
    return {"names": list(names), "groups": groups, "kinds": [name.rpartition(".")[2] for name in names]}


def table_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """The key-value metadata of `attribution.parquet`."""
    layers = {f"layer_{key}": json.dumps(value) for key, value in record["layers"].items()}
    return layers | {"step": json.dumps(record["step"])}


def query_files(artifact: Artifact) -> list[str]:
    """The files of a committed artifact, in the order of the queries."""
    return [name for name in artifact.list("query-") if name.endswith(".parquet")]


def in_short(artifact: Artifact) -> dict[str, Any]:
    """What `summary.json` says of a committed artifact; nothing where scores were not taken apart."""
    record = artifact.read_json(RECORD)
    return {key: value for key, value in record.items() if key not in ("layers", "replica_seconds")}
