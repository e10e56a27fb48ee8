"""Decompositions: what LAPACK's 32-bit workspace does not hold goes another way, or is refused beforehand."""

from __future__ import annotations

import pytest
import torch

from influence import eigenbasis as module
from influence.eigenbasis import check_decomposable, eigenbasis


def covariance(size: int, seed: int = 0) -> torch.Tensor:
    rows_NI = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows_NI.T @ rows_NI / len(rows_NI)


def test_large_blocks_are_decomposed_by_the_lapack_with_64_bit_integers(monkeypatch: pytest.MonkeyPatch):
    assert module._numpy_counts_in_64_bits()  # of the numpy that constraints.txt pins
    blocks = [covariance(24), covariance(23, seed=1)]
    expected = eigenbasis("activation/up", blocks)
    monkeypatch.setattr(module, "LARGEST_OF_TORCH", 23)
    called = []
    eigh = module.np.linalg.eigh
    monkeypatch.setattr(module.np.linalg, "eigh", lambda block: called.append(len(block)) or eigh(block))
    found = eigenbasis("activation/up", blocks)

    assert called == [24]
    for block, vectors, values, reference in zip(blocks, found.vectors, found.values, expected.values, strict=True):
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, block, rtol=0, atol=1e-12)
        torch.testing.assert_close(values, reference, rtol=1e-12, atol=1e-12)


def test_what_nothing_here_decomposes_is_refused_with_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch):
    check_decomposable("activation/down", 32_769, 1)
    monkeypatch.setattr(module, "_numpy_counts_in_64_bits", lambda: False)
    check_decomposable("activation/down", 32_769, 2)
    with pytest.raises(ValueError, match=r"down has blocks of 32,769 .* 32,766 .* factors\.blocks=2 or more"):
        check_decomposable("activation/down", 32_769, 1)


def test_a_decomposition_that_fails_names_the_factor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST_OF_TORCH", 1)

    def fails(_block: object) -> None:
        raise module.np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(module.np.linalg, "eigh", fails)
    with pytest.raises(ValueError, match=r"factor gradient/up, block 0: no eigendecomposition"):
        eigenbasis("gradient/up", [covariance(4)])
