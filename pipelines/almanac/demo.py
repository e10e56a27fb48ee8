"""The demo: generate the almanac, train on it, trace its facts, and say how well their documents were found.

Everything that is traced goes through the real job, `pipelines.tracing.run_trace`, once with EK-FAC and once with the
gradient dot product; the two runs share tokenised sequences, candidates and query gradients through the store.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from actors.sequences import read_candidates
from conf.load import compose_config, override_strings
from conf.schema import ProbeConfig, RunConfig
from pipelines.almanac import evaluate
from pipelines.almanac.evaluate import Evaluation, Judgement
from pipelines.almanac.probes import by_training_order, write_probes
from pipelines.almanac.results import render_markdown
from pipelines.almanac.train import TrainSpec, train
from pipelines.almanac.world import CONFUSING, STATING, WorldSpec, generate, write
from pipelines.fingerprint import fingerprint
from pipelines.probing import ProbeResult, run_probe
from pipelines.tracing import TraceResult, run_trace

log = logging.getLogger(__name__)

HOME = Path(".whence/almanac")
PROBES = "probes.yaml"
METHODS = {"EK-FAC": "ekfac", "gradient dot product": "identity"}  # the title of a method, and its solver


@dataclass(frozen=True)
class Almanac:
    """A generated world on disk, with the model that was trained on it."""

    folder: Path
    training: Mapping[str, Any]

    @property
    def truth(self) -> dict[str, Any]:
        """The content of `truth.json`: facts, and the documents of each query by kind."""
        return json.loads((self.folder / "truth.json").read_text(encoding="utf-8"))

    def overrides(self) -> list[str]:
        """Hydra overrides that name the model, the corpus and the queries, and how the corpus is cut."""
        settings = {
            "unfiltered": "all",
            "cluster": "replicas2",
            "model.path": str(self.folder / "model"),
            "corpus": {"path": str(self.folder / "almanac.jsonl"), "id_field": "id", "pack": False},
            "corpus.sequence_length": self.training["context"],
            "queries.path": str(self.folder / "queries.jsonl"),
            "tails.count": 50,  # 0.01 per cent of a few thousand documents is none
            "report.title": "Which documents of the almanac state this fact?",
        }
        return override_strings(settings)


def demo(overrides: Sequence[str] = (), run_dir: str | Path | None = None) -> int:
    """Run the demo and print how well each method finds the documents that state a fact.

    Args:
        overrides: Hydra overrides of the trace; they win over the demo's own, except the solver.
        run_dir: Folder of the results; by default one under `runs/` named by date and time.

    Returns:
        0, the exit status.

    Raises:
        ConfigProblems: listing every setting that is not allowed.
        WhenceError: if a trace fails.
    """
    started = time.perf_counter()
    almanac = prepare(HOME, WorldSpec(), TrainSpec())
    prepared = time.perf_counter()
    configs = {title: _config(almanac, overrides, solver) for title, solver in METHODS.items()}
    folder = Path(run_dir) if run_dir else _run_dir(next(iter(configs.values())))
    traces = {title: run_trace(config, folder / METHODS[title]) for title, config in configs.items()}
    seconds = {"almanac": prepared - started, "traces": time.perf_counter() - prepared}
    probed = run_probe(_probed(almanac, next(iter(configs.values()))), folder / "probes")
    seconds["probes"] = time.perf_counter() - prepared - seconds["traces"]
    results = judge(almanac, traces) | {"probes": judge_probes(almanac, probed), "seconds": seconds}
    text = render_markdown(results)
    (folder / "almanac.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "almanac.md").write_text(text, encoding="utf-8")
    report = next(iter(traces.values())).report_path
    sys.stdout.write(f"\n{text}\nresults: {folder / 'almanac.md'}\nreport:  {report}\nprobes:  {probed.page_path}\n")
    return 0


def prepare(home: Path, world_spec: WorldSpec, train_spec: TrainSpec) -> Almanac:
    """Generate the world and train on it, or take what an earlier run left for the same parameters.

    Args:
        home: A folder for almanacs; each gets one of its own, named by its fingerprint.
        world_spec: What the world is like.
        train_spec: What the model is like.
    """
    world = generate(world_spec)
    documents = [asdict(document) for document in world.documents]
    specs = {"world": asdict(world_spec), "training": asdict(train_spec), "documents": documents}
    folder = home / fingerprint(specs, {})[:16]
    if not (folder / "training.json").exists():
        log.info("almanac: %d documents; training a model on them", len(world.documents))
        aside = home / f".tmp-{uuid.uuid4().hex}"
        write(world, aside)
        training = train(world, train_spec, aside / "model")
        record = asdict(training) | {"context": train_spec.context, "documents": len(documents)}
        (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _move(aside, folder)
    write_probes(world, folder / PROBES)
    return Almanac(folder, json.loads((folder / "training.json").read_text(encoding="utf-8")))


def judge(almanac: Almanac, traces: Mapping[str, TraceResult]) -> dict[str, Any]:
    """Compare the scores of every method with what is known.

    Args:
        almanac: The world.
        traces: Finished traces of all its documents, by the title of their method.

    Returns:
        The content of `almanac.json`.
    """
    truth, first = almanac.truth, next(iter(traces.values()))
    query_ids, names, document_of_sequence = first.query_ids, *_documents(first)
    positions = {name: position for position, name in enumerate(names)}
    judgements = [_judgement(query_id, truth["queries"][query_id], positions) for query_id in query_ids]
    scores = {title: _influence(trace, document_of_sequence, len(names)) for title, trace in traces.items()}
    scores["BM25"] = _bm25(first, document_of_sequence, len(names))
    methods = {title: _method(scores_QN, judgements) for title, scores_QN in scores.items()}
    methods["random order"] = {"mean": asdict(evaluate.expected_by_chance(len(names), judgements))}
    return {
        "k": evaluate.K,
        "documents": len(names),
        "queries": {query_id: _about(truth, query_id) for query_id in query_ids},
        "training": dict(almanac.training),
        "methods": methods,
    }


def judge_probes(almanac: Almanac, probed: ProbeResult) -> dict[str, Any]:
    """What the partitions of the probes come to, by the order in which training stated the facts."""
    truth = almanac.truth
    orders = {query_id: _about(truth, query_id)["order"] for query_id in truth["queries"]}
    return by_training_order(probed.summary, orders)


def _probed(almanac: Almanac, config: RunConfig) -> RunConfig:
    probe = ProbeConfig(path=str((almanac.folder / PROBES).absolute()))
    return replace(config, probe=probe, report=replace(config.report, title="What if a fact were stated otherwise?"))


def _config(almanac: Almanac, overrides: Sequence[str], solver: str) -> RunConfig:
    return compose_config(["name=almanac", *almanac.overrides(), *overrides, f"factors.solver={solver}"])


def _run_dir(config: RunConfig) -> Path:
    return Path("runs") / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def _move(aside: Path, folder: Path) -> None:
    """Put a finished folder in its place; whoever was first there has the same content."""
    try:
        os.replace(aside, folder)
    except OSError:
        if not (folder / "training.json").exists():
            raise
        shutil.rmtree(aside)


def _documents(trace: TraceResult) -> tuple[list[str], np.ndarray]:
    """Names of the documents, and the position among them for every sequence id."""
    sequences = trace.artifact("sequences")
    index = sequences.read_json("index.json")
    assert isinstance(index, dict)
    names: dict[str, int] = {}
    owners: list[int] = []
    for shard in index["shards"]:
        table = sequences.read_table(shard["name"], columns=["document_id"])
        owners += [names.setdefault(name, len(names)) for name in table.column("document_id").to_pylist()]
    return list(names), np.asarray(owners)


def _influence(trace: TraceResult, document_of_sequence: np.ndarray, documents: int) -> np.ndarray:
    """scores_QN of a trace."""
    table = trace.scores_table()
    scores_SQ = np.asarray(table.column("scores").to_pylist(), dtype=np.float64)
    sequence_ids_S = table.column("sequence_id").to_numpy()
    return evaluate.document_scores(sequence_ids_S, scores_SQ, document_of_sequence, documents)


def _bm25(trace: TraceResult, document_of_sequence: np.ndarray, documents: int) -> np.ndarray:
    """scores_QN of the prefilter; 0, the lowest there is, where it proposes nothing."""
    table = read_candidates(trace.artifact("candidates"))
    queries = {query_id: position for position, query_id in enumerate(trace.query_ids)}
    scores_QN = np.zeros((len(queries), documents))
    for row in table.to_pylist():
        if row["query_id"] is not None:
            place = queries[row["query_id"]], document_of_sequence[row["sequence_id"]]
            scores_QN[place] = max(scores_QN[place], row["bm25_score"])
    return scores_QN


def _judgement(query_id: str, known: Mapping[str, Any], positions: Mapping[str, int]) -> Judgement:
    def found(kind: str) -> np.ndarray:
        return np.asarray([positions[name] for name in known[kind]], dtype=np.int64)

    return Judgement(query_id, {kind: found(kind) for kind in STATING}, {kind: found(kind) for kind in CONFUSING})


def _method(scores_QN: np.ndarray, judgements: Sequence[Judgement]) -> dict[str, Any]:
    each: list[Evaluation] = [evaluate.evaluate(scores_N, j) for scores_N, j in zip(scores_QN, judgements, strict=True)]
    by_query = {judgement.query_id: asdict(result) for judgement, result in zip(judgements, each, strict=True)}
    return {"mean": asdict(evaluate.mean(each)), "queries": by_query}


def _about(truth: Mapping[str, Any], query_id: str) -> dict[str, Any]:
    known = truth["queries"][query_id]
    fact = next(fact for fact in truth["facts"] if fact["fact_id"] == known["fact"])
    return {"order": fact["order"]} | {kind: len(known[kind]) for kind in STATING + CONFUSING}
