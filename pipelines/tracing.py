"""The main job: from a corpus and queries to the most influential sequences, and what the run leaves behind."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.environment import hardware, versions
from actors.filesystem import without_secret
from actors.store import Artifact, Store
from conf.schema import RunConfig, plain
from pipelines.cluster import Cluster
from pipelines.export import export
from pipelines.graph import build_steps
from pipelines.report import write_report
from pipelines.report.notebook import notebook_view
from pipelines.runner import Runner, StageOutcome
from pipelines.stages import attribution, refinement
from pipelines.stages.attributed import ROW_GROUP
from pipelines.stages.attributed import SCHEMA as ATTRIBUTION
from pipelines.stages.tails import in_short
from pipelines.stages.top import SCHEMA as TOP

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SHOWN = 5  # sequences a query in the terminal
SNIPPET = 88  # characters of a sequence's text there
SCORE_UNIT = (
    "change of the measurement (nats) per unit weight of the sequence in a loss that is a mean over training "
    "sequences; adding the sequence once to N sequences predicts a change of score / N"
)


@dataclass(frozen=True)
class TraceResult:
    """What a run left: its folder, the top sequences, all scores, and where the artifacts are.

    Attributes:
        run_dir: folder of the run.
        summary: the content of `summary.json`.
        outcomes: what became of each step, with its artifact.
    """

    run_dir: Path
    summary: Mapping[str, Any]
    outcomes: Mapping[str, StageOutcome]

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.run_dir / "report.html"

    @property
    def query_ids(self) -> list[str]:
        """The queries, in the order of the scores."""
        return [query["query_id"] for query in self.summary["queries"]]

    @cached_property
    def top(self) -> pa.Table:
        """The top sequences: query_id, rank, sequence_id, feed, score, bm25_score, document_id, offset, text."""
        return pq.read_table(self.run_dir / "top.parquet")

    @cached_property
    def bottom(self) -> pa.Table:
        """The bottom sequences, rank 1 the most negative; no rows unless `scan.bottom` asked for some."""
        return self._table("bottom.parquet", TOP)

    @cached_property
    def survival(self) -> pa.Table:
        """Points of the survival functions: query_id, feed, influence, survival."""
        return self._table("tails.parquet", pa.schema([]))

    def attribution(self, query_id: str | None = None) -> pa.Table:
        """Where in each top and bottom sequence its influence comes from, of one query or of all.

        A row holds the pieces of text, Equation 31 by token, by layer and by both (`matrix`, [T, L] by rows), and
        Equations 36 and 38 by token; names of layers are in the schema's metadata. No rows if nothing was attributed.
        """
        wanted = None if query_id is None else [("query_id", "=", query_id)]
        return self._table("attribution.parquet", ATTRIBUTION, wanted)

    def frame(self, name: str = "top") -> pd.DataFrame:
        """A table as a pandas frame.

        Args:
            name: `top`, `bottom`, `attribution`, `survival` or `scores`, whose frame has a column a query.

        Raises:
            ValueError: there is no such table.
            ImportError: pandas is not installed.
        """
        tables = {"attribution": self.attribution, "scores": self._scores_by_query}
        tables |= {key: functools.partial(getattr, self, key) for key in ("top", "bottom", "survival")}
        if name not in tables:
            raise ValueError(f"name={name!r}: allowed: {', '.join(sorted(tables))}")
        if importlib.util.find_spec("pandas") is None:
            raise ImportError("frame() needs pandas: pip install pandas. The Arrow tables need nothing: result.top")
        return tables[name]().to_pandas()

    def _table(self, file: str, schema: pa.Schema, filters: list[tuple[str, str, str]] | None = None) -> pa.Table:
        path = self.run_dir / file
        return pq.read_table(path, filters=filters) if path.exists() else schema.empty_table()

    def _scores_by_query(self) -> pa.Table:
        table = self.scores_table()
        scores_QN = table.column("scores").combine_chunks().flatten().to_numpy().reshape(len(table), -1).T
        columns = dict(zip(self.query_ids, scores_QN, strict=True))
        return pa.table({"sequence_id": table["sequence_id"], "feed": table["feed"], **columns})

    def scores_table(self) -> pa.Table:
        """All scores: sequence_id, feed, and a list with one score a query in the order of `query_ids`.

        Read from the store, so that they are verified; the files in the run's folder are the same.
        """
        scores = self.artifact("scores")
        return pa.concat_tables(scores.read_table(name) for name, _ in score_files(scores)).unify_dictionaries()

    def artifact(self, step: str) -> Artifact:
        """The artifact of a step."""
        return self.outcomes[step].artifact

    def table(self) -> str:
        """The top sequences of every query, for a terminal."""
        return render_table(self.top.to_pylist(), self.summary["queries"])

    def _repr_html_(self) -> str:
        return notebook_view(self.run_dir)


def run_trace(config: RunConfig, run_dir: str | Path) -> TraceResult:
    """Run every step that is not in the store yet, and write the run's folder.

    Args:
        config: the run.
        run_dir: folder to write; it is created.

    Returns:
        What the run left.

    Raises:
        WhenceError: for bad input, damaged artifacts, or work that keeps failing; the message names the remedy.
    """
    started = time.time()
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = Runner(Store(config.store), build_steps(config), config, lambda: Cluster(config)).run()
    _copy(folder, outcomes["tails"].artifact, "tails.json", "tails.parquet")
    _join(folder / "attribution.parquet", outcomes["attribution"].artifact)
    _fill(folder, outcomes["top"].artifact, outcomes["scores"].artifact)  # last: no scores beside what is damaged
    summary = summarise(config, outcomes, started)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    result = TraceResult(folder, summary, outcomes)
    write_report(folder, config.report)
    export(folder)
    log.info("report: %s", result.report_path)
    return result


def summarise(config: RunConfig, outcomes: Mapping[str, StageOutcome], started: float) -> dict[str, Any]:
    """What `summary.json` says: versions, timings and rates by stage, counts, coverage, fidelity, paths."""
    sequences = outcomes["sequences"].artifact.read_json("index.json")
    assert isinstance(sequences, dict)
    candidates = outcomes["candidates"].artifact.read_json("index.json")
    return {
        "name": config.name,
        "config": publishable(plain(config)),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": time.time() - started,
        "stages": {name: stage_summary(outcome) for name, outcome in outcomes.items()},
        "corpus": {key: sequences[key] for key in ("sequences", "tokens", "documents", "skipped")}
        | {"identity": (outcomes["sequences"].artifact.record() or {}).get("config")},
        "coverage": outcomes["layers"].extra["coverage"],
        "layers": outcomes["layers"].extra["description"],
        "candidates": {key: value for key, value in candidates.items() if key != "files"},
        "fidelity": outcomes["fidelity"].artifact.read_json("fidelity.json"),
        "convergence": outcomes["convergence"].artifact.read_json("convergence.json"),
        "refinement": _refinement(outcomes),
        "agreement": outcomes["agreement"].artifact.read_json("agreement.json"),
        "attribution": attribution.in_short(outcomes["attribution"].artifact),
        "tails": in_short(outcomes["tails"].artifact.read_json("tails.json")),
        "excluded": {
            name: outcome.extra["excluded"] for name, outcome in outcomes.items() if outcome.extra.get("excluded")
        },
        "queries": [_query(record) for record in outcomes["scores"].artifact.read_json("queries.json")],
        "score_unit": SCORE_UNIT,
        "artifacts": {name: outcome.artifact.uri for name, outcome in outcomes.items()},
    }


def _refinement(outcomes: Mapping[str, StageOutcome]) -> dict[str, Any]:
    """Conjugate gradients, where the solver has them."""
    found = outcomes.get("refinement")
    return refinement.in_short(found.artifact.read_json("residuals.json")) if found else {}


def publishable(value: Any) -> Any:
    """Settings without the credentials that a URI may hold: summaries and reports are passed on."""
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items()}
    return without_secret(value) if isinstance(value, str) else value


def _query(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key != "ranks"}
    return kept | {"total_rank": sum(record["ranks"].values()) or None}


def stage_summary(outcome: StageOutcome) -> dict[str, Any]:
    """What `summary.json` says of a step."""
    stage: dict[str, Any] = {"cached": outcome.cached, "seconds": outcome.seconds, "counts": dict(outcome.counts)}
    tokens = outcome.counts.get("tokens")
    busy = outcome.extra.get("replica_seconds")
    if tokens and busy:
        stage |= {"replica_seconds": busy, "tokens_per_replica_second": tokens / busy}
    if tokens and outcome.seconds:
        stage["tokens_per_second"] = tokens / outcome.seconds
    return stage


def _fill(folder: Path, top: Artifact, scores: Artifact) -> None:
    """Bring the tables into the run's folder; those of an earlier run in the same folder go."""
    _copy(folder, top, "top.parquet")
    (folder / "bottom.parquet").unlink(missing_ok=True)
    if top.exists("bottom.parquet"):
        _copy(folder, top, "bottom.parquet")
    (folder / "scores").mkdir(exist_ok=True)
    for stale in (folder / "scores").glob("shard-*.parquet"):
        stale.unlink()
    for name, size in score_files(scores):
        _link(scores, name, size, folder / "scores" / name)


