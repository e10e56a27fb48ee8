"""Weights that DeepSpeed gathers in a pass are those that a plan counts: two ranks, each a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.model import load_skeleton
from conf.schema import ModelConfig
from influence.shape import forward_shape
from influence.traffic import weights_received
from tests.actors.shards import measure_all, on_processes
from tests.tiny import CASES

FAMILIES = ("gpt2", "llama", "neox")  # a tied head; inputs that layers share; attention beside the MLP
ROWS = [[[1, 2, 3, 4, 5]], [[5, 4, 3, 2, 1]]]


@pytest.mark.parametrize("layers", ["mlp", "attention"])
def test_weights_received_are_those_of_the_formula(tmp_path: Path, layers: str):
    configs = []
    for family in FAMILIES:
        CASES[family]().model.save_pretrained(tmp_path / family)  # type: ignore[operator]
        configs.append(ModelConfig(path=str(tmp_path / family), layers=layers))
    ranks = on_processes(2, measure_all, configs, ROWS)
    for number, config in enumerate(configs):
        for rank in ranks:
            assert not isinstance(rank, Exception), rank
            found = rank[number]
            expected = 4 * weights_received(forward_shape(load_skeleton(config), found.selection), 2)
            assert set(found.received) == {expected}, config.path
