"""Covariance factors of K-FAC: second moments of activations (A) and of pseudo-gradients (S).

rows_NI: [predicted (token, use) pairs, columns]; block_bb: one diagonal block of a factor. A sum is kept as strips, so
that the ranks of a sharded replica can each own some of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.layers import LayerSelection, TrackedLayer

TILE = 128  # rows of a strip of a symmetric product; what is below the diagonal is not computed


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


class Strip(NamedTuple):
    """`TILE` rows of a symmetric sum: those of diagonal block `block` from row `start` on, right of the diagonal."""

    block: int
    start: int

    @property
    def name(self) -> str:
        """As it is called in files."""
        return f"{self.block}.{self.start}"


def all_strips(size: int, blocks: int) -> list[Strip]:
    """The strips that make up a symmetric matrix of `size` coordinates in `blocks` blocks."""
    return [
        Strip(index, start)
        for index, part in enumerate(block_slices(size, blocks))
        for start in range(0, part.stop - part.start, TILE)
    ]


def strip_shape(size: int, blocks: int, strip: Strip) -> tuple[int, int]:
    """Rows and columns of a strip."""
    part = block_slices(size, blocks)[strip.block]
    width = part.stop - part.start
    return min(TILE, width - strip.start), width - strip.start


def deal_strips(sizes: Mapping[str, int], blocks: int, ranks: int) -> list[dict[str, list[Strip]]]:
    """Who owns which strips of which factor: one dictionary a rank.

    Each strip goes to the rank that has the fewest numbers of this factor so far, then to the one with the fewest of
    all factors. So memory and work are even, also on each factor: ranks go from layer to layer in step.

    Args:
        sizes: coordinates of each factor.
        blocks: diagonal blocks of each.
        ranks: processes that share them.
    """
    owned: list[dict[str, list[Strip]]] = [{name: [] for name in sizes} for _ in range(ranks)]
    held = [0] * ranks
    for name, size in sizes.items():
        mine = [0] * ranks
        for strip in all_strips(size, blocks):
            rows, columns = strip_shape(size, blocks, strip)
            rank = min(range(ranks), key=lambda index: (mine[index], held[index], index))
            owned[rank][name].append(strip)
            mine[rank] += rows * columns
            held[rank] += rows * columns
    return owned


@dataclass
class SecondMoment:
    """A running sum Σ x xᵀ over rows, as strips on and above the diagonal, with the number of rows.

    A symmetric product costs little more than half of the full one, N·I² / 2 multiply-adds for N rows of I columns, and
    takes half of its memory. Any part of the strips may be held here and the rest elsewhere.
    """

    size: int
    blocks: int
    strips: dict[Strip, Tensor]
    rows: int = 0

    @staticmethod
    def zeros(
        size: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        owned: Iterable[Strip] | None = None,
    ) -> SecondMoment:
        """An empty sum over vectors of `size` coordinates in `blocks` blocks; all strips, or those that are owned."""
        owned = all_strips(size, blocks) if owned is None else owned
        strips = {strip: torch.zeros(strip_shape(size, blocks, strip), dtype=dtype, device=device) for strip in owned}
        return SecondMoment(size, blocks, strips)

    def add(self, rows_NI: Tensor, count: int, product: torch.dtype) -> None:
        """Add Σ_n x_n x_nᵀ for the given rows.

        Args:
            rows_NI: the vectors; rows of zeros add nothing.
            count: how many predicted (token, use) pairs the rows stand for.
            product: the type of the operands of the product; sums stay in the type of the strips.
        """
        rows_NI, parts = rows_NI.to(product), block_slices(self.size, self.blocks)
        for strip, target in self.strips.items():
            rows_Nb = rows_NI[:, parts[strip.block]]
            left, right = rows_Nb[:, strip.start : strip.start + target.shape[0]].T, rows_Nb[:, strip.start :]
            if rows_Nb.dtype == target.dtype:
                target.addmm_(left, right)
            else:
                target += left @ right
        self.rows += count

    def merge(self, other: SecondMoment) -> None:
        """Add another sum over different rows to this one."""
        for strip, theirs in other.strips.items():
            self.strips[strip] += theirs
        self.rows += other.rows

    def mean(self) -> tuple[Tensor, ...]:
        """The mean second moment E[x xᵀ], symmetric, a tensor a block.

        Raises:
            ValueError: if no row was added, or strips are missing.
        """
        if self.rows == 0:
            raise ValueError("a covariance factor over no rows: no position of the sample predicts a token")
        missing = set(all_strips(self.size, self.blocks)) - set(self.strips)
        if missing:
            raise ValueError(f"a covariance factor lacks {len(missing)} of its strips, the first at {min(missing)}")
        found = []
        for index, part in enumerate(block_slices(self.size, self.blocks)):
            width = part.stop - part.start
            block_bb = next(iter(self.strips.values())).new_empty(width, width)
            for strip, value in self.strips.items():
                if strip.block == index:
                    _mirror(block_bb, strip.start, value / self.rows)
            found.append(block_bb)
        return tuple(found)


def _mirror(block_bb: Tensor, start: int, strip: Tensor) -> None:
    """Write a strip into a symmetric block, on both sides of the diagonal."""
    rows = strip.shape[0]
    tile = torch.triu(strip[:, :rows])
    block_bb[start : start + rows, start : start + rows] = tile + torch.triu(tile, diagonal=1).T
    block_bb[start : start + rows, start + rows :] = strip[:, rows:]
    block_bb[start + rows :, start : start + rows] = strip[:, rows:].T


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
        selection: LayerSelection,
        blocks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> CovarianceSums:
        """Zero sums for every layer of a selection, in `blocks` blocks a side; the part that a rank owns of them."""
        layers = selection.layers
        inputs = {f"activation/{layer.input_group}": layer.columns for layer in layers}
        outputs = {f"gradient/{layer.name}": layer.outputs for layer in layers}
        owned = deal_strips(inputs | outputs, blocks, ranks)[rank]

        def moment(factor: str, size: int) -> SecondMoment:
            return SecondMoment.zeros(size, blocks, dtype, device, owned[factor])

        return CovarianceSums(
            {factor.removeprefix("activation/"): moment(factor, size) for factor, size in inputs.items()},
            {factor.removeprefix("gradient/"): moment(factor, size) for factor, size in outputs.items()},
        )

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
    if bool(predicted_BT.all()):  # rows whose last positions were left behind already
        return act_BTI.flatten(0, 1)
    return act_BTI[predicted_BT]


def _merge_all(mine: Mapping[str, SecondMoment], theirs: Mapping[str, SecondMoment]) -> None:
    if mine.keys() != theirs.keys():
        raise ValueError(f"sums over different layers cannot be merged: {sorted(mine.keys() ^ theirs.keys())}")
    for name, moment in theirs.items():
        mine[name].merge(moment)
