"""Sums of log-probabilities: values against log-softmax, gradients against autograd's, and what each query measures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from influence.labels import IGNORED
from influence.measurement import (
    MEASUREMENTS,
    MeasuredQuery,
    completion_log_probability,
    contrast,
    log_probabilities,
    sequence_log_probability,
)

LABELS = torch.tensor([[1, IGNORED, 2, 0, IGNORED], [IGNORED] * 5, [4, 5, 6, 0, 1]])


def _logits(dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def _reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("chunk", [1, 21, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_log_softmax(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("influence.measurement._CHUNK", chunk)
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(_logits(dtype).dtype)
    ours, theirs = _logits(dtype).requires_grad_(), _logits(dtype).requires_grad_()
    values, expected = log_probabilities(ours, LABELS), _reference(theirs, LABELS)
    torch.testing.assert_close(values, expected)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not values[LABELS == IGNORED].any()


def test_numerical_gradient():
    assert torch.autograd.gradcheck(lambda logits: log_probabilities(logits, LABELS), _logits().requires_grad_())


def test_large_logits_do_not_overflow_and_impossible_tokens_are_minus_infinity():
    logits = torch.tensor([[[1e4, 0.0, -math.inf]]])
    assert log_probabilities(logits, torch.tensor([[0]])).item() == 0.0
    assert log_probabilities(logits, torch.tensor([[2]])).item() == -math.inf


def test_positions_without_label_or_weight_have_no_gradient_even_where_logits_are_not_finite():
    logits = _logits(torch.float32)
    logits[0, 1], logits[2, 3] = math.nan, math.nan
    logits.requires_grad_()
    values = log_probabilities(logits, LABELS)
    assert values[0].isfinite().all()
    (values[:2].sum() + values[2, :2].sum()).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 1].any()
    assert not logits.grad[2, 2:].any()


def test_the_completion_is_measured_and_the_prompt_is_not():
    query = MeasuredQuery.of(prompt=[3, 1], completion=[4, 6, 2])
    assert query.input_ids == (3, 1, 4, 6, 2)
    logits = _logits(batch=1)
    logp = torch.log_softmax(logits, -1)[0]
    torch.testing.assert_close(completion_log_probability(logits, query), (logp[1, 4] + logp[2, 6] + logp[3, 2])[None])
    whole = logp[0, 1] + logp[1, 4] + logp[2, 6] + logp[3, 2]
    torch.testing.assert_close(sequence_log_probability(logits, query), whole[None])


def test_a_contrast_is_the_difference_of_two_completions_of_any_lengths():
    query = MeasuredQuery.of([3, 1], [4, 6, 2], [5])
    assert query.batch.lengths.tolist() == [5, 3]
    logits = _logits(batch=2)
    logp = torch.log_softmax(logits, -1)
    terms = contrast(logits, query)
    torch.testing.assert_close(terms, torch.stack([logp[0, 1, 4] + logp[0, 2, 6] + logp[0, 3, 2], -logp[1, 1, 5]]))
    same = MeasuredQuery.of([3, 1], [4], [4])
    assert contrast(logits[:1].expand(2, -1, -1), same).sum() == 0


def test_half_precision_logits_keep_a_float32_sum():
    query = MeasuredQuery.of([3, 1], [4, 6, 2], [5])
    for name, measure in MEASUREMENTS.items():
        values = measure(_logits(torch.bfloat16, batch=2), query)
        assert values.dtype == torch.float32, name


def test_queries_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="without completion tokens"):
        MeasuredQuery.of([1, 2], [])
    with pytest.raises(ValueError, match="without contrast tokens"):
        MeasuredQuery.of([1, 2], [3], [])
    with pytest.raises(ValueError, match="at least one token before"):
        MeasuredQuery.of([], [3])
    with pytest.raises(ValueError, match="same prompt"):
        MeasuredQuery((1, 2, 3), 2, (1, 4, 3))
    with pytest.raises(ValueError, match="needs a second completion"):
        contrast(_logits(batch=1), MeasuredQuery.of([3, 1], [4]))
