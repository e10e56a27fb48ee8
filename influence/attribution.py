"""Influence taken apart: the cells of layers and tokens (Section 3.3), output and input tokens (Appendix B).

Legend: B rows of a micro-batch, T positions, I columns and O outputs of a layer, R rank of one query in one layer, P
pairs of a row and a query, L layers. V: the preconditioned gradient of one query in one layer, [O, I], bias last.

A cell, Σ_calls Ds_tᵀ V ā_t, is what the gradient at position t and one layer adds to the score; the update happens at
position t, and the token that it learns to predict is t + 1. The influences of tokens are derivatives of Σ log p along
θ' = θ + αV. Weights may be spread over ranks, so they stay as they are: θ' is had by adding α V ā to the outputs of the
tracked layers, which is the same function.

Where a model is sharded, all ranks make the same calls with the same micro-batch, and each runs its own rows. Queries
are whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from influence.batch import Batch
from influence.capture import Use, by_sequence
from influence.exchange import gather_rows
from influence.labels import TrueLabels
from influence.layers import TrackedLayer
from influence.measurement import log_probabilities
from influence.scoring import LayerQueries
from influence.worker import Worker

SPURIOUS = 2 / 3  # ‖a‖₂ / ‖a‖₁ of the tokenwise influences, above which Section 5.3 calls a sequence spurious

Queries = Mapping[str, LayerQueries]
"""All queries of every layer, on whichever device they lie."""


@dataclass(frozen=True)
class Direction:
    """V of one query in one layer, as factors V = L Rᵀ or as it is.

    Attributes:
        left_OR: L.
        right_IR: R.
        full_OI: V; None where it is factors.
        bias: whether the last column of V is the bias's.
    """

    left_OR: Tensor | None
    right_IR: Tensor | None
    full_OI: Tensor | None
    bias: bool

    @classmethod
    def of(cls, queries: Queries, layer: TrackedLayer, query: int, like: Tensor, dtype: torch.dtype) -> Direction:
        """The direction of one query, on the device of a tensor and in a type."""
        one = queries[layer.name].only([query]).to(dtype, dtype, like.device)
        if one.dense_QOI is not None:
            return cls(None, None, one.dense_QOI[0], layer.bias)
        return cls(one.left_OR, one.right_IR, None, layer.bias)

    def apply(self, act_BTI: Tensor) -> Tensor:
        """V ā, of inputs without the bias's coordinate; [B, T, O]. T·I·O multiply-adds a row, or T·R·(I + O)."""
        if self.full_OI is not None:
            weight_OI = self.full_OI[:, :-1] if self.bias else self.full_OI
            out_BTO = act_BTI @ weight_OI.T
            return out_BTO + self.full_OI[:, -1] if self.bias else out_BTO
        assert self.left_OR is not None
        return self._seen(act_BTI) @ self.left_OR.T

    def transpose(self, grad_BTO: Tensor) -> Tensor:
        """Vᵀ Ds, without the bias's coordinate; [B, T, I]."""
        if self.full_OI is not None:
            return grad_BTO @ (self.full_OI[:, :-1] if self.bias else self.full_OI)
        assert self.left_OR is not None
        assert self.right_IR is not None
        right_IR = self.right_IR[:-1] if self.bias else self.right_IR
        return (grad_BTO @ self.left_OR) @ right_IR.T

    def cells(self, act_BTI: Tensor, grad_BTO: Tensor, sums: torch.dtype) -> Tensor:
        """Ds_tᵀ V ā_t at every position; [B, T]."""
        if self.full_OI is not None:
            return (self.apply(act_BTI) * grad_BTO).sum(-1, dtype=sums)
        assert self.left_OR is not None
        return ((grad_BTO @ self.left_OR) * self._seen(act_BTI)).sum(-1, dtype=sums)

    def _seen(self, act_BTI: Tensor) -> Tensor:
        """Rᵀ ā; [B, T, R]."""
        assert self.right_IR is not None
        return act_BTI @ self.right_IR[:-1] + self.right_IR[-1] if self.bias else act_BTI @ self.right_IR


def sparsity(tokens: Tensor) -> Tensor:
    """‖a‖₂ / ‖a‖₁ over the last dimension (Section 5.3): 1 where one token has it all, 0 where there is nothing."""
    size = tokens.abs().sum(-1)
    return torch.where(size > 0, tokens.norm(dim=-1) / size.where(size > 0, torch.ones_like(size)), 0.0)


# --- layers and tokens --------------------------------------------------------------------------------------------


