"""What a replica makes of stored queries: full matrices lose no digits that factors would keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.factors import layer_file
from actors.holdings import HeldQueries, Queries
from actors.store import Artifact, Store
from conf.schema import Contraction, ScanConfig
from influence.capture import Use
from influence.exchange import Alone
from influence.layers import LayerSelection, TrackedLayer
from influence.scoring import layer_scores
from influence.worker import Precision

LAYER = TrackedLayer("mlp.up", ("mlp.up",), 6, 5, False, False, "mlp.up")
COUNT, RANK = 3, 4
DOUBLE = Precision(torch.float64, torch.float64)


@pytest.fixture
def stored(tmp_path: Path) -> Artifact:
    """Factors of three queries in float32, as the compression writes them."""
    artifact = Store(str(tmp_path / "store")).folder("queries", "a" * 64)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(LAYER.outputs, COUNT * RANK, generator=generator)
    right = torch.randn(LAYER.columns, COUNT * RANK, generator=generator)
    owner = torch.arange(COUNT).repeat_interleave(RANK)
    artifact.write_tensors(layer_file(LAYER.name), {"left": left, "right": right, "owner": owner})
    artifact.write_json("queries.json", [{"query_id": str(number)} for number in range(COUNT)])
    return artifact


def held(contraction: Contraction, precision: Precision) -> HeldQueries:
    scan = ScanConfig(contraction=contraction)
    return HeldQueries(
        LayerSelection((LAYER,), (), LAYER.parameters), scan, precision, torch.device("cpu"), Alone(), None
    )


def scores(queries: Queries) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    act_BTI = torch.randn(2, 7, LAYER.inputs, generator=generator, dtype=torch.float64)
    grad_BTO = torch.randn(2, 7, LAYER.outputs, generator=generator, dtype=torch.float64)
    return layer_scores(LAYER, [Use(act_BTI, grad_BTO)], queries[LAYER.name], torch.float64, torch.float64)


def test_dense_and_factored_scores_agree_to_the_last_digits_of_float64(stored: Artifact):
    factored = scores(held(Contraction.factored, DOUBLE).planned(stored, 7))
    dense = scores(held(Contraction.dense, DOUBLE).planned(stored, 7))
    torch.testing.assert_close(dense, factored, rtol=1e-13, atol=1e-13)


def test_a_few_full_queries_have_the_digits_of_the_sums(stored: Artifact):
    tensors = stored.read_tensors(layer_file(LAYER.name))
    mine = tensors["owner"] == 2
    expected = tensors["left"][:, mine].double() @ tensors["right"][:, mine].double().T
    (double,) = held(Contraction.auto, DOUBLE).some(stored, [2]).values()
    assert double.dense_QOI is not None
    torch.testing.assert_close(double.dense_QOI[0], expected, rtol=1e-15, atol=1e-15)
    (single,) = held(Contraction.auto, Precision()).some(stored, [2]).values()
    assert single.dense_QOI is not None
    assert single.dense_QOI.dtype == torch.float32
