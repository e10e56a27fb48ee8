"""Cells, output tokens and input tokens against exact derivatives in float64, which share nothing with the hooks.

The influence of output token t is ⟨V, ∇_θ log p(t)⟩, one ordinary backward pass a token, to the weights themselves;
that of input token t is ∂/∂ε_t ⟨V, ∇_θ Σ log p⟩ by differentiating twice, embeddings scaled before the model sees them.

Legend: B rows, T positions, I columns and O outputs of a layer, Q queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from influence import attribution, cost
from influence.attribution import (
    SPURIOUS,
    TokenInfluence,
    cells,
    choose_steps,
    output_scales,
    sparsity,
    token_influence,
)
from influence.batch import Batch
from influence.scoring import LayerQueries
from influence.shape import forward_shape
from influence.worker import Precision, Worker
from tests import oracle
from tests.fitted import selection_of, worker_for
from tests.oracle import Oracle
from tests.ranks import ThreadExchange, on_ranks
from tests.tiny import CASES, Case, CausalModel, sequences

ROWS = sequences(5, seed=3, shortest=2, longest=9)
CHOSEN = [0, 0, 1, 2, 1]  # the query of each row
QUERIES = 3
RANK = 2
SHARE = 6e-6  # of a layer's outputs, that a step moves: about the cube root of float64's epsilon
EXACT = 1e-8  # of the largest entry: what central differences leave in float64


@dataclass(frozen=True)
class Made:
    """A case with random directions of every layer, low-rank or full."""

    worker: Worker
    brute: Oracle
    queries: dict[str, LayerQueries]

    def vectors(self, query: int) -> dict[str, Tensor]:
        """V of one query, [O, I] of each layer."""
        found = {}
        for name, held in self.queries.items():
            full = held.densified([query]).dense_QOI
            assert full is not None
            found[name] = full[0].double()
        return found


def eager(case: Case) -> Case:
    if hasattr(case.model, "set_attn_implementation"):
        case.model.set_attn_implementation("eager")  # type: ignore[operator]  # fused kernels are not counted
    return case


def make(name: str, full: bool, dtype: torch.dtype = torch.float64) -> Made:
    case = CASES[name]()
    brute = Oracle(case.model, case.layers)
    return Made(worker_for(case, dtype), brute, directions(worker_for(case, dtype), full))


def directions(worker: Worker, full: bool) -> dict[str, LayerQueries]:
    """Random V; query 1 has no rank left in the first layer, and more in the others."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {}
    for index, layer in enumerate(worker.selection.layers):
        if full:
            found[layer.name] = LayerQueries(QUERIES, dense_QOI=normal(QUERIES, layer.outputs, layer.columns))
            continue
        ranks = [RANK, 0 if index == 0 else RANK + 1, RANK]
        owner = torch.tensor([query for query in (2, 0, 1) for _ in range(ranks[query])])  # in any order
        found[layer.name] = LayerQueries(
            QUERIES, normal(layer.outputs, sum(ranks)), normal(layer.columns, sum(ranks)), owner
        )
    return found


def logits_of(model: nn.Module, tokens: Sequence[int], scales_T: Tensor) -> Tensor:
    """Logits [T, V] with the embedding of each token scaled."""
    ids = torch.tensor([list(tokens)])
    embedded_BTH = model.get_input_embeddings()(ids) * scales_T[None, :, None]  # type: ignore[operator]
    if not isinstance(model, CausalModel):
        return model(inputs_embeds=embedded_BTH).logits[0]
    for _ in range(model.loops):
        for block in model.blocks:
            embedded_BTH = block(embedded_BTH)
    return model.lm_head(embedded_BTH)[0]


