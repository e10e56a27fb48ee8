"""What each stage costs: floating-point operations and numbers held, by formulas.

Legend: T positions of a sequence, U calls of a layer in a pass, I columns of a layer (inputs, and one for a bias),
O outputs, b the blocks that a side is cut into, Q queries, R rank, K singular values kept.

FLOPs are those of matrix products, two a multiply-add, of one sequence (or one query, or one factor) unless said
otherwise; tests hold them equal to what `FlopCounterMode` counts in the very methods. Decompositions, which no counter
sees, are apart: leading terms of LAPACK's algorithms. "Numbers" times the size of their type are bytes, and tests hold
them equal to the tensors in the artifacts of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from influence.compression import EXACT_SIZE, OVERSAMPLING, POWER_ITERATIONS
from influence.covariance import block_slices
from influence.eigenbasis import aligned_size
from influence.layers import TrackedLayer
from influence.passes import upper_strips
from influence.shape import ForwardShape

# --- the floor: a forward pass and a backward pass to activations only ---


def forward_flops(shape: ForwardShape, tokens: int) -> int:
    """One forward pass over a sequence: 2·T·I·O a linear layer, 4·T²·W an attention."""
    linears = sum(call.inputs * call.outputs * call.forward for call in shape.linears)
    return 2 * tokens * linears + sum(4 * tokens**2 * attention.width for attention in shape.attentions)


def floor_flops(shape: ForwardShape, tokens: int) -> int:
    """A forward pass and a backward pass that computes no weight gradient: what every gradient stage has to do.

    Adds 2·T·I·O for each call whose input needs a gradient and 8·T²·W for each attention below which one does.
    """
    linears = sum(call.inputs * call.outputs * call.backward for call in shape.linears)
    attentions = sum(8 * tokens**2 * attention.width for attention in shape.attentions if attention.backward)
    return forward_flops(shape, tokens) + 2 * tokens * linears + attentions


def elementwise_numbers(shape: ForwardShape, tokens: int, sampled: bool) -> int:
    """Numbers that operations other than products touch in the floor, as passes over a softmax: an estimate.

    Two for each activation that autograd saves (made in the forward, used in the backward pass), and of the logits
    two for the loss and its gradient and one for sampling labels.
    """
    return tokens * (2 * shape.saved_numbers + (3 if sampled else 2) * shape.vocabulary)


def attention_weights(shape: ForwardShape, tokens: int) -> int:
    """Weights of attention, T² a head: made in the forward pass, made again and differentiated in the backward pass."""
    return tokens**2 * shape.heads


# --- factors ---


def block_squares(size: int, blocks: int = 1) -> int:
    """Σ b² over the diagonal blocks of one side: the numbers of a factor, and the multiply-adds to rotate one row."""
    return sum((part.stop - part.start) ** 2 for part in block_slices(size, blocks))


def covariance_flops(layer: TrackedLayer, tokens: int, calls: int = 1, blocks: int = 1, ranks: int = 1) -> int:
    """A and S of one layer: (T − 1)·U rows of I columns, none if another layer of its group adds them, and T·U of O.

    Each row costs as many multiply-adds as the upper strips have numbers. Several ranks leave the last of T rows behind
    on both sides, and have all other products in common: this is their sum.
    """
    own = layer.name == layer.input_group
    activation = (tokens - 1) * calls * upper_strips(layer.columns, blocks) if own else 0
    rows = tokens if ranks == 1 else tokens - 1
    return 2 * (activation + rows * calls * upper_strips(layer.outputs, blocks))


def correction_flops(
    layer: TrackedLayer, tokens: int, calls: int = 1, blocks: int = 1, aligned: bool = True, ranks: int = 1
) -> int:
    """Λ of one layer, T over all calls: T·I·O + Σb_I²·min(T, O) + Σb_O²·min(T, I) multiply-adds.

    I is that of an aligned basis of the inputs, unless there are several blocks or `aligned` is off. Several ranks
    always rotate rows, T − 1 a call, by the bases as they are: (T − 1)·U·(I·O + Σb_I² + Σb_O²) over all ranks.
    """
    if ranks > 1:
        rotations = block_squares(layer.columns, blocks) + block_squares(layer.outputs, blocks)
        return 2 * (tokens - 1) * calls * (layer.parameters + rotations)
    rows = tokens * calls
    columns = aligned_size(layer.columns) if aligned and blocks == 1 else layer.columns
    formed = rows * columns * layer.outputs
    rotated = block_squares(columns, blocks) * min(rows, layer.outputs)
    rotated += block_squares(layer.outputs, blocks) * min(rows, columns)
    return 2 * (formed + rotated)


def eigenbasis_operations(size: int, blocks: int = 1) -> int:
    """Eigendecomposition of one factor by divide and conquer: 14/3 b³ a block.

    4/3 to tridiagonalise, 4/3 to merge and 2 to transform back; deflation saves a part of the second.
    """
    return sum(14 * (part.stop - part.start) ** 3 // 3 for part in block_slices(size, blocks))


def factor_sizes(layers: Sequence[TrackedLayer]) -> dict[str, int]:
    """Coordinates of every factor, by its name: A once for an input group, S for each layer."""
    sizes = {f"activation/{layer.input_group}": layer.columns for layer in layers}
    return sizes | {f"gradient/{layer.name}": layer.outputs for layer in layers}


def covariance_numbers(layers: Sequence[TrackedLayer], blocks: int = 1) -> int:
    """Numbers of all factors A and S, Σ b²: the artifact."""
    return sum(block_squares(size, blocks) for size in factor_sizes(layers).values())


def strip_numbers(layers: Sequence[TrackedLayer], blocks: int = 1) -> int:
    """Numbers of the sums behind A and S, about half of them: what the ranks of a replica hold together, and a part."""
    return sum(upper_strips(size, blocks) for size in factor_sizes(layers).values())


def basis_numbers(layers: Sequence[TrackedLayer], blocks: int = 1) -> int:
    """Numbers of the eigenbasis artifact: vectors, and values."""
    return covariance_numbers(layers, blocks) + sum(factor_sizes(layers).values())


def correction_numbers(layers: Iterable[TrackedLayer]) -> int:
    """Numbers of Λ: I·O a layer."""
    return sum(layer.parameters for layer in layers)


# --- queries ---


def token_factor_numbers(layer: TrackedLayer, tokens: int) -> int:
    """Numbers of one query's gradient in one layer, as factors over `tokens` tokens (and calls): T·(I + O)."""
    return tokens * (layer.columns + layer.outputs)


