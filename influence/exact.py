"""The exact damped Gauss-Newton solution (G + λ)⁻¹ V of a plain network, in float64; λ is one number a layer.

N examples, C outputs, P parameters of all tracked layers. G has rank N·C at most, so that by the Woodbury identity a
system of N·C unknowns does where that is a few thousand (`influence.dominant`, with all rows). Where it is more,
conjugate gradients are run to a residual, preconditioned by the inverse of the largest rows. The rows of convolutions
are sums over places and take P numbers each (`influence.formed`), so that memory says how many of them there are.

Why not EK-FAC as a preconditioner. A network with more parameters than it has outputs over the whole sample has a G of
low rank, and λ lies far below its largest eigenvalues. EK-FAC spreads curvature over directions that have none. That is
near enough to rank points, but it tears apart the eigenvalues that lie together at λ, and the last digits take
thousands of iterations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.conjugate_gradients import Product, conjugate_gradients, inner
from influence.dominant import Dominant
from influence.formed import BYTES, Formed
from influence.gauss_newton import Examples, GaussNewton, TensorNetwork, Vectors
from influence.layers import TrackedLayer
from influence.supervised import micro_batches, places

KERNEL = "kernel"
ITERATIVE = "conjugate gradients"
LARGEST_KERNEL = 8_000  # rows; 512 MB in float64
ITERATIONS = 2_000
TOLERANCE = 1e-6
EXAMPLES = 64  # a micro-batch whose rows are formed


@dataclass(frozen=True)
class ExactSolution:
    """(G + λ)⁻¹ V in float64.

    Attributes:
        vectors: by layer, [K, O, I].
        way: `KERNEL` or `ITERATIVE`.
        rows: N·C.
        products: Gauss-Newton products of the K vectors.
        iterations: of conjugate gradients.
        residual_K: ‖V − (G + λ) X‖ / ‖V‖ of the result, by a product of its own; 0 for V = 0.
        bytes: of the preconditioner, and of the vectors that the iteration holds.
    """

    vectors: Vectors
    way: str
    rows: int
    products: int
    iterations: int
    residual_K: Tensor
    bytes: int


def solve_exactly(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    vectors: Vectors,
    damping: Mapping[str, float],
    batch: int = 256,
    largest_kernel: int = LARGEST_KERNEL,
    tolerance: float = TOLERANCE,
    most: int = BYTES,
) -> ExactSolution:
    """Solve (G + λ) X = V.

    Args:
        network: in evaluation mode, its parameters frozen; of any type.
        layers: tracked.
        examples: all N.
        vectors: V.
        damping: λ by layer, positive.
        batch: examples a micro-batch.
        largest_kernel: rows N·C up to which the solution is direct, and else of the preconditioner.
        tolerance: relative residual at which conjugate gradients stop.
        most: bytes of the rows of convolutions; if all of them take no more, the solution is direct.
    """
    network, examples = in_double(network, examples)
    right = {name: value.double() for name, value in vectors.items()}
    newton, rows = GaussNewton(network, layers), _outputs(network, examples) * len(examples.inputs)

    def product(given: Vectors) -> Vectors:
        return newton(micro_batches(examples, batch), given)

    if any(seen > 1 for seen in places(network, layers, examples).values()):
        formed = Formed.fit(network, layers, examples, damping, most, min(batch, EXAMPLES))
        inverse, whole, held = formed, formed.whole, formed.bytes
    else:
        dominant = Dominant.fit(network, layers, examples, damping, largest_kernel, batch)
        inverse, whole, held = dominant, rows <= largest_kernel, dominant.cholesky_RR.nbytes
    if whole:
        solution = inverse(right)
        return ExactSolution(solution, KERNEL, rows, 0, 0, residual(product, solution, right, damping), held)
    found = conjugate_gradients(product, right, damping, inverse, ITERATIONS, tolerance)
    iterations = int(found.products_K.max())
    rest_K = residual(product, found.vectors, right, damping)
    held += 5 * sum(value.nbytes for value in right.values())
    return ExactSolution(found.vectors, ITERATIVE, rows, iterations, iterations, rest_K, held)


def in_double(network: TensorNetwork, examples: Examples) -> tuple[TensorNetwork, Examples]:
    """The same network and examples in float64; they themselves if they are so."""
    if next(network.model.parameters()).dtype == torch.float64:
        return network, examples
    targets = examples.targets.double() if examples.targets.is_floating_point() else examples.targets
    model = copy.deepcopy(network.model).double()
    return TensorNetwork(model, network.loss), Examples(examples.inputs.double(), targets)


def residual(product: Product, solution: Vectors, right: Vectors, damping: Mapping[str, float]) -> Tensor:
    """‖V − (G + λ) X‖ / ‖V‖ of each vector; 0 for V = 0."""
    curved = product(solution)
    rest = {name: right[name] - curved[name] - damping[name] * value for name, value in solution.items()}
    norm_K = inner(right, right).sqrt()
    return torch.where(norm_K > 0, inner(rest, rest).sqrt() / norm_K.clamp_min(1e-300), 0.0)


def _outputs(network: TensorNetwork, examples: Examples) -> int:
    """C."""
    with torch.no_grad():
        return network.outputs(Examples(examples.inputs[:1], examples.targets[:1])).numel()
