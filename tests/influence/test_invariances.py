"""What must not move a factor or a score beyond rounding: batch size, padding, order and sharing of the corpus, blocks,
how a shared weight is written down, and which contraction is used.

Legend: B sequences, L layers, T positions, Q queries, I columns and O outputs of a layer.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from influence.batch import Batch
from influence.compression import ScoreWeights, weighted_spectrum
from influence.correction import CorrectionSums
from influence.covariance import CovarianceSums
from influence.labels import SampledLabels, TrueLabels
from influence.measurement import MeasuredQuery, completion_log_probability
from influence.scoring import LayerQueries
from influence.solvers import apply
from influence.worker import ScoreBlock, Worker
from tests.fitted import (
    Fitted,
    batches_of,
    fit,
    fit_correction,
    fit_covariance,
    precondition,
    worker_for,
)
from tests.tiny import CASES, VOCABULARY, llama, sequences, tied, untied

ROWS = sequences(14, seed=6, shortest=2, longest=12)
TRAINING = sequences(7, seed=7, shortest=2, longest=12)
QUERIES = tuple(MeasuredQuery.of(row[:3], row[3:]) for row in sequences(3, seed=8, shortest=5))
LABELS = SampledLabels(seed=21)
TOLERANCE = 1e-10


def same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"{error:.1e} of the largest entry"


def gradients(worker: Worker) -> list[dict[str, Tensor]]:
    found = [worker.token_factors(q.batch, functools.partial(completion_log_probability, query=q)) for q in QUERIES]
    return [{name: factor.gradient() for name, factor in factors.items()} for factors in found]


def scored(worker: Worker, queries: dict[str, LayerQueries], batch: Batch) -> ScoreBlock:
    return worker.scores(batch, queries, per_layer=True, per_token=True)


@pytest.fixture(scope="module", params=CASES)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    return fit(worker_for(CASES[request.param]()), batches_of(ROWS, 5), [LABELS])


def compare_covariances(actual: CovarianceSums, expected: CovarianceSums) -> None:
    assert (actual.sequences, actual.tokens) == (expected.sequences, expected.tokens)
    for mine, theirs in ((actual.activation, expected.activation), (actual.gradient, expected.gradient)):
        for name, moment in theirs.items():
            assert mine[name].rows == moment.rows
            same(torch.block_diag(*mine[name].mean()), torch.block_diag(*moment.mean()))


def compare_corrections(actual: CorrectionSums, expected: CorrectionSums) -> None:
    assert (actual.sequences, actual.tokens) == (expected.sequences, expected.tokens)
    for name in expected.sums:
        same(actual.mean(name), expected.mean(name))


@pytest.mark.parametrize("size", [1, 3, len(ROWS)])
def test_batch_size_moves_no_factor(fitted: Fitted, size: int):
    batches = batches_of(ROWS, size)
    compare_covariances(fit_covariance(fitted.worker, batches, [LABELS]), fitted.covariance)
    compare_corrections(fit_correction(fitted.worker, batches, [LABELS], fitted.bases), fitted.correction)


def test_shards_in_another_order_merge_into_the_same_factors(fitted: Fitted):
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    shards = [order[:1], order[1:9], order[9:]]
    covariance = CovarianceSums.empty(fitted.worker.selection, 1, torch.float64)
    correction = CorrectionSums.empty(fitted.worker.selection, torch.float64)
    for shard in shards:
        batches = [Batch.collate(part, [ROWS[i] for i in part]) for part in (shard[:4], shard[4:]) if part]
        covariance.merge(fit_covariance(fitted.worker, batches, [LABELS]))
        correction.merge(fit_correction(fitted.worker, batches, [LABELS], fitted.bases))
    compare_covariances(covariance, fitted.covariance)
    compare_corrections(correction, fitted.correction)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_size_moves_no_score(fitted: Fitted, size: int):
    queries = precondition(fitted.solve("ekfac"), gradients(fitted.worker))
    expected = scored(fitted.worker, queries, Batch.collate(range(len(TRAINING)), TRAINING))
    parts = [scored(fitted.worker, queries, batch) for batch in batches_of(TRAINING, size)]
    same(torch.cat([part.scores_BQ for part in parts]), expected.scores_BQ)
    same(torch.cat([part.by_layer_BLQ for part in parts]), expected.by_layer_BLQ)
    at = 0
    for part in parts:
        rows, positions = part.by_token_BLTQ.shape[0], part.by_token_BLTQ.shape[2]
        same(part.by_token_BLTQ, expected.by_token_BLTQ[at : at + rows, :, :positions])
        at += rows


def test_padding_moves_nothing_whatever_its_tokens_are(fitted: Fitted):
    queries = precondition(fitted.solve("ekfac"), gradients(fitted.worker))
    alone = Batch.collate(range(len(TRAINING)), TRAINING)
    wider = torch.randint(VOCABULARY, (len(TRAINING), 16), generator=torch.Generator().manual_seed(1))
    positions = alone.input_ids.shape[1]
    wider[:, :positions] = torch.where(alone.attention_mask_BT.bool(), alone.input_ids, wider[:, :positions])
    padded = dataclasses.replace(alone, input_ids=wider)
    expected, actual = scored(fitted.worker, queries, alone), scored(fitted.worker, queries, padded)
    same(actual.scores_BQ, expected.scores_BQ)
    same(actual.by_token_BLTQ[:, :, :positions], expected.by_token_BLTQ)
    assert not actual.by_token_BLTQ[:, :, positions:].any()
    sums = [fit_covariance(fitted.worker, [batch], [LABELS]) for batch in (padded, alone)]
    compare_covariances(*sums)
    compare_corrections(*(fit_correction(fitted.worker, [b], [LABELS], fitted.bases) for b in (padded, alone)))


def test_last_positions_and_padding_have_no_share(fitted: Fitted):
    queries = precondition(fitted.solve("ekfac"), gradients(fitted.worker))
    batch = Batch.collate(range(len(TRAINING)), TRAINING)
    by_token_BLTQ = scored(fitted.worker, queries, batch).by_token_BLTQ
    assert not by_token_BLTQ.transpose(1, 2)[~batch.predicted_BT].any()
    assert by_token_BLTQ.transpose(1, 2)[batch.predicted_BT].any(dim=(1, 2)).all()


def test_a_sequence_that_predicts_nothing_scores_zero(fitted: Fitted):
    queries = precondition(fitted.solve("ekfac"), gradients(fitted.worker))
    scores_BQ = fitted.worker.scores(Batch.collate([0, 1, 2], [TRAINING[0], [5], TRAINING[1]]), queries).scores_BQ
    assert not scores_BQ[1].any()
    expected_BQ = fitted.worker.scores(Batch.collate([0, 2], [TRAINING[0], TRAINING[1]]), queries).scores_BQ
    same(scores_BQ[[0, 2]], expected_BQ)


def test_shares_add_up(fitted: Fitted):
    queries = precondition(fitted.solve("ekfac"), gradients(fitted.worker))
    block = scored(fitted.worker, queries, Batch.collate(range(len(TRAINING)), TRAINING))
    same(block.by_layer_BLQ.sum(1), block.scores_BQ, 1e-13)
    same(block.by_token_BLTQ.sum(2), block.by_layer_BLQ, 1e-13)


def test_a_query_scored_as_a_training_sequence_is_its_own_gradient_norm(fitted: Fitted):
    """With the identity and a measurement over the whole sequence, f's own influence is |grad f|^2."""
    row = TRAINING[0]
    whole = MeasuredQuery.of(row[:1], row[1:])
    objective = functools.partial(completion_log_probability, query=whole)
    gradient = {name: f.gradient() for name, f in fitted.worker.token_factors(whole.batch, objective).items()}
    queries = precondition(fitted.solve("identity"), [gradient])
    score = fitted.worker.scores(Batch.collate([0], [row]), queries).scores_BQ[0, 0]
    same(score, sum(matrix.square().sum() for matrix in gradient.values()))


