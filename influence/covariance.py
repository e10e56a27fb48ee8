"""Covariance factors of K-FAC: second moments of activations (A) and of pseudo-gradients (S).

rows_NI: [predicted (token, use) pairs, columns]; block_bb: one diagonal block of a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.layers import LayerSelection, TrackedLayer

TILE = 128  # columns of a tile of a symmetric product; tiles below the diagonal are not computed


def block_slices(size: int, blocks: int) -> tuple[slice, ...]:
    """Cut `size` coordinates into `blocks` runs of nearly equal length, the longer ones first (Appendix A).

    Raises:
        ValueError: if there are more blocks than coordinates.
    """
    if not 1 <= blocks <= size:
        raise ValueError(f"cannot cut {size} coordinates into {blocks} blocks; choose factors.blocks from 1 to {size}")
    small, longer = divmod(size, blocks)
    ends = [index * small + min(index, longer) for index in range(blocks + 1)]
    return tuple(slice(start, end) for start, end in pairwise(ends))


@dataclass
class SecondMoment:
    """A running sum Σ x xᵀ over rows, as diagonal blocks, with the number of rows.

    Only the tiles on and above the diagonal are kept up to date: a symmetric product costs little more than half of the
    full one, N·I² / 2 multiply-adds for N rows of I columns.
    """

    blocks: tuple[Tensor, ...]
    rows: int = 0

    @staticmethod
    def zeros(size: int, blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> SecondMoment:
        """An empty sum over vectors of `size` coordinates in `blocks` blocks."""
        widths = [part.stop - part.start for part in block_slices(size, blocks)]
        return SecondMoment(tuple(torch.zeros(width, width, dtype=dtype, device=device) for width in widths))

    @property
    def size(self) -> int:
        """Number of coordinates over all blocks."""
        return sum(block.shape[0] for block in self.blocks)

    def add(self, rows_NI: Tensor, count: int, product: torch.dtype) -> None:
        """Add Σ_n x_n x_nᵀ for the given rows.

        Args:
            rows_NI: the vectors; rows of zeros add nothing.
            count: how many predicted (token, use) pairs the rows stand for.
            product: the type of the operands of the product; sums stay in the type of the blocks.
        """
        rows_NI = rows_NI.to(product)
        for part, block in zip(block_slices(self.size, len(self.blocks)), self.blocks, strict=True):
            _add_upper_tiles(block, rows_NI[:, part])
        self.rows += count

    def merge(self, other: SecondMoment) -> None:
        """Add another sum over different rows to this one."""
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine += theirs
        self.rows += other.rows

    def mean(self) -> tuple[Tensor, ...]:
        """The mean second moment E[x xᵀ], symmetric, a tensor a block.

        Raises:
            ValueError: if no row was added.
        """
        if self.rows == 0:
            raise ValueError("a covariance factor over no rows: no position of the sample predicts a token")
        return tuple(_mirrored(block) / self.rows for block in self.blocks)


def _add_upper_tiles(block_bb: Tensor, rows_Nb: Tensor) -> None:
    size = block_bb.shape[0]
    for start in range(0, size, TILE):
        end = min(start + TILE, size)
        target, left, right = block_bb[start:end, start:], rows_Nb[:, start:end].T, rows_Nb[:, start:]
        if rows_Nb.dtype == block_bb.dtype:
            target.addmm_(left, right)
        else:
            target += left @ right


def _mirrored(block_bb: Tensor) -> Tensor:
    upper = torch.triu(block_bb)
    return upper + torch.triu(block_bb, diagonal=1).T


@dataclass
class CovarianceSums:
    """The sums behind A and S of every tracked layer; a value with `merge`.

    A is kept once for layers that see the same input (`TrackedLayer.input_group`). Both are means over predicted
    (token, use) pairs: tokens are treated as independent (Section 3.1), and so are the uses of a shared weight.
    """

    activation: dict[str, SecondMoment]
    gradient: dict[str, SecondMoment]
    sequences: int = 0
    tokens: int = 0
    excluded: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def empty(
        selection: LayerSelection, blocks: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> CovarianceSums:
        """Zero sums for every layer of a selection, in `blocks` blocks a side."""
        activation = {
            layer.input_group: SecondMoment.zeros(layer.columns, blocks, dtype, device) for layer in selection.layers
        }
        gradient = {layer.name: SecondMoment.zeros(layer.outputs, blocks, dtype, device) for layer in selection.layers}
        return CovarianceSums(activation, gradient)

    def add(
        self, layer: TrackedLayer, uses: list[Use] | tuple[Use, ...], predicted_BT: Tensor, product: torch.dtype
    ) -> None:
        """Add one micro-batch's statistics of one layer.

        Output gradients are exactly zero at positions that predict nothing, so only the activations are masked.
        """
        count = int(predicted_BT.sum())
        for use in uses:
            if layer.name == layer.input_group:
                rows_NI = homogeneous(_predicted_rows(use.act_BTI, predicted_BT), layer.bias)
                self.activation[layer.name].add(rows_NI, count, product)
            self.gradient[layer.name].add(use.grad_BTO.flatten(0, 1), count, product)

    def merge(self, other: CovarianceSums) -> None:
        """Add the sums over other sequences to this one."""
        _merge_all(self.activation, other.activation)
        _merge_all(self.gradient, other.gradient)
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.excluded |= other.excluded


def _predicted_rows(act_BTI: Tensor, predicted_BT: Tensor) -> Tensor:
    if bool(predicted_BT[:, :-1].all()) and not bool(predicted_BT[:, -1].any()):
        return act_BTI[:, :-1].flatten(0, 1)
    return act_BTI[predicted_BT]


def _merge_all(mine: Mapping[str, SecondMoment], theirs: Mapping[str, SecondMoment]) -> None:
    if mine.keys() != theirs.keys():
        raise ValueError(f"sums over different layers cannot be merged: {sorted(mine.keys() ^ theirs.keys())}")
    for name, moment in theirs.items():
        mine[name].merge(moment)
