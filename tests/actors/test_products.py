"""What a replica says of a model that cannot carry tangents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors import products
from actors.errors import WhenceError
from actors.replica import Replica
from actors.store import Store
from actors.tasks import ReplicaSpec
from conf.schema import ClusterConfig, ModelConfig, ScanConfig
from tests.integration.world import World, write_sequences


class Fused(torch.autograd.Function):
    """An operation as fused kernels are: with a backward pass, without a forward mode."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 2


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    world = World.make(tmp_path)
    model = ModelConfig(path=str(world.root / "gpt2"))
    return Replica(ReplicaSpec(model, ScanConfig(batch_size=2), ClusterConfig(cpus_per_rank=1)))


def test_an_operation_without_forward_mode_is_named_with_the_remedy(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = Store(str(tmp_path / "store")).folder("refinement", "a" * 64)
    corpus = write_sequences(Store(str(tmp_path / "store")), [[5, 6, 7, 8], [6, 7, 8, 9]], shard=4)
    names = {layer.name: torch.ones(1, layer.outputs, layer.columns) for layer in replica.selection.layers}
    monkeypatch.setattr(products, "read_direction", lambda *_: names)
    replica.worker.model.lm_head.register_forward_hook(lambda *given: Fused.apply(given[-1]))
    task: Any = SimpleNamespace(
        systems=SimpleNamespace(bundles=lambda layers: [layers]),
        direction=SimpleNamespace(chosen=(0,)),
        excluded={},
        sequence_ids=(0, 1),
        sequences=corpus,
        memory=1 << 30,
        output=output,
        folder="parts/x",
    )
    with pytest.raises(
        WhenceError, match=r"without a forward-mode derivative, which factors\.solver=ekfac_cg"
    ) as caught:
        replica.products(task)
    assert caught.value.remedy == "set model.attention=eager, or factors.solver=ekfac"
    assert output.list() == []
