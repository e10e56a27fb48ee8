"""Compression against its definition: least error of scores at a given total rank, and a loss that is known."""

from __future__ import annotations

import pytest
import torch

from influence import compression
from influence.compression import ScoreWeights, Spectrum, allot_ranks, pack, pearson, weighted_spectrum
from influence.eigenbasis import eigenbasis
from influence.solvers import SOLVERS, LayerCurvature, SolverState, apply


def factor(size: int) -> torch.Tensor:
    rows = torch.randn(size + 3, size, dtype=torch.float64) * torch.logspace(0, -2, size, dtype=torch.float64)
    return rows.T @ rows


def curvature(outputs: int, columns: int) -> LayerCurvature:
    """A layer whose Λ is separable, so that the score norm is exact."""
    activation, gradient = eigenbasis("A", [factor(columns)]), eigenbasis("S", [factor(outputs)])
    return LayerCurvature(activation, gradient, torch.outer(gradient.all_values, activation.all_values) * 7, 7.0)


def fitted(outputs: int, columns: int) -> tuple[LayerCurvature, SolverState, ScoreWeights]:
    layer = curvature(outputs, columns)
    return layer, SOLVERS["ekfac"].fit(layer, 0.1), ScoreWeights.of(layer, outputs, columns)


def score_energy(layer: LayerCurvature, error_OI: torch.Tensor) -> float:
    """E[⟨error, G⟩²] over gradients G whose entries in the eigenbasis are uncorrelated with second moments Λ."""
    rotated = layer.gradient.vectors[0].T @ error_OI @ layer.activation.vectors[0]
    assert layer.correction_OI is not None
    return float((layer.correction_OI * rotated.square()).sum())


def test_the_error_of_scores_is_the_energy_that_was_dropped_and_less_than_that_of_plain_svd():
    torch.manual_seed(0)
    layer, state, weights = fitted(12, 9)
    gradient = torch.randn(12, 9, dtype=torch.float64)
    full = apply(state, gradient)
    spectrum = weighted_spectrum(gradient, state, weights, None)
    assert spectrum.energy == pytest.approx(score_energy(layer, full), rel=1e-6)
    left, values, right_t = torch.linalg.svd(full)
    for rank in (1, 3, 6):
        ours = full - spectrum.left_OK[:, :rank].double() @ spectrum.right_IK[:, :rank].double().T
        plain = full - left[:, :rank] * values[:rank] @ right_t[:rank]
        dropped = spectrum.energy - float(spectrum.values_K[:rank].square().sum())
        assert score_energy(layer, ours) == pytest.approx(dropped, rel=1e-3)
        assert score_energy(layer, ours) < score_energy(layer, plain)


def test_predicted_fidelity_is_the_correlation_of_scores():
    torch.manual_seed(1)
    layer, state, weights = fitted(10, 8)
    gradient = torch.randn(10, 8, dtype=torch.float64)
    full, spectrum = apply(state, gradient), weighted_spectrum(gradient, state, weights, None)
    allotted = allot_ranks({"fc": spectrum.values_K}, {"fc": spectrum.energy}, 1, None)
    kept = spectrum.left_OK[:, :1].double() @ spectrum.right_IK[:, :1].double().T
    assert layer.correction_OI is not None
    drawn = torch.randn(50_000, 10, 8, dtype=torch.float64) * layer.correction_OI.sqrt()
    drawn = layer.gradient.vectors[0] @ drawn @ layer.activation.vectors[0].T
    found = pearson((drawn * full).sum((1, 2)), (drawn * kept).sum((1, 2)))
    assert found == pytest.approx(allotted.predicted_fidelity, abs=0.01)
    assert found < 0.99  # something was lost, or there was nothing to predict


def test_ranks_go_to_the_largest_values_of_all_layers():
    values = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([3.5, 0.1]), "c": torch.tensor([0.2])}
    energies = {name: float(value.square().sum()) for name, value in values.items()}
    allotted = allot_ranks(values, energies, 1, None)  # three values in all
    assert allotted.ranks == {"a": 2, "b": 1, "c": 0}
    total = sum(energies.values())
    assert allotted.predicted_fidelity == pytest.approx(((25 + 16 + 12.25) / total) ** 0.5)
    for wanted in (0.5, 0.9, 0.99, 1.0):
        met = allot_ranks(values, energies, None, wanted)
        assert met.predicted_fidelity >= wanted - 1e-6
    least = allot_ranks(values, energies, None, 0.9)
    fewer = sum(
        sorted((float(v) ** 2 for x in values.values() for v in x), reverse=True)[: sum(least.ranks.values()) - 1]
    )
    assert (fewer / total) ** 0.5 < 0.9


def test_a_randomised_decomposition_finds_the_leading_values_and_knows_what_it_missed(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(2)
    _, state, weights = fitted(90, 70)
    gradient = torch.randn(90, 70, dtype=torch.float64)
    exact = weighted_spectrum(gradient, state, weights, 12)
    monkeypatch.setattr(compression, "EXACT_SIZE", 8)
    found = weighted_spectrum(gradient, state, weights, 12)
    assert found.energy == pytest.approx(exact.energy, rel=1e-12)
    torch.testing.assert_close(found.values_K, exact.values_K, rtol=1e-3, atol=0)
    assert float(found.values_K.square().sum()) <= found.energy


def test_without_curvature_the_norm_is_plain():
    torch.manual_seed(3)
    gradient = torch.randn(6, 5, dtype=torch.float64)
    spectrum = weighted_spectrum(gradient, SOLVERS["identity"].fit(None, 0.1), ScoreWeights.of(None, 6, 5), None)
    torch.testing.assert_close(spectrum.values_K, torch.linalg.svdvals(gradient))
    torch.testing.assert_close(spectrum.left_OK @ spectrum.right_IK.T, gradient.float())


def test_packed_columns_know_their_query():
    first = Spectrum(torch.ones(3, 2), torch.ones(4, 2), torch.ones(2), 2.0)
    left, right, owner = pack([(first.left_OK, first.right_IK), (torch.zeros(3, 1), torch.zeros(4, 1))])
    assert (left.shape, right.shape, owner.tolist()) == ((3, 3), (4, 3), [0, 0, 1])


def test_correlation_with_a_constant_is_undefined():
    assert pearson(torch.ones(3), torch.arange(3.0)) != pearson(torch.ones(3), torch.arange(3.0))
