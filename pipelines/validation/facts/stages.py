"""Steps `facts` and `fact_tracing`: a model that has learnt sentences, and whether they are found for what they taught.

Legend: Q queries, N sentences. Every sentence is a document and a sequence of its own, numbered alike.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import ConfigError
from actors.store import Artifact
from conf.schema import (
    CorpusConfig,
    CorpusFormat,
    QueriesConfig,
    RunConfig,
    Solver,
    UnfilteredConfig,
    UnfilteredKind,
    plain,
)
from pipelines.almanac.evaluate import Judgement
from pipelines.runner import StageOutcome
from pipelines.steps import StageContext, StageResult, Step
from pipelines.validation.facts.learning import FactsSpec, Knowledge, drawn, examine, learn
from pipelines.validation.facts.sentences import Choice, choose, collection_digest, read_collection
from pipelines.validation.language.scores import bm25_scores
from pipelines.validation.language.tracing import CANDIDATES, bm25_then, trace_results
from pipelines.validation.language.variants import read_scores, run_variants

VERSIONS = {"facts": 1, "fact_tracing": 1}
SOLVERS = (Solver.identity, Solver.ekfac, Solver.ekfac_cg)
FITTED = ("samples", "blocks", "damping_factor", "seed", "groups", "cg_iterations", "cg_samples")
CORPUS, QUERIES, MODEL, TRUTH = "corpus.jsonl", "queries.jsonl", "model/", "facts.json"


def steps(config: RunConfig) -> list[Step]:
    """The two steps.

    Args:
        config: of it are read `validation` (path, seed, points, measurements, epochs), `factors` but for its solver,
            `prefilter`, `scan`, `cluster`, `seed`, `model.layers` and how a model is loaded; not which model, corpus
            and queries, which are made here.

    Raises:
        ConfigError: if `validation.path` is not a folder of facts.
    """
    spec = asdict(FactsSpec.of(config.validation))
    learnt = {"version": VERSIONS["facts"], "spec": spec, "data": collection_digest(config.validation.path)}
    traced = {
        "version": VERSIONS["fact_tracing"],
        "factors": {name: getattr(config.factors, name) for name in FITTED} | {"labels": config.factors.labels.name},
        "prefilter": plain(config.prefilter),
        "label_seed": config.seed,
        "model": [config.model.layers, config.model.dtype.name, config.model.attention],
        "precision": [config.scan.product_dtype.name, config.scan.sum_dtype.name],
    }
    return [
        Step("facts", "facts", (), learnt, run_facts),
        Step("fact_tracing", "fact_tracing", ("facts",), traced, run_tracing),
    ]


def run_facts(context: StageContext) -> StageResult:
    """Train, and write the model, `corpus.jsonl`, `queries.jsonl` and `facts.json`.

    `facts.json` holds `training` (loss, accuracy on the facts that were watched, epochs, parameters, vocabulary,
    seconds), `sentences`; the number of `facts` whose evidence is there, of those that are `answerable` in its words,
    `completed` and `known`; and `queries`: by id subject, relation, object, prompt, `evidence` (positions in the
    corpus), `log_probability` and `without_subject` (nats).

    Raises:
        ConfigError: if the model knows no fact.
    """
    config, output = context.config, context.artifact
    spec = FactsSpec.of(config.validation)
    choice = choose(
        read_collection(config.validation.path), spec.sentences, spec.training.context, spec.filler, spec.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        training = learn(choice, spec, Path(folder))
        knowledge = examine(Path(folder), choice.facts, spec)
        for path in sorted(Path(folder).iterdir()):
            output.write_bytes(MODEL + path.name, path.read_bytes())
    asked = drawn(knowledge, spec)
    if not asked:
        raise ConfigError(
            f"the model knows none of {len(knowledge)} facts after validation.epochs={spec.training.epochs}",
            remedy="raise validation.epochs or validation.points",
        )
    _write_files(output, choice, asked)
    counts = {
        "sentences": len(choice.texts),
        "facts": len(choice.facts),
        "answerable": len(knowledge),
        "completed": sum(each.completed for each in knowledge),
        "known": sum(each.known for each in knowledge),
    }
    output.write_json(TRUTH, counts | {"training": asdict(training), "queries": _described(asked)})
    return StageResult(counts | {"queries": len(asked)}, {"training": asdict(training)})


def run_tracing(context: StageContext) -> StageResult:
    """Trace every query with every solver, and write `fact_tracing.json`.

    It holds the content of `facts.json`, its `queries` called `about`; what
    `pipelines.validation.language.tracing.trace_results` says of the methods `identity`, `ekfac`, `ekfac_cg`, `bm25`
    and `bm25_ekfac`; `candidates`, BM25's for EK-FAC; and `seconds` of each step by solver.
    """
    facts = context.inputs["facts"]
    truth = facts.read_json(TRUTH)
    texts = [json.loads(line)["text"] for line in facts.read_bytes(CORPUS).decode().splitlines()]
    with tempfile.TemporaryDirectory() as aside:
        configs = variants(context.config, local_folder(facts, Path(aside)))
        outcomes = run_variants(configs)
    methods = _methods(outcomes, list(truth["queries"]), len(texts))
    judgements = [judgement(query_id, about, texts) for query_id, about in truth["queries"].items()]
    seconds = {name: {step: outcome.seconds for step, outcome in found.items()} for name, found in outcomes.items()}
    about = {key: value for key, value in truth.items() if key != "queries"} | {"about": truth["queries"]}
    results = about | {"candidates": CANDIDATES, "seconds": seconds}
    context.artifact.write_json("fact_tracing.json", results | trace_results(methods, judgements, len(texts)))
    return StageResult({"queries": len(judgements), "sentences": len(texts)})


def variants(config: RunConfig, folder: Path) -> dict[str, RunConfig]:
    """The traces by solver: every sentence is scored, by queries of full rank.

    Args:
        config: of the validation.
        folder: of the files that the step `facts` wrote.
    """
    context = FactsSpec.of(config.validation).training.context
    corpus = CorpusConfig(
        path=str(folder / CORPUS), format=CorpusFormat.jsonl, id_field="id", pack=False, sequence_length=context
    )
    whole = replace(
        config,
        model=replace(config.model, path=str(folder / MODEL), tokenizer=None, revision=None),
        corpus=corpus,
        queries=QueriesConfig(path=str(folder / QUERIES), rank="full"),
        unfiltered=UnfilteredConfig(kind=UnfilteredKind.all),
    )
    return {solver.name: replace(whole, factors=replace(config.factors, solver=solver)) for solver in SOLVERS}


def local_folder(artifact: Artifact, aside: Path) -> Path:
    """Where the files of an artifact lie on this machine: in the store, or copied aside from a store elsewhere.

    Replicas on other machines need a store that they see as well.
    """
    here = Path(artifact.uri.removeprefix("file://"))
    if here.is_dir():
        return here
    for name in artifact.list():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(artifact.read_bytes(name))
    return aside


def judgement(query_id: str, about: Mapping[str, Any], texts: Sequence[str]) -> Judgement:
    """What is known of one query: sentences of its `evidence`; and others that name the `subject`, or the `object`."""
    evidence = set(about["evidence"])
    others = [number for number in range(len(texts)) if number not in evidence]
    subject = [number for number in others if about["subject"] in texts[number]]
    named = set(subject)
    object_ = [number for number in others if about["object"] in texts[number] and number not in named]
    confusing = {"subject": np.asarray(subject, dtype=np.int64), "object": np.asarray(object_, dtype=np.int64)}
    return Judgement(query_id, {"evidence": np.asarray(sorted(evidence), dtype=np.int64)}, confusing)


def _methods(
    outcomes: Mapping[str, Mapping[str, StageOutcome]], query_ids: list[str], sentences: int
) -> dict[str, np.ndarray]:
    """scores_QN by method."""
    methods = {name: np.full((len(query_ids), sentences), np.nan) for name in outcomes}
    for name, found in outcomes.items():
        scores = read_scores(found["scores"].artifact)
        methods[name][:, scores.sequence_ids_N] = scores.scores_QN
    candidates = next(iter(outcomes.values()))["candidates"].artifact
    bm25_QN = bm25_scores(candidates, query_ids, sentences)
    return methods | {"bm25": bm25_QN, "bm25_ekfac": bm25_then(methods["ekfac"], bm25_QN, CANDIDATES)}


def _write_files(output: Artifact, choice: Choice, asked: Sequence[Knowledge]) -> None:
    """The corpus and the queries, as a trace reads them."""
    documents = [{"id": str(number), "text": text} for number, text in zip(choice.numbers, choice.texts, strict=True)]
    facts = [each.fact for each in asked]
    queries = [{"query_id": f.fact_id, "prompt": f.prompt, "completion": f.completion} for f in facts]
    for name, records in ((CORPUS, documents), (QUERIES, queries)):
        output.write_bytes(name, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def _described(asked: Sequence[Knowledge]) -> dict[str, dict[str, Any]]:
    return {
        each.fact.fact_id: {
            "subject": each.fact.subject,
            "relation": each.fact.relation,
            "object": each.fact.object,
            "prompt": each.fact.prompt,
            "evidence": list(each.fact.evidence),
            "log_probability": each.log_probability,
            "without_subject": each.without_subject,
        }
        for each in asked
    }