def test_damping_does_not_depend_on_the_blocks(fitted: Fitted):
    """Rotations keep the sum of Λ, so Appendix A's approximation changes directions but not the damping."""
    in_blocks = fit(fitted.worker, batches_of(ROWS, 5), [LABELS], blocks=3)
    for name, state in fitted.solve("ekfac").items():
        assert in_blocks.solve("ekfac")[name].damping == pytest.approx(state.damping, rel=1e-12)
        assert len(in_blocks.bases[name].gradient.vectors) == 3


def test_blocks_of_one_coordinate_are_the_diagonal_of_the_fisher():
    worker = worker_for(llama(hidden=6, inner=6))
    fitted = fit(worker, batches_of(ROWS, 4), [LABELS], blocks=6)
    squares = {layer.name: torch.zeros(layer.outputs, layer.columns) for layer in worker.selection.layers}
    for number, row in enumerate(ROWS):
        batch = Batch.collate([number], [row])
        with torch.no_grad():
            labels_BT = LABELS(batch, worker.model(input_ids=batch.input_ids).logits)
        for name, factor in worker.token_factors(batch, functools.partial(log_probability, labels_BT)).items():
            squares[name] = squares[name] + factor.gradient().square() / len(ROWS)
    for name, expected_OI in squares.items():
        same(fitted.correction.mean(name), expected_OI)


