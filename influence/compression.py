"""Low-rank compression of preconditioned query gradients, in the norm that scores are measured in.

V_OI: a preconditioned query gradient, rotated_OI the same in the Kronecker eigenbasis; left_OK, right_IK: its factors,
V ≈ L Rᵀ; values_K: weighted singular values, descending.

Influence scores are ⟨V, G⟩ over training gradients G. In the eigenbasis EK-FAC takes the entries of G as uncorrelated
with second moments Λ, and K-FAC's separable model of Λ is c · λ_S λ_Aᵀ. The squared error of scores from replacing V
by V' is then ‖D_S (V − V') D_A‖²_F with D = diag(√λ): truncate the singular values of D_S V D_A, and undo the weights.
The truncation is an orthogonal projection in that norm, so the correlation of compressed with full scores is
√(kept energy / energy). Singular values of all layers are comparable numbers and are ordered together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.solvers import LayerCurvature, SolverState, apply_rotated

EXACT_SIZE = 768  # matrices whose smaller side is at most this get an exact SVD
OVERSAMPLING = 16  # extra columns of a randomised SVD
POWER_ITERATIONS = 4
WEIGHT_FLOOR = 1e-6  # of the largest weight²; directions below carry no score


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of the score norm in one layer's eigenbasis: D_S over outputs and D_A over inputs.

    Ones for a solver without curvature, where the norm is the plain Frobenius norm.
    """

    output_O: Tensor
    input_I: Tensor

    @staticmethod
    def of(curvature: LayerCurvature | None, outputs: int, columns: int) -> ScoreWeights:
        """√λ_S and √λ_A, scaled so that Σ (D_S² D_A²) = ΣΛ: layers are then comparable."""
        if curvature is None:
            ones = torch.ones(outputs + columns, dtype=torch.float64)
            return ScoreWeights(ones[:outputs], ones[outputs:])
        output_O = _floored(curvature.gradient.all_values.double())
        input_I = _floored(curvature.activation.all_values.double())
        if curvature.correction_OI is None:
            scale = curvature.tokens_per_sequence
        else:
            scale = float(curvature.correction_OI.sum(dtype=torch.float64) / (output_O.sum() * input_I.sum()))
        return ScoreWeights((scale * output_O).sqrt(), input_I.sqrt())


def _floored(values: Tensor) -> Tensor:
    largest = float(values.max())
    return values.clamp_min(WEIGHT_FLOOR * largest if largest > 0 else 1.0)


@dataclass(frozen=True)
class Spectrum:
    """The weighted singular value decomposition of one query in one layer, V = left · rightᵀ + residual.

    Attributes:
        left_OK: left factors in the layout of the weights, scaled by the singular values.
        right_IK: right factors.
        values_K: weighted singular values, descending.
        energy: squared weighted norm of V, Σ of all its squared singular values; Σ values² is at most this, and the
            difference bounds what a randomised or truncated decomposition left out.
    """

    left_OK: Tensor
    right_IK: Tensor
    values_K: Tensor
    energy: float


def weighted_spectrum(
    gradient_OI: Tensor, state: SolverState, weights: ScoreWeights, max_rank: int | None, residual: float = 0.0
) -> Spectrum:
    """Precondition a query gradient (Equation 21) and decompose it in the norm of scores.

    Exact SVD where the smaller side is at most `EXACT_SIZE`, else randomised with oversampling and power iterations;
    the energy that it missed is known exactly, from the norm.

    Args:
        gradient_OI: the measurement's gradient in one layer.
        state: the fitted solver.
        weights: of the norm.
        max_rank: the most singular values that are kept; None keeps all that count.
        residual: share of the energy that may be dropped.

    Returns:
        The decomposition, in float32.
    """
    return spectrum(apply_rotated(state, gradient_OI.double()), state, weights, max_rank, residual)


