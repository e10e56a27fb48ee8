"""What a second copy of the model takes in a plan: its own type's bytes, where it is what works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.load import compose_config
from conf.schema import Dtype
from pipelines.estimate import estimate
from pipelines.plan import make_plan
from pipelines.stepcost import activations, gathered, passes, weights
from pipelines.workload import Lockstep, Workload

GIVEN = ["experiment=paper_52b", "scan.agreement_sample=64", "attribution=all", "attribution.top=10"]
WALKS_A_PAIR = 2


@pytest.fixture(scope="module")
def load() -> Workload:
    """A model in bfloat16 over eight ranks, whose tokens and agreement are computed by a copy in float32."""
    return make_plan(compose_config(GIVEN, planned=True)).load


def in_type(load: Workload, dtype: Dtype) -> Workload:
    config = load.config
    return replace(load, config=replace(config, model=replace(config.model, dtype=dtype)))


def test_weights_of_the_copy_are_gathered_at_its_size(load: Workload):
    assert load.config.model.dtype is Dtype.bfloat16
    plain, with_copy = weights(load), weights(load, Dtype.float32)
    assert with_copy["weights"] == plain["weights"]
    assert with_copy["gathered weights"] == 2 * plain["gathered weights"]
    assert gathered(load, 3, copy=Dtype.float32) == gathered(in_type(load, Dtype.float32), 3) == 2 * gathered(load, 3)
    assert activations(load, 2, 16, copy=Dtype.float32) == activations(in_type(load, Dtype.float32), 2, 16)
    alone = replace(load, config=replace(load.config, cluster=replace(load.config.cluster, world_size=1)))
    assert weights(alone, Dtype.float32) == weights(alone)  # the copy is counted beside it


def test_the_attribution_gathers_its_first_pass_in_the_models_type_and_the_others_in_float32(load: Workload):
    found, single = estimate(load)["attribution"], estimate(in_type(load, Dtype.float32))["attribution"]
    pairs = load.queries * 10
    first = Lockstep.over([pairs], load.ranks, load.config.scan.batch_size)
    assert single.moved["weights"] - found.moved["weights"] == gathered(load, first.steps)
    assert found.moved["weights"] > gathered(load, first.steps) + WALKS_A_PAIR * gathered(load, first.steps)
    assert found.memory["gathered weights"] == single.memory["gathered weights"]
    assert found.memory["autograd"] == single.memory["autograd"]
    assert "weights in float32" in found.memory
    assert "weights in float32" not in single.memory


def test_the_agreement_is_half_the_models_and_half_the_copys(load: Workload):
    found = estimate(load)["agreement"]
    steps = Lockstep.over([64], load.ranks, load.config.scan.batch_size).steps
    assert found.moved["weights"] == 3 * gathered(load, steps)
    assert found.memory["gathered weights"] == weights(load, Dtype.float32)["gathered weights"]
    floor = passes(load, 64, load.tokens, False)
    assert found.work["bfloat16"] == floor["bfloat16"] == found.work["float32"]
    assert found.work["elementwise"] == 2 * floor["elementwise"]
