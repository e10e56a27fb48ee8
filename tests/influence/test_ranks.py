"""Ranks of a sharded replica: parts of sums that are owned, rows that are exchanged; the numbers are one process's.

Here every rank has a whole model of its own, so that only the division of the statistics is tested; the sharding of
weights is `tests/actors/test_sharding.py`'s.
"""

from __future__ import annotations

import functools
from itertools import combinations

import pytest
import torch

from influence.batch import Batch
from influence.correction import CorrectionSums, LayerBasisShare, owned_part
from influence.covariance import TILE, CovarianceSums, SecondMoment, all_strips, deal_strips, strip_shape
from influence.eigenbasis import eigenbasis
from influence.exchange import Alone, shares
from influence.labels import SampledLabels
from influence.layers import LayerSelection, TrackedLayer
from influence.measurement import MeasuredQuery, completion_log_probability
from influence.passes import correction_bytes, covariance_bytes
from influence.scoring import LayerQueries
from influence.worker import NonFiniteSequences, Precision, ScoreBlock, Worker
from tests.fitted import Fitted, batches_of, fit, precondition, selection_of, worker_for
from tests.influence.test_invariances import compare_corrections, compare_covariances, same
from tests.ranks import ThreadExchange, on_ranks
from tests.tiny import CASES, sequences

ROWS = sequences(11, seed=6, shortest=1, longest=12)
LABELS = SampledLabels(seed=21)
RANKS = (1, 2, 4)


def worker_of(case: str, exchange: ThreadExchange | None = None, dtype: torch.dtype = torch.float64) -> Worker:
    made = CASES[case]()
    return Worker(made.model.to(dtype), selection_of(made), Precision(dtype, dtype), exchange)


