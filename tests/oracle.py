"""Brute force in float64, from the paper's equations: what the implementation is measured against.

Nothing here is shared with `influence/`, and nothing is fast. Every sequence goes through the model alone and without
padding; gradients are autograd's, of the weight matrices themselves; the cell of one token is autograd's gradient of a
copy of the weights that acts at that position only; Kronecker products and curvature matrices are formed, and the
inverse-Hessian-vector product is a dense solve.

Legend: T positions of one sequence, N its predicted (token, use) pairs, I inputs of a layer (a last one that is 1 if
the layer has a bias, Eq. 12), O outputs, V vocabulary, P = I * O parameters of a layer. vec stacks columns (Eq. 15:
theta = a kron s), so entry (o, i) of a weight matrix [O, I] is entry i * O + o of its vector.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OracleLayer:
    """One weight matrix, written out by hand for each tiny model.

    Attributes:
        name: The module that owns it.
        modules: Every module that multiplies by it.
        bias: Whether a bias is added.
        transposed: Whether the weight is stored [I, O], as GPT-2's Conv1D does.
    """

    name: str
    modules: tuple[str, ...]
    bias: bool
    transposed: bool = False


@dataclass(frozen=True)
class Trace:
    """One scalar of one sequence, taken apart.

    Attributes:
        value: The scalar, a sum of log-probabilities.
        gradient: By layer, [O, I]: autograd's gradient of the weights (and of the bias, last column).
        cells: By layer, [T, O, I]: the part of that gradient which comes from position t (Eq. 26).
        activations: By layer, [N, I]: the homogeneous inputs at predicted positions, of each use.
        output_gradients: By layer, [N, O]: D s at the same pairs (Eq. 13).
    """

    value: float
    gradient: dict[str, Tensor]
    cells: dict[str, Tensor]
    activations: dict[str, Tensor]
    output_gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Moments:
    """A and S of one layer (Eq. 16) and the mean number of predicted (token, use) pairs of a sequence."""

    A: Tensor
    S: Tensor
    rows_per_sequence: float


class Oracle:
    """A float64 copy of a model that answers with explicit gradients."""

    def __init__(self, model: nn.Module, layers: Sequence[OracleLayer]) -> None:
        self.model = copy.deepcopy(model).double().eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.layers = tuple(layers)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [T, V] of one sequence."""
        return self.model(input_ids=torch.tensor([list(tokens)])).logits[0]

    def trace(self, tokens: Sequence[int], labels: Sequence[int] | None = None, first: int = 0) -> Trace:
        """Take apart sum_{t >= first} log p(label_t | tokens up to t).

        Args:
            tokens: The T tokens of the sequence.
            labels: T - 1 labels; the next tokens if None.
            first: The first position whose label counts (positions 0 .. T-2 predict).
        """
        targets = torch.tensor(list(tokens[1:] if labels is None else labels))
        with self._perturbed(len(tokens)) as (weights_at, outputs_at, inputs_of):
            log_p_TV = torch.log_softmax(self.logits(tokens)[:-1], dim=-1)
            value = log_p_TV[torch.arange(len(targets)), targets][first:].sum()
            parameters = [p for layer in self.layers for p in self._parameters(layer)]
            wanted = [*parameters, *weights_at.values(), *(d for uses in outputs_at.values() for d in uses)]
            gradients = iter(torch.autograd.grad(value, wanted))
        full = {layer.name: self._assemble(layer, gradients) for layer in self.layers}
        cells = {name: next(gradients) for name in weights_at}
        outputs = {name: torch.cat([next(gradients)[:-1] for _ in uses]) for name, uses in outputs_at.items()}
        inputs = {name: torch.cat([a_TI[:-1] for a_TI in uses]).detach() for name, uses in inputs_of.items()}
        return Trace(float(value.detach()), full, cells, inputs, outputs)

    def gauss_newton(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The exact per-layer Gauss-Newton matrices E_x[sum_t J_t^T H_t J_t], [P, P], with nothing sampled.

        J_t [V, P] is the Jacobian of the logits at position t, H_t = diag(p_t) - p_t p_t^T the Hessian of the
        cross-entropy there: in closed form, the expectation over labels of D theta D theta^T (Eq. 11, 16), since labels
        of different positions are drawn independently.
        """
        totals = {layer.name: torch.zeros(()) for layer in self.layers}
        for tokens in sequences:
            logits_TV = self.logits(tokens)[:-1]
            p_TV = torch.softmax(logits_TV, dim=-1).detach()
            root_H_TVV = _root_of_output_hessian(p_TV)
            parameters = [p for layer in self.layers for p in self._parameters(layer)]
            basis = torch.eye(logits_TV.numel(), dtype=torch.float64)
            rows = iter(torch.autograd.grad(logits_TV.flatten(), parameters, basis, is_grads_batched=True))
            for layer in self.layers:
                J_TVP = vec(self._assemble(layer, rows)).reshape(*p_TV.shape, -1)
                half_XP = (root_H_TVV @ J_TVP).flatten(0, 1)
                totals[layer.name] = totals[layer.name] + half_XP.T @ half_XP / len(sequences)
        return totals

    def whole_gauss_newton(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The same of all layers in one matrix, vec of each layer after the other, with what is between layers."""
        total = torch.zeros(())
        for tokens in sequences:
            logits_TV = self.logits(tokens)[:-1]
            p_TV = torch.softmax(logits_TV, dim=-1).detach()
            parameters = [p for layer in self.layers for p in self._parameters(layer)]
            basis = torch.eye(logits_TV.numel(), dtype=torch.float64)
            rows = iter(torch.autograd.grad(logits_TV.flatten(), parameters, basis, is_grads_batched=True))
            J_XP = torch.cat([vec(self._assemble(layer, rows)) for layer in self.layers], dim=1)
            half_XP = (_root_of_output_hessian(p_TV) @ J_XP.reshape(*p_TV.shape, -1)).flatten(0, 1)
            total = total + half_XP.T @ half_XP / len(sequences)
        return total

    def move(self, direction: dict[str, Tensor], step: float) -> None:
        """Add `step` times a direction [O, I] of each layer to the weights, in place."""
        for layer in self.layers:
            module, scaled_OI = self.model.get_submodule(layer.name), step * direction[layer.name]
            weight_OI = scaled_OI[:, :-1] if layer.bias else scaled_OI
            module.weight.data += weight_OI.T if layer.transposed else weight_OI
            if layer.bias:
                module.bias.data += scaled_OI[:, -1]

    def _parameters(self, layer: OracleLayer) -> list[Tensor]:
        module = self.model.get_submodule(layer.name)
        return [module.weight, module.bias] if layer.bias else [module.weight]

    def _assemble(self, layer: OracleLayer, gradients: Iterator[Tensor]) -> Tensor:
        """[..., O, I] out of the gradients of weight and bias."""
        weight = next(gradients)
        weight = weight.transpose(-1, -2) if layer.transposed else weight
        return torch.cat([weight, next(gradients)[..., None]], dim=-1) if layer.bias else weight

    @contextmanager
    def _perturbed(self, positions: int) -> Iterator[tuple[dict[str, Tensor], dict[str, list], dict[str, list]]]:
        """Add E_t a_t + d_t to each output, E and d zero: their gradients are the cells and D s."""
        weights_at, outputs_at, inputs_of, handles = {}, {}, {}, []
        for layer in self.layers:
            weight = self.model.get_submodule(layer.name).weight
            outputs, inputs = weight.T.shape if layer.transposed else weight.shape
            shape = (positions, outputs, inputs + layer.bias)
            weights_at[layer.name] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            outputs_at[layer.name], inputs_of[layer.name] = [], []
            hook = _perturb(layer, weights_at[layer.name], outputs_at[layer.name], inputs_of[layer.name])
            handles += [self.model.get_submodule(name).register_forward_hook(hook) for name in layer.modules]
        try:
            yield weights_at, outputs_at, inputs_of
        finally:
            for handle in handles:
                handle.remove()


def _perturb(layer: OracleLayer, weights_TOI: Tensor, outputs_at: list, inputs_of: list) -> Callable:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a_TI = arguments[0][0]
        if layer.bias:
            a_TI = torch.cat([a_TI, torch.ones(len(a_TI), 1, dtype=torch.float64)], dim=1)
        delta_TO = torch.zeros_like(output[0]).requires_grad_()
        inputs_of.append(a_TI)
        outputs_at.append(delta_TO)
        return output + delta_TO + (weights_TOI @ a_TI[:, :, None])[None, :, :, 0]

    return hook


def _root_of_output_hessian(p_TV: Tensor) -> Tensor:
    """R with R^T R = diag(p) - p p^T, [T, V, V]: R = diag(sqrt p) (1 - 1 p^T)."""
    identity_VV = torch.eye(p_TV.shape[1], dtype=torch.float64)
    return p_TV.sqrt()[:, :, None] * (identity_VV - p_TV[:, None, :])


def vec(matrix_OI: Tensor) -> Tensor:
    """Stack the columns of [..., O, I] into [..., I * O]."""
    return matrix_OI.transpose(-1, -2).flatten(-2)


def unvec(vector_P: Tensor, outputs: int) -> Tensor:
    """Undo `vec`: [O, I]."""
    return vector_P.reshape(-1, outputs).T


def moments(traces: Sequence[Trace], name: str) -> Moments:
    """A and S of Equation 16: means over the predicted (token, use) pairs of all sequences."""
    a_NI = torch.cat([trace.activations[name] for trace in traces])
    s_NO = torch.cat([trace.output_gradients[name] for trace in traces])
    A = sum(torch.outer(a_I, a_I) for a_I in a_NI) / len(a_NI)
    S = sum(torch.outer(s_O, s_O) for s_O in s_NO) / len(s_NO)
    return Moments(A, S, len(a_NI) / len(traces))


def partition(size: int, blocks: int) -> list[slice]:
    """Contiguous blocks whose sizes differ by at most one, the larger ones first (Appendix A)."""
    small, larger = divmod(size, blocks)
    ends = [0]
    for block in range(blocks):
        ends.append(ends[-1] + small + (block < larger))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def block_diagonal(matrix: Tensor, blocks: int) -> Tensor:
    """The matrix with everything outside its diagonal blocks set to zero (Eq. 33)."""
    kept = torch.zeros_like(matrix)
    for block in partition(len(matrix), blocks):
        kept[block, block] = matrix[block, block]
    return kept


def eigenvectors(matrix: Tensor, blocks: int) -> Tensor:
    """The dense block-diagonal matrix of the eigenvectors of each diagonal block (Eq. 18, 33)."""
    vectors = torch.zeros_like(matrix)
    for block in partition(len(matrix), blocks):
        vectors[block, block] = torch.linalg.eigh(matrix[block, block]).eigenvectors
    return vectors


def eigenvalue_correction(traces: Sequence[Trace], name: str, Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Equation 20 on the gradients of Equation 26: E[((Q_A kron Q_S)^T D theta)^2], [P]."""
    basis_PP = torch.kron(Q_A, Q_S)
    return torch.stack([(basis_PP.T @ vec(trace.gradient[name])) ** 2 for trace in traces]).mean(dim=0)


def ekfac(traces: Sequence[Trace], name: str, Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Equation 19, [P, P]."""
    basis_PP = torch.kron(Q_A, Q_S)
    return basis_PP @ torch.diag(eigenvalue_correction(traces, name, Q_A, Q_S)) @ basis_PP.T


def kfac(moment: Moments, blocks: int = 1) -> Tensor:
    """Equation 16 as if the tokens of a sequence were independent: T * (A kron S), T the mean pairs of a sequence."""
    A, S = block_diagonal(moment.A, blocks), block_diagonal(moment.S, blocks)
    return moment.rows_per_sequence * torch.kron(A, S)


def ihvp(curvature_PP: Tensor, gradient_OI: Tensor, damping_factor: float) -> Tensor:
    """(G + lambda 1)^-1 grad f with lambda = factor * mean eigenvalue of G, by a dense solve; [O, I]."""
    damping = damping_factor * torch.trace(curvature_PP) / len(curvature_PP)
    damped_PP = curvature_PP + damping * torch.eye(len(curvature_PP), dtype=torch.float64)
    return unvec(torch.linalg.solve(damped_PP, vec(gradient_OI)), len(gradient_OI))


def score_cells(preconditioned: dict[str, Tensor], train: Trace) -> Tensor:
    """Equation 31, [layers, T]: the dot product of the preconditioned query gradient with each cell of the gradient."""
    return torch.stack([torch.stack([vec(v) @ vec(c) for c in train.cells[n]]) for n, v in preconditioned.items()])


def score(preconditioned: dict[str, Tensor], train: Trace) -> dict[str, float]:
    """Equation 30, by layer: grad f^T (G + lambda 1)^-1 grad log p(z), both minus signs of Equation 25 gone."""
    return {name: float(vec(v) @ vec(train.gradient[name])) for name, v in preconditioned.items()}
