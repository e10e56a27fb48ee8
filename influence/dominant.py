"""The inverse of what the largest rows contribute to G + λ: a preconditioner for systems with G + λ of plain networks.

G = 1/N Σ_i J_iᵀ H_i J_i is a sum over the modes of examples: with H_i = Σ_c h_c e_c e_cᵀ and ũ_ic = √(h_c/N) e_cᵀ J_i,
a row, G = Σ ũᵀ ũ. A network that has learnt its data is sure of most examples, whose rows are then tiny. The R rows of
the largest ũ λ⁻¹ ũᵀ make

    M = λ + Σ_R ũᵀ ũ ⪯ G + λ,    M⁻¹ V = λ⁻¹ (V − Uᵀ (1 + U λ⁻¹ Uᵀ)⁻¹ U λ⁻¹ V),

which differs from G + λ by what is small beside λ; with all N·C rows they are the same. Being below G + λ, M⁻¹ bounds
its inverse from above.

In a linear layer that sees one row of each example, ũ is a product g ãᵀ of the gradient of an output and an input, so
that the kernel is (g gᵀ) ⊙ (ã ãᵀ) and no row is formed. K vectors side by side, E of the N examples that have rows
among the R, I inputs (with the bias) and O outputs of a layer. Cost: R³/3 multiply-adds once; a vector takes
2 E · Σ I·O, 2 R · Σ O and R².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.gauss_newton import Examples, TensorNetwork, Vectors
from influence.layers import TrackedLayer
from influence.output_losses import OutputLoss
from influence.supervised import backward, micro_batches

ROWS = 8_000
BLOCK = 1_000  # rows of the kernel at a time


@dataclass(frozen=True)
class Dominant:
    """M⁻¹, ready to be applied.

    Attributes:
        damping: λ by layer.
        inputs: ã of the E examples, [E, I] by layer.
        gradients: g of the R rows, [R, O] by layer, with √(h/N) in it.
        owner_R: which of the E examples a row is of.
        cholesky_RR: of 1 + U λ⁻¹ Uᵀ, lower.
        trace_share: of the trace of λ⁻¹G that the rows have.
    """

    damping: Mapping[str, float]
    inputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    owner_R: Tensor
    cholesky_RR: Tensor
    trace_share: float

    @staticmethod
    def fit(
        network: TensorNetwork,
        layers: Sequence[TrackedLayer],
        examples: Examples,
        damping: Mapping[str, float],
        rows: int = ROWS,
        batch: int = 500,
    ) -> Dominant:
        """Choose the rows and factorise their kernel, in the type of the network.

        Args:
            network: in evaluation mode, frozen; each of its tracked layers is linear, is called once and sees one row
                of each example.
            layers: tracked.
            examples: all N.
            damping: λ by layer.
            rows: R at most.
            batch: examples a micro-batch.

        Raises:
            ValueError: for a layer that sees several rows of an example.
        """
        inputs, gradients = _all_rows(network, layers, examples, batch)
        scores_NC = torch.stack(
            [
                inputs[layer.name].square().sum(1)[:, None]
                * gradients[layer.name].square().sum(2)
                / damping[layer.name]
                for layer in layers
            ]
        ).sum(0)
        modes = scores_NC.shape[1]
        chosen_R = scores_NC.flatten().topk(min(rows, scores_NC.numel())).indices.sort().values
        examples_E, owner_R = torch.unique(chosen_R // modes, return_inverse=True)
        inputs = {name: value[examples_E] for name, value in inputs.items()}
        gradients = {name: value[chosen_R // modes, chosen_R % modes] for name, value in gradients.items()}
        kernel_RR = _kernel(inputs, gradients, owner_R, damping)
        share = float(scores_NC.flatten()[chosen_R].sum() / scores_NC.sum())
        return Dominant(dict(damping), inputs, gradients, owner_R, torch.linalg.cholesky(kernel_RR), share)

    def __call__(self, vectors: Vectors) -> Vectors:
        """M⁻¹ V."""
        divided = {name: value / self.damping[name] for name, value in vectors.items()}
        seen_RK = sum(self._seen(name, value) for name, value in divided.items())
        weights_RK = torch.cholesky_solve(seen_RK, self.cholesky_RR)  # type: ignore[arg-type]
        return {name: value - self._back(name, weights_RK) / self.damping[name] for name, value in divided.items()}

    def _seen(self, name: str, vectors_KOI: Tensor) -> Tensor:
        """U V of one layer, [R, K]."""
        count, outputs, columns = vectors_KOI.shape
        pushed_EKO = (self.inputs[name] @ vectors_KOI.reshape(-1, columns).T).view(-1, count, outputs)
        blocks = zip(self.owner_R.split(BLOCK), self.gradients[name].split(BLOCK), strict=True)
        return torch.cat([(pushed_EKO[owner] @ grad_RO[:, :, None]).squeeze(2) for owner, grad_RO in blocks])

    def _back(self, name: str, weights_RK: Tensor) -> Tensor:
        """Uᵀ w of one layer, [K, O, I]."""
        (examples, columns), outputs = self.inputs[name].shape, self.gradients[name].shape[1]
        count = weights_RK.shape[1]
        pulled_EKO = weights_RK.new_zeros(examples, count, outputs)
        blocks = zip(self.owner_R.split(BLOCK), weights_RK.split(BLOCK), self.gradients[name].split(BLOCK), strict=True)
        for owner, weights, grad_RO in blocks:
            pulled_EKO.index_add_(0, owner, weights[:, :, None] * grad_RO[:, None, :])
        return (pulled_EKO.view(examples, -1).T @ self.inputs[name]).view(count, outputs, columns)


def _all_rows(
    network: TensorNetwork, layers: Sequence[TrackedLayer], examples: Examples, batch: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ã [N, I] and √(h/N) g [N, C, O] of every example and mode, by layer."""
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for part in micro_batches(examples, batch):
        with torch.no_grad():
            modes_BCC = modes_of(network.loss, network.outputs(part), part.targets) / len(examples.inputs) ** 0.5
        found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        for mode in range(modes_BCC.shape[1]):

            def consume(layer: TrackedLayer, uses: Sequence[Use], first: bool = mode == 0) -> None:
                if len(uses) != 1 or uses[0].act_BTI.shape[1] != 1:
                    raise ValueError(f"layer {layer.name} sees several rows of an example")
                found[layer.name].append(uses[0].grad_BTO[:, 0])  # noqa: B023
                if first:
                    inputs[layer.name].append(homogeneous(uses[0].act_BTI[:, 0], layer.bias))

            backward(network, layers, part.inputs, lambda _, row=modes_BCC[:, mode]: row, consume)
        for name, value in found.items():
            gradients[name].append(torch.stack(value, 1))
    return {k: torch.cat(v) for k, v in inputs.items()}, {k: torch.cat(v) for k, v in gradients.items()}


