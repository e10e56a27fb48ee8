"""What a shard does, in one process: forward, backward, and one statistic out of every tracked layer.

act_BTI, grad_BTO: inputs and output gradients of a layer, [sequences, positions, ...]; scores_BQ.

A `Worker` holds a model and nothing that belongs to a run: sums, bases and queries come in as arguments. It knows no
files and no Ray; `actors.replica` wraps it.

Where a model is sharded, each rank has a worker, and all of them make the same calls with the same micro-batch. Each
rank runs its part of the sequences. Statistics are owned in parts: the rows of all ranks are gathered, layer by layer,
and each rank reduces them to its part of the sums. Nobody leaves a pass before its end, whatever is found on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence.batch import Batch
from influence.capture import Capture, Consume, Use, homogeneous
from influence.correction import Bases, BasisShares, CorrectionSums, LayerBasis, add_correction, add_correction_share
from influence.covariance import CovarianceSums
from influence.exchange import Alone, Exchange, gather_rows
from influence.labels import Labels, TrueLabels
from influence.layers import LayerSelection, TrackedLayer
from influence.measurement import log_probabilities
from influence.scoring import LayerQueries, layer_scores, token_scores

Objective = Callable[[Tensor], Tensor]  # logits_BTV -> one number a sequence, [B]


@dataclass(frozen=True)
class Precision:
    """Types of the operands of our products and of the sums; the model's own type is its weights'."""

    product: torch.dtype = torch.float32
    sums: torch.dtype = torch.float32


@dataclass(frozen=True)
class TokenFactors:
    """A gradient of one layer as a sum over tokens, G = Σ_t grad_t act_tᵀ; grad_TO, act_TI (homogeneous)."""

    grad_TO: Tensor
    act_TI: Tensor

    def gradient(self) -> Tensor:
        """G, [O, I], in float64."""
        return self.grad_TO.double().T @ self.act_TI.double()


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of a micro-batch, with the shares of layers (in the selection's order) and tokens where asked for."""

    scores_BQ: Tensor
    by_layer_BLQ: Tensor | None = None
    by_token_BLTQ: Tensor | None = None


