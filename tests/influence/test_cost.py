"""The formulas of `influence.cost`, equal to the products that FlopCounterMode counts in the very methods.

Attention is eager here: the fused kernel of a CPU is not counted. Legend: Q queries, I columns, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import influence.correction
import influence.covariance
from influence import cost
from influence.batch import Batch
from influence.compression import ScoreWeights, _svd, pack, weighted_spectrum
from influence.labels import TrueLabels
from influence.layers import LayerSelection, TrackedLayer
from influence.scoring import LayerQueries
from influence.shape import ForwardShape, forward_shape
from influence.solvers import SOLVERS, apply
from influence.worker import Worker
from tests import tiny
from tests.fitted import bases_of, fit, fit_correction, fit_covariance, selection_of, worker_for

TOKENS, SEQUENCES = 12, 3
SIZES = {"wide": {"hidden": 6, "inner": 40}, "narrow": {"hidden": 18, "inner": 10}}  # T below and above I and O
FAMILIES: dict[str, Callable[..., tiny.Case]] = {"gpt2": tiny.gpt2, "llama": tiny.llama, "neox": tiny.neox}
SHARED = {"looped": tiny.looped, "tied": tiny.tied}


def cases() -> list:
    plain = [
        pytest.param(lambda make=make, size=size: eager(make(**SIZES[size])), id=f"{name}-{size}")
        for name, make in FAMILIES.items()
        for size in SIZES
        if not (name == "neox" and size == "narrow")
    ]
    return plain + [pytest.param(make, id=name) for name, make in SHARED.items()]


def eager(case: tiny.Case) -> tiny.Case:
    case.model.set_attn_implementation("eager")  # type: ignore[operator]
    return case


@pytest.fixture(params=cases())
def worker(request: pytest.FixtureRequest) -> Worker:
    return worker_for(request.param())


def batch(sequences: int = SEQUENCES, tokens: int = TOKENS) -> Batch:
    rows = tiny.sequences(sequences, shortest=tokens, longest=tokens)
    return Batch.collate(range(sequences), rows)


def shape_of(worker: Worker) -> ForwardShape:
    return forward_shape(copy.deepcopy(worker.model), worker.selection)


def in_place_product(_target: list[int], left: list[int], right: list[int], **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(run: Callable[[], object]) -> int:
    mapping = {torch.ops.aten.addmm_: in_place_product}  # the counter knows addmm only
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def backward(worker: Worker) -> None:
    objective = worker._training_objective(batch(), TrueLabels())
    worker.backward(batch(), objective, lambda layer, uses: None)


def layers_of(worker: Worker, shape: ForwardShape) -> list:
    return [(layer, shape.calls[layer.name]) for layer in worker.selection.layers]


def test_floor(worker: Worker):
    shape = shape_of(worker)
    assert shape.probed
    assert shape.vocabulary == tiny.VOCABULARY
    assert counted(lambda: backward(worker)) == SEQUENCES * cost.floor_flops(shape, TOKENS)
    with torch.no_grad():
        forward = counted(lambda: worker.model(input_ids=batch().input_ids))
    assert forward == SEQUENCES * cost.forward_flops(shape, TOKENS)


def test_the_same_shape_is_read_on_the_meta_device(monkeypatch: pytest.MonkeyPatch):
    for make in FAMILIES.values():
        case = eager(make())
        selection = selection_of(case)
        real = forward_shape(copy.deepcopy(case.model), selection)
        meta = forward_shape(copy.deepcopy(case.model).to("meta"), selection)
        assert meta == real
        assert meta.saved_numbers > 0
        assert meta.heads > 0

    def refuse(**_: object) -> None:
        raise NotImplementedError("values are needed")

    monkeypatch.setattr(case.model, "forward", refuse)
    fallback = forward_shape(case.model, selection)
    assert not fallback.probed
    assert cost.forward_flops(fallback, TOKENS) == cost.forward_flops(real, TOKENS)


@pytest.mark.parametrize("blocks", [1, 3])
def test_covariance(worker: Worker, blocks: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(influence.covariance, "TILE", 4)
    shape = shape_of(worker)
    extra = sum(cost.covariance_flops(layer, TOKENS, calls, blocks) for layer, calls in layers_of(worker, shape))
    found = counted(lambda: fit_covariance(worker, [batch()], [TrueLabels()], blocks))
    assert found == SEQUENCES * (cost.floor_flops(shape, TOKENS) + extra)
    sums = fit_covariance(worker, [batch()], [TrueLabels()], blocks)
    moments = [moment for side in (sums.activation, sums.gradient) for moment in side.values()]
    held = sum(strip.numel() for moment in moments for strip in moment.strips.values())
    assert held == cost.strip_numbers(worker.selection.layers, blocks)
    written = sum(mean.numel() for moment in moments for mean in moment.mean())
    assert written == cost.covariance_numbers(worker.selection.layers, blocks)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("chunk", [1 << 25, 1])
def test_correction(worker: Worker, blocks: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(influence.correction, "GRADIENT_BYTES", chunk)
    shape = shape_of(worker)
    bases = bases_of(worker, fit_covariance(worker, [batch(8)], [TrueLabels()], blocks))
    found = counted(lambda: fit_correction(worker, [batch()], [TrueLabels()], bases))
    extra = sum(cost.correction_flops(layer, TOKENS, calls, blocks) for layer, calls in layers_of(worker, shape))
    assert found == SEQUENCES * (cost.floor_flops(shape, TOKENS) + extra)
    sums = fit_correction(worker, [batch()], [TrueLabels()], bases)
    assert sum(value.numel() for value in sums.sums.values()) == cost.correction_numbers(worker.selection.layers)


@pytest.mark.parametrize("contraction", ["factored", "dense"])
def test_scan(worker: Worker, contraction: str):
    shape, ranks = shape_of(worker), (3, 1)
    queries = random_queries(worker.selection, ranks)
    if contraction == "dense":
        queries = {name: value.densified() for name, value in queries.items()}
    extra = sum(
        cost.scan_flops(layer, contraction, TOKENS, sum(ranks), len(ranks), calls)
        for layer, calls in layers_of(worker, shape)
    )
    found = counted(lambda: worker.scores(batch(), queries))
    assert found == SEQUENCES * (cost.floor_flops(shape, TOKENS) + extra)
    for layer in worker.selection.layers:
        held = [queries[layer.name].left_OR, queries[layer.name].right_IR, queries[layer.name].dense_QOI]
        numbers = cost.factored_numbers(layer, sum(ranks))
        if contraction == "dense":
            numbers = cost.dense_numbers(layer, len(ranks))
        assert sum(tensor.numel() for tensor in held if tensor is not None) == numbers


def random_queries(selection: LayerSelection, ranks: tuple[int, ...]) -> dict[str, LayerQueries]:
    made = {}
    for layer in selection.layers:
        factors = [
            (torch.randn(layer.outputs, rank).double(), torch.randn(layer.columns, rank).double()) for rank in ranks
        ]
        made[layer.name] = LayerQueries(len(ranks), *pack(factors))
    return made


def test_query_gradients_and_captured_activations(worker: Worker):
    shape, one = shape_of(worker), batch(1)
    objective = worker._training_objective(one, TrueLabels())
    assert counted(lambda: worker.token_factors(one, objective)) == cost.floor_flops(shape, TOKENS)
    held: dict[int, int] = {}

    def consume(layer: object, uses: tuple) -> None:
        for use in uses:
            storage = use.act_BTI.untyped_storage()
            assert held.setdefault(storage.data_ptr(), use.act_BTI.numel()) == use.act_BTI.numel()
            keep.append(use.act_BTI)

    keep: list = []
    worker.backward(one, objective, consume)
    assert sum(held.values()) == cost.captured_numbers(worker.selection.layers, TOKENS, shape.calls)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("max_rank", [None, 3])
def test_ihvp(worker: Worker, blocks: int, max_rank: int | None):
    fitted = fit(worker, [batch(16)], [TrueLabels()], blocks)
    one = batch(1)
    factors = worker.token_factors(one, worker._training_objective(one, TrueLabels()))
    for solver in SOLVERS.values():
        for layer in worker.selection.layers:
            factor, curvature = factors[layer.name], fitted.curvature(layer.name)
            state = solver.fit(curvature, 0.1)
            weights = ScoreWeights.of(curvature, layer.outputs, layer.columns)
            tokens = len(factor.grad_TO)
            assert factor.grad_TO.numel() + factor.act_TI.numel() == cost.token_factor_numbers(layer, tokens)
            arguments = (layer, tokens, max_rank)
            curved = solver.needs_covariance
            full = counted(lambda state=state, factor=factor: apply(state, factor.gradient()))
            assert full == cost.ihvp_flops(*arguments, full=True, curvature=curved, blocks=blocks)
            kept = []

            def compressed(state=state, factor=factor, weights=weights, kept=kept):
                kept.append(weighted_spectrum(factor.gradient(), state, weights, max_rank))

            found = counted(compressed)
            rank = kept[0].left_OK.shape[1]
            assert rank <= cost.kept_values(layer, max_rank)
            assert found == cost.ihvp_flops(layer, tokens, rank, full=False, curvature=curved, blocks=blocks)


@pytest.mark.parametrize("shape", [(800, 900), (900, 800)])
def test_randomised_decompositions(shape: tuple[int, int]):
    matrix_OI = torch.randn(shape, dtype=torch.float64)
    assert counted(lambda: _svd(matrix_OI, 8)) == cost.randomised_flops(*shape, 8) > 0
    assert cost.randomised_flops(*shape, None) == cost.randomised_flops(64, 4096, 32) == 0
    assert cost.svd_operations(*shape, 8) < cost.svd_operations(*shape, None) / 20


def test_the_cheaper_contraction_order_of_the_correction():
    """4096 → 14336 at T = 512 costs 1.6 times the layer's own forward and (full) backward pass, not 12."""
    layer = TrackedLayer("layer", ("layer",), 4096, 14336, False, False, "layer")
    own = 6 * 512 * layer.inputs * layer.outputs
    assert cost.correction_flops(layer, 512) / own == pytest.approx(1.6, abs=0.01)
    formed_first = 2 * (512 * 4096 * 14336 + 4096**2 * 14336 + 4096 * 14336**2)
    assert formed_first / own == pytest.approx(12.3, abs=0.1)
