"""Measurements f of a model's output: sums of log-probabilities of chosen tokens.

Legend: B sequences, T positions, V vocabulary, N positions with a label. logits_BTV[b, t] are the scores of the token
after position t; labels_BT[b, t] is the token that is asked for there, or -100.

A measurement is a function of logits and a query that returns one signed term a sequence of the query's batch, `[B]`;
f is their sum. A new measurement is one more such function in `MEASUREMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from influence.batch import Batch
from influence.labels import IGNORED

_CHUNK = 1 << 20  # probabilities that are held at once, beside the logits and their gradient


def log_probabilities(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The log p(label) at each position: logits[b, t, label] - logsumexp(logits[b, t]).

    Computed in float32, or float64 for float64 logits, a few rows at a time: neither the forward nor the backward pass
    holds a second tensor of the logits' size, except the gradient itself. Differentiable once.

    Args:
        logits_BTV: Any floating-point type.
        labels_BT: int64 tokens; -100 where nothing is measured.

    Returns:
        float32 or float64 `[B, T]`, nats; 0 where the label is -100. Sum them: the loss of a sequence is minus the sum
        over its predicted positions (Eq. 22), never a mean.
    """
    return _LogProbabilities.apply(logits_BTV, labels_BT)  # type: ignore[return-value]


class _LogProbabilities(torch.autograd.Function):
    """Gathered log-softmax whose backward pass recomputes the softmax rather than keep it. N: flat positions."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        ctx.save_for_backward(logits_BTV, labels_BT)
        logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
        logp_N = torch.zeros(labels_N.shape, dtype=_wide(logits_NV.dtype), device=logits_NV.device)
        for rows in _chunks(labels_N, logits_NV.shape[1]):
            scores_NV = torch.log_softmax(logits_NV[rows], dim=1, dtype=logp_N.dtype)
            chosen_N = scores_NV.gather(1, labels_N[rows].clamp(min=0)[:, None]).squeeze(1)
            logp_N[rows] = chosen_N.masked_fill(labels_N[rows] == IGNORED, 0.0)
        return logp_N.unflatten(0, labels_BT.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits_BTV, labels_BT = ctx.saved_tensors
        logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
        grad_N = grad_outputs[0].flatten().masked_fill(labels_N == IGNORED, 0.0)
        grad_NV = torch.zeros_like(logits_NV)
        for rows in _chunks(labels_N, logits_NV.shape[1]):
            weight_N1 = grad_N[rows, None]
            share_NV = torch.softmax(logits_NV[rows], dim=1, dtype=grad_N.dtype).mul_(-weight_N1)
            share_NV.scatter_add_(1, labels_N[rows].clamp(min=0)[:, None], weight_N1)
            grad_NV[rows] = share_NV.masked_fill_(weight_N1 == 0, 0.0)
        return grad_NV.view_as(logits_BTV), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(labels_N: Tensor, vocabulary: int) -> Iterator[slice]:
    """Positions, a few at a time, from the first that has a label to the last."""
    labelled = (labels_N != IGNORED).nonzero()
    if len(labelled) == 0:
        return
    first, last = int(labelled[0]), int(labelled[-1]) + 1
    step = max(1, _CHUNK // vocabulary)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


@dataclass(frozen=True)
class MeasuredQuery:
    """Tokens of a query and which of them are measured.

    Attributes:
        input_ids: Prompt and completion.
        first_measured: Index of the completion's first token in `input_ids`.
        contrast_input_ids: The same prompt with a second completion, which starts at the same index.

    Raises:
        ValueError: If a completion has no token, or no token precedes it.
    """

    input_ids: tuple[int, ...]
    first_measured: int
    contrast_input_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.first_measured < 1:
            raise ValueError("a query needs at least one token before the first that is measured")
        for name, ids in (("completion", self.input_ids), ("contrast", self.contrast_input_ids)):
            if ids is not None and len(ids) <= self.first_measured:
                raise ValueError(f"a query without {name} tokens measures nothing")
        if self.contrast_input_ids is not None and (
            self.contrast_input_ids[: self.first_measured] != self.input_ids[: self.first_measured]
        ):
            raise ValueError("the two completions of a contrast must follow the same prompt")

    @classmethod
    def of(
        cls, prompt: Sequence[int], completion: Sequence[int], contrast: Sequence[int] | None = None
    ) -> MeasuredQuery:
        """A query from the tokens of its prompt and its completions."""
        second = None if contrast is None else (*prompt, *contrast)
        return cls((*prompt, *completion), len(prompt), second)

    @property
    def batch(self) -> Batch:
        """The query as sequences 0 and, for a contrast, 1."""
        rows = [self.input_ids] if self.contrast_input_ids is None else [self.input_ids, self.contrast_input_ids]
        return Batch.collate(range(len(rows)), rows)


Measurement = Callable[[Tensor, MeasuredQuery], Tensor]


def completion_log_probability(logits_BTV: Tensor, query: MeasuredQuery) -> Tensor:
    """Measure f = Σ log p(completion token | all before it), over the tokens of the completion only; `[1]`, nats."""
    return _sums(logits_BTV[:1], query.batch, query.first_measured)[:1]


def contrast(logits_BTV: Tensor, query: MeasuredQuery) -> Tensor:
    """Measure f = log p(completion | prompt) - log p(contrast | prompt), as its two signed terms `[2]`.

    Raises:
        ValueError: If the query has no second completion.
    """
    if query.contrast_input_ids is None:
        raise ValueError("a contrast needs a second completion")
    return _sums(logits_BTV, query.batch, query.first_measured) * logits_BTV.new_tensor([1.0, -1.0])


def sequence_log_probability(logits_BTV: Tensor, query: MeasuredQuery) -> Tensor:
    """Measure f = Σ log p(token | all before it) over every token of prompt and completion but the first; `[1]`."""
    return _sums(logits_BTV[:1], query.batch, 1)[:1]


MEASUREMENTS: dict[str, Measurement] = {
    "log_probability": completion_log_probability,
    "contrast": contrast,
    "sequence_log_probability": sequence_log_probability,
}


def _sums(logits_BTV: Tensor, batch: Batch, first_measured: int) -> Tensor:
    """Σ_t log p(token t + 1) over t + 1 >= first_measured, `[B]`."""
    batch = batch.to(logits_BTV.device)
    rows = len(logits_BTV)
    positions_T = torch.arange(batch.input_ids.shape[1], device=logits_BTV.device)
    measured_BT = batch.predicted_BT & (positions_T + 1 >= first_measured)
    labels_BT = torch.where(measured_BT, torch.roll(batch.input_ids, -1, dims=1), IGNORED)[:rows]
    return log_probabilities(logits_BTV[:, : labels_BT.shape[1]], labels_BT).sum(dim=1)