def kept_values(layer: TrackedLayer, max_rank: int | None) -> int:
    """The most singular values that a query keeps in a layer."""
    most = min(layer.columns, layer.outputs)
    return most if max_rank is None else min(max_rank, most)


def ihvp_flops(
    layer: TrackedLayer, tokens: int, max_rank: int | None, full: bool, curvature: bool = True, blocks: int = 1
) -> int:
    """One query in one layer: form the gradient, rotate it, and unrotate it or its K singular vectors.

    T·I·O + OΣb_I² + IΣb_O² multiply-adds, then the rotations again (full matrices) or K(Σb_I² + Σb_O²).

    Args:
        layer: The layer.
        tokens: Tokens with a gradient.
        max_rank: The most singular values kept; None is all.
        full: Whether the full matrix is wanted instead of singular vectors.
        curvature: Whether the solver has an eigenbasis.
        blocks: Diagonal blocks a side.
    """
    formed = tokens * layer.columns * layer.outputs
    squares_I, squares_O = block_squares(layer.columns, blocks), block_squares(layer.outputs, blocks)
    rotated = layer.outputs * squares_I + layer.columns * squares_O if curvature else 0
    if full:
        return 2 * (formed + 2 * rotated)
    back = kept_values(layer, max_rank) * (squares_I + squares_O) if curvature else 0
    return 2 * (formed + rotated + back) + randomised_flops(layer.outputs, layer.columns, max_rank)


def _is_exact(smaller: int, max_rank: int | None) -> bool:
    return smaller <= EXACT_SIZE or max_rank is None or max_rank + OVERSAMPLING >= smaller


def randomised_flops(rows: int, columns: int, max_rank: int | None) -> int:
    """Products of a randomised SVD with q = K + 16 columns: (2 + 2·4)·m·n·q + m·q² multiply-adds; 0 if it is exact."""
    if _is_exact(min(rows, columns), max_rank):
        return 0
    assert max_rank is not None
    width = max_rank + OVERSAMPLING
    return 2 * ((2 + 2 * POWER_ITERATIONS) * rows * columns * width + max(rows, columns) * width**2)


