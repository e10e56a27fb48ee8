"""A low-rank preconditioner of (G + λ) X = B: Nyström's approximation of G from products with random vectors.

P parameters of all tracked layers, R random vectors; λ is one number a layer. In coordinates where λ is 1,
Â = λ^(−1/2) G λ^(−1/2), and with R orthonormal rows Ω and Y = Ω Â,

    Â ≈ Yᵀ (Ω Yᵀ)⁻¹ Y = Uᵀ diag(μ) U,        M⁻¹ = Uᵀ diag((μ_R + 1) / (μ + 1)) U + (1 − UᵀU)

for eigenvectors U as rows and eigenvalues μ, descending (Frangella, Tropp and Udell, "Randomized Nyström
preconditioning", 2021, Algorithm 2.1 and Equation 1.3). The largest R eigenvalues become alike, so that the
condition number falls from about 1 + μ_1 to about 1 + μ_R.

Why not EK-FAC. A network with more parameters than it has outputs over the whole sample has a G of low rank, and λ
lies far below its largest eigenvalues. EK-FAC spreads curvature over directions that have none. That is near enough to
rank points, but as a preconditioner it tears apart the eigenvalues that lie together at λ, and the last digits take
thousands of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.conjugate_gradients import Product
from influence.gauss_newton import Vectors

WIDTH = 16  # random vectors that go through a product together


@dataclass(frozen=True)
class Nystrom:
    """The preconditioner.

    Attributes:
        rows_RP: U, in coordinates where λ is 1.
        values_R: μ there, descending; fewer than vectors were tried where G has a lower rank.
        damping: λ by layer.
        products: with one vector, that it took.
    """

    rows_RP: Tensor
    values_R: Tensor
    damping: Mapping[str, float]
    products: int

    def __call__(self, vectors: Vectors) -> Vectors:
        """M⁻¹ V up to a factor; 2·R·P multiply-adds a vector."""
        scaled_KP = _flat(vectors, self.damping)
        seen_KR = scaled_KP @ self.rows_RP.T
        change_R = (self.values_R[-1] + 1) / (self.values_R + 1) - 1
        return _layers(scaled_KP.addmm(seen_KR * change_R, self.rows_RP), vectors, self.damping)


def nystrom(product: Product, like: Vectors, damping: Mapping[str, float], rank: int, seed: int = 0) -> Nystrom:
    """Approximate G from `rank` products with one vector each.

    Args:
        product: G V.
        like: vectors of the system; their values are not read.
        damping: λ by layer, positive.
        rank: R, at most half of the parameters.
        seed: of the random vectors.

    Returns:
        The preconditioner, in the type of the vectors; 3·R·P numbers are held meanwhile and R·P after it.
    """
    size = sum(value[0].numel() for value in like.values())
    rank = max(1, min(rank, size // 2))
    first = next(iter(like.values()))
    random_PR = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probes_RP = torch.linalg.qr(random_PR.to(first))[0].T.contiguous()
    del random_PR
    curved_RP = torch.empty_like(probes_RP)
    for start in range(0, rank, WIDTH):
        given = _layers(probes_RP[start : start + WIDTH], like, damping)
        curved_RP[start : start + WIDTH] = _flat(product(given), damping)
    shift = math.sqrt(size) * torch.finfo(first.dtype).eps * float(curved_RP.norm())
    curved_RP += shift * probes_RP  # keeps what follows positive definite, and is taken off again
    core_RR = probes_RP @ curved_RP.T
    del probes_RP
    half_RP = torch.linalg.solve_triangular(_factor(core_RR), curved_RP, upper=False)
    del curved_RP
    squares_R, turn_RR = torch.linalg.eigh(half_RP @ half_RP.T)
    kept = squares_R > squares_R[-1] * torch.finfo(first.dtype).eps * size
    squares_R, turn_RR = squares_R[kept].flip(0), turn_RR[:, kept].flip(1)
    rows_RP = (turn_RR / squares_R.sqrt()).T @ half_RP
    return Nystrom(rows_RP, (squares_R - shift).clamp_min(0), dict(damping), rank)


def _factor(core_RR: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric matrix, made positive definite where rounding has left it not so."""
    core_RR = (core_RR + core_RR.T) / 2
    jitter = torch.finfo(core_RR.dtype).eps * float(core_RR.diagonal().abs().max())
    factor_RR, failed = torch.linalg.cholesky_ex(core_RR)
    while int(failed):
        core_RR = core_RR + jitter * torch.eye(len(core_RR)).to(core_RR)
        jitter *= 10
        factor_RR, failed = torch.linalg.cholesky_ex(core_RR)
    return factor_RR


def _flat(vectors: Mapping[str, Tensor], damping: Mapping[str, float]) -> Tensor:
    """λ^(−1/2) V, all layers in a row; [K, P]."""
    return torch.cat([value.flatten(1) / math.sqrt(damping[name]) for name, value in vectors.items()], dim=1)


def _layers(scaled_KP: Tensor, like: Mapping[str, Tensor], damping: Mapping[str, float]) -> Vectors:
    """λ^(−1/2) of rows, by layer."""
    found, start = {}, 0
    for name, value in like.items():
        shape, size = value.shape[1:], value[0].numel()
        part = scaled_KP[:, start : start + size].unflatten(1, shape)
        found[name], start = part / math.sqrt(damping[name]), start + size
    return found
