"""Contraction of training gradients with preconditioned queries, in the cheaper order.

act_BTI, grad_BTO: as captured; left_OR, right_IR: packed factors of all queries, R the sum of their ranks; owner_R: the
query that each column belongs to; dense_QOI: full-rank queries; scores_BQ, tokens_BTQ.

Influence is positive where training on the sequence raises the measurement: I = ⟨V_q, G_m⟩ with V_q = (G + λ)⁻¹ ∇f
and G_m = ∇ log p(z_m) (Equation 25 with L = −log p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from influence.capture import Use, homogeneous
from influence.correction import GRADIENT_BYTES
from influence.exchange import shares
from influence.layers import TrackedLayer

DENSE_COPIES = 2  # of full matrices: as they are, and as columns for the product with gradients


@dataclass(frozen=True)
class LayerQueries:
    """All queries of one layer, as packed factors (V_q = L_q R_qᵀ), as full matrices, or as both.

    Attributes:
        left_OR: the columns of every L_q, side by side; None where only full matrices are at hand.
        right_IR: the columns of every R_q in the same order.
        owner_R: index of the query of each column.
        dense_QOI: full matrices; None where only factors are at hand.
        queries: number of queries.
        outputs: the rows of the full matrices that are here, where a rank holds a share of them; None is all.
    """

    queries: int
    left_OR: Tensor | None = None
    right_IR: Tensor | None = None
    owner_R: Tensor | None = None
    dense_QOI: Tensor | None = None
    outputs: slice | None = None

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all queries."""
        return 0 if self.left_OR is None else self.left_OR.shape[1]

    @cached_property
    def columns_NQ(self) -> Tensor:
        """Full matrices as columns, N = O·I; laid out for the product with flattened gradients."""
        assert self.dense_QOI is not None
        return self.dense_QOI.flatten(1).T.contiguous()

    @cached_property
    def columns_and_bias(self) -> tuple[Tensor, Tensor]:
        """The same with the bias, the last column of each matrix, apart: [O·(I − 1), Q] and [O, Q]."""
        assert self.dense_QOI is not None
        weights = self.dense_QOI[..., :-1].flatten(1).T.contiguous()
        return weights, self.dense_QOI[..., -1].T.contiguous()

    def densified(self, chosen: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> LayerQueries:
        """Some queries with their full matrices formed; Q·I·O numbers.

        Args:
            chosen: which; all by default.
            dtype: in which L_q R_qᵀ is multiplied out, that of the factors by default. What is scored by the factors
                in a wider type must not lose digits here.
        """
        chosen = range(self.queries) if chosen is None else chosen
        if self.dense_QOI is not None:
            return LayerQueries(len(chosen), dense_QOI=self.dense_QOI[list(chosen)])
        assert self.left_OR is not None
        assert self.right_IR is not None
        assert self.owner_R is not None
        left_OR, right_IR = self.left_OR.to(dtype=dtype), self.right_IR.to(dtype=dtype)
        dense_QOI = left_OR.new_empty(len(chosen), left_OR.shape[0], right_IR.shape[0])
        for index, query in enumerate(chosen):
            mine = self.owner_R == query
            dense_QOI[index] = left_OR[:, mine] @ right_IR[:, mine].T
        return LayerQueries(len(chosen), dense_QOI=dense_QOI)

    def only(self, chosen: Sequence[int]) -> LayerQueries:
        """Some queries, each as it is at hand: as factors, as a full matrix, or as both."""
        dense_QOI = None if self.dense_QOI is None else self.dense_QOI[list(chosen)]
        if self.left_OR is None or self.right_IR is None or self.owner_R is None:
            return LayerQueries(len(chosen), dense_QOI=dense_QOI, outputs=self.outputs)
        place_Q = torch.full((self.queries,), -1, device=self.owner_R.device)
        place_Q[list(chosen)] = torch.arange(len(chosen), device=self.owner_R.device)
        place_R = place_Q[self.owner_R]
        mine = place_R >= 0
        left_Or, right_Ir = self.left_OR[:, mine], self.right_IR[:, mine]
        return LayerQueries(len(chosen), left_Or, right_Ir, place_R[mine], dense_QOI, self.outputs)

    def share(self, rank: int, ranks: int) -> LayerQueries:
        """A rank's share: of the packed columns, or of the rows of full matrices. Scores are the sum over ranks."""
        if self.dense_QOI is not None:
            rows = shares(self.dense_QOI.shape[1], ranks)[rank]
            return LayerQueries(self.queries, dense_QOI=self.dense_QOI[:, rows].contiguous(), outputs=rows)
        assert self.left_OR is not None
        assert self.right_IR is not None
        assert self.owner_R is not None
        part = shares(self.total_rank, ranks)[rank]
        left_Or, right_Ir = self.left_OR[:, part].contiguous(), self.right_IR[:, part].contiguous()
        return LayerQueries(self.queries, left_Or, right_Ir, self.owner_R[part])

    def of_outputs(self, uses: Sequence[Use]) -> Sequence[Use]:
        """Uses with the output gradients that belong to the rows of the full matrices that are here."""
        if self.outputs is None:
            return uses
        return [Use(use.act_BTI, use.grad_BTO[..., self.outputs]) for use in uses]

    def to(self, product: torch.dtype, sums: torch.dtype, device: torch.device | str | None = None) -> LayerQueries:
        """The same queries for a worker: factors in the type of products, full matrices in the type of sums."""

        def moved(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        owner = None if self.owner_R is None else self.owner_R.to(device=device)
        return LayerQueries(
            self.queries,
            moved(self.left_OR, product),
            moved(self.right_IR, product),
            owner,
            moved(self.dense_QOI, sums),
            self.outputs,
        )


def factored_cost(tokens: int, inputs: int, outputs: int, total_rank: int) -> int:
    """Multiply-adds a sequence of two thin products for all queries: T·ΣR·(I + O)."""
    return tokens * total_rank * (inputs + outputs)


def dense_cost(tokens: int, inputs: int, outputs: int, queries: int) -> int:
    """Multiply-adds a sequence to form the gradient and meet it with full queries: I·O·(T + Q)."""
    return inputs * outputs * (tokens + queries)


def plan_contractions(
    layers: Sequence[TrackedLayer],
    total_ranks: Sequence[int],
    queries: int,
    tokens: int,
    memory: int,
    itemsize: int = 4,
) -> dict[str, str]:
    """Choose `dense` or `factored` for each layer.

    A layer goes dense where that costs fewer multiply-adds and its full queries, 2·Q·I·O numbers, still fit in
    `memory`; where not all fit, those that save most for a byte come first.

    Args:
        layers: tracked layers.
        total_ranks: sum of ranks over queries for each layer.
        queries: Q.
        tokens: T of a sequence.
        memory: bytes that full-rank queries may take.
        itemsize: bytes of a number.
    """
    savings = []
    for layer, rank in zip(layers, total_ranks, strict=True):
        saved = factored_cost(tokens, layer.columns, layer.outputs, rank) - dense_cost(
            tokens, layer.columns, layer.outputs, queries
        )
        size = DENSE_COPIES * queries * layer.columns * layer.outputs * itemsize
        savings.append((saved / size, saved, size, layer.name))
    choice = {layer.name: "factored" for layer in layers}
    for _, saved, size, name in sorted(savings, key=lambda item: (-item[0], item[3])):
        if saved > 0 and size <= memory:
            choice[name] = "dense"
            memory -= size
    return choice


def layer_scores(
    layer: TrackedLayer, uses: Sequence[Use], queries: LayerQueries, product: torch.dtype, sums: torch.dtype
) -> Tensor:
    """One layer's share of the scores (Equation 30); [B, Q].

    Args:
        layer: the layer.
        uses: inputs and output gradients of the micro-batch.
        queries: factors in the type of the products, full matrices in the type of the sums, used where given.
        product: type of the operands of the products.
        sums: type of the result.
    """
    if queries.dense_QOI is not None:
        return _dense_scores(layer, queries.of_outputs(uses), queries, product, sums)
    return _factored_scores(layer, uses, queries, product, sums)


def _dense_scores(
    layer: TrackedLayer, uses: Sequence[Use], queries: LayerQueries, product: torch.dtype, sums: torch.dtype
) -> Tensor:
    step = max(1, GRADIENT_BYTES // (4 * layer.outputs * layer.columns))
    parts = []
    for start in range(0, uses[0].act_BTI.shape[0], step):
        part = [Use(use.act_BTI[start : start + step], use.grad_BTO[start : start + step]) for use in uses]
        if layer.bias:  # the bias's gradient is Σ_t Ds_t: no column of ones is multiplied
            weights_NQ, bias_OQ = queries.columns_and_bias
            bias_bO = torch.stack([use.grad_BTO.sum(1, dtype=sums) for use in part]).sum(0)
            scores_bQ = bias_bO @ bias_OQ
        else:
            weights_NQ, scores_bQ = queries.columns_NQ, 0
        parts.append(_formed(part, product).to(sums).flatten(1) @ weights_NQ + scores_bQ)
    return torch.cat(parts)


def _formed(uses: Sequence[Use], product: torch.dtype) -> Tensor:
    """Σ_t Ds_t a_tᵀ of each sequence, without the bias; [b, O, I − bias]."""
    formed = [torch.bmm(use.grad_BTO.to(product).transpose(1, 2), use.act_BTI.to(product)) for use in uses]
    return formed[0] if len(formed) == 1 else torch.stack(formed).sum(0)


def _columnwise(layer: TrackedLayer, use: Use, queries: LayerQueries, product: torch.dtype) -> Tensor:
    """(Ds_tᵀ l_r) · (r_rᵀ ā_t) for every token and packed column; [B, T, R]."""
    assert queries.left_OR is not None
    assert queries.right_IR is not None
    act = use.act_BTI.to(product)
    right = queries.right_IR
    seen_BTR = act @ right[:-1] + right[-1] if layer.bias else act @ right
    return (use.grad_BTO.to(product) @ queries.left_OR).mul_(seen_BTR)


def _factored_scores(
    layer: TrackedLayer, uses: Sequence[Use], queries: LayerQueries, product: torch.dtype, sums: torch.dtype
) -> Tensor:
    assert queries.owner_R is not None
    total = torch.zeros(uses[0].act_BTI.shape[0], queries.queries, dtype=sums, device=uses[0].act_BTI.device)
    for use in uses:
        by_column_BR = _columnwise(layer, use, queries, product).sum(1, dtype=sums)
        total.index_add_(1, queries.owner_R, by_column_BR)
    return total


def token_scores(
    layer: TrackedLayer, uses: Sequence[Use], queries: LayerQueries, product: torch.dtype, sums: torch.dtype
) -> Tensor:
    """One layer's share of the scores, token by token (Equation 31); [B, T, Q].

    Sums over tokens to `layer_scores`, up to rounding.
    """
    shape = (*uses[0].act_BTI.shape[:2], queries.queries)
    total = torch.zeros(shape, dtype=sums, device=uses[0].act_BTI.device)
    for use in queries.of_outputs(uses):
        if queries.dense_QOI is not None:
            act_BTI = homogeneous(use.act_BTI, layer.bias).to(product)
            for query, full_OI in enumerate(queries.dense_QOI):
                total[..., query] += ((act_BTI @ full_OI.T.to(product)) * use.grad_BTO.to(product)).sum(-1, dtype=sums)
        else:
            assert queries.owner_R is not None
            total.index_add_(2, queries.owner_R, _columnwise(layer, use, queries, product).to(sums))
    return total