def svd_operations(rows: int, columns: int, max_rank: int | None) -> int:
    """An exact SVD, m ≥ n, with both sides' vectors: 6mn² + 20n³; or the orthogonalisations of a randomised one."""
    large, small = max(rows, columns), min(rows, columns)
    if _is_exact(small, max_rank):
        return 6 * large * small**2 + 20 * small**3
    assert max_rank is not None
    width = max_rank + OVERSAMPLING
    orthogonalised = (1 + POWER_ITERATIONS) * 4 * large * width**2 + POWER_ITERATIONS * 4 * small * width**2
    return orthogonalised + 6 * small * width**2 + 20 * width**3


def factored_numbers(layer: TrackedLayer, total_rank: int) -> int:
    """Numbers of packed factors of all queries: ΣR·(I + O)."""
    return total_rank * (layer.columns + layer.outputs)


def dense_numbers(layer: TrackedLayer, queries: int) -> int:
    """Numbers of full matrices of all queries: Q·I·O."""
    return queries * layer.parameters


# --- scan ---


def scan_flops(
    layer: TrackedLayer,
    contraction: str,
    tokens: int,
    total_rank: int,
    queries: int,
    calls: int = 1,
    shared: bool = False,
) -> int:
    """Scores of one sequence against all queries in one layer.

    `factored`: T·U·ΣR·(I + O) multiply-adds. `dense`: T·U·I·O to form the gradient and Q·I·O to meet the queries. A
    bias is added, not multiplied, but for Q·O where the gradient is formed. Ranks that share the queries leave the last
    of T rows behind.
    """
    rows = (tokens - shared) * calls
    if contraction == "factored":
        return 2 * rows * total_rank * (layer.inputs + layer.outputs)
    return 2 * (layer.inputs * layer.outputs * (rows + queries) + layer.bias * layer.outputs * queries)


def top_comparisons(candidates: int, queries: int) -> int:
    """Sorting scores shard by shard for the best of every query: about Q·N·log₂ N comparisons."""
    return queries * candidates * max(1, candidates.bit_length())


# --- conjugate gradients ---


def product_flops(
    shape: ForwardShape, layers: Sequence[TrackedLayer], tokens: int, vectors: int, pieces: int = 1
) -> int:
    """Σ Jᵀ H J V of one sequence: 2 forward passes a piece of the vectors; tangents and a backward pass for each.

    Tangents pass through what the backward pass passes through, by as many products; at each linear layer there torch
    takes one more in a piece, of the size of a vector's. Each tracked layer adds V ā, T·U·I·O multiply-adds without the
    bias, and Σ_t Ds_t ā_tᵀ, as many with it.

    Args:
        shape: of a pass.
        layers: tracked.
        tokens: T.
        vectors: K.
        pieces: in which they go through the model.
    """
    forward = forward_flops(shape, tokens)
    backward = floor_flops(shape, tokens) - forward
    tracked = sum(
        2 * tokens * shape.calls.get(layer.name, 1) * layer.outputs * (layer.inputs + layer.columns) for layer in layers
    )
    once = 2 * tokens * sum(call.inputs * call.outputs * call.backward for call in shape.linears)
    return pieces * (2 * forward + once) + vectors * (2 * backward + tracked)


# --- attribution ---


def through_flops(shape: ForwardShape, tokens: int) -> int:
    """A forward pass and a backward pass down to the embeddings, which all layers take part in."""
    linears = sum(call.inputs * call.outputs * call.forward for call in shape.linears)
    attentions = sum(8 * tokens**2 * attention.width for attention in shape.attentions)
    return forward_flops(shape, tokens) + 2 * tokens * linears + attentions


def direction_flops(layer: TrackedLayer, tokens: int, rank: int | None, calls: int = 1) -> int:
    """V ā, Vᵀ Ds or Ds_tᵀ V ā_t of one query and sequence: T·U·R·(I + O) multiply-adds, T·U·I·O at full rank (None)."""
    each = layer.inputs * layer.outputs if rank is None else rank * (layer.inputs + layer.outputs)
    return 2 * tokens * calls * each


# --- activations ---


def captured_numbers(layers: Sequence[TrackedLayer], tokens: int, calls: Mapping[str, int] | None = None) -> int:
    """Inputs of tracked layers that one sequence holds at once: T·U·(I without bias) for each input group."""
    counts = calls or {}
    widths = {layer.input_group: layer.inputs * counts.get(layer.name, 1) for layer in layers}
    return tokens * sum(widths.values())
