"""What a validation on a language model is about: a config that names model, corpus and queries, and how it is traced.

The almanac of a validation is smaller than the demo's: models are trained on it hundreds of times.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from conf.schema import RunConfig, Solver, Subject, UnfilteredKind
from pipelines.almanac.demo import HOME
from pipelines.almanac.demo import prepare as prepare_almanac
from pipelines.almanac.train import TrainSpec
from pipelines.almanac.world import WorldSpec

WORLD = WorldSpec(entities=4, near_misses=4, distractors=3, filler=260, queries=10)
TRAINING = TrainSpec(hidden=48, intermediate=128, layers=2, batch_size=16, epochs=12, most_epochs=12)
SPECS = "specs.json"


@dataclass(frozen=True)
class Specs:
    """What an almanac was made of: its world, and how a model is trained on it."""

    world: WorldSpec
    training: TrainSpec


def prepare(config: RunConfig, world: WorldSpec = WORLD, training: TrainSpec = TRAINING) -> RunConfig:
    """The config of a validation, complete: every sequence is scored by queries of full rank, EK-FAC the first method.

    Args:
        config: `validation.subject` is `almanac`, which is generated and trained in `validation.path` (by default where
            the demo keeps its own) unless it is there; or another one, whose model, corpus and queries are named.
        world: the almanac's.
        training: of its model.
    """
    if config.validation.subject is Subject.almanac:
        almanac = prepare_almanac(Path(config.validation.path or HOME), world, training)
        specs = {"world": asdict(world), "training": asdict(training)}
        (almanac.folder / SPECS).write_text(json.dumps(specs, indent=1) + "\n", encoding="utf-8")
        config = _named(config, almanac.folder, training.context)
    return replace(
        config,
        factors=replace(config.factors, solver=Solver.ekfac),
        queries=replace(config.queries, rank="full", fidelity=None),
        unfiltered=replace(config.unfiltered, kind=UnfilteredKind.all),
    )


def specs_of(config: RunConfig) -> Specs:
    """What the almanac of a prepared config was made of."""
    found = json.loads((almanac_folder(config) / SPECS).read_text(encoding="utf-8"))
    return Specs(WorldSpec(**found["world"]), TrainSpec(**found["training"]))


def almanac_folder(config: RunConfig) -> Path:
    """Where the almanac of a prepared config lies."""
    return Path(config.model.path).parent


def _named(config: RunConfig, folder: Path, context: int) -> RunConfig:
    corpus = replace(
        config.corpus, path=str(folder / "almanac.jsonl"), id_field="id", pack=False, sequence_length=context
    )
    return replace(
        config,
        model=replace(config.model, path=str(folder / "model")),
        corpus=corpus,
        queries=replace(config.queries, path=str(folder / "queries.jsonl")),
    )
