"""The eigenvalue correction Λ of EK-FAC: second moments of the exact sequence gradients in the eigenbasis.

act_BTI, grad_BTO: as captured; gradient_bOI: gradients of b sequences, formed; sum_OI: the running sum of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.eigenbasis import BasisShare, BlockBasis
from influence.exchange import Exchange, gather_columns, shares
from influence.layers import LayerSelection, TrackedLayer

GRADIENT_BYTES = 1 << 25  # of sequence gradients that are formed at a time


@dataclass
class CorrectionSums:
    """Σ over sequences of (Q_Sᵀ G Q_A)² for every layer (Equation 20), with the number of sequences; mergeable.

    A rank of a sharded replica holds some rows of each sum, or some columns: a share of the layer's larger side.
    """

    sums: dict[str, Tensor]
    sequences: int = 0
    tokens: int = 0
    excluded: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def empty(
        selection: LayerSelection,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> CorrectionSums:
        """Zero sums for every layer of a selection; the part that a rank owns of them."""

        def zeros(layer: TrackedLayer) -> Tensor:
            rows, columns = owned_part(layer, rank, ranks)
            return torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype, device=device)

        return CorrectionSums({layer.name: zeros(layer) for layer in selection.layers})

    def merge(self, other: CorrectionSums) -> None:
        """Add the sums over other sequences to this one."""
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"sums over different layers: {sorted(self.sums.keys() ^ other.sums.keys())}")
        for name, value in other.sums.items():
            self.sums[name] += value
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.excluded |= other.excluded

    def mean(self, name: str) -> Tensor:
        """Λ of one layer, [O, I]: the mean over sequences.

        Raises:
            ValueError: if no sequence was added.
        """
        if self.sequences == 0:
            raise ValueError(f"correction of {name} over no sequences")
        return self.sums[name] / self.sequences


@dataclass(frozen=True)
class LayerBasis:
    """The Kronecker eigenbasis of one layer: Q_A over its inputs and Q_S over its outputs."""

    activation: BlockBasis
    gradient: BlockBasis


@dataclass(frozen=True)
class LayerBasisShare:
    """A rank's share of the Kronecker eigenbasis of one layer: some columns of Q_A and of Q_S."""

    activation: BasisShare
    gradient: BasisShare


Bases = Mapping[str, LayerBasis]
BasisShares = Mapping[str, LayerBasisShare]


def owned_part(layer: TrackedLayer, rank: int, ranks: int) -> tuple[slice, slice]:
    """Rows and columns of Λ [O, I] that a rank owns: a share of the larger side."""
    if layer.columns <= layer.outputs:
        return shares(layer.outputs, ranks)[rank], slice(0, layer.columns)
    return slice(0, layer.outputs), shares(layer.columns, ranks)[rank]


def add_correction(
    sum_OI: Tensor, layer: TrackedLayer, uses: Sequence[Use], basis: LayerBasis, product: torch.dtype
) -> None:
    """Add Σ_b (Q_Sᵀ G_b Q_A)² of a micro-batch, each side rotated where that is cheaper.

    The inputs are rotated token by token if T < O, else after the product over tokens; the output gradients if
    T < I. The basis of the inputs may be aligned (`BlockBasis.aligned`). Cost a sequence: T·I·O + I²·min(T, O) +
    O²·min(T, I) multiply-adds, T counted over all uses.

    Args:
        sum_OI: the running sum, changed in place.
        layer: whose uses they are.
        uses: inputs and output gradients of the micro-batch.
        basis: the layer's eigenbasis, in the type of the products.
        product: type of the operands.
    """
    tokens = sum(use.act_BTI.shape[1] for use in uses)
    width = basis.activation.size  # of the homogeneous activations, with the zeros of an aligned basis
    act_first, grad_first = tokens < layer.outputs, tokens < width
    step = max(1, GRADIENT_BYTES // (4 * layer.outputs * layer.columns))
    for start in range(0, uses[0].act_BTI.shape[0], step):
        total = None
        for use in uses:
            act_bTI = homogeneous(use.act_BTI[start : start + step], layer.bias, width).to(product)
            grad_bTO = use.grad_BTO[start : start + step].to(product)
            act_bTI = basis.activation.rotate(act_bTI) if act_first else act_bTI
            grad_bTO = basis.gradient.rotate(grad_bTO) if grad_first else grad_bTO
            formed = torch.bmm(grad_bTO.transpose(1, 2), act_bTI)
            total = formed if total is None else total + formed
        assert total is not None
        if not act_first:
            total = basis.activation.rotate(total)
        if not grad_first:
            total = basis.gradient.rotate(total.transpose(1, 2)).transpose(1, 2)
        sum_OI += total.to(sum_OI.dtype).square_().sum(0)[:, : layer.columns]


def add_correction_share(
    sum_oi: Tensor,
    layer: TrackedLayer,
    uses: Sequence[Use],
    basis: LayerBasisShare,
    exchange: Exchange,
    product: torch.dtype,
) -> None:
    """Add a rank's part of Σ_b (Q_Sᵀ G_b Q_A)² of a micro-batch whose rows all ranks have.

    Each rank rotates all rows by its columns of Q_A and of Q_S. What the smaller side gave is gathered, so that
    every rank has it whole, and the rank's part of each rotated gradient is formed from it. Cost a sequence and rank,
    for N ranks: T·(I² + O² + I·O) / N multiply-adds; moves T·min(I, O)·(N − 1) / N numbers a sequence to each rank.

    Args:
        sum_oi: the rank's part of the running sum (`owned_part`), changed in place.
        layer: whose uses they are.
        uses: inputs and output gradients of the whole micro-batch.
        basis: the rank's share of the eigenbasis.
        exchange: the other ranks.
        product: type of the operands.
    """
    rotated = []
    for use in uses:
        act_BTi = basis.activation.rotate(homogeneous(use.act_BTI, layer.bias).to(product))
        grad_BTo = basis.gradient.rotate(use.grad_BTO.to(product))
        if layer.columns <= layer.outputs:
            act_BTi = gather_columns(exchange, act_BTi, layer.columns)
        else:
            grad_BTo = gather_columns(exchange, grad_BTo, layer.outputs)
        rotated.append((act_BTi, grad_BTo))
    step = max(1, GRADIENT_BYTES // (4 * max(1, sum_oi.numel())))
    for start in range(0, uses[0].act_BTI.shape[0], step):
        formed = [
            torch.bmm(grad_BTo[start : start + step].transpose(1, 2), act_BTi[start : start + step])
            for act_BTi, grad_BTo in rotated
        ]
        total = formed[0] if len(formed) == 1 else torch.stack(formed).sum(0)
        sum_oi += total.to(sum_oi.dtype).square_().sum(0)
