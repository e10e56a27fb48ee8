"""Train the almanac's model again on some of its documents, and measure the queries.

All trainings of a seed begin with the same weights; what differs is the documents, and with them the batches. The
recipe is that of the model under study: as many epochs, hence fewer steps where there are fewer documents.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from actors.model import load_model
from actors.queries import read_queries
from actors.store import Artifact
from conf.schema import RunConfig
from influence.gauss_newton import LanguageNetwork
from pipelines.almanac.train import train_on, train_tokenizer
from pipelines.almanac.world import generate
from pipelines.steps import StageContext
from pipelines.validation.language.problem import measure
from pipelines.validation.language.subject import specs_of


def seed_of(config: RunConfig, retraining: int) -> int:
    """The seed of a retraining; none is the seed of the model under study."""
    return specs_of(config).training.seed + 1 + retraining


def retrain(config: RunConfig, kept: Sequence[int], seed: int, output: Artifact, name: str) -> None:
    """Train on some documents and write `NAME`.json: `measured` (f of every query), `loss`, `accuracy`, `seconds`.

    Args:
        config: prepared, of an almanac.
        kept: numbers of the documents.
        seed: of the first weights and of the batches.
        output: where to write.
        name: of the file, without its ending.
    """
    disable_progress_bar()  # those of files would garble the driver's log
    begun, specs = time.perf_counter(), specs_of(config)
    world = generate(specs.world)
    texts = [document.text for document in world.documents]
    spec = replace(specs.training, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [texts[number] for number in kept]
        training = train_on(chosen, world.queries, train_tokenizer(texts), spec, Path(folder))
        network = LanguageNetwork(load_model(replace(config.model, path=folder)))
    queries = read_queries(config)
    measured_Q = measure(network, queries, config.queries.measurement.name)
    record = {"measured": measured_Q.tolist(), "loss": training.loss, "accuracy": training.accuracy}
    output.write_json(f"{name}.json", record | {"seconds": time.perf_counter() - begun})


def retrain_all(context: StageContext, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, dict[str, Any]]:
    """Train side by side what is not there yet, and read all of it.

    Args:
        context: of the stage.
        wanted: (documents, seed) by the name of the file.

    Returns:
        What `retrain` wrote, by name.
    """
    output = context.artifact
    waiting = [name for name in wanted if not output.exists(f"{name}.json")]
    progress = context.progress("trainings", len(wanted), "models")
    progress.resume(len(wanted) - len(waiting))
    tasks = [(context.config, tuple(wanted[name][0]), wanted[name][1], output, name) for name in waiting]
    for _ in context.cluster.map(retrain, tasks):
        progress.advance(1)
    progress.close()
    return {name: output.read_json(f"{name}.json") for name in wanted}


def documents(config: RunConfig) -> int:
    """How many documents the almanac has."""
    return len(generate(specs_of(config).world).documents)


def measured_by_seed(found: Mapping[str, Mapping[str, Any]], names: Sequence[Sequence[str]]) -> np.ndarray:
    """The measurement of every query, [Q, S, R]: S sets of documents, R seeds, by names of files [S][R]."""
    return np.asarray([[found[name]["measured"] for name in row] for row in names]).transpose(2, 0, 1)


def seconds_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`seconds` of all trainings together, and `seconds_a_training`, the mean."""
    seconds = [record["seconds"] for record in found.values()]
    return {"seconds": float(np.sum(seconds)), "seconds_a_training": float(np.mean(seconds))}
