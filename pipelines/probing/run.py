"""The job of `whence probe`: what is wrong with the file first, then the steps, then the run's folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.environment import hardware, versions
from actors.factors import load_selection
from actors.probe_files import read_probe
from actors.probes import Probe, read_probes, tokenise_probe_queries, tokenise_probes
from actors.store import Artifact, Store
from actors.tokeniser import load_tokeniser, model_limits
from conf.schema import RunConfig, plain
from pipelines.cluster import Cluster
from pipelines.graph import build_probe_steps
from pipelines.probing.figures import write_figures
from pipelines.probing.measures import by_partition, over_probes, range_of
from pipelines.probing.page import write_page
from pipelines.probing.table import probe_rows, render_table, write_tables
from pipelines.runner import Runner, StageOutcome
from pipelines.tracing import SCORE_UNIT, publishable, stage_summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """What a run of probes left.

    Attributes:
        run_dir: folder of the run.
        summary: the content of `summary.json`.
        outcomes: what became of each step, with its artifact.
    """

    run_dir: Path
    summary: Mapping[str, Any]
    outcomes: Mapping[str, StageOutcome]

    @property
    def page_path(self) -> Path:
        """Bars and heatmaps of all sequences."""
        return self.run_dir / "probe.html"

    @cached_property
    def rows(self) -> pa.Table:
        """The content of `probe.parquet`: a row a sequence."""
        return pq.read_table(self.run_dir / "probe.parquet")

    def artifact(self, step: str) -> Artifact:
        """The artifact of a step."""
        return self.outcomes[step].artifact

    def table(self) -> str:
        """What each partition comes to, for a terminal."""
        return render_table(self.summary)


def run_probe(config: RunConfig, run_dir: str | Path) -> ProbeResult:
    """Score the sequences of `probe.path` on their queries, and write the run's folder.

    Factors, and query gradients of probes that ask what a trace asked, come from the store where they are there.

    Args:
        config: the run; `queries.path` is not read.
        run_dir: folder to write; it is created.

    Returns:
        What the run left.

    Raises:
        WhenceError: for a file that cannot be used, before anything is computed; else as a trace.
    """
    started = time.time()
    folder = Path(run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    probes = read_probes(config)
    tokeniser, limits = load_tokeniser(config.model), model_limits(config.model)
    tokenise_probe_queries(probes, tokeniser, limits, config)
    tokenise_probes(probes, tokeniser, limits, config)
    config = replace(config, queries=replace(config.queries, path=write_queries(folder / "queries.jsonl", probes)))
    outcomes = Runner(Store(config.store), build_probe_steps(config), config, lambda: Cluster(config)).run()
    found = [read_probe(outcomes["probe"].artifact, number) for number in range(len(probes))]
    rows = probe_rows(probes, found, tokeniser)
    layers = [layer.name for layer in load_selection(outcomes["layers"].artifact).layers]
    summary = summarise(config, outcomes, probes, rows, started)
    write_tables(folder, rows, [probe.probe_id for probe in probes], layers)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_figures(folder, summary, rows)
    write_page(folder / "probe.html", summary, rows, layers, config.report.title)
    log.info("page of the probes: %s", folder / "probe.html")
    return ProbeResult(folder, summary, outcomes)


def write_queries(path: Path, probes: Sequence[Probe]) -> str:
    """Write the probes' queries as a file that `whence trace` takes as well; returns its path."""
    lines = [json.dumps(probe.record()) for probe in probes]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def summarise(
    config: RunConfig,
    outcomes: Mapping[str, StageOutcome],
    probes: Sequence[Probe],
    rows: Sequence[Mapping[str, Any]],
    started: float,
) -> dict[str, Any]:
    """What `summary.json` says: partitions of each probe and of all, timings, fidelity, what to cite."""
    records = outcomes["probe"].artifact.read_json("queries.json")
    pairs = enumerate(zip(probes, records, strict=True))
    described = [_probe(number, probe, record, rows) for number, (probe, record) in pairs]
    not_finite = [f"{row['probe_id']}: {row['partition']}, {row['index']}" for row in rows if row["score"] is None]
    if not_finite:
        log.warning("loss or gradient of %d sequences is not finite: %s", len(not_finite), "; ".join(not_finite[:5]))
    return {
        "name": config.name,
        "config": publishable(plain(config)),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": time.time() - started,
        "stages": {name: stage_summary(outcome) for name, outcome in outcomes.items()},
        "coverage": outcomes["layers"].extra["coverage"],
        "layers": outcomes["layers"].extra["description"],
        "fidelity": outcomes["fidelity"].artifact.read_json("fidelity.json"),
        "agreement": outcomes["agreement"].artifact.read_json("agreement.json"),
        "probes": described,
        "partitions": over_probes(described),
        "not_finite": not_finite,
        "score_unit": SCORE_UNIT,
        "artifacts": {name: outcome.artifact.uri for name, outcome in outcomes.items()},
    }


def _probe(number: int, probe: Probe, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["probe_id"] == probe.probe_id]
    scores = [math.nan if row["score"] is None else row["score"] for row in mine]
    others = range_of([row["scores"][number] for row in rows if row["probe_id"] != probe.probe_id])
    return {
        "probe_id": probe.probe_id,
        "prompt": record["prompt"],
        "completion": record["completion"],
        "contrast": record["contrast"],
        "measured": record["measured"],
        "reference": probe.reference,
        "partitions": by_partition([row["partition"] for row in mine], scores, probe.reference, others),
        "others": others,
    }
