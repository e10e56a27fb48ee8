"""The content of `validation.json`, and the table of scores and responses behind its correlations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.environment import hardware, versions
from actors.store import Artifact
from conf.schema import RunConfig, Subject, plain
from pipelines.runner import StageOutcome
from pipelines.tracing import publishable, stage_summary
from pipelines.validation.datasets import SETS
from pipelines.validation.language.scores import methods_and_curve
from pipelines.validation.presentation.figures import PAIRS
from pipelines.validation.responses import RECORD
from pipelines.validation.results import language, networks
from pipelines.validation.results.responses import response
from pipelines.validation.results.solved import solved

Outcomes = Mapping[str, StageOutcome]


def summarise(config: RunConfig, outcomes: Outcomes, started: float) -> dict[str, Any]:
    """The whole document; see `pipelines.validation.results`."""
    artifacts = {name: outcome.artifact for name, outcome in outcomes.items()}
    return {
        "name": config.name,
        "subject": config.validation.subject.name,
        "date": datetime.fromtimestamp(started).strftime("%Y-%m-%d"),
        "config": publishable(plain(config)),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": time.time() - started,
        "stages": {name: stage_summary(outcome) for name, outcome in outcomes.items()},
        "studies": {name: study for name, study in studies(config, artifacts).items() if study},
        "artifacts": {name: artifact.uri for name, artifact in artifacts.items()},
    }


def studies(config: RunConfig, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What was found, from the artifacts of the steps that ran."""
    if config.validation.subject in SETS:
        return _network(artifacts)
    if config.validation.subject is Subject.facts:
        found = artifacts["fact_tracing"].read_json("fact_tracing.json")
        return {
            "model": language.facts_model(found),
            "cost": language.cost(found["queries"], found["seconds"]),
            "tracing": language.tracing(found, "sentences"),
        }
    return _language(artifacts)


def _network(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    dataset, training, curvature, estimates = (
        artifacts[name].read_json(f"{name}.json") for name in ("dataset", "training", "curvature", "estimates")
    )
    measured = response(artifacts["responses"].read_json(RECORD)) if "responses" in artifacts else None
    scored = networks.read_scored(artifacts)
    agreed = networks.agreement(scored)
    found = {
        "model": networks.model(dataset, training, curvature),
        "agreement": agreed,
        "solved": None if agreed else solved(scored.scores),
        "cost": networks.cost(estimates),
        "response": measured,
        "blocks": networks.blocks(estimates, scored, agreed),
        "sizes": networks.sizes(artifacts["estimates"].read_json("sizes.json"), "examples"),
    }
    for name, read in (("datamodels", networks.datamodels), ("removal", networks.removal)):
        if name in artifacts:
            found[name] = read(artifacts[name].read_json(f"{name}.json"))
    return found


def _language(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    def record(step: str, file: str) -> Any:
        return artifacts[step].read_json(file) if step in artifacts else None

    scores = artifacts["language_scores"].read_json("scores.json")
    found: dict[str, Any] = {
        "model": language.model(scores),
        "cost": language.cost(len(scores["queries"]), scores["seconds"], record("language_solves", "solves.json")),
    }
    if responses := record("language_responses", "responses.json"):
        found["agreement"] = language.agreement(responses)
        found["response"] = response(responses)
    elif "language_solves" in artifacts:
        methods, _ = methods_and_curve(artifacts)
        found["solved"] = solved({name: torch.from_numpy(scores_QN) for name, scores_QN in methods.items()})
    found["iterations"] = language.iterations(responses, record("language_datamodels", "datamodels.json"))
    readers = (
        ("language_datamodels", "datamodels", language.datamodels),
        ("language_removal", "removal", language.removal),
        ("tracing", "tracing", language.tracing),
        ("ranks", "ranks", language.ranks),
        ("scale", "scale", language.scale),
    )
    for step, name, read in readers:
        if given := record(step, f"{name}.json"):
            found[name] = read(given)
    if given := record("block_factors", "block_factors.json"):
        found["blocks"] = language.block_factors(given)
    return found


def write_pairs(folder: Path, outcomes: Outcomes) -> None:
    """Write `pairs.parquet`: a row a measurement and point, with every method's score and the measured response.

    Nothing is written where no response was measured; a table of an earlier run in the same folder goes.
    """
    path = folder / PAIRS
    path.unlink(missing_ok=True)
    if "responses" not in outcomes or "estimates" not in outcomes:
        return
    artifacts = {name: outcome.artifact for name, outcome in outcomes.items()}
    scored = networks.read_scored(artifacts)
    assert scored.response_QP is not None
    measurements, points = scored.response_QP.shape
    columns: dict[str, Any] = {
        "measurement": np.repeat(np.arange(measurements), points),
        "test": np.repeat(np.asarray(scored.test_Q), points),
        "point": np.tile(np.asarray(scored.points_P), measurements),
        "response": scored.response_QP.reshape(-1).numpy(),
    }
    columns |= {name: scores.reshape(-1).numpy() for name, scores in scored.scores.items()}
    pq.write_table(pa.table(columns), path)