def log_probability(labels_BT: Tensor, logits_BTV: Tensor) -> Tensor:
    """Of the labels, summed; written without the implementation's."""
    log_p_BTV = logits_BTV[:, :-1].log_softmax(-1)
    return log_p_BTV.gather(2, labels_BT[:, :-1, None]).sum((1, 2))


def test_a_module_called_twice_is_two_modules_with_one_parameter():
    looped_fit, tied_fit = (fit(worker_for(CASES[n]()), batches_of(ROWS, 5), [LABELS]) for n in ("looped", "tied"))
    compare_covariances(looped_fit.covariance, tied_fit.covariance)
    compare_corrections(looped_fit.correction, tied_fit.correction)
    batch = Batch.collate(range(len(TRAINING)), TRAINING)
    blocks = [
        scored(found.worker, precondition(found.solve("ekfac"), gradients(found.worker)), batch)
        for found in (looped_fit, tied_fit)
    ]
    same(blocks[0].scores_BQ, blocks[1].scores_BQ)
    same(blocks[0].by_layer_BLQ, blocks[1].by_layer_BLQ)
    same(blocks[0].by_token_BLTQ, blocks[1].by_token_BLTQ)


def test_the_gradient_of_a_tied_weight_is_the_sum_of_those_of_its_uses():
    apart = gradients(worker_for(untied()))
    for query, together in enumerate(gradients(worker_for(tied()))):
        for part in ("up", "down"):
            expected_OI = apart[query][f"blocks.0.mlp.{part}"] + apart[query][f"blocks.1.mlp.{part}"]
            same(together[f"blocks.0.mlp.{part}"], expected_OI)


def test_full_rank_compression_keeps_the_preconditioned_gradient(fitted: Fitted):
    """Factors are kept in float32, hence the tolerance."""
    states = fitted.solve("ekfac")
    for gradient in gradients(fitted.worker):
        for name, state in states.items():
            weights = ScoreWeights.of(fitted.curvature(name), *gradient[name].shape)
            spectrum = weighted_spectrum(gradient[name], state, weights, max_rank=None)
            same(spectrum.left_OK @ spectrum.right_IK.T, apply(state, gradient[name]), 1e-5)


def test_labels_depend_on_the_sequence_and_not_on_its_batch(fitted: Fitted):
    batch = Batch.collate(range(len(ROWS)), ROWS)
    with torch.no_grad():
        together = LABELS(batch, fitted.worker.model(input_ids=batch.input_ids).logits)
        for number, row in enumerate(ROWS):
            alone = Batch.collate([number], [row])
            labels = LABELS(alone, fitted.worker.model(input_ids=alone.input_ids).logits)
            assert labels[0, : len(row)].tolist() == together[number, : len(row)].tolist()
    assert not torch.equal(together, TrueLabels()(batch, torch.zeros(1)))


def test_float32_scores_move_by_rounding_only():
    worker = worker_for(CASES["gpt2"](), torch.float32)
    fitted = fit(worker, batches_of(ROWS, 5), [LABELS])
    queries = precondition(fitted.solve("ekfac"), gradients(worker))
    queries = {name: layer.to(torch.float32, torch.float32) for name, layer in queries.items()}
    expected = worker.scores(Batch.collate(range(len(TRAINING)), TRAINING), queries).scores_BQ
    for size in (1, 3):
        parts = [worker.scores(batch, queries).scores_BQ for batch in batches_of(TRAINING, size)]
        same(torch.cat(parts), expected, 1e-5)