def exact(brute: Oracle, tokens: Sequence[int], vectors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Influence of output and of input tokens, [T] each."""
    with sdpa_kernel(SDPBackend.MATH):  # others cannot be differentiated twice
        return _exact(brute, tokens, vectors)


def _exact(brute: Oracle, tokens: Sequence[int], vectors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scales_T = torch.ones(len(tokens), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(list(tokens[1:]), dtype=torch.long)
    logp_T = torch.log_softmax(logits_of(brute.model, tokens, scales_T)[:-1], dim=-1)[
        torch.arange(len(targets)), targets
    ]
    parameters = [parameter for layer in brute.layers for parameter in brute._parameters(layer)]

    def along(value: Tensor, again: bool) -> Tensor:
        gradients = iter(torch.autograd.grad(value, parameters, retain_graph=True, create_graph=again))
        parts = [(vectors[layer.name] * brute._assemble(layer, gradients)).sum() for layer in brute.layers]
        return torch.stack(parts).sum()

    outputs_T = torch.stack([torch.zeros((), dtype=torch.float64), *(along(value, False) for value in logp_T)])
    (inputs_T,) = torch.autograd.grad(along(logp_T.sum(), True), scales_T)
    return outputs_T.detach(), inputs_T


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{what}: {error:.1e} of the largest entry"


def batch_of(rows: Sequence[Sequence[int]]) -> Batch:
    return Batch.collate(range(len(rows)), rows)


def steps_of(made: Made) -> Tensor:
    return SHARE / output_scales(made.worker, batch_of(ROWS), CHOSEN, made.queries)


def influences(made: Made, worker: Worker | None = None) -> TokenInfluence:
    return token_influence(worker or made.worker, batch_of(ROWS), CHOSEN, steps_of(made), made.queries)


@pytest.fixture(scope="module", params=[(name, full) for name in CASES for full in (False, True)], ids=str)
def made(request: pytest.FixtureRequest) -> Made:
    return make(*request.param)


def test_output_tokens_have_the_exact_derivative(made: Made):
    found = influences(made)
    for row, (tokens, query) in enumerate(zip(ROWS, CHOSEN, strict=True)):
        expected_T, _ = exact(made.brute, tokens, made.vectors(query))
        close(found.output_BT[row, : len(tokens)], expected_T, EXACT, "output tokens")
        assert found.output_BT[row, 0] == 0
        assert not found.output_BT[row, len(tokens) :].any()


def test_input_tokens_have_the_exact_derivative(made: Made):
    found = influences(made)
    for row, (tokens, query) in enumerate(zip(ROWS, CHOSEN, strict=True)):
        _, expected_T = exact(made.brute, tokens, made.vectors(query))
        close(found.input_BT[row, : len(tokens)], expected_T, EXACT, "input tokens")
        assert not found.input_BT[row, len(tokens) :].any()
        assert found.input_BT[row, len(tokens) - 1] == 0  # the last token is no input of a prediction


def test_output_tokens_add_up_to_the_score(made: Made):
    block = made.worker.scores(batch_of(ROWS), made.queries)
    expected_B = block.scores_BQ[torch.arange(len(ROWS)), torch.tensor(CHOSEN)]
    close(influences(made).output_BT.sum(1), expected_B, EXACT, "sums of output tokens")


def test_moved_outputs_are_those_of_moved_weights(made: Made):
    """At a step that is not small: log p and its slope along each embedding at θ + αV, the weights really moved."""
    step, query = 0.3, 2
    rows, steps_B = {query: list(range(len(ROWS)))}, torch.full((len(ROWS),), step, dtype=torch.float64)
    logp_BT, slopes_BT = attribution._passes(made.worker, batch_of(ROWS), rows, steps_B, made.queries)
    made.brute.move(made.vectors(query), step)
    try:
        for tokens, logp_T, slopes_T in zip(ROWS, logp_BT, slopes_BT, strict=True):
            scales_T = torch.ones(len(tokens), dtype=torch.float64, requires_grad=True)
            probabilities = torch.log_softmax(logits_of(made.brute.model, tokens, scales_T)[:-1], dim=-1)
            expected_T = probabilities[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:], dtype=torch.long)]
            (expected_slopes_T,) = torch.autograd.grad(expected_T.sum(), scales_T)
            close(logp_T[: len(tokens) - 1], expected_T.detach(), 1e-12, "log p")
            close(slopes_T[: len(tokens)], expected_slopes_T, 1e-11, "slopes")
    finally:
        made.brute.move(made.vectors(query), -step)


def test_cells_are_those_of_brute_force_for_any_pairs(made: Made):
    pairs = [(0, 2), (3, 1), (3, 0), (4, 1), (3, 2)]
    found = cells(made.worker, batch_of(ROWS), pairs, made.queries)
    assert found.shape == (len(pairs), max(map(len, ROWS)), len(made.worker.selection.layers))
    scores_BQ = made.worker.scores(batch_of(ROWS), made.queries).scores_BQ
    for cells_TL, (row, query) in zip(found, pairs, strict=True):
        expected_LT = oracle.score_cells(made.vectors(query), made.brute.trace(ROWS[row]))
        close(cells_TL[: len(ROWS[row])], expected_LT.T, 1e-10, "cells")
        assert not cells_TL[len(ROWS[row]) :].any()
        assert float(cells_TL.sum()) == pytest.approx(float(scores_BQ[row, query]), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_what_one_process_finds(made: Made, ranks: int):
    pairs = [(0, 2), (3, 1), (3, 0), (4, 1), (3, 2)]
    batch, alone = batch_of(ROWS), influences(made)
    steps = choose_steps(made.worker, batch, CHOSEN, made.queries)
    expected = cells(made.worker, batch, pairs, made.queries)

    def run(exchange: ThreadExchange) -> tuple[TokenInfluence, Tensor, list]:
        copied = CASES_BY_SELECTION[made.worker.selection.layers[0].name, len(made.worker.selection.layers)]
        case = CASES[copied]()
        worker = Worker(case.model, selection_of(case), Precision(torch.float64, torch.float64), exchange)
        found = influences(made, worker), cells(worker, batch, pairs, made.queries)
        return *found, choose_steps(worker, batch, CHOSEN, made.queries)

    for tokens, cells_PTL, chosen in on_ranks(ranks, run):
        torch.testing.assert_close(tokens.output_BT, alone.output_BT, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(tokens.input_BT, alone.input_BT, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(cells_PTL, expected, rtol=1e-10, atol=1e-10)
        mine, theirs = ([step.alpha / step.relative for step in found] for found in (chosen, steps))
        assert mine == pytest.approx(theirs, rel=1e-10)  # which step is best may be for rounding to decide
        assert max(step.error for step in chosen) < 1e-7


CASES_BY_SELECTION = {
    (selection_of(case()).layers[0].name, len(selection_of(case()).layers)): name for name, case in CASES.items()
}


def test_a_sequence_alone_has_the_influences_that_it_has_in_a_batch(made: Made):
    together = influences(made)
    for row, (tokens, query) in enumerate(zip(ROWS, CHOSEN, strict=True)):
        alone = token_influence(made.worker, batch_of([tokens]), [query], steps_of(made)[[row]], made.queries)
        close(together.output_BT[row, : len(tokens)], alone.output_BT[0], 1e-7, "output tokens")
        close(together.input_BT[row, : len(tokens)], alone.input_BT[0], 1e-7, "input tokens")


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_chosen_step_is_as_good_as_it_says_whatever_the_size_of_the_query(dtype: torch.dtype, size: float):
    made = make("llama", full=False, dtype=dtype)
    queries = {
        name: LayerQueries(QUERIES, held.left_OR * size, held.right_IR, held.owner_R)  # type: ignore[operator]
        for name, held in made.queries.items()
    }
    rows, chosen = sequences(3, seed=9, shortest=6, longest=14), [0, 1, 2]
    steps = choose_steps(made.worker, batch_of(rows), chosen, queries)
    steps_B = torch.tensor([step.alpha for step in steps], dtype=torch.float64)
    found = token_influence(made.worker, batch_of(rows), chosen, steps_B, queries)
    limit = 1e-3 if dtype is torch.float32 else 1e-8
    for row, (tokens, step) in enumerate(zip(rows, steps, strict=True)):
        output_T, input_T = exact(made.brute, tokens, made.vectors(chosen[row]))
        for side, expected_T in (("output", output_T * size), ("input", input_T * size)):
            found_T = getattr(found, f"{side}_BT")[row, : len(tokens)]
            error = float((found_T - expected_T).norm() / expected_T.norm())
            assert error <= min(limit, 2 * step.error)  # what is said of it holds
        assert step.error <= limit


def test_a_step_that_is_given_is_taken_and_its_error_is_measured():
    made = make("gpt2", full=True)
    batch, chosen = batch_of(ROWS[:2]), [0, 1]
    wide = choose_steps(made.worker, batch, chosen, made.queries, relative=0.02)
    narrow = choose_steps(made.worker, batch, chosen, made.queries, relative=0.002)
    assert [step.relative for step in wide + narrow] == [0.02, 0.02, 0.002, 0.002]
    for one, other in zip(wide, narrow, strict=True):
        assert one.alpha == pytest.approx(10 * other.alpha)
        assert one.error == pytest.approx(100 * other.error, rel=0.2)  # falls with the square of the step


def test_relative_is_the_largest_change_of_a_layer():
    made = make("gpt2", full=False)
    tokens, query = ROWS[3], 2
    (step,) = choose_steps(made.worker, batch_of([tokens]), [query], made.queries, relative=0.25)
    before = made.brute.trace(tokens)
    shares = []
    for layer in made.brute.layers:
        inputs_TI = inputs_at_all_positions(made.brute, layer, tokens)
        weight_OI = made.brute.model.get_submodule(layer.name).weight.detach().T
        bias_O = made.brute.model.get_submodule(layer.name).bias.detach()
        out_TO = inputs_TI @ torch.cat([weight_OI, bias_O[:, None]], 1).T
        moved_TO = inputs_TI @ made.vectors(query)[layer.name].T
        shares.append(float(moved_TO.norm() / out_TO.norm()))
    assert step.alpha * max(shares) == pytest.approx(0.25)
    assert before.value < 0


def inputs_at_all_positions(brute: Oracle, layer: oracle.OracleLayer, tokens: Sequence[int]) -> Tensor:
    found: list[Tensor] = []
    module = brute.model.get_submodule(layer.name)
    handle = module.register_forward_pre_hook(lambda _module, given: found.append(given[0][0].detach()))
    brute.logits(tokens)
    handle.remove()
    return torch.cat([found[0], torch.ones(len(tokens), 1, dtype=torch.float64)], dim=1)


def test_a_query_without_a_direction_has_no_influence():
    made = make("llama", full=True)
    nothing = {
        layer.name: LayerQueries(1, dense_QOI=torch.zeros(1, layer.outputs, layer.columns, dtype=torch.float64))
        for layer in made.worker.selection.layers
    }
    (step,) = choose_steps(made.worker, batch_of(ROWS[:1]), [0], nothing)
    assert step.error == 0
    found = token_influence(made.worker, batch_of(ROWS[:1]), [0], torch.tensor([step.alpha]), nothing)
    assert not found.output_BT.any()
    assert not found.input_BT.any()


def test_a_sequence_that_is_not_finite_says_so_and_harms_no_other():
    made = make("gpt2", full=False)
    made.worker.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, output: output.masked_fill((inputs[0] == 7)[..., None], float("nan"))
    )
    batch = batch_of([[1, 2, 3], [7, 2, 3], [4, 5]])
    found = cells(made.worker, batch, [(0, 0), (1, 0), (2, 1)], made.queries)
    assert torch.isfinite(found).flatten(1).all(1).tolist() == [True, False, True]
    steps_B = torch.full((3,), SHARE, dtype=torch.float64)
    tokens = token_influence(made.worker, batch, [0, 0, 1], steps_B, made.queries)
    assert torch.isfinite(tokens.output_BT).all(1).tolist() == [True, False, True]
    (_, bad, _) = choose_steps(made.worker, batch, [0, 0, 1], made.queries)
    assert bad.error == float("inf")


# --- the rest -----------------------------------------------------------------------------------------------------


def test_sparsity_is_the_ratio_of_norms():
    tokens = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, -3.0, 0.0, 0.0], [8.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = sparsity(tokens)
    assert found.tolist() == pytest.approx([0.5, 1.0, 66**0.5 / 10, 0.0])
    assert (found > SPURIOUS).tolist() == [False, True, True, False]


class Flattening(nn.Module):
    """Hands its layer [B * T, ...], as OPT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.inner(x_BTH.flatten(0, 1)).unflatten(0, x_BTH.shape[:2])


def test_layers_that_see_rows_of_all_sequences_at_once():
    plain, flat = CASES["looped"](), CASES["looped"]()
    block = flat.model.blocks[0]  # type: ignore[index]
    block.mlp.up, block.mlp.down = Flattening(block.mlp.up), Flattening(block.mlp.down)
    expected_worker, worker = worker_for(plain), worker_for(flat)
    queries = directions(expected_worker, full=False)
    renamed = {
        layer.name: queries[other.name]
        for layer, other in zip(worker.selection.layers, expected_worker.selection.layers, strict=True)
    }
    steps_B = torch.full((len(ROWS),), SHARE, dtype=torch.float64)
    expected = token_influence(expected_worker, batch_of(ROWS), CHOSEN, steps_B, queries)
    found = token_influence(worker, batch_of(ROWS), CHOSEN, steps_B, renamed)
    torch.testing.assert_close(found.output_BT, expected.output_BT)
    torch.testing.assert_close(found.input_BT, expected.input_BT)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "looped", "tied"])
def test_costs_are_those_that_are_counted(name: str, full: bool):
    case = eager(CASES[name]())
    worker = worker_for(case)
    shape = forward_shape(case.model, worker.selection)
    rows = sequences(3, shortest=8, longest=8)
    batch, chosen = batch_of(rows), [0, 0, 0]
    queries = {name: held.only([0]) for name, held in directions(worker, full).items()}

    def counted(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    rank = None if full else RANK
    each = sum(cost.direction_flops(layer, 8, rank, shape.calls[layer.name]) for layer in worker.selection.layers)
    steps_B = torch.full((3,), SHARE, dtype=torch.float64)
    walk = counted(functools.partial(token_influence, worker, batch, chosen, steps_B, queries))
    assert walk == 3 * 2 * (cost.through_flops(shape, 8) + 2 * each)
    pairs = [(row, 0) for row in range(3)]
    assert counted(lambda: cells(worker, batch, pairs, queries)) == 3 * (cost.floor_flops(shape, 8) + each)