class NonFiniteSequences(Exception):
    """Some sequences of a micro-batch have a loss or a gradient that is not finite."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(f"sequence {sequence}: {reason}" for sequence, reason in self.reasons.items())


class Worker:
    """Runs a frozen causal language model and reduces what its tracked layers see."""

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        precision: Precision | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Take a model over: its parameters are frozen and it is put into evaluation mode.

        Args:
            model: the model; with several ranks, sharded over them.
            selection: its tracked layers.
            precision: of products and sums.
            exchange: the other ranks; None if there are none.
        """
        self.model = model.eval().requires_grad_(False)
        self.selection = selection
        self.precision = precision or Precision()
        self.exchange = exchange or Alone()
        self._capture = Capture(model, selection.layers)

    def accumulate_covariance(self, batch: Batch, labels: Labels, sums: CovarianceSums) -> None:
        """Add a micro-batch to the covariance factors A and S (Section 3.1).

        Args:
            batch: sequences, the same on all ranks.
            labels: where the labels of the pseudo-gradients come from.
            sums: changed in place; the part that this rank owns.

        Raises:
            NonFiniteSequences: if a loss or a gradient is not finite; `sums` must then be thrown away.
        """
        predicted_BT = self._filled(batch).predicted_BT[:, : -1 if self.exchange.size > 1 else None]

        def reduce(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            alike = layer.name == layer.input_group
            sums.add(layer, tuple(self._of_all_ranks(uses, activations=alike)), predicted_BT, self.precision.product)

        self._pseudo_backward(batch, labels, reduce)
        sums.sequences += len(batch)
        sums.tokens += int(batch.predicted_BT.sum())

    def accumulate_correction(
        self, batch: Batch, labels: Labels, bases: Bases | BasisShares, sums: CorrectionSums
    ) -> None:
        """Add a micro-batch to Λ (Equation 20).

        Args:
            batch: sequences, the same on all ranks.
            labels: where the labels of the pseudo-gradients come from.
            bases: the eigenbasis of every layer, in the type of the products; with several ranks, this one's share.
            sums: changed in place; the part that this rank owns.

        Raises:
            NonFiniteSequences: as in `accumulate_covariance`.
        """
        product = self.precision.product

        def reduce(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            basis, total = bases[layer.name], sums.sums[layer.name]
            if isinstance(basis, LayerBasis):
                add_correction(total, layer, uses, basis, product)
            else:
                add_correction_share(total, layer, self._of_all_ranks(uses), basis, self.exchange, product)

        self._pseudo_backward(batch, labels, reduce)
        sums.sequences += len(batch)
        sums.tokens += int(batch.predicted_BT.sum())

    def token_factors(self, batch: Batch, objective: Objective) -> dict[str, TokenFactors]:
        """The exact gradient of Σ_b objective_b in every tracked layer, as factors over tokens.

        Tokens without gradient (padding, and positions after the last one that is measured) are dropped. With several
        ranks, each has a query of its own.

        Args:
            batch: the sequences of one query (two for a contrast).
            objective: from logits to one number a sequence.

        Raises:
            NonFiniteSequences: if the measurement or a gradient is not finite.
        """
        factors: dict[str, TokenFactors] = {}
        reasons: dict[int, str] = {}

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            reasons.update(_not_finite(batch, layer, uses))
            grad_NO = torch.cat([use.grad_BTO.flatten(0, 1) for use in uses])
            act_NI = torch.cat([homogeneous(use.act_BTI, layer.bias).flatten(0, 1) for use in uses])
            live_N = grad_NO.ne(0).any(dim=1)
            factors[layer.name] = TokenFactors(grad_NO[live_N], act_NI[live_N])

        finite_B = self.backward(batch, objective, consume)
        reasons |= _without_loss(batch, finite_B)
        if reasons:
            raise NonFiniteSequences(reasons)
        for layer in self.selection.layers:
            if layer.name not in factors:  # the measurement does not depend on this layer
                device = batch.input_ids.device
                factors[layer.name] = TokenFactors(
                    torch.zeros(0, layer.outputs, device=device), torch.zeros(0, layer.columns, device=device)
                )
        return factors

    def scores(
        self,
        batch: Batch,
        queries: dict[str, LayerQueries],
        per_layer: bool = False,
        per_token: bool = False,
        shared: bool = False,
    ) -> ScoreBlock:
        """Influence of every sequence of a micro-batch on every query (Equations 25, 30 and 31).

        Args:
            batch: training sequences, the same on all ranks; their loss is the sum over predicted tokens of −log p
                (Equation 22).
            queries: preconditioned queries of every layer.
            per_layer: also return the share of each layer.
            per_token: also return the share of each layer and token.
            shared: with several ranks, each of which holds a share of the queries (`LayerQueries.share`): the rows of
                all ranks are gathered, and their partial scores added in the order of ranks.

        Returns:
            Scores: a sequence whose loss or gradient is not finite has scores that are not finite.
        """
        shared = shared and self.exchange.size > 1
        whole = self._filled(batch)
        local = whole.part(self.exchange.rank, self.exchange.size)
        blank = _ScoreSums(self, whole if shared else local, queries, per_layer, per_token)

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            blank.add(layer, self._of_all_ranks(uses) if shared else uses)

        finite_B = self.backward(local, self._training_objective(local, TrueLabels()), consume)
        if shared:
            finite_B = gather_rows(self.exchange, finite_B)
        blank.total_BQ[~finite_B] = float("nan")
        return blank.block(self.exchange, shared, batch)

    def backward(self, batch: Batch, objective: Objective, consume: Consume) -> Tensor:
        """One forward and one backward pass of Σ_b objective_b over this rank's own sequences.

        Sequences whose objective is not finite are left out of the sum; what reaches the layers from them is NaN or
        zero. The backward pass is run in any case: with a sharded model all ranks have to.

        Args:
            batch: sequences.
            objective: from logits to one number a sequence.
            consume: called with each tracked layer's uses as the backward pass reaches it.

        Returns:
            Which objectives are finite, bool [B].
        """
        padded = bool((batch.lengths != batch.input_ids.shape[1]).any())
        mask = batch.attention_mask_BT if padded else None
        with self._capture.consuming(consume, batch.input_ids.shape[1]):
            logits_BTV = self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
            values_B = objective(logits_BTV)
            finite_B = torch.isfinite(values_B.detach())
            if values_B.requires_grad:
                torch.where(finite_B, values_B, 0).sum().backward()
            return finite_B

    def _pseudo_backward(self, batch: Batch, labels: Labels, reduce: Consume) -> None:
        """A pass over the micro-batch by all ranks.

        Raises:
            NonFiniteSequences: on all of them, when the pass is over.
        """
        local = self._filled(batch).part(self.exchange.rank, self.exchange.size)
        reasons: dict[int, str] = {}

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            reasons.update(_not_finite(local, layer, uses))
            reduce(layer, uses)

        finite_B = self.backward(local, self._training_objective(local, labels), consume)
        reasons |= _without_loss(local, finite_B)
        anywhere = self.exchange.gather(torch.tensor([len(reasons)], device=finite_B.device))
        if bool(anywhere.any()):
            raise NonFiniteSequences({key: why for part in self.exchange.agree(reasons) for key, why in part.items()})

    def _filled(self, batch: Batch) -> Batch:
        return batch if self.exchange.size == 1 else batch.filled(self.exchange.size)

    def _of_all_ranks(self, uses: Sequence[Use], activations: bool = True) -> Sequence[Use]:
        """Uses with the rows of all ranks, in the order of the micro-batch and in the type of the products.

        The last position is left behind: it predicts nothing, so that no loss depends on what it puts out.
        """
        if self.exchange.size == 1:
            return uses

        def whole(rows_BTX: Tensor) -> Tensor:
            return gather_rows(self.exchange, rows_BTX[:, :-1].to(self.precision.product))

        return [Use(whole(use.act_BTI) if activations else use.act_BTI, whole(use.grad_BTO)) for use in uses]

    @staticmethod
    def _training_objective(batch: Batch, labels: Labels) -> Objective:
        def objective(logits_BTV: Tensor) -> Tensor:
            return log_probabilities(logits_BTV, labels(batch, logits_BTV.detach())).sum(1)

        return objective


class _ScoreSums:
    """Scores of a micro-batch while the backward pass goes from layer to layer."""

    def __init__(
        self, worker: Worker, batch: Batch, queries: dict[str, LayerQueries], per_layer: bool, per_token: bool
    ) -> None:
        self._order = {layer.name: index for index, layer in enumerate(worker.selection.layers)}
        self._precision, self._queries = worker.precision, queries
        options = {"dtype": worker.precision.sums, "device": batch.input_ids.device}
        shape, count = batch.input_ids.shape, next(iter(queries.values())).queries
        self.total_BQ = torch.zeros(shape[0], count, **options)
        self._layers = torch.zeros(len(self._order), shape[0], count, **options) if per_layer else None
        self._tokens = torch.zeros(len(self._order), *shape, count, **options) if per_token else None

    def add(self, layer: TrackedLayer, uses: Sequence[Use]) -> None:
        """Add one layer's share."""
        product, sums = self._precision.product, self._precision.sums
        if self._tokens is not None:
            share_BTQ = token_scores(layer, uses, self._queries[layer.name], product, sums)
            self._tokens[self._order[layer.name], :, : share_BTQ.shape[1]] = share_BTQ
            share_BQ = share_BTQ.sum(1)
        else:
            share_BQ = layer_scores(layer, uses, self._queries[layer.name], product, sums)
        self.total_BQ += share_BQ
        if self._layers is not None:
            self._layers[self._order[layer.name]] = share_BQ

    def block(self, exchange: Exchange, shared: bool, batch: Batch) -> ScoreBlock:
        """The scores of all sequences, on every rank: partial sums added in rank order, or rows put together."""

        def whole(part: Tensor) -> Tensor:
            if exchange.size > 1:
                parts = exchange.gather(part)
                part = _in_order(parts) if shared else parts.flatten(0, 1)
            return part[: len(batch)]

        layers = None if self._layers is None else whole(self._layers.transpose(0, 1))
        tokens = None if self._tokens is None else whole(self._tokens.transpose(0, 1))
        tokens = None if tokens is None else tokens[:, :, : batch.input_ids.shape[1]]
        return ScoreBlock(whole(self.total_BQ), layers, tokens)


def _in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, added in its order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _without_loss(batch: Batch, finite_B: Tensor) -> dict[int, str]:
    if bool(finite_B.all()):
        return {}
    return dict.fromkeys(batch.sequence_ids[~finite_B].tolist(), "the loss is not finite")


def _not_finite(batch: Batch, layer: TrackedLayer, uses: Sequence[Use]) -> dict[int, str]:
    """Sequences with a gradient that is not finite; one cheap reduction where all is well."""
    found = {}
    for use in uses:
        if bool(torch.isfinite(use.grad_BTO.sum(dtype=torch.float32))):
            continue
        bad_B = ~torch.isfinite(use.grad_BTO).flatten(1).all(1)
        found |= dict.fromkeys(batch.sequence_ids[bad_B].tolist(), f"the gradient at layer {layer.name} is not finite")
    return found