def _copy(folder: Path, artifact: Artifact, *names: str) -> None:
    """Files of an artifact, verified; never written through a link that an earlier run left."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(artifact.read_bytes(name))


def _join(target: Path, artifact: Artifact) -> None:
    """The files of all queries as one table, a query at a time; none where scores were not taken apart."""
    target.unlink(missing_ok=True)
    record = artifact.read_json(attribution.RECORD)
    if not record:
        return
    metadata = attribution.table_metadata(record)
    with pq.ParquetWriter(target, ATTRIBUTION.with_metadata(metadata), compression="zstd") as writer:
        for name in attribution.query_files(artifact):
            table = artifact.read_table(name).cast(ATTRIBUTION).replace_schema_metadata(metadata)
            writer.write_table(table, row_group_size=ROW_GROUP)


def score_files(scores: Artifact) -> list[tuple[str, int]]:
    """Names and sizes of the files of a committed `scores` artifact, in the order of their sequences."""
    files = (scores.record() or {"files": {}})["files"]
    shards = (name for name in files if name.startswith("shard-") and name.endswith(".parquet"))
    return [(name, files[name]["bytes"]) for name in sorted(shards)]


def _link(artifact: Artifact, name: str, size: int, target: Path) -> None:
    """A hard link where the store is beside the folder, without reading the file, which may be one of gigabytes in all.

    Elsewhere, and where the size is not what it was, the file is read and verified.
    """
    source = Path(f"{artifact.uri}/{name}".removeprefix("file://"))
    try:
        if source.stat().st_size == size:
            os.link(source, target)
            return
    except OSError:
        log.debug("%s cannot be linked; copied", source)
    target.unlink(missing_ok=True)  # never through a link into the store
    target.write_bytes(artifact.read_bytes(name))


def render_table(rows: list[dict[str, Any]], queries: list[Mapping[str, Any]], shown: int = SHOWN) -> str:
    """A table of the top sequences for a terminal."""
    lines = []
    for query in queries:
        mine = [row for row in rows if row["query_id"] == query["query_id"]][:shown]
        name, prompt, completion = (one_line(query[key]) for key in ("query_id", "prompt", "completion"))
        lines.append(f"\n{name}: {prompt} → {completion}")
        lines.append(f"  {'rank':>4}  {'influence':>11}  {'feed':<10}  {'sequence':>9}  text")
        for row in mine:
            text = one_line(row["text"])[:SNIPPET]
            lines.append(
                f"  {row['rank']:>4}  {row['score']:>11.4g}  {row['feed']:<10}  {row['sequence_id']:>9}  {text}"
            )
    return "\n".join(lines).lstrip("\n")


def one_line(text: str) -> str:
    """Text on one line, with control characters (which could steer a terminal) replaced."""
    return "".join(char if char.isprintable() else " " for char in text)
