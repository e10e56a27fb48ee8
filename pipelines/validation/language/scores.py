"""Stage `language_scores`: the scores of all training sequences by every solver, by the real steps of a trace.

Legend: Q queries, N training sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.factors import fit_solver, load_selection
from actors.sequences import read_candidates
from actors.store import Artifact
from conf.schema import RunConfig, Solver
from pipelines.runner import StageOutcome
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.problem import documents_of
from pipelines.validation.language.variants import read_scores, run_variants

BM25 = "bm25"
FILE = "scores.safetensors"


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """The config with each solver, by its name."""
    return {solver.name: replace(config, factors=replace(config.factors, solver=solver)) for solver in Solver}


def run(context: StageContext) -> StageResult:
    """Write `scores.safetensors` and `scores.json`.

    The tensors: METHOD -> [Q, N] float64 for every solver, and `bm25`, 0 where the prefilter proposes nothing.
    The JSON: `queries` (query_id, prompt, completion, measured), `sequences` N, `documents`, `damping` by layer,
    `parameters` (`tracked`, `model`), `seconds` of each step by method; steps that methods share are listed with each.
    """
    outcomes = run_variants(variants(context.config), cluster=context.cluster)
    scores = {name: _all_scores(found["scores"].artifact) for name, found in outcomes.items()}
    queries = context.inputs["gradients"].read_json("queries.json")
    sequences = next(iter(scores.values())).shape[1]
    scores[BM25] = bm25_scores(context.inputs["candidates"], [query["query_id"] for query in queries], sequences)
    context.artifact.write_tensors(FILE, {name: torch.from_numpy(value) for name, value in scores.items()})
    context.artifact.write_json("scores.json", _description(context, outcomes, queries, sequences))
    return StageResult({"queries": len(queries), "sequences": sequences, "methods": len(scores)})


def read_methods(scores: Artifact) -> dict[str, np.ndarray]:
    """scores_QN of every method."""
    return {name: value.numpy() for name, value in scores.read_tensors(FILE).items()}


def methods_and_curve(inputs: Mapping[str, Artifact]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """scores_QN of every method, those of `language_solves` among them, and scores_KQN of conjugate gradients."""
    methods = read_methods(inputs["language_scores"])
    exact_KQN = inputs["language_solves"].read_tensors("exact.safetensors")["scores_KQN"].numpy()
    lissa_QN = inputs["language_solves"].read_tensors("lissa.safetensors")["scores_QN"].numpy()
    return methods | {"lissa": lissa_QN, "exact": exact_KQN[-1]}, exact_KQN


def bm25_scores(candidates: Artifact, query_ids: list[str], sequences: int) -> np.ndarray:
    """The prefilter's own scores, [Q, N]; 0 where it proposes nothing."""
    table = read_candidates(candidates)
    positions = {name: position for position, name in enumerate(query_ids)}
    found_QN = np.zeros((len(query_ids), sequences))
    for row in table.filter(table["query_id"].is_valid()).to_pylist():
        found_QN[positions[row["query_id"]], row["sequence_id"]] = row["bm25_score"]
    return found_QN


def _all_scores(artifact: Artifact) -> np.ndarray:
    found = read_scores(artifact)
    assert np.array_equal(found.sequence_ids_N, np.arange(len(found.sequence_ids_N))), "unfiltered=all scores all"
    return found.scores_QN


def _description(
    context: StageContext,
    outcomes: Mapping[str, Mapping[str, StageOutcome]],
    queries: list[dict[str, Any]],
    sequences: int,
) -> dict[str, Any]:
    inputs = context.inputs
    selection = load_selection(inputs["layers"])
    factors = {name: inputs[name] for name in ("eigenbasis", "correction")}
    factor = context.config.factors.damping_factor
    return {
        "queries": [{key: query[key] for key in ("query_id", "prompt", "completion", "measured")} for query in queries],
        "sequences": sequences,
        "documents": len(set(documents_of(inputs["sequences"]))),
        "damping": {layer.name: fit_solver("ekfac", factors, layer, factor)[0].damping for layer in selection.layers},
        "parameters": {"tracked": selection.tracked_parameters, "model": selection.total_parameters},
        "seconds": {
            name: {step: outcome.seconds for step, outcome in found.items()} for name, found in outcomes.items()
        },
    }
