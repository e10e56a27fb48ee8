"""What ranks receive from one another, and the products of all of them together: formulas equal to what is counted.

Ranks are threads, each with a whole model of its own, so that only what the statistics exchange is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import influence.covariance
from influence import cost, traffic
from influence.batch import Batch
from influence.correction import CorrectionSums, LayerBasisShare
from influence.covariance import CovarianceSums
from influence.exchange import shares
from influence.labels import TrueLabels
from influence.layers import TrackedLayer
from influence.shape import ForwardShape, Weights, forward_shape
from influence.worker import Precision, Worker
from tests import tiny
from tests.fitted import bases_of, fit_covariance, selection_of, worker_for
from tests.influence.test_cost import TOKENS, counted, eager, random_queries
from tests.ranks import ThreadExchange, on_ranks

EACH = 2  # sequences of a rank in the micro-batch
DOUBLE = 8
CASES: dict[str, Callable[[], tiny.Case]] = {
    "gpt2": lambda: eager(tiny.gpt2(hidden=6, inner=40)),
    "llama": lambda: eager(tiny.llama(hidden=18, inner=10)),  # gate and up share their input
    "looped": tiny.looped,  # a layer that is called several times
    "tied": tiny.tied,
}


@pytest.fixture(params=sorted(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


def worker_of(name: str, exchange: ThreadExchange) -> Worker:
    case = CASES[name]()
    return Worker(case.model.double(), selection_of(case), Precision(torch.float64, torch.float64), exchange)


def shape_and_layers(name: str) -> tuple[ForwardShape, tuple[TrackedLayer, ...]]:
    worker = worker_for(CASES[name]())
    return forward_shape(copy.deepcopy(worker.model), worker.selection), worker.selection.layers


def micro_batch(ranks: int) -> Batch:
    return Batch.collate(range(EACH * ranks), tiny.sequences(EACH * ranks, shortest=TOKENS, longest=TOKENS))


def measured(name: str, ranks: int, run: Callable[[Worker, ThreadExchange], object]) -> tuple[int, list[int]]:
    """Products of all ranks together, and the bytes that each received."""

    def rank(exchange: ThreadExchange) -> tuple[int, int]:
        worker = worker_of(name, exchange)
        flops = counted(lambda: run(worker, exchange))
        return flops, exchange.moved_bytes

    found = on_ranks(ranks, rank)
    return sum(flops for flops, _ in found), [moved for _, moved in found]


@pytest.mark.parametrize("blocks", [1, 3])
def test_covariance(name: str, ranks: int, blocks: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(influence.covariance, "TILE", 4)
    shape, layers = shape_and_layers(name)

    def run(worker: Worker, exchange: ThreadExchange) -> None:
        sums = CovarianceSums.empty(worker.selection, blocks, torch.float64, "cpu", exchange.rank, exchange.size)
        worker.accumulate_covariance(micro_batch(ranks), TrueLabels(), sums)

    flops, moved = measured(name, ranks, run)
    extra = sum(cost.covariance_flops(layer, TOKENS, shape.calls[layer.name], blocks, ranks=ranks) for layer in layers)
    assert flops == EACH * ranks * (cost.floor_flops(shape, TOKENS) + extra)
    numbers = traffic.covariance_received(layers, TOKENS, shape.calls, ranks)
    assert moved == [EACH * numbers * DOUBLE + (ranks - 1) * traffic.FLAG_BYTES] * ranks


@pytest.mark.parametrize("blocks", [1, 2])
def test_correction(name: str, ranks: int, blocks: int):
    shape, layers = shape_and_layers(name)
    fitted = worker_for(CASES[name]())
    bases = bases_of(fitted, fit_covariance(fitted, [micro_batch(ranks)], [TrueLabels()], blocks))

    def run(worker: Worker, exchange: ThreadExchange) -> None:
        sums = CorrectionSums.empty(worker.selection, torch.float64, "cpu", exchange.rank, exchange.size)
        mine = {}
        for layer in worker.selection.layers:
            inputs, outputs = (shares(size, ranks)[exchange.rank] for size in (layer.columns, layer.outputs))
            whole = bases[layer.name]
            mine[layer.name] = LayerBasisShare(whole.activation.share(inputs), whole.gradient.share(outputs))
        worker.accumulate_correction(micro_batch(ranks), TrueLabels(), mine, sums)

    flops, moved = measured(name, ranks, run)
    extra = sum(cost.correction_flops(layer, TOKENS, shape.calls[layer.name], blocks, ranks=ranks) for layer in layers)
    assert flops == EACH * ranks * (cost.floor_flops(shape, TOKENS) + extra)
    numbers = traffic.correction_received(layers, TOKENS, shape.calls, ranks)
    assert moved == [EACH * numbers * DOUBLE + (ranks - 1) * traffic.FLAG_BYTES] * ranks


@pytest.mark.parametrize("contraction", ["factored", "dense"])
@pytest.mark.parametrize("shared", [False, True])
def test_scan(name: str, ranks: int, contraction: str, shared: bool):
    shape, layers = shape_and_layers(name)
    each = (3, 1)

    def run(worker: Worker, exchange: ThreadExchange) -> None:
        worker.scores(micro_batch(ranks), queries[exchange.rank], shared=shared)

    packed = random_queries(worker_for(CASES[name]()).selection, each)
    if contraction == "dense":
        packed = {key: value.densified() for key, value in packed.items()}
    queries = [
        {key: value.share(rank, ranks) if shared else value for key, value in packed.items()} for rank in range(ranks)
    ]
    flops, moved = measured(name, ranks, run)
    extra = sum(
        cost.scan_flops(layer, contraction, TOKENS, sum(each), len(each), shape.calls[layer.name], shared)
        for layer in layers
    )
    assert flops == EACH * ranks * (cost.floor_flops(shape, TOKENS) + extra)
    received = EACH * DOUBLE * traffic.scores_received(len(each), ranks, shared)
    if shared:
        received += EACH * DOUBLE * traffic.rows_received(layers, TOKENS, shape.calls, ranks)
        received += EACH * (ranks - 1)  # whether each loss is finite, a byte
    assert moved == [received] * ranks


def layer(name: str, inputs: int, outputs: int) -> TrackedLayer:
    return TrackedLayer(name, (name,), inputs, outputs, False, False, name)


def test_rows_are_fewer_than_products_and_bases_for_the_micro_batches_that_fit():
    """The choices of docs/scaling.md, for a block of 8192 → 32768 → 8192, eight ranks, two sequences of 512 each."""
    block, ranks = [layer("up", 8192, 32768), layer("down", 32768, 8192)], 8
    rows = 2 * traffic.covariance_received(block, 512, {}, ranks)
    assert rows == 7 * 2 * 511 * 2 * (8192 + 32768)
    products = traffic.products_received(block, ranks)
    assert products == pytest.approx(7 / 8 * (8192**2 + 32768**2), rel=0.01)
    assert rows < 0.6 * products
    correction = 2 * traffic.correction_received(block, 512, {}, ranks)
    assert correction == rows + 7 * 8 * 2 * 511 * 2 * 8192 // 8
    assert correction < traffic.bases_received(block, ranks) / 2


def test_weights_are_gathered_where_modules_use_them():
    """Uses as DeepSpeed's ZeRO-3 was seen to gather them; tests/actors holds them equal to what is gathered."""
    case = tiny.gpt2(hidden=6, inner=40)
    shape = forward_shape(case.model, selection_of(case))
    first, _ = case.model.transformer.h
    head = case.model.transformer.wte.weight.numel()  # of the embedding and of the head, which are tied
    forward = sum(parameter.numel() for parameter in case.model.parameters()) + head
    below = [first.ln_1, first.attn, first.ln_2, first.mlp.c_fc, case.model.transformer.wte, case.model.transformer.wpe]
    backward = forward - sum(p.numel() for module in below for p in module.parameters())
    assert sum(weights.numbers * weights.forward for weights in shape.weights) == forward
    assert sum(weights.numbers * weights.backward for weights in shape.weights) == backward
    assert shape.largest_module == 6 * 40 + 40
    even = ForwardShape((), (), weights=(Weights(1000, 2, 1), Weights(1001, 1, 0)))
    assert traffic.weights_received(even, 4) == 3 * (3 * 250 + 251)
