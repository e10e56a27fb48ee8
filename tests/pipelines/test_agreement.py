"""How well two ways of scoring agree, where that is defined."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipelines.stages.agreement import agreement, shown

FIRST = torch.tensor([[1.0, 4.0], [2.0, 1.0], [3.0, 0.0], [5.0, 9.0]])


def test_agreement_is_the_correlation_of_every_query():
    second = FIRST.square() + torch.tensor([0.0, 1.0])
    found = agreement(FIRST, second, ["a", "b"])
    expected = [float(np.corrcoef(FIRST[:, query], second[:, query])[0, 1]) for query in range(2)]
    assert found["pearson"] == pytest.approx(dict(zip("ab", expected, strict=True)))
    assert found["minimum"] == pytest.approx(min(expected))
    assert found["mean"] == pytest.approx(sum(expected) / 2)
    assert found["sample"] == 4


def test_sequences_that_are_not_finite_are_left_out():
    second = 2 * FIRST + 1
    second[1, 0] = float("nan")
    found = agreement(FIRST, second, ["a", "b"])
    assert found["sample"] == 3
    assert found["pearson"] == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_constant_query_has_no_correlation_and_the_others_do():
    second = FIRST.clone()
    second[:, 1] = 3.0
    found = agreement(FIRST, second, ["a", "b"])
    assert found["pearson"] == {"a": pytest.approx(1.0), "b": None}
    assert found["minimum"] == found["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_is_defined_on_fewer_than_two_sequences(rows: int):
    found = agreement(FIRST[:rows], FIRST[:rows], ["a", "b"])
    assert found == {"sample": rows, "pearson": {"a": None, "b": None}, "minimum": None, "mean": None}
    json.dumps(found, allow_nan=False)
    assert shown(found["minimum"]) == "undefined"
    assert shown(0.5) == "0.50000"
