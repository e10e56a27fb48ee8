"""How near the factors come to the exact Gauss-Newton matrix of a tiny model: EK-FAC < K-FAC < the identity.

The exact matrix of each layer, E_x[sum_t J_t^T H_t J_t] (Eq. 6 and 11 with a softmax output), is formed in closed form
from Jacobians of the logits: no label is sampled. The factors are fitted on the same sequences with many passes of
sampled labels, so that what remains is the error of the approximation and not of the sample. The models are trained for
a moment on a Markov chain, so that some labels are likely and others are not.

Distances are relative Frobenius norms, in two ways:

- each approximation at its best multiple, min_c |c X - G| / |G|, since scores are ranked alike at any multiple (the
  damping is relative). Here EK-FAC < K-FAC < the identity holds in every layer.
- as fitted. EK-FAC is then still nearer than K-FAC and than the best multiple of the identity, in every layer. K-FAC
  may not be nearer than that: T * (A kron S) takes the norms of activations and of gradients as independent, and where
  tokens of large activations have small gradients (Llama's down projections) it is several times too large.

Legend: P parameters of a layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from influence.labels import SampledLabels
from influence.solvers import kronecker_eigenvalues
from tests.fitted import Fitted, batches_of, fit, worker_for
from tests.oracle import Oracle, vec
from tests.tiny import gpt2, llama, markov_sequences, train

MODELS = {"gpt2": gpt2, "llama": llama}
SEQUENCES = markov_sequences(24, seed=3)
PASSES = [SampledLabels(seed=5, pass_index=index) for index in range(60)]


@dataclass(frozen=True)
class Diagonals:
    """One layer in the Kronecker eigenbasis: the exact matrix [P, P] and the diagonals [P] that stand for it."""

    exact: Tensor
    ekfac: Tensor
    kfac: Tensor
    identity: Tensor

    def distance(self, diagonal_P: Tensor) -> float:
        """|X - G| / |G|."""
        return float((torch.diag(diagonal_P) - self.exact).norm() / self.exact.norm())

    def distance_at_best_multiple(self, diagonal_P: Tensor) -> float:
        """min_c |c X - G| / |G|."""
        return self.distance(diagonal_P * (diagonal_P @ self.exact.diagonal()) / (diagonal_P @ diagonal_P))


@functools.cache
def layers_of(model: str) -> dict[str, Diagonals]:
    case = MODELS[model](hidden=12, inner=20)
    train(case.model, markov_sequences(200, seed=0))
    exact = Oracle(case.model, case.layers).gauss_newton(SEQUENCES)
    fitted = fit(worker_for(case), batches_of(SEQUENCES, len(SEQUENCES)), PASSES)
    return {name: diagonals(fitted, name, exact_PP) for name, exact_PP in exact.items()}


def diagonals(fitted: Fitted, name: str, exact_PP: Tensor) -> Diagonals:
    curvature = fitted.curvature(name)
    assert curvature.correction_OI is not None
    Q_A, Q_S = torch.block_diag(*curvature.activation.vectors), torch.block_diag(*curvature.gradient.vectors)
    basis_PP = torch.kron(Q_A, Q_S)
    ekfac_P, kfac_P = vec(curvature.correction_OI), vec(kronecker_eigenvalues(curvature))
    return Diagonals(basis_PP.T @ exact_PP @ basis_PP, ekfac_P, kfac_P, torch.ones_like(ekfac_P))


@pytest.mark.parametrize("model", MODELS)
def test_ekfac_is_nearer_than_kfac_and_kfac_nearer_than_the_identity(model: str):
    for name, layer in layers_of(model).items():
        ekfac, kfac, identity = map(layer.distance_at_best_multiple, (layer.ekfac, layer.kfac, layer.identity))
        assert ekfac < kfac < identity, f"{name}: {ekfac:.3f}, {kfac:.3f}, {identity:.3f}"


@pytest.mark.parametrize("model", MODELS)
def test_ekfac_as_fitted_is_nearer_than_kfac_and_than_the_best_identity(model: str):
    for name, layer in layers_of(model).items():
        ekfac, kfac = layer.distance(layer.ekfac), layer.distance(layer.kfac)
        identity = layer.distance_at_best_multiple(layer.identity)
        assert ekfac < min(kfac, identity), f"{name}: {ekfac:.3f}, {kfac:.3f}, {identity:.3f}"


@pytest.mark.parametrize("model", MODELS)
def test_correction_is_the_diagonal_of_the_exact_matrix_in_the_eigenbasis(model: str):
    """Λ (Eq. 20) is unbiased for it: what is left is the noise of 60 passes of labels."""
    for name, layer in layers_of(model).items():
        noise = float((layer.ekfac - layer.exact.diagonal()).norm() / layer.exact.norm())
        assert noise < 0.08, f"{name}: {noise:.3f}"
