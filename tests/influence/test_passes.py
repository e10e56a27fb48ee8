"""Passes over the sample: whole groups, in the model's order, never more than a rank may hold."""

from __future__ import annotations

import random

import pytest
import torch

from influence.correction import CorrectionSums
from influence.covariance import CovarianceSums, block_slices
from influence.eigenbasis import BlockBasis
from influence.exchange import shares
from influence.layers import LayerSelection, TrackedLayer
from influence.passes import correction_bytes, covariance_bytes, plan_passes, upper_strips


def layer(name: str, inputs: int = 10, outputs: int = 20, group: str | None = None, bias: bool = False) -> TrackedLayer:
    return TrackedLayer(name, (name,), inputs, outputs, bias, False, group or name)


def names(passes: tuple[tuple[TrackedLayer, ...], ...]) -> list[str]:
    return ["".join(layer.name for layer in group) for group in passes]


def sizes(**of: int):
    return lambda layer: of[layer.name]


ABCD = [layer(name) for name in "abcd"]


def test_no_limit_is_one_pass():
    assert names(plan_passes(ABCD, lambda _: 10**18, None)) == ["abcd"]
    assert plan_passes([], lambda _: 1, 5) == ()


def test_as_few_passes_as_fit_in_the_order_of_the_model():
    assert names(plan_passes(ABCD, lambda _: 3, 6)) == ["ab", "cd"]
    assert names(plan_passes(ABCD, lambda _: 3, 5)) == ["a", "b", "c", "d"]
    assert names(plan_passes(ABCD, lambda _: 3, 12)) == ["abcd"]
    assert names(plan_passes(ABCD, sizes(a=1, b=6, c=5, d=1), 6)) == ["a", "b", "cd"]


def test_layers_that_see_one_input_stay_together():
    layers = [layer("g", group="g"), layer("u", group="g"), layer("d")]
    assert names(plan_passes(layers, sizes(g=2, u=1, d=3), 5)) == ["gu", "d"]
    apart = [layer("g", group="g"), layer("d"), layer("u", group="g")]
    assert names(plan_passes(apart, sizes(g=2, u=2, d=3), 4)) == ["gu", "d"]


def test_no_pass_exceeds_the_limit_and_none_is_lost():
    generator = random.Random(0)
    for _ in range(200):
        layers = [layer(f"l{index}", group=f"l{index - index % 2}") for index in range(generator.randint(1, 12))]
        size = {item.name: generator.randint(0, 40) for item in layers}
        found = plan_passes(layers, lambda item, size=size: size[item.name], 80)
        assert [item for group in found for item in group] == layers
        totals = [sum(size[item.name] for item in group) for group in found]
        assert max(totals) <= 80
        firsts = [[item for item in group if item.input_group == group[0].input_group] for group in found[1:]]
        for total, first in zip(totals, firsts, strict=False):  # the next group did not fit
            assert total + sum(size[item.name] for item in first) > 80


@pytest.mark.parametrize("group", ["alone", "shared"])
def test_a_layer_that_does_not_fit_is_named_with_what_helps(group: str):
    layers = [layer("small"), layer("mlp.up", group="up"), layer("mlp.gate", group="up" if group == "shared" else None)]
    layers[1:] = layers[1:] if group == "shared" else [layer("mlp.up")]
    with pytest.raises(ValueError, match=r"cluster\.memory_per_rank=100 is too small for mlp\.up") as caught:
        plan_passes(layers, lambda item: 1 if item.name == "small" else 101, 100)
    told = str(caught.value)
    assert "cluster.world_size" in told
    assert "factors.blocks" in told
    assert ("mlp.gate" in told) == (group == "shared")
    assert ("202" if group == "shared" else "101") in told


def held_by(rank: int, ranks: int, blocks: int, layers: list[TrackedLayer]) -> int:
    """Numbers that a rank's empty covariance sums hold."""
    sums = CovarianceSums.empty(LayerSelection(tuple(layers), (), 0), blocks, rank=rank, ranks=ranks)
    moments = [*sums.activation.values(), *sums.gradient.values()]
    return sum(value.numel() for moment in moments for value in moment.strips.values())


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_of_the_covariance_are_those_of_the_sums(ranks: int, blocks: int):
    layers = [
        layer("w", 300, 500, bias=True),
        layer("v", 300, 700, group="w", bias=True),
        layer("down", 700, 300),
    ]
    expected = sum(covariance_bytes(item, ranks, blocks, 4) for item in layers)
    held = [4 * held_by(rank, ranks, blocks, layers) for rank in range(ranks)]
    total = 4 * sum(upper_strips(size, blocks) for size in (301, 500, 700, 700, 300))
    assert sum(held) == total
    assert max(held) <= expected  # the bound holds on every rank
    assert expected == total if ranks == 1 else expected < 1.6 * total / ranks


def test_half_of_a_large_factor_is_kept_and_evenly_dealt():
    assert upper_strips(100) == 100**2
    assert upper_strips(8192) / 8192**2 == pytest.approx(0.5, abs=0.01)
    assert upper_strips(300, 2) == 2 * (128 * 150 + 22 * 22)
    wide = layer("w", 8192, 8192)
    even = 4 * 2 * upper_strips(8192) / 8
    assert covariance_bytes(wide, 8, 1, 4) == pytest.approx(even, rel=0.005)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("sizes", [(301, 500), (500, 300)])
def test_bytes_of_the_correction_are_those_of_bases_and_sums(sizes: tuple[int, int], ranks: int, blocks: int):
    wide = layer("w", sizes[0], sizes[1])

    def held(rank: int) -> int:
        numbers = CorrectionSums.empty(LayerSelection((wide,), (), 0), rank=rank, ranks=ranks).sums["w"].numel()
        for size in sizes:
            vectors = tuple(torch.eye(part.stop - part.start) for part in block_slices(size, blocks))
            share = BlockBasis(vectors, tuple(torch.ones(len(v)) for v in vectors)).share(shares(size, ranks)[rank])
            numbers += sum(columns.numel() for _, columns in share.pieces)
        return numbers

    assert correction_bytes(wide, ranks, blocks, 8) == 8 * held(0)
    assert max(held(rank) for rank in range(ranks)) == held(0)