def put_together(parts: list[CovarianceSums]) -> CovarianceSums:
    """The strips of all ranks as one sum."""
    whole = parts[0]
    for mine, sides in ((whole.activation, "activation"), (whole.gradient, "gradient")):
        for name, moment in mine.items():
            others = [getattr(part, sides)[name] for part in parts[1:]]
            strips = {strip: value for part in (moment, *others) for strip, value in part.strips.items()}
            assert sum(len(part.strips) for part in (moment, *others)) == len(strips)
            mine[name] = SecondMoment(moment.size, moment.blocks, strips, moment.rows)
    return whole


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def alone(case: str, blocks: int) -> Fitted:
    return fit(worker_for(CASES[case]()), batches_of(ROWS, 4), [LABELS], blocks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("blocks", [1, 2])
def test_covariance_in_strips_is_that_of_one_process(case: str, ranks: int, blocks: int):
    def run(exchange: ThreadExchange) -> CovarianceSums:
        worker = worker_of(case, exchange)
        sums = CovarianceSums.empty(worker.selection, blocks, torch.float64, "cpu", exchange.rank, ranks)
        for batch in batches_of(ROWS, 4):
            worker.accumulate_covariance(batch, LABELS, sums)
        return sums

    compare_covariances(put_together(on_ranks(ranks, run)), alone(case, blocks).covariance)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("blocks", [1, 2])
def test_correction_in_shares_is_that_of_one_process(case: str, ranks: int, blocks: int):
    fitted = alone(case, blocks)

    def run(exchange: ThreadExchange) -> CorrectionSums:
        worker = worker_of(case, exchange)
        sums = CorrectionSums.empty(worker.selection, torch.float64, "cpu", exchange.rank, ranks)
        bases = {}
        for layer in worker.selection.layers:
            whole = fitted.bases[layer.name]
            inputs, outputs = (shares(size, ranks)[exchange.rank] for size in (layer.columns, layer.outputs))
            bases[layer.name] = LayerBasisShare(whole.activation.share(inputs), whole.gradient.share(outputs))
        for batch in batches_of(ROWS, 4):
            worker.accumulate_correction(batch, LABELS, bases, sums)
        return sums

    parts = on_ranks(ranks, run)
    whole = CorrectionSums.empty(fitted.worker.selection, torch.float64)
    whole.sequences, whole.tokens = parts[0].sequences, parts[0].tokens
    for layer in fitted.worker.selection.layers:
        for rank, part in enumerate(parts):
            rows, columns = owned_part(layer, rank, ranks)
            whole.sums[layer.name][rows, columns] += part.sums[layer.name]
    compare_corrections(whole, fitted.correction)


def queries_of(fitted: Fitted, factored: bool) -> dict[str, LayerQueries]:
    rows = sequences(3, seed=8, shortest=5)
    gradients = []
    for row in rows:
        query = MeasuredQuery.of(row[:3], row[3:])
        objective = functools.partial(completion_log_probability, query=query)
        found = fitted.worker.token_factors(query.batch, objective)
        gradients.append({name: factor.gradient() for name, factor in found.items()})
    dense = precondition(fitted.solve("ekfac"), gradients)
    if not factored:
        return dense
    packed = {}
    for name, held in dense.items():
        assert held.dense_QOI is not None
        U_QOK, s_QK, Vh_QKI = torch.linalg.svd(held.dense_QOI, full_matrices=False)
        left = (U_QOK * s_QK[:, None]).movedim(0, 1).flatten(1)
        owner = torch.arange(3).repeat_interleave(s_QK.shape[1])
        packed[name] = LayerQueries(3, left.contiguous(), Vh_QKI.flatten(0, 1).T.contiguous(), owner)
    return packed


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_scores_of_ranks_are_those_of_one_process(case: str, ranks: int, shared: bool, factored: bool):
    fitted = alone(case, 1)
    queries = queries_of(fitted, factored)
    batch = Batch.collate(range(7), ROWS[:7])

    def run(exchange: ThreadExchange) -> ScoreBlock:
        mine = {name: q.share(exchange.rank, ranks) if shared else q for name, q in queries.items()}
        return worker_of(case, exchange).scores(batch, mine, per_layer=True, per_token=True, shared=shared)

    expected = fitted.worker.scores(batch, queries, per_layer=True, per_token=True)
    for found in on_ranks(ranks, run):
        for name in ("scores_BQ", "by_layer_BLQ", "by_token_BLTQ"):
            assert getattr(found, name).shape == getattr(expected, name).shape
            same(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_sequence_that_is_not_finite_is_named_on_every_rank_after_the_pass(ranks: int):
    def run(exchange: ThreadExchange) -> tuple[dict[int, str], ScoreBlock]:
        worker = worker_of("gpt2", exchange)
        worker.model.get_input_embeddings().register_forward_hook(
            lambda _module, inputs, output: output.masked_fill((inputs[0] == 7)[..., None], float("nan"))
        )
        batch = Batch.collate([3, 4, 5, 6, 8], [[1, 2, 3], [7, 2, 3], [1, 1, 1], [2, 2, 2], [7, 7, 1]])
        sums = CovarianceSums.empty(worker.selection, 1, torch.float64, "cpu", exchange.rank, exchange.size)
        with pytest.raises(NonFiniteSequences) as caught:
            worker.accumulate_covariance(batch, LABELS, sums)
        queries = {
            layer.name: LayerQueries(1, dense_QOI=torch.ones(1, layer.outputs, layer.columns, dtype=torch.float64))
            for layer in worker.selection.layers
        }
        return caught.value.reasons, worker.scores(batch, queries)

    for reasons, block in on_ranks(ranks, run):
        assert reasons == dict.fromkeys([4, 8], "the loss is not finite")
        assert torch.isfinite(block.scores_BQ[:, 0]).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_strips_are_dealt_once_and_evenly(ranks: int, blocks: int):
    sizes = {"first": 10 * TILE + 17, "second": 3 * TILE, "third": 5}
    owned = deal_strips(sizes, blocks, ranks)
    for name, size in sizes.items():
        dealt = [strip for rank in owned for strip in rank[name]]
        assert sorted(dealt) == all_strips(size, blocks)
        numbers = [sum(r * c for r, c in (strip_shape(size, blocks, s) for s in rank[name])) for rank in owned]
        assert max(numbers) - min(numbers) <= TILE * size
    assert all(not set(first[name]) & set(second[name]) for first, second in combinations(owned, 2) for name in sizes)


@pytest.mark.parametrize("ranks", RANKS)
def test_what_a_rank_holds_is_a_share_of_what_one_process_holds(ranks: int):
    layer = TrackedLayer("up", ("up",), 8 * TILE, 16 * TILE, True, False, "up")
    selection = LayerSelection((layer,), (), layer.parameters)
    held = []
    for rank in range(ranks):
        covariance = CovarianceSums.empty(selection, 1, torch.float32, "meta", rank, ranks)
        correction = CorrectionSums.empty(selection, torch.float32, "meta", rank, ranks)
        strips = [s for m in (covariance.activation["up"], covariance.gradient["up"]) for s in m.strips.values()]
        held.append((sum(s.nbytes for s in strips), correction.sums["up"].nbytes))
    planned = covariance_bytes(layer, ranks, 1, 4)
    assert sum(covariance for covariance, _ in held) == pytest.approx(planned * ranks, abs=4 * ranks)
    assert max(covariance for covariance, _ in held) <= planned + 4 * TILE * layer.outputs
    assert [correction for _, correction in held] == [4 * layer.parameters // ranks] * ranks
    assert correction_bytes(layer, ranks, 1, 4) >= 4 * layer.parameters // ranks


@pytest.mark.parametrize(("size", "blocks", "ranks"), [(10, 1, 3), (10, 3, 4), (3, 1, 4), (7, 2, 2)])
def test_shares_of_a_basis_put_together_rotate_as_the_whole(size: int, blocks: int, ranks: int):
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(9, size, generator=generator, dtype=torch.float64)
    moment = SecondMoment.zeros(size, blocks, torch.float64)
    moment.add(rows, 9, torch.float64)
    basis = eigenbasis("x", moment.mean())
    parts = [basis.share(part).rotate(rows) for part in shares(size, ranks)]
    torch.testing.assert_close(torch.cat(parts, dim=1), basis.rotate(rows))


def test_one_process_is_a_gang_of_one():
    exchange = Alone()
    rows = torch.ones(2, 3)
    assert exchange.gather(rows).shape == (1, 2, 3)
    assert exchange.agree("x") == exchange.collect("x") == ["x"]
    exchange.barrier()
    assert exchange.moved_bytes == 0
