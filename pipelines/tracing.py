"""The main job: from a corpus and queries to the most influential sequences, and what the run leaves behind."""

from __future__ import annotations

import html
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.environment import hardware, versions
from actors.filesystem import without_secret
from actors.store import Artifact, Store
from conf.schema import RunConfig, plain
from pipelines.cluster import Cluster
from pipelines.graph import build_steps
from pipelines.report import write_report
from pipelines.runner import Runner, StageOutcome

log = logging.getLogger(__name__)

SHOWN = 5  # sequences a query in the terminal
SNIPPET = 88  # characters of a sequence's text there


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
        rows = "".join(
            f"<tr><td>{html.escape(row['query_id'])}<td>{row['rank']}<td>{row['score']:.4g}<td>{row['feed']}"
            f"<td>{row['sequence_id']}<td>{html.escape(row['text'][:300])}</tr>"
            for row in self.top.to_pylist()
            if row["rank"] <= SHOWN
        )
        head = "<tr><th>query<th>rank<th>influence<th>feed<th>sequence<th>text</tr>"
        return f"<table>{head}{rows}</table>"


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
    _fill(folder, outcomes["top"].artifact, outcomes["scores"].artifact)
    summary = summarise(config, outcomes, started)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    result = TraceResult(folder, summary, outcomes)
    write_report(folder / "report.html", summary, result.top.to_pylist(), config.report)
    log.info("report: %s", result.report_path)
    return result


def summarise(config: RunConfig, outcomes: Mapping[str, StageOutcome], started: float) -> dict[str, Any]:
    """What `summary.json` says: versions, timings and rates by stage, counts, coverage, fidelity, paths."""
    sequences = outcomes["sequences"].artifact.read_json("index.json")
    assert isinstance(sequences, dict)
    candidates = outcomes["candidates"].artifact.read_json("index.json")
    return {
        "name": config.name,
        "config": _publishable(plain(config)),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": time.time() - started,
        "stages": {name: _stage(outcome) for name, outcome in outcomes.items()},
        "corpus": {key: sequences[key] for key in ("sequences", "tokens", "documents", "skipped")},
        "coverage": outcomes["layers"].extra["coverage"],
        "layers": outcomes["layers"].extra["description"],
        "candidates": {key: value for key, value in candidates.items() if key != "files"},
        "fidelity": outcomes["fidelity"].artifact.read_json("fidelity.json"),
        "agreement": outcomes["agreement"].artifact.read_json("agreement.json"),
        "excluded": {
            name: outcome.extra["excluded"] for name, outcome in outcomes.items() if outcome.extra.get("excluded")
        },
        "queries": [_query(record) for record in outcomes["scores"].artifact.read_json("queries.json")],
        "score_unit": (
            "change of the measurement (nats) per unit weight of the sequence in a loss that is a mean over training "
            "sequences; adding the sequence once to N sequences predicts a change of score / N"
        ),
        "artifacts": {name: outcome.artifact.uri for name, outcome in outcomes.items()},
    }


def _publishable(value: Any) -> Any:
    """Settings without the credentials that a URI may hold: summaries and reports are passed on."""
    if isinstance(value, dict):
        return {key: _publishable(item) for key, item in value.items()}
    return without_secret(value) if isinstance(value, str) else value


def _query(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key != "ranks"}
    return kept | {"total_rank": sum(record["ranks"].values()) or None}


def _stage(outcome: StageOutcome) -> dict[str, Any]:
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
    (folder / "top.parquet").unlink(missing_ok=True)
    (folder / "top.parquet").write_bytes(top.read_bytes("top.parquet"))
    (folder / "scores").mkdir(exist_ok=True)
    for stale in (folder / "scores").glob("shard-*.parquet"):
        stale.unlink()
    for name, size in score_files(scores):
        _link(scores, name, size, folder / "scores" / name)


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
        name, prompt, completion = (_one_line(query[key]) for key in ("query_id", "prompt", "completion"))
        lines.append(f"\n{name}: {prompt} → {completion}")
        lines.append(f"  {'rank':>4}  {'influence':>11}  {'feed':<10}  {'sequence':>9}  text")
        for row in mine:
            text = _one_line(row["text"])[:SNIPPET]
            lines.append(
                f"  {row['rank']:>4}  {row['score']:>11.4g}  {row['feed']:<10}  {row['sequence_id']:>9}  {text}"
            )
    return "\n".join(lines).lstrip("\n")


def _one_line(text: str) -> str:
    """Text on one line, with control characters (which could steer a terminal) replaced."""
    return "".join(char if char.isprintable() else " " for char in text)
