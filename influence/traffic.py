"""What the ranks of a sharded replica receive from one another, by formulas, and what moving it otherwise would take.

Legend: N ranks, B sequences of each in a micro-batch, T positions, U calls of a layer in a pass, I inputs of a layer
without a bias (`columns`: with it), O its outputs, Q queries. A gather gives each rank what the N − 1 others sent.

"Numbers" times the size of their type are bytes; tests hold them equal to what the ranks of small replicas received.
Whoever counts all that is moved adds up over ranks: each number received was sent once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from influence.cost import block_squares
from influence.layers import TrackedLayer
from influence.passes import upper_strips
from influence.shape import ForwardShape

FLAG_BYTES = 8  # a rank's number of sequences that are not finite, told after each micro-batch of a statistic


def row_numbers(layer: TrackedLayer, tokens: int, calls: int = 1, activations: bool = True) -> int:
    """Numbers of a sequence's rows in one layer: (T − 1)·U·(I + O), or only O; the last position predicts nothing."""
    return (tokens - 1) * calls * (layer.inputs * activations + layer.outputs)


def covariance_received(layers: Iterable[TrackedLayer], tokens: int, calls: Mapping[str, int], ranks: int) -> int:
    """Numbers that a rank receives for each sequence of its own: (N − 1) times its rows, inputs once a group."""
    own = sum(row_numbers(layer, tokens, calls.get(layer.name, 1), layer.name == layer.input_group) for layer in layers)
    return (ranks - 1) * own


def correction_received(layers: Iterable[TrackedLayer], tokens: int, calls: Mapping[str, int], ranks: int) -> int:
    """Numbers that a rank receives for each sequence of its own: the rows of every layer, and the smaller side rotated.

    Each rank rotates all N·(T − 1)·U rows by its ⌈min(I, O) / N⌉ columns and sends what comes out.
    """
    total = 0
    for layer in layers:
        uses = calls.get(layer.name, 1)
        rotated = (tokens - 1) * uses * -(-min(layer.columns, layer.outputs) // ranks)
        total += row_numbers(layer, tokens, uses) + ranks * rotated
    return (ranks - 1) * total


def rows_received(layers: Iterable[TrackedLayer], tokens: int, calls: Mapping[str, int], ranks: int) -> int:
    """Numbers that a rank receives for each sequence of its own where it holds a share of the queries: all rows."""
    return (ranks - 1) * sum(row_numbers(layer, tokens, calls.get(layer.name, 1)) for layer in layers)


def scores_received(queries: int, ranks: int, shared: bool) -> int:
    """Scores that a rank receives for each sequence of its own: (N − 1)·Q; partial ones of all N where shared."""
    return (ranks - 1) * queries * (ranks if shared else 1)


def weights_received(shape: ForwardShape, ranks: int) -> int:
    """Numbers that a rank receives in a forward and a backward pass of a sharded model, whatever the sequences.

    Each use of a parameter of P numbers brings N − 1 slices of ⌈P / N⌉.
    """
    used = sum(-(-weights.numbers // ranks) * (weights.forward + weights.backward) for weights in shape.weights)
    return (ranks - 1) * used


# --- what was not chosen ---


def products_received(layers: Iterable[TrackedLayer], ranks: int, blocks: int = 1) -> int:
    """Numbers that a rank receives a micro-batch if ranks reduce-scattered their own Σ x xᵀ instead of gathering rows.

    (N − 1) / N of the upper strips of each factor, whatever the number of rows; each rank would hold a whole product.
    """
    total = 0
    for layer in layers:
        total += upper_strips(layer.outputs, blocks)
        if layer.name == layer.input_group:
            total += upper_strips(layer.columns, blocks)
    return (ranks - 1) * -(-total // ranks)


def bases_received(layers: Iterable[TrackedLayer], ranks: int, blocks: int = 1) -> int:
    """Numbers that a rank receives a micro-batch if Q_A and Q_S were gathered layer by layer, as weights are."""
    total = sum(block_squares(layer.columns, blocks) + block_squares(layer.outputs, blocks) for layer in layers)
    return (ranks - 1) * -(-total // ranks)
