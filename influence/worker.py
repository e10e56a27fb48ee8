"""What a shard does, in one process: forward, backward, and one statistic out of every tracked layer.

act_BTI, grad_BTO: inputs and output gradients of a layer, [sequences, positions, ...]; scores_BQ.

A `Worker` holds a model and nothing that belongs to a run: sums, bases and queries come in as arguments. It knows no
files and no Ray; `actors.replica` wraps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence.batch import Batch
from influence.capture import Capture, Consume, Use, homogeneous
from influence.correction import Bases, CorrectionSums, add_correction
from influence.covariance import CovarianceSums
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

    def __init__(self, model: nn.Module, selection: LayerSelection, precision: Precision | None = None) -> None:
        """Take a model over: its parameters are frozen and it is put into evaluation mode."""
        self.model = model.eval().requires_grad_(False)
        self.selection = selection
        self.precision = precision or Precision()
        self._capture = Capture(model, selection.layers)

    def accumulate_covariance(self, batch: Batch, labels: Labels, sums: CovarianceSums) -> None:
        """Add a micro-batch to the covariance factors A and S (Section 3.1).

        Args:
            batch: sequences.
            labels: where the labels of the pseudo-gradients come from.
            sums: changed in place.

        Raises:
            NonFiniteSequences: if a loss or a gradient is not finite; `sums` must then be thrown away.
        """

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            _check_gradients(batch, layer, uses)
            sums.add(layer, tuple(uses), batch.predicted_BT, self.precision.product)

        self._pseudo_backward(batch, labels, consume)
        sums.sequences += len(batch)
        sums.tokens += int(batch.predicted_BT.sum())

    def accumulate_correction(self, batch: Batch, labels: Labels, bases: Bases, sums: CorrectionSums) -> None:
        """Add a micro-batch to Λ (Equation 20).

        Args:
            batch: sequences.
            labels: where the labels of the pseudo-gradients come from.
            bases: the eigenbasis of every layer, in the type of the products.
            sums: changed in place.

        Raises:
            NonFiniteSequences: as in `accumulate_covariance`.
        """

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            _check_gradients(batch, layer, uses)
            add_correction(sums.sums[layer.name], layer, uses, bases[layer.name], self.precision.product)

        self._pseudo_backward(batch, labels, consume)
        sums.sequences += len(batch)
        sums.tokens += int(batch.predicted_BT.sum())

    def token_factors(self, batch: Batch, objective: Objective) -> dict[str, TokenFactors]:
        """The exact gradient of Σ_b objective_b in every tracked layer, as factors over tokens.

        Tokens without gradient (padding, and positions after the last one that is measured) are dropped.

        Args:
            batch: the sequences of one query (two for a contrast).
            objective: from logits to one number a sequence.

        Raises:
            NonFiniteSequences: if the measurement or a gradient is not finite.
        """
        factors: dict[str, TokenFactors] = {}

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            _check_gradients(batch, layer, uses)
            grad_NO = torch.cat([use.grad_BTO.flatten(0, 1) for use in uses])
            act_NI = torch.cat([homogeneous(use.act_BTI, layer.bias).flatten(0, 1) for use in uses])
            live_N = grad_NO.ne(0).any(dim=1)
            factors[layer.name] = TokenFactors(grad_NO[live_N], act_NI[live_N])

        self.backward(batch, objective, consume)
        for layer in self.selection.layers:
            if layer.name not in factors:  # the measurement does not depend on this layer
                device = batch.input_ids.device
                factors[layer.name] = TokenFactors(
                    torch.zeros(0, layer.outputs, device=device), torch.zeros(0, layer.columns, device=device)
                )
        return factors

    def scores(
        self, batch: Batch, queries: dict[str, LayerQueries], per_layer: bool = False, per_token: bool = False
    ) -> ScoreBlock:
        """Influence of every sequence of a micro-batch on every query (Equations 25, 30 and 31).

        Args:
            batch: training sequences; their loss is the sum over predicted tokens of −log p (Equation 22).
            queries: preconditioned queries of every layer.
            per_layer: also return the share of each layer.
            per_token: also return the share of each layer and token.

        Returns:
            Scores: a sequence whose loss or gradient is not finite has scores that are not finite.
        """
        order = {layer.name: index for index, layer in enumerate(self.selection.layers)}
        product, sums = self.precision.product, self.precision.sums
        count = next(iter(queries.values())).queries
        shape = (len(batch), count)
        device = batch.input_ids.device
        total_BQ = torch.zeros(shape, dtype=sums, device=device)
        layers = torch.zeros(len(order), *shape, dtype=sums, device=device) if per_layer else None
        tokens = None
        if per_token:
            tokens = torch.zeros(len(order), *batch.input_ids.shape, count, dtype=sums, device=device)

        def consume(layer: TrackedLayer, uses: Sequence[Use]) -> None:
            if tokens is not None:
                share_BTQ = token_scores(layer, uses, queries[layer.name], product, sums)
                tokens[order[layer.name]] = share_BTQ
                share_BQ = share_BTQ.sum(1)
            else:
                share_BQ = layer_scores(layer, uses, queries[layer.name], product, sums)
            total_BQ.add_(share_BQ)
            if layers is not None:
                layers[order[layer.name]] = share_BQ

        losses_B = self.backward(batch, self._training_objective(batch, TrueLabels()), consume, tolerant=True)
        total_BQ[~torch.isfinite(losses_B)] = float("nan")
        return ScoreBlock(
            total_BQ,
            None if layers is None else layers.transpose(0, 1),
            None if tokens is None else tokens.transpose(0, 1),
        )

    def backward(self, batch: Batch, objective: Objective, consume: Consume, tolerant: bool = False) -> Tensor:
        """One forward and one backward pass of Σ_b objective_b; returns the objective of each sequence, [B].

        Args:
            batch: sequences.
            objective: from logits to one number a sequence.
            consume: called with each tracked layer's uses as the backward pass reaches it.
            tolerant: leave sequences out of the sum whose objective is not finite instead of raising.

        Raises:
            NonFiniteSequences: if an objective is not finite and `tolerant` is off.
        """
        padded = bool((batch.lengths != batch.input_ids.shape[1]).any())
        mask = batch.attention_mask_BT if padded else None
        with self._capture.consuming(consume, batch.input_ids.shape[1]):
            logits_BTV = self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
            values_B = objective(logits_BTV)
            finite_B = torch.isfinite(values_B.detach())
            if not bool(finite_B.all()):
                if not tolerant:
                    ids = batch.sequence_ids[~finite_B].tolist()
                    raise NonFiniteSequences(dict.fromkeys(ids, "the loss is not finite"))
                values_B = values_B[finite_B]
            if values_B.requires_grad and len(values_B):
                values_B.sum().backward()
            return torch.where(finite_B, torch.zeros((), device=finite_B.device), float("nan"))

    def _pseudo_backward(self, batch: Batch, labels: Labels, consume: Consume) -> None:
        self.backward(batch, self._training_objective(batch, labels), consume)

    @staticmethod
    def _training_objective(batch: Batch, labels: Labels) -> Objective:
        def objective(logits_BTV: Tensor) -> Tensor:
            return log_probabilities(logits_BTV, labels(batch, logits_BTV.detach())).sum(1)

        return objective


def _check_gradients(batch: Batch, layer: TrackedLayer, uses: Sequence[Use]) -> None:
    """Raise for sequences with a gradient that is not finite; one cheap reduction where all is well."""
    for use in uses:
        if bool(torch.isfinite(use.grad_BTO.sum(dtype=torch.float32))):
            continue
        bad_B = ~torch.isfinite(use.grad_BTO).flatten(1).all(1)
        if bool(bad_B.any()):
            ids = batch.sequence_ids[bad_B].tolist()
            raise NonFiniteSequences(dict.fromkeys(ids, f"the gradient at layer {layer.name} is not finite"))
