"""Sampled labels: their distribution, and that nothing but seed, sequence, pass and position decides them."""

from __future__ import annotations

import math

import pytest
import torch

from influence.batch import Batch
from influence.labels import IGNORED, SampledLabels, TrueLabels, inverse_cdf

VOCABULARY = 700  # more than two blocks of the two-level search, and not a multiple of one


def _logits(lengths: list[int], vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Logits that depend on the row's length, not on its place in the batch."""
    rows = torch.zeros(len(lengths), max(lengths), vocabulary)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = 3 * torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(length))
    return rows


def _batch(ids: list[int], lengths: list[int]) -> Batch:
    return Batch.collate(ids, [list(range(1, length + 1)) for length in lengths])


def test_true_labels_are_the_next_tokens():
    batch = Batch.collate([0, 1], [[3, 4, 5], [6, 7]])
    assert TrueLabels()(batch, torch.empty(0)).tolist() == [[4, 5, IGNORED], [7, IGNORED, IGNORED]]


def test_nothing_is_sampled_at_last_positions_and_padding():
    batch = _batch([0, 1, 2], [5, 1, 3])
    labels = SampledLabels(0)(batch, _logits([5, 1, 3]))
    assert labels.dtype == torch.int64
    assert torch.equal(labels != IGNORED, batch.predicted_BT)
    assert labels[batch.predicted_BT].min() >= 0


def test_frequencies_follow_the_softmax():
    vocabulary, positions = 300, 40_001
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    batch = Batch.collate([11], [[0] * positions])
    labels = SampledLabels(seed=5)(batch, logits.expand(1, positions, vocabulary))[0, :-1]
    expected = torch.softmax(logits.double(), 0) * (positions - 1)
    observed = torch.bincount(labels, minlength=vocabulary).double()
    common = expected > 5
    rest = torch.stack([expected[~common].sum(), observed[~common].sum()])
    statistic = (((observed - expected) ** 2 / expected)[common]).sum() + (rest[1] - rest[0]) ** 2 / rest[0]
    freedom = int(common.sum())
    assert abs(float(statistic) - freedom) < 4 * math.sqrt(2 * freedom)


def test_labels_do_not_depend_on_the_batch_or_the_padding():
    lengths, ids = [6, 4, 9], [30, 10, 20]
    together = SampledLabels(3)(_batch(ids, lengths), _logits(lengths))
    for row, (index, length) in enumerate(zip(ids, lengths, strict=True)):
        alone = SampledLabels(3)(_batch([index], [length]), _logits([length]))
        assert torch.equal(alone[0], together[row, :length])
    backwards = SampledLabels(3)(_batch(ids[::-1], lengths[::-1]), _logits(lengths[::-1]))
    assert torch.equal(backwards.flip(0), together)


def test_labels_do_not_depend_on_the_chunks_they_are_computed_in(monkeypatch: pytest.MonkeyPatch):
    batch, logits = _batch([1, 2], [9, 5]), _logits([9, 5])
    whole = SampledLabels(0)(batch, logits)
    monkeypatch.setattr("influence.labels._CHUNK", 2 * VOCABULARY)
    assert torch.equal(SampledLabels(0)(batch, logits), whole)


def test_seed_pass_and_sequence_each_give_other_labels():
    lengths = [64]
    draws = [
        SampledLabels(seed, pass_index)(_batch([sequence], lengths), _logits(lengths))
        for seed, pass_index, sequence in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, 0, 2**40)]
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)
    assert torch.equal(SampledLabels(0)(_batch([0], lengths), _logits(lengths)), draws[0])


def test_the_inverse_cdf_is_the_cumulative_sum_searched():
    logits = _logits([33])[0]
    uniforms = torch.rand(33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cumulative = torch.softmax(logits.double(), 1).cumsum(1)
    assert torch.equal(inverse_cdf(logits, uniforms), torch.searchsorted(cumulative, uniforms[:, None])[:, 0])


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 257, 512, 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_of_the_unit_interval_give_tokens_of_positive_probability(vocabulary: int, dtype: torch.dtype):
    logits = torch.full((4, vocabulary), -math.inf, dtype=dtype)
    logits[:, vocabulary // 2] = 1.0
    logits[2:, vocabulary // 3] = 1.0
    uniforms = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    expected = [vocabulary // 2, vocabulary // 2, vocabulary // 3, vocabulary // 2]
    assert inverse_cdf(logits, uniforms).tolist() == expected


def test_half_precision_logits_are_sampled_as_their_float32_values():
    logits, uniforms = _logits([50])[0].bfloat16(), torch.rand(50, dtype=torch.float64)
    assert torch.equal(inverse_cdf(logits, uniforms), inverse_cdf(logits.float(), uniforms))


def test_logits_that_are_not_finite_still_give_tokens_of_the_vocabulary():
    logits = torch.full((2, 300), math.nan)
    logits[1] = math.inf
    labels = inverse_cdf(logits, torch.tensor([0.3, 1.0], dtype=torch.float64))
    assert ((labels >= 0) & (labels < 300)).all()