def cells(worker: Worker, batch: Batch, pairs: Sequence[tuple[int, int]], queries: Queries) -> Tensor:
    """The token × layer matrix of Equation 31, of some pairs of a sequence and a query, by one pass over the sequences.

    Args:
        worker: that runs the model, and its precision.
        batch: the sequences, the same on all ranks.
        pairs: (row of the batch, query).
        queries: preconditioned queries of every layer.

    Returns:
        [P, T, L] on every rank, in the type of the sums, layers in the selection's order; not finite where the
        sequence's loss or gradient is not. The sum of a matrix is the sequence's score on the query, to rounding. Costs
        T·(I·O) multiply-adds a pair and layer beside the pass, or T·R·(I + O) with factors.
    """
    local, ranks = _own(worker, batch), worker.exchange.size
    by_rank = [[place for place, (row, _) in enumerate(pairs) if row // len(local) == rank] for rank in range(ranks)]
    mine, first = by_rank[worker.exchange.rank], worker.exchange.rank * len(local)
    rows = _by_query([pairs[place][1] for place in mine])
    order = {layer.name: index for index, layer in enumerate(worker.selection.layers)}
    product, sums = worker.precision.product, worker.precision.sums
    shape = (max(map(len, by_rank)), local.input_ids.shape[1], len(order))
    cells_PTL = torch.zeros(shape, dtype=sums, device=local.input_ids.device)

    def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
        for query, places in rows.items():
            chosen = [pairs[mine[place]][0] - first for place in places]
            direction = Direction.of(queries, layer, query, uses[0].grad_BTO, product)
            for use in uses:
                act, grad = use.act_BTI[chosen].to(product), use.grad_BTO[chosen].to(product)
                cells_PTL[places, :, order[layer.name]] += direction.cells(act, grad, sums)

    def objective(logits_BTV: Tensor) -> Tensor:
        return log_probabilities(logits_BTV, TrueLabels()(local, logits_BTV)).sum(1)

    finite_B = worker.backward(local, objective, consume)
    lost = [place for place, number in enumerate(mine) if not finite_B[pairs[number][0] - first]]
    cells_PTL[lost] = float("nan")
    return _in_their_order(worker.exchange.gather(cells_PTL), by_rank)[:, : batch.input_ids.shape[1]]


def _in_their_order(parts: Tensor, by_rank: Sequence[Sequence[int]]) -> Tensor:
    """What each rank found of its own, put together; parts are filled up to the same length."""
    whole = parts.new_zeros(sum(map(len, by_rank)), *parts.shape[2:])
    for part, places in zip(parts, by_rank, strict=True):
        whole[list(places)] = part[: len(places)]
    return whole


def _own(worker: Worker, batch: Batch) -> Batch:
    """This rank's rows of a micro-batch."""
    size = worker.exchange.size
    return (batch if size == 1 else batch.filled(size)).part(worker.exchange.rank, size)


def _by_query(chosen: Sequence[int]) -> dict[int, list[int]]:
    """The places of each query."""
    found: dict[int, list[int]] = {}
    for place, query in enumerate(chosen):
        found.setdefault(query, []).append(place)
    return found


# --- output and input tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenInfluence:
    """Influence of the tokens of each row on its query, [B, T], in float64.

    Attributes:
        output_BT: of token t as a target (Equation 36); the first token is nobody's target, and 0.
        input_BT: of token t as an input (Equation 38).
    """

    output_BT: Tensor
    input_BT: Tensor


def token_influence(
    worker: Worker, batch: Batch, chosen: Sequence[int], steps_B: Tensor, queries: Queries
) -> TokenInfluence:
    """Influence of output and input tokens (Equations 36 and 38), by central differences of step α along V.

    Output: d/dα log p(token t | all before it; θ + αV), which is the directional derivative that Equation 31 sums over
    positions of the *update*, here by position of the *target*: over all t it adds up to the sequence's score.
    Input: d/dα of d/dε_t Σ log p, with the embedding of token t scaled by 1 + ε_t. Positive raises the measurement.

    The paper takes one step forward; one to either side costs a second pass and its error falls with α² instead of α.
    Two forward and two backward passes a row, and two thin products (or a full one) a layer and pass.

    Args:
        worker: that runs the model.
        batch: a sequence a row, the same on all ranks.
        chosen: the query of each row; rows of the same query are best side by side.
        steps_B: α of each row.
        queries: preconditioned queries of every layer.

    Returns:
        The influences of every row, on every rank; NaN where a loss or a gradient is not finite.
    """
    local = _own(worker, batch)
    rows = slice(worker.exchange.rank * len(local), (worker.exchange.rank + 1) * len(local))
    extra = worker.exchange.size * len(local) - len(chosen)
    mine = [*chosen, *[chosen[-1]] * extra][rows]
    filler_B = steps_B.new_ones(extra)
    steps_B = torch.cat([steps_B, filler_B])[rows].to(local.input_ids.device, torch.float64)
    (plus_BT, upper_BT), (minus_BT, lower_BT) = (
        _passes(worker, local, _by_query(mine), sign * steps_B, queries) for sign in (1, -1)
    )
    width_B1 = 2 * steps_B[:, None]
    output_BT = torch.zeros_like(plus_BT)
    output_BT[:, 1:] = ((plus_BT - minus_BT) / width_B1)[:, :-1]
    input_BT = (upper_BT - lower_BT) / width_B1
    output_BT, input_BT = (gather_rows(worker.exchange, part) for part in (output_BT, input_BT))
    count, positions = batch.input_ids.shape
    return TokenInfluence(output_BT[:count, :positions], input_BT[:count, :positions])


def output_scales(worker: Worker, batch: Batch, chosen: Sequence[int], queries: Queries) -> Tensor:
    """How far one unit of α moves the outputs of the layer that it moves most: max_ℓ ‖V ā‖ / ‖s‖ over a row; [B].

    ‖·‖ is over the positions and calls of a sequence. Zero where V is. One forward pass; all ranks hold the result.
    """
    local = _own(worker, batch)
    first = worker.exchange.rank * len(local)
    mine = [*chosen, *[chosen[-1]] * (worker.exchange.size * len(local) - len(chosen))][first : first + len(local)]
    rows, tokens_BT = _by_query(mine), local.attention_mask_BT.bool()
    shape = (len(worker.selection.layers), 2, len(local))
    squares_L2B = torch.zeros(shape, dtype=torch.float64, device=local.input_ids.device)

    def measure(index: int, layer: TrackedLayer, act_BTI: Tensor, out_BTO: Tensor) -> None:
        for query, places in rows.items():
            moved_bTO = Direction.of(queries, layer, query, act_BTI, act_BTI.dtype).apply(act_BTI[places])
            for side, part in enumerate((moved_bTO, out_BTO[places])):
                squares_bT = part.double().square().sum(-1)
                squares_L2B[index, side, places] += squares_bT.where(tokens_BT[places], 0.0).sum(-1)

    def hook_of(index: int, layer: TrackedLayer) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            positions = local.input_ids.shape[1]
            measure(index, layer, by_sequence(inputs[0], positions), by_sequence(output, positions))

        return hook

    with torch.no_grad(), _hooks(worker, hook_of):
        _logits(worker, local)
    moved_LB, out_LB = squares_L2B.unbind(1)
    ratios_LB = (moved_LB / out_LB.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return gather_rows(worker.exchange, ratios_LB.amax(0))[: len(batch)]


def _passes(
    worker: Worker, local: Batch, rows: Mapping[int, list[int]], steps_B: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """The log p(token t + 1) at position t, and d/dε_t Σ log p, at θ + αV; [B, T] each, in float64."""
    positions = local.input_ids.shape[1]

    def hook_of(_: int, layer: TrackedLayer) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            act_BTI = by_sequence(inputs[0], positions)
            moved_BTO = _Moved.apply(act_BTI, _Moves(layer, rows, steps_B, queries))
            return output + moved_BTO.view_as(output).to(output.dtype)  # type: ignore[attr-defined]

        return hook

    with torch.enable_grad(), _hooks(worker, hook_of), _scaled_embeddings(worker.model, positions) as scales:
        logits_BTV = _logits(worker, local)
        logp_BT = log_probabilities(logits_BTV, TrueLabels()(local, logits_BTV.detach()))
        logp_BT.sum().backward()
    slopes = [scale.grad.double() for scale in scales if scale.grad is not None]
    slopes_BT = torch.stack(slopes).sum(0) if slopes else torch.zeros_like(logp_BT, dtype=torch.float64)
    return logp_BT.detach().double(), slopes_BT


@dataclass(frozen=True)
class _Moves:
    """What moves the output of one layer: α of each row along the V of its query."""

    layer: TrackedLayer
    rows: Mapping[int, list[int]]
    steps_B: Tensor
    queries: Queries

    def apply(self, given_BTX: Tensor, transposed: bool) -> Tensor:
        """α V ā of every row, or α Vᵀ Ds."""
        width = self.layer.inputs if transposed else self.layer.outputs
        moved_BTX = given_BTX.new_zeros(*given_BTX.shape[:-1], width)
        for query, places in self.rows.items():
            direction = Direction.of(self.queries, self.layer, query, given_BTX, given_BTX.dtype)
            part = given_BTX if len(places) == len(given_BTX) else given_BTX[places]
            found = direction.transpose(part) if transposed else direction.apply(part)
            moved_BTX[places] = found * self.steps_B[places, None, None].to(found.dtype)
        return moved_BTX


class _Moved(torch.autograd.Function):
    """α V ā, whose backward pass looks V up again: autograd would keep that of every layer until then."""

    @staticmethod
    def forward(ctx: Any, act_BTI: Tensor, moves: _Moves) -> Tensor:
        ctx.moves = moves
        return moves.apply(act_BTI, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.moves.apply(grad_outputs[0], transposed=True), None


def _logits(worker: Worker, local: Batch) -> Tensor:
    padded = bool((local.lengths != local.input_ids.shape[1]).any())
    mask = local.attention_mask_BT if padded else None
    return worker.model(input_ids=local.input_ids, attention_mask=mask, use_cache=False).logits


@contextmanager
def _hooks(worker: Worker, hook_of: Callable[[int, TrackedLayer], Callable[..., Any]]) -> Iterator[None]:
    """A forward hook on every module of every tracked layer, made from the layer and its number."""
    with ExitStack() as stack:
        for index, layer in enumerate(worker.selection.layers):
            for path in layer.modules:
                handle = worker.model.get_submodule(path).register_forward_hook(hook_of(index, layer))
                stack.callback(handle.remove)
        yield


@contextmanager
def _scaled_embeddings(model: nn.Module, positions: int) -> Iterator[list[Tensor]]:
    """Scale the embedding of token t by 1 + ε_t, ε zero; yields the ε_BT of each call, which gradients arrive at."""
    scales: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        rows_BTH = by_sequence(output, positions)
        scales.append(torch.zeros_like(rows_BTH[..., 0]).requires_grad_())
        return (rows_BTH * (1 + scales[-1])[..., None]).view_as(output)

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(hook)
    try:
        yield scales
    finally:
        handle.remove()


# --- the step -----------------------------------------------------------------------------------------------------

RATIO = 4.0  # between steps that are tried
LARGEST = 0.02  # share of a layer's outputs that the largest of them moves
TRIED = {torch.float32: 6, torch.float64: 8}  # how many: down to 2e-5 and to 1e-6
MARGIN = 2.0  # errors that differ by less are the same: the larger step is taken


@dataclass(frozen=True)
class Step:
    """The step of one query, and how far it can be trusted.

    Attributes:
        alpha: α.
        relative: how far α moves the outputs of the layer that it moves most, as a share of them.
        output: error of the influence of output tokens as a share of its norm, from how it changes with the step.
        input: the same of input tokens.
    """

    alpha: float
    relative: float
    output: float
    input: float

    @property
    def error(self) -> float:
        """The larger of the two; infinite if either is not a number."""
        both = (self.output, self.input)
        return math.inf if any(map(math.isnan, both)) else max(both)


def choose_steps(
    worker: Worker, batch: Batch, chosen: Sequence[int], queries: Queries, relative: float | None = None
) -> list[Step]:
    """The step of each row's query, chosen by what is seen on the row.

    A central difference is wrong by c α² from the curve and by r / α from rounding, where neither c nor r is known. So
    steps a factor of 4 apart are tried, by how far they move the layers' outputs. Where the curve dominates, the
    influences at α and α/4 differ by 15/16 c α², those at 4α and α by 15 c α²; where rounding does, those at α/4 by
    about 4 r / α. The error is taken as the larger of the difference to the smaller step and 1/15 of that to the larger
    one: right in the first case, too large in the second. The step with the least is chosen.

    Args:
        worker: that runs the model, in float32 or float64.
        batch: the sequence of each query that it is tried on, the same on all ranks.
        chosen: the queries.
        queries: preconditioned queries of every layer.
        relative: a step to take instead, whose error is measured.
    """
    scales_B = output_scales(worker, batch, chosen, queries)
    still_B = scales_B == 0  # no direction: any step will do
    shares = _ladder(worker.model) if relative is None else [relative / RATIO, relative, relative * RATIO]
    steps = [torch.where(still_B, 1.0, share / scales_B.where(~still_B, 1.0)) for share in shares]
    tried = [token_influence(worker, batch, chosen, steps_B, queries) for steps_B in steps]
    found = []
    for row in range(len(chosen)):
        outputs = [_difference(one.output_BT[row], other.output_BT[row]) for one, other in pairwise(tried)]
        inputs = [_difference(one.input_BT[row], other.input_BT[row]) for one, other in pairwise(tried)]
        candidates = [
            Step(float(steps[at][row]), shares[at], _error(*outputs[at - 1 : at + 1]), _error(*inputs[at - 1 : at + 1]))
            for at in range(1, len(shares) - 1)
        ]
        least = min(step.error for step in candidates)
        found.append(next(step for step in reversed(candidates) if step.error <= MARGIN * least))
    return found


def _ladder(model: nn.Module) -> list[float]:
    return [LARGEST / RATIO**power for power in reversed(range(TRIED[next(model.parameters()).dtype]))]


def _difference(one_T: Tensor, other_T: Tensor) -> float:
    size = max(float(one_T.norm()), float(other_T.norm()))
    return float((one_T - other_T).norm()) / size if size else 0.0


def _error(from_smaller: float, to_larger: float) -> float:
    both = (from_smaller, to_larger / (RATIO**2 - 1))
    return math.nan if any(map(math.isnan, both)) else max(both)
