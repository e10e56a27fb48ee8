"""Fingerprints: equal for what is equal, different for what is not, refused for what has no canonical form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from conf.schema import FactorsConfig, Solver, plain
from pipelines.fingerprint import canonical_json, fingerprint


def test_is_stable_across_releases():
    assert fingerprint({"version": 1, "b": [1, 2.5, None, True, "é"]}, {"tokenise": "ab"}) == (
        "b085a9cf727b3c67cb41c482cf482183270a3fbdc9d0b92f0bb8b973a02e2250"
    )


def test_order_and_container_do_not_matter():
    assert fingerprint({"a": 1, "b": (1, 2)}, {}) == fingerprint({"b": [1, 2], "a": 1}, {})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"a": True}),
        ({"a": None}, {}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": {"b": 1}}, {"a.b": 1}),
    ],
)
def test_differences_matter(first, second):
    assert fingerprint(first, {}) != fingerprint(second, {})


def test_inputs_matter():
    assert len({fingerprint({}, {}), fingerprint({}, {"a": "1"}), fingerprint({}, {"b": "1"})}) == 3
    assert fingerprint({"a": "1"}, {}) != fingerprint({}, {"a": "1"})


@dataclass
class Data:
    x: int = 1


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, len, lambda: 1, object(), Data(), Path("x"), {1, 2}, b"x", np.int64(3), Solver.ekfac, {1: 2}],
)
def test_refuses_what_has_no_canonical_form(value):
    with pytest.raises(ValueError, match=r"identity\.scan\[1\]"):
        fingerprint({"scan": [0, value]}, {})


def test_takes_a_config_made_plain():
    assert canonical_json(plain(FactorsConfig(samples=None))).startswith('{"blocks":1,')
