"""The inverse of what the largest rows contribute to G + λ, for networks whose layers see several places: convolutions.

M of `influence.dominant`, with the same rows ũ_ic = √(h_c/N) e_cᵀ J_i. Where a layer sees T places of an example, ũ is
the sum over places of g_t ã_tᵀ and no product, so that it is formed: R rows of P numbers are held, P parameters of all
tracked layers. Cost: R² P multiply-adds once, and 2 R·P and R² a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.dominant import modes_of
from influence.gauss_newton import Examples, TensorNetwork, Vectors
from influence.layers import TrackedLayer
from influence.supervised import micro_batches, pulled_back

BYTES = 1 << 31  # that the rows may take


@dataclass(frozen=True)
class Formed:
    """M⁻¹, ready to be applied.

    Attributes:
        damping: λ by layer.
        rows: ũ of the R rows, [R, O, I] by layer.
        cholesky_RR: of 1 + U λ⁻¹ Uᵀ, lower.
        trace_share: of the trace of λ⁻¹G that the rows have.
        whole: whether these are all rows that are not zero, and M is G + λ.
    """

    damping: Mapping[str, float]
    rows: Mapping[str, Tensor]
    cholesky_RR: Tensor
    trace_share: float
    whole: bool

    @staticmethod
    def fit(
        network: TensorNetwork,
        layers: Sequence[TrackedLayer],
        examples: Examples,
        damping: Mapping[str, float],
        most: int = BYTES,
        batch: int = 32,
    ) -> Formed:
        """Choose the rows in one pass over the examples, and form them in another.

        Args:
            network: in evaluation mode, frozen.
            layers: tracked.
            examples: all N.
            damping: λ by layer.
            most: bytes that the rows may take.
            batch: examples a micro-batch.
        """
        sizes = [
            sum(rows.square().flatten(1).sum(1) / damping[name] for name, rows in found.items())
            for found in _rows(network, layers, examples, batch)
        ]
        scores_M = torch.cat(sizes)  # type: ignore[arg-type]
        number = sum(layer.parameters for layer in layers) * scores_M.element_size()
        nonzero = int((scores_M > 0).sum())
        count = max(1, min(nonzero, most // number))
        chosen_R = scores_M.topk(count).indices.sort().values
        parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        start = 0
        for size, found in zip(sizes, _rows(network, layers, examples, batch), strict=True):
            mine = chosen_R[(chosen_R >= start) & (chosen_R < start + len(size))] - start  # type: ignore[arg-type]
            start += len(size)  # type: ignore[arg-type]
            for name, rows in found.items():
                parts[name].append(rows[mine])
        held = {name: torch.cat(value) for name, value in parts.items()}
        kernel_RR = torch.eye(count, dtype=scores_M.dtype, device=scores_M.device)
        for name, rows in held.items():
            kernel_RR.addmm_(rows.flatten(1), rows.flatten(1).T, alpha=1 / damping[name])
        share = float(scores_M[chosen_R].sum() / scores_M.sum())
        return Formed(dict(damping), held, torch.linalg.cholesky(kernel_RR), share, count == nonzero)

    def __call__(self, vectors: Vectors) -> Vectors:
        """M⁻¹ V."""
        divided = {name: value / self.damping[name] for name, value in vectors.items()}
        seen_RK = sum(self.rows[name].flatten(1) @ value.flatten(1).T for name, value in divided.items())
        weights_RK = torch.cholesky_solve(seen_RK, self.cholesky_RR)  # type: ignore[arg-type]
        return {
            name: value - (weights_RK.T @ self.rows[name].flatten(1)).view_as(value) / self.damping[name]
            for name, value in divided.items()
        }

    @property
    def bytes(self) -> int:
        """Of the rows and their kernel."""
        return self.cholesky_RR.nbytes + sum(rows.nbytes for rows in self.rows.values())


def _rows(network: TensorNetwork, layers: Sequence[TrackedLayer], examples: Examples, batch: int) -> Iterator[Vectors]:
    """ũ of a mode of a micro-batch of examples, [B, O, I] by layer; mode after mode, then the next micro-batch."""
    for part in micro_batches(examples, batch):
        with torch.no_grad():
            modes_BCC = modes_of(network.loss, network.outputs(part), part.targets) / len(examples.inputs) ** 0.5
        for row_BC in modes_BCC.unbind(1):
            yield pulled_back(network, layers, part.inputs, lambda _, row=row_BC: row)