def spectrum(
    rotated_OI: Tensor, state: SolverState, weights: ScoreWeights, max_rank: int | None, residual: float = 0.0
) -> Spectrum:
    """The same of a gradient that is preconditioned already and rotated into the eigenbasis, in float64."""
    weighted = weights.output_O[:, None] * rotated_OI * weights.input_I
    energy = float(weighted.square().sum())
    left, values, right = _svd(weighted, max_rank)
    keep = _rank_for(values, energy, residual)
    keep = keep if max_rank is None else min(keep, max_rank)
    left = left[:, :keep] * values[:keep] / weights.output_O[:, None]
    right = right[:, :keep] / weights.input_I[:, None]
    if state.activation is not None and state.gradient is not None:
        left = state.gradient.unrotate(left.T).T
        right = state.activation.unrotate(right.T).T
    return Spectrum(left.float(), right.float(), values[:keep], energy)


def _rank_for(values_K: Tensor, energy: float, residual: float) -> int:
    """The fewest leading values whose squares leave at most `residual` of the energy; always all non-zero for 0."""
    if energy == 0:
        return 0
    kept = values_K.square().cumsum(0)
    floor = max(residual, 1e-12)
    enough = torch.nonzero(kept >= (1 - floor) * energy)
    return int(enough[0]) + 1 if len(enough) else len(values_K)


def _svd(matrix_OI: Tensor, max_rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    smaller = min(matrix_OI.shape)
    if smaller <= EXACT_SIZE or max_rank is None or max_rank + OVERSAMPLING >= smaller:
        left, values, right_t = torch.linalg.svd(matrix_OI, full_matrices=False)
        return left, values, right_t.T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix_OI, q=max_rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    return left, values, right


@dataclass(frozen=True)
class Allotment:
    """How many singular values each layer keeps for one query, and the fidelity that this predicts."""

    ranks: dict[str, int]
    predicted_fidelity: float


def allot_ranks(
    values: Mapping[str, Tensor], energies: Mapping[str, float], rank: int | None, fidelity: float | None
) -> Allotment:
    """Spread one query's ranks over layers: singular values of all layers in one order, the largest kept.

    Args:
        values: weighted singular values of each layer.
        energies: squared weighted norm of each layer.
        rank: mean rank over layers; the total is rank · layers.
        fidelity: if given, keep the fewest values for which √(kept / energy) reaches it; overrides `rank`.

    Raises:
        ValueError: if neither is given.
    """
    names = list(values)
    everything = torch.cat([values[name] for name in names])
    origin = torch.cat([torch.full((len(values[name]),), index) for index, name in enumerate(names)])
    order = torch.argsort(everything, descending=True, stable=True)
    kept = everything[order].square().cumsum(0)
    total = sum(energies.values())
    if fidelity is not None:
        count = int((kept < fidelity**2 * total).sum()) + 1
    elif rank is not None:
        count = rank * len(names)
    else:
        raise ValueError("either a rank or a fidelity is needed")
    count = min(count, len(everything))
    counts = torch.bincount(origin[order[:count]].long(), minlength=len(names))
    achieved = float(kept[count - 1] / total) ** 0.5 if count and total > 0 else 1.0
    return Allotment({name: int(counts[index]) for index, name in enumerate(names)}, min(achieved, 1.0))


def pearson(first_N: Tensor, second_N: Tensor) -> float:
    """The Pearson correlation of two score vectors; NaN where one of them is constant."""
    first, second = first_N.double(), second_N.double()
    first, second = first - first.mean(), second - second.mean()
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale > 0 else float("nan")


def pack(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay the factors of all queries of one layer side by side.

    Args:
        factors: (left_OR, right_IR) a query, ranks may differ.

    Returns:
        left_OR and right_IR of all queries, and the query that owns each column.
    """
    owners = [torch.full((left.shape[1],), query) for query, (left, _) in enumerate(factors)]
    return (
        torch.cat([left for left, _ in factors], dim=1),
        torch.cat([right for _, right in factors], dim=1),
        torch.cat(owners).long(),
    )
