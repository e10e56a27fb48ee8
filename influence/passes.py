"""Which layers are fitted together: passes over the sample, none of whose factors exceed what a rank may hold.

I: columns of a layer (its inputs, and one for a bias). O: its outputs. N: ranks of a replica.

A pass runs the model over the whole sample with only its own layers tracked. Layers that see one input share the factor
of that input, so a group of them stays together. Passes are runs of groups in the order of the model, not the tightest
packing: a backward pass ends at the first tracked layer, so that passes over the last layers are the cheap ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from influence.covariance import all_strips, block_slices, deal_strips, strip_shape
from influence.exchange import shares
from influence.layers import TrackedLayer

Passes = tuple[tuple[TrackedLayer, ...], ...]


def plan_passes(layers: Sequence[TrackedLayer], bytes_of: Callable[[TrackedLayer], int], limit: int | None) -> Passes:
    """Cut layers into passes, as few as runs of whole input groups allow.

    Args:
        layers: tracked layers in the order of the model.
        bytes_of: what one rank holds of a layer's factors; that of a shared input counts with one layer of its group.
        limit: bytes that a rank may hold at once; None is no limit, and one pass.

    Returns:
        The layers of each pass; passes, and layers in them, in the order of the model (a group counts where its first
        layer stands).

    Raises:
        ValueError: if the layers of one group alone exceed the limit; names them and what helps.
    """
    passes: list[list[TrackedLayer]] = []
    room = 0
    for group in _groups(layers):
        size = sum(map(bytes_of, group))
        if limit is not None and size > limit:
            raise ValueError(_too_large(group, size, limit))
        if not passes or (limit is not None and size > room):
            passes.append([])
            room = limit or 0
        passes[-1] += group
        room -= size
    return tuple(tuple(found) for found in passes)


def covariance_bytes(layer: TrackedLayer, ranks: int, blocks: int, itemsize: int) -> int:
    """The most bytes that a rank may own of A and S of one layer: about (I² + O²) / 2N numbers.

    The factor of the input counts with the layer that its group is named after; the others of the group have only S.
    Strips are dealt whole, so that it is more than an even share where a factor has few of them.

    Args:
        layer: the layer.
        ranks: N, ranks of the replica.
        blocks: diagonal blocks a side.
        itemsize: bytes of a number of the sums.
    """
    numbers = _largest_share(layer.outputs, ranks, blocks)
    if layer.name == layer.input_group:
        numbers += _largest_share(layer.columns, ranks, blocks)
    return numbers * itemsize


def correction_bytes(layer: TrackedLayer, ranks: int, blocks: int, itemsize: int) -> int:
    """The bytes of a rank's shares of Q_A, Q_S and Λ of one layer: about (Σ b_I² + Σ b_O² + I·O) / N numbers.

    They are those of the first rank, whose shares are the largest. A basis of inputs that several layers share counts
    with each of them.

    Args:
        layer: the layer.
        ranks: N, ranks of the replica.
        blocks: diagonal blocks a side, of b coordinates each.
        itemsize: bytes of a number of the sums, and of the bases.
    """
    numbers = basis_share(layer.columns, ranks, blocks) + basis_share(layer.outputs, ranks, blocks)
    return (numbers + correction_share(layer, ranks)) * itemsize


def basis_share(size: int, ranks: int, blocks: int) -> int:
    """Numbers of the first rank's columns of a block-diagonal Q of `size` coordinates."""
    part = shares(size, ranks)[0]
    return sum(
        (block.stop - block.start) * max(0, min(part.stop, block.stop) - block.start)
        for block in block_slices(size, blocks)
    )


def correction_share(layer: TrackedLayer, ranks: int) -> int:
    """Numbers of the first rank's part of Λ: ⌈max(I, O) / N⌉·min(I, O)."""
    large, small = max(layer.columns, layer.outputs), min(layer.columns, layer.outputs)
    return -(-large // ranks) * small


def upper_strips(size: int, blocks: int = 1) -> int:
    """Numbers on and above the diagonal that a symmetric factor keeps, in strips of `TILE` rows; about Σ b² / 2.

    A strip of rows [s, e) of a block of b coordinates has the columns [s, b): (e − s)(b − s).
    """
    return sum(math.prod(strip_shape(size, blocks, strip)) for strip in all_strips(size, blocks))


def _largest_share(size: int, ranks: int, blocks: int) -> int:
    """The most numbers that one rank owns of a factor."""
    dealt = deal_strips({"": size}, blocks, ranks)
    return max(sum(math.prod(strip_shape(size, blocks, strip)) for strip in owned[""]) for owned in dealt)


def _groups(layers: Sequence[TrackedLayer]) -> list[list[TrackedLayer]]:
    groups: dict[str, list[TrackedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.input_group, []).append(layer)
    return list(groups.values())


def _too_large(group: Sequence[TrackedLayer], size: int, limit: int) -> str:
    names = group[0].name
    if len(group) > 1:
        names += f" with {', '.join(layer.name for layer in group[1:])}, which see the same input,"
    return (
        f"cluster.memory_per_rank={limit} is too small for {names}: a rank holds {size} bytes of its factors. "
        "Spread them over more ranks (cluster.world_size), cut them into more blocks (factors.blocks), or allow more "
        "memory (cluster.memory_per_rank)"
    )