def modes_of(loss: OutputLoss, outputs_BC: Tensor, targets: Tensor) -> Tensor:
    """√h_c e_c of each example, [B, C, C]: a mode a row."""
    count, size = outputs_BC.shape
    unit = torch.eye(size, dtype=outputs_BC.dtype, device=outputs_BC.device)
    hessian = loss.hessian_product(outputs_BC, targets, unit[:, None].expand(size, count, size)).transpose(0, 1)
    values_BC, vectors_BCC = torch.linalg.eigh(hessian)
    return (vectors_BCC * values_BC.clamp_min(0).sqrt()[:, None]).transpose(1, 2)


def _kernel(
    inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], owner_R: Tensor, damping: Mapping[str, float]
) -> Tensor:
    """1 + U λ⁻¹ Uᵀ, [R, R], some rows at a time."""
    first = next(iter(gradients.values()))
    kernel_RR = torch.eye(len(owner_R), dtype=first.dtype, device=first.device)
    for name, act_EI in inputs.items():
        gram_EE = act_EI @ act_EI.T / damping[name]
        for rows in torch.arange(len(owner_R), device=first.device).split(BLOCK):
            products = gradients[name][rows] @ gradients[name].T
            kernel_RR[rows] += products * gram_EE[owner_R[rows]][:, owner_R]
    return kernel_RR
