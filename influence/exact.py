"""The exact damped Gauss-Newton solution (G + λ)⁻¹ V of a plain network, in float64; λ is one number a layer.

N examples, C outputs, D tracked parameters; vectors_KOI: K vectors in one layer. With U the N·C rows √H_i J_i, one
for each output of each example, G = UᵀU / N, and by the Woodbury identity

    (λ + UᵀU/N)⁻¹ V = λ⁻¹ (V − Uᵀ (N + U λ⁻¹ Uᵀ)⁻¹ U λ⁻¹ V),

a system of N·C unknowns instead of D. Its matrix is a sum over layers, K = Σ_ℓ U_ℓ U_ℓᵀ / λ_ℓ. In a linear layer
a row is the product g ãᵀ of an output's gradient and an input, so that U_ℓ U_ℓᵀ = (g gᵀ) ⊙ (ã ãᵀ) and no row is formed.
Products with U and Uᵀ are Jacobian products. Where N·C is too large for it, conjugate gradients are run to a residual,
preconditioned by a low-rank approximation of G (`influence.nystrom` has why, and why not by EK-FAC).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.conjugate_gradients import conjugate_gradients, inner
from influence.gauss_newton import Examples, GaussNewton, TensorNetwork, Vectors
from influence.layers import TrackedLayer
from influence.nystrom import nystrom
from influence.output_losses import OutputLoss
from influence.supervised import backward, micro_batches, places

KERNEL = "kernel"
ITERATIVE = "conjugate gradients"
LARGEST_KERNEL = 8_000  # rows N·C
ROW_BYTES = 1 << 31  # of rows that are formed: those of layers with several places
ITERATIONS = 2_000
TOLERANCE = 1e-6
RANK = 256  # of the preconditioner


@dataclass(frozen=True)
class ExactSolution:
    """(G + λ)⁻¹ V in float64.

    Attributes:
        vectors: by layer, [K, O, I].
        way: `KERNEL` or `ITERATIVE`.
        rows: N·C.
        products: Gauss-Newton products of the K vectors, those behind the preconditioner in proportion; none by the
            kernel.
        iterations: of conjugate gradients.
        residual_K: ‖V − (G + λ) X‖ / ‖V‖ of the result, by a product of its own; 0 for V = 0.
        bytes: of the kernel's matrix, or of the vectors that the iteration holds.
    """

    vectors: Vectors
    way: str
    rows: int
    products: int
    iterations: int
    residual_K: Tensor
    bytes: int


def in_double(network: TensorNetwork, examples: Examples) -> tuple[TensorNetwork, Examples]:
    """The same network and examples in float64; they themselves if they are so."""
    if next(network.model.parameters()).dtype == torch.float64:
        return network, examples
    targets = examples.targets.double() if examples.targets.is_floating_point() else examples.targets
    model = copy.deepcopy(network.model).double()
    return TensorNetwork(model, network.loss), Examples(examples.inputs.double(), targets)


def solve_exactly(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    vectors: Vectors,
    damping: Mapping[str, float],
    batch: int = 256,
    largest_kernel: int = LARGEST_KERNEL,
    tolerance: float = TOLERANCE,
    rank: int = RANK,
) -> ExactSolution:
    """Solve (G + λ) X = V.

    Args:
        network: in evaluation mode, its parameters frozen; of any type.
        layers: tracked.
        examples: all N.
        vectors: V.
        damping: λ by layer, positive.
        batch: examples a micro-batch.
        largest_kernel: rows N·C up to which the kernel is formed, where the rows that it needs fit into `ROW_BYTES`.
        tolerance: relative residual at which conjugate gradients stop.
        rank: of their preconditioner.
    """
    network, examples = in_double(network, examples)
    right = {name: value.double() for name, value in vectors.items()}
    newton = GaussNewton(network, layers)

    def product(given: Vectors) -> Vectors:
        return newton(micro_batches(examples, batch), given)

    rows, seen = _outputs(network, examples) * len(examples.inputs), places(network, layers, examples)
    formed = 8 * rows * sum(layer.parameters for layer in layers if seen[layer.name] > 1)
    if rows <= largest_kernel and formed <= ROW_BYTES:
        solution = _by_kernel(newton, network, layers, examples, right, damping, batch)
        rest_K = residual(product(solution), solution, right, damping)
        return ExactSolution(solution, KERNEL, rows, 0, 0, rest_K, 8 * rows**2)
    near = nystrom(product, right, damping, rank)
    found = conjugate_gradients(product, right, damping, near, ITERATIONS, tolerance)
    count, iterations = len(found.products_K), int(found.products_K.max())
    rest_K = residual(product(found.vectors), found.vectors, right, damping)
    held = 5 * sum(value.nbytes for value in right.values()) + near.rows_RP.nbytes
    products = iterations + math.ceil(near.products / count)
    return ExactSolution(found.vectors, ITERATIVE, rows, products, iterations, rest_K, held)


def residual(curved: Vectors, solution: Vectors, right: Vectors, damping: Mapping[str, float]) -> Tensor:
    """‖V − G X − λ X‖ / ‖V‖ of each vector, given G X; 0 for V = 0."""
    rest = {name: right[name] - curved[name] - damping[name] * value for name, value in solution.items()}
    norm_K = inner(right, right).sqrt()
    return torch.where(norm_K > 0, inner(rest, rest).sqrt() / norm_K.clamp_min(1e-300), 0.0)


# --- the kernel -------------------------------------------------------------------------------------------------------


def _by_kernel(
    newton: GaussNewton[Examples],
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    right: Vectors,
    damping: Mapping[str, float],
    batch: int,
) -> Vectors:
    """λ⁻¹ (V − Uᵀ (N + U λ⁻¹ Uᵀ)⁻¹ U λ⁻¹ V)."""
    divided = {name: value / damping[name] for name, value in right.items()}
    roots, seen = [], []
    for part in micro_batches(examples, batch):
        with torch.no_grad():
            roots.append(_root(network.loss, network.outputs(part), part.targets))
        pushed = newton.jacobian_product(part, divided)
        seen.append(torch.einsum("bce,kbe->kbc", roots[-1], pushed))
    seen_KNC = torch.cat(seen, dim=1)
    size = seen_KNC.shape[1]
    matrix_MM = _kernel(network, layers, examples, damping, roots, batch)
    matrix_MM.diagonal().add_(size)
    flat_MK = seen_KNC.permute(2, 1, 0).flatten(0, 1)  # rows in the order of outputs, then of examples
    weights_MK = torch.cholesky_solve(flat_MK, torch.linalg.cholesky(matrix_MM))
    weights_KNC = weights_MK.unflatten(0, (-1, size)).permute(2, 1, 0)
    total, start = {name: torch.zeros_like(value) for name, value in right.items()}, 0
    for part, root_BCC in zip(micro_batches(examples, batch), roots, strict=True):
        given = weights_KNC[:, start : start + len(root_BCC)]
        back = newton.transposed_product(part, torch.einsum("bce,kbe->kbc", root_BCC, given))
        start += len(root_BCC)
        for name, value in back.items():
            total[name] += value
    return {name: (value - total[name]) / damping[name] for name, value in right.items()}


def _kernel(
    network: TensorNetwork,
    layers: Sequence[TrackedLayer],
    examples: Examples,
    damping: Mapping[str, float],
    roots: Sequence[Tensor],
    batch: int,
) -> Tensor:
    """Σ_ℓ U_ℓ U_ℓᵀ / λ_ℓ, [C·N, C·N], by a backward pass for each output."""
    held: dict[str, _Rows] = {layer.name: _Rows([], [], []) for layer in layers}
    outputs = roots[0].shape[-1]
    for output in range(outputs):

        def consume(layer: TrackedLayer, uses: Sequence[Use], first: bool = output == 0) -> None:
            held[layer.name].add(layer, uses, first)

        for part, root_BCC in zip(micro_batches(examples, batch), roots, strict=True):
            backward(network, layers, part.inputs, lambda _, row=root_BCC[:, output]: row, consume)
    total = roots[0].new_zeros(outputs * len(examples.inputs), outputs * len(examples.inputs))
    for layer in layers:
        held[layer.name].add_products(total, outputs, 1 / damping[layer.name])
    return total


@dataclass(frozen=True)
class _Rows:
    """The rows U of one layer: inputs and gradients where they are single products g ãᵀ, else as they are."""

    act_NI: list[Tensor]
    grad_MO: list[Tensor]
    formed_MP: list[Tensor]

    def add(self, layer: TrackedLayer, uses: Sequence[Use], first: bool) -> None:
        """Take the rows of a micro-batch; the inputs are the same ones for each output."""
        if len(uses) == 1 and uses[0].act_BTI.shape[1] == 1:
            self.grad_MO.append(uses[0].grad_BTO[:, 0])
            if first:
                self.act_NI.append(homogeneous(uses[0].act_BTI[:, 0], layer.bias))
            return
        formed = [use.grad_BTO.transpose(1, 2) @ homogeneous(use.act_BTI, layer.bias) for use in uses]
        self.formed_MP.append(torch.stack(formed).sum(0).flatten(1))

    def add_products(self, total_MM: Tensor, outputs: int, factor: float) -> None:
        """Add factor · U Uᵀ; nothing for a layer that no output depends on."""
        if self.formed_MP:
            rows_MP = torch.cat(self.formed_MP)
            total_MM.addmm_(rows_MP, rows_MP.T, alpha=factor)
        elif self.grad_MO:
            grad_MO, act_NI = torch.cat(self.grad_MO), torch.cat(self.act_NI)
            grams_NN = act_NI @ act_NI.T
            size = len(grams_NN)
            blocks = total_MM.view(outputs, size, outputs, size).transpose(1, 2)  # [C, C, N, N]
            for output, grad_NO in enumerate(grad_MO.split(size)):  # a row of blocks at a time
                products = (grad_NO @ grad_MO.T).unflatten(1, (outputs, size)).transpose(0, 1)
                blocks[output] += factor * products * grams_NN


def _root(loss: OutputLoss, outputs_BC: Tensor, targets: Tensor) -> Tensor:
    """The symmetric root of H_ŷ of each example, [B, C, C]."""
    count, size = outputs_BC.shape
    unit = torch.eye(size, dtype=outputs_BC.dtype, device=outputs_BC.device)
    hessian = loss.hessian_product(outputs_BC, targets, unit[:, None].expand(size, count, size)).transpose(0, 1)
    values, vectors = torch.linalg.eigh(hessian)
    return vectors @ (values.clamp_min(0).sqrt()[..., None] * vectors.transpose(1, 2))


def _outputs(network: TensorNetwork, examples: Examples) -> int:
    """C."""
    with torch.no_grad():
        return network.outputs(Examples(examples.inputs[:1], examples.targets[:1])).numel()
