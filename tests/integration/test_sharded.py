"""Whole runs on replicas whose model is sharded with DeepSpeed: the scores of one process, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actors.factors import layer_file, load_selection
from actors.store import Artifact
from pipelines.tracing import TraceResult, run_trace
from tests.integration.world import World, run_locally

pytestmark = pytest.mark.slow

RELATIVE = 1e-5  # of the largest entry, in float32


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= RELATIVE, f"{what}: {error:.1e} of the largest entry"


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    names = [name for name in artifact.list() if name.endswith(".safetensors")]
    return {f"{name}:{key}": value for name in names for key, value in artifact.read_tensors(name).items()}


def scores_of(result: TraceResult) -> tuple[list[int], np.ndarray]:
    table = pq.read_table(result.run_dir / "scores").sort_by("sequence_id")
    return table.column("sequence_id").to_pylist(), np.asarray(table.column("scores").to_pylist())


def assert_same_run(found: TraceResult, expected: TraceResult) -> None:
    """Equal to rounding: A, S, Λ, query gradients and scores. Bases may differ in signs, so they are not compared."""
    for step in ("covariance", "gradients"):
        mine, theirs = tensors_of(found.artifact(step)), tensors_of(expected.artifact(step))
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            close(mine[name], value, f"{step} {name}")
    for layer in load_selection(expected.artifact("layers")).layers:
        mine, theirs = (run.artifact("correction").read_tensors(layer_file(layer.name)) for run in (found, expected))
        close(mine["correction"].sum(), theirs["correction"].sum(), f"correction of {layer.name}")
    (ids, scores), (all_ids, all_scores) = scores_of(found), scores_of(expected)
    assert ids == all_ids
    close(torch.from_numpy(scores), torch.from_numpy(all_scores), "scores")


CASES = {
    "two ranks": {"cluster__world_size": 2},
    "two ranks, gpt2, rank 4, an uneven batch": {
        "cluster__world_size": 2,
        "model__path": "gpt2",
        "queries__rank": "4",
        "scan__batch_size": 5,
    },
    "four ranks, blocks, several passes": {
        "cluster__world_size": 4,
        "corpus__limit": 40,
        "factors__blocks": 2,
        "cluster__memory_per_rank": 1700,
        "scan__batch_size": 3,
    },
    "two replicas of two ranks": {"cluster__world_size": 2, "cluster__max_replicas": 2, "cluster__num_cpus": 6},
    "one rank with its weights offloaded": {"model__offload": "cpu"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_scores_as_one_process_does(ray_session: None, world: World, tmp_path: Path, name: str):
    changes: dict[str, Any] = dict(CASES[name])
    if "model__path" in changes:
        changes["model__path"] = str(world.root / changes["model__path"])
    alone = {key: value for key, value in changes.items() if not key.startswith("cluster__") and "offload" not in key}
    expected = run_locally(world.config(tmp_path / "alone", **alone), tmp_path / "expected")
    found = run_trace(world.config(tmp_path / "store", **changes), tmp_path / "found")
    assert_same_run(found, expected)
