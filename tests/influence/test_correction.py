"""An aligned basis of the inputs moves nothing: zeros are rotated into zeros and left out of Λ."""

from __future__ import annotations

import pytest
import torch

from influence.capture import Use, homogeneous
from influence.correction import LayerBasis, add_correction
from influence.eigenbasis import aligned_size, eigenbasis
from influence.layers import TrackedLayer


def factor(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("tokens", [5, 300])
def test_an_aligned_basis_gives_the_same_correction(tokens: int):
    torch.manual_seed(0)
    layer = TrackedLayer("fc", ("fc",), 256, 20, True, False, "fc")
    use = Use(torch.randn(2, tokens, 256).double(), torch.randn(2, tokens, 20).double())
    basis = LayerBasis(eigenbasis("A", [factor(257)]), eigenbasis("S", [factor(20)]))
    aligned = LayerBasis(basis.activation.aligned(), basis.gradient)
    assert aligned.activation.size == 272
    sums = []
    for given in (basis, aligned):
        sums.append(torch.zeros(20, 257, dtype=torch.float64))
        add_correction(sums[-1], layer, [use], given, torch.float64)
    gradient = use.grad_BTO.transpose(1, 2) @ homogeneous(use.act_BTI, True)
    rotated = basis.gradient.vectors[0].T @ gradient @ basis.activation.vectors[0]
    torch.testing.assert_close(sums[0], rotated.square().sum(0), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-10, atol=1e-9)


def test_alignment_adds_at_most_a_sixteenth():
    assert [aligned_size(size) for size in (17, 64, 65, 257, 1025, 4097)] == [17, 64, 65, 272, 1040, 4112]


def test_several_blocks_are_left_as_they_are():
    basis = eigenbasis("A", [factor(129), factor(128)])
    assert basis.aligned() is basis
