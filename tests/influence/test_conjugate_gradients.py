"""Exact Gauss-Newton products against dense matrices, and solvers on them against dense solves; float64.

G is formed from Jacobians of the parameters themselves, all tracked layers in one matrix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from influence import cost
from influence.conjugate_gradients import Product, conjugate_gradients
from influence.gauss_newton import Examples, GaussNewton, LanguageNetwork, ProductSums, TensorNetwork, Vectors
from influence.labels import SampledLabels
from influence.lissa import largest_eigenvalue, lissa
from influence.shape import forward_shape
from influence.solvers import SolverState
from tests.fitted import batches_of, fit, selection_of, worker_for
from tests.networks import Plain, convolutional, mlp
from tests.oracle import Oracle, vec
from tests.tiny import Case, gpt2, llama, markov_sequences, neox, sequences, train

NETWORKS: dict[str, Callable[[], Plain]] = {
    "mlp, softmax": mlp,
    "mlp, squared error": lambda: mlp("squares"),
    "mlp, first layer not tracked": lambda: mlp(frozen_first=True),
    "convolutions": convolutional,
}
LANGUAGE = {"gpt2": gpt2, "llama": llama, "neox": neox}


def largest(error: Tensor, of: Tensor) -> float:
    return float(error.abs().max() / of.abs().max())


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_products_with_plain_networks_are_those_of_the_dense_matrix(name: str):
    plain = NETWORKS[name]()
    vectors = plain.vectors(4)
    newton = GaussNewton(plain.network, plain.layers)
    expected = plain.flat(vectors) @ plain.gauss_newton()
    for size, width in ((24, None), (5, 3), (1, 1)):
        assert largest(plain.flat(newton(plain.parts(size), vectors, width)) - expected, expected) < 1e-13
    J_BCP = plain.jacobian()
    pushed = newton.jacobian_product(plain.examples, vectors)
    assert largest(pushed - torch.einsum("bcp,kp->kbc", J_BCP, plain.flat(vectors)), pushed) < 1e-13
    pulled = plain.flat(newton.transposed_product(plain.examples, pushed))
    assert largest(pulled - torch.einsum("bcp,kbc->kp", J_BCP, pushed), pulled) < 1e-13


@pytest.mark.parametrize("name", LANGUAGE)
def test_products_with_language_models_are_those_of_the_dense_matrix(name: str):
    case, rows = LANGUAGE[name](), sequences(5)
    selection = selection_of(case)
    vectors = {
        layer.name: torch.randn(3, layer.outputs, layer.columns, dtype=torch.float64) for layer in selection.layers
    }
    expected = flat(case, vectors) @ dense(case, rows)
    newton = GaussNewton(LanguageNetwork(case.model), selection.layers)
    for size in (5, 2):  # padded, and not
        found = flat(case, newton(batches_of(rows, size), vectors))
        assert largest(found - expected, expected) < 1e-13


def test_its_blocks_are_those_of_the_oracle():
    case, rows = gpt2(), sequences(4)
    blocks, whole, start = Oracle(case.model, case.layers).gauss_newton(rows), dense(case, rows), 0
    for layer in case.layers:
        stop = start + len(blocks[layer.name])
        assert largest(whole[start:stop, start:stop] - blocks[layer.name], whole) < 1e-13
        start = stop


def test_central_differences_agree_within_their_own_error():
    """The independent way to J V, by moving the weights; and what it misses, in float64."""
    plain, step = mlp(), 1e-5
    vectors = plain.vectors(1)
    exact = GaussNewton(plain.network, plain.layers).jacobian_product(plain.examples, vectors)[0]

    def moved(by: float) -> Tensor:
        _move(plain, vectors, by)
        found = plain.network.model(plain.examples.inputs)
        _move(plain, vectors, -by)
        return found

    assert 1e-13 < largest((moved(step) - moved(-step)) / (2 * step) - exact, exact) < 1e-8


def test_examples_whose_outputs_are_not_finite_are_left_out():
    plain = mlp()
    vectors = plain.vectors(2)
    newton = GaussNewton(plain.network, plain.layers)
    broken = plain.examples.inputs.clone()
    broken[3] = math.inf
    kept = [index for index in range(24) if index != 3]
    expected = newton([Examples(plain.examples.inputs[kept], plain.examples.targets[kept])], vectors)
    found = newton([Examples(broken, plain.examples.targets)], vectors)
    assert largest(plain.flat(found) - plain.flat(expected), plain.flat(expected)) < 1e-13


class Unbatched(torch.nn.Module):
    """Torch has no batching rule for `alias`, which some models call."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.alias(x)


def test_operations_that_cannot_be_batched_take_a_vector_at_a_time():
    plain = mlp()
    vectors = plain.vectors(3)
    expected = plain.flat(vectors) @ plain.gauss_newton()
    assert isinstance(plain.network.model, torch.nn.Sequential)
    layers = list(plain.network.model)
    layers[1] = torch.nn.Sequential(torch.nn.Tanh(), Unbatched())
    network = TensorNetwork(torch.nn.Sequential(*layers), plain.network.loss)
    found = plain.flat(GaussNewton(network, plain.layers)([plain.examples], vectors))
    assert largest(found - expected, expected) < 1e-13


class Products(TorchDispatchMode):
    """Counts FLOPs of products; FlopCounterMode itself puts hooks on leaves, which `autograd.grad` does not allow."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=found) if count else 0
        return found


def test_the_cost_formula_counts_what_is_done():
    """Attention by its definition everywhere: fused kernels of a CPU are not counted."""
    case, rows = llama(), [row[:6] for row in sequences(2, shortest=6)]
    case.model.set_attn_implementation("eager")
    selection = selection_of(case)
    shape = forward_shape(copy.deepcopy(case.model), selection)
    newton = GaussNewton(LanguageNetwork(case.model), selection.layers)
    vectors = {layer.name: torch.randn(3, layer.outputs, layer.columns).double() for layer in selection.layers}
    for width, pieces in ((3, 1), (1, 3)):
        with Products() as counter:
            newton.add(batches_of(rows, 2)[0], vectors, ProductSums.like(vectors), width)
        expected = 2 * cost.product_flops(shape, selection.layers, 6, 3, pieces)
        assert counter.total == expected


# --- conjugate gradients ----------------------------------------------------------------------------------------------


def test_they_solve_to_the_dense_solution_and_each_stops_by_itself():
    plain = mlp()
    right = plain.vectors(3)
    for value in right.values():
        value[1] = 0  # nothing to solve
    damping = {layer.name: 0.01 * (index + 1) for index, layer in enumerate(plain.layers)}
    found = conjugate_gradients(product_of(plain), right, damping, None, 400, 1e-12)
    expected = plain.solve(damping, right)
    assert largest(plain.flat(found.vectors) - expected, expected) < 1e-10
    assert not found.vectors["0"][1].any()
    assert found.products_K[1] == 0
    assert found.products_K[0] < 400
    assert found.residuals_NK[-1].tolist()[0] <= 1e-12 < found.residuals_NK[-2].max()
    assert len(set(found.products_K.tolist())) > 1
    rest = plain.flat(right) - plain.flat(found.vectors) @ plain.damped(damping)
    assert float((rest.norm(dim=1)[0] / plain.flat(right).norm(dim=1)[0] - found.residuals_NK[-1, 0]).abs()) < 1e-12


def test_the_stopping_of_one_moves_no_other():
    plain = mlp()
    right, damping = plain.vectors(3), dict.fromkeys(("0", "2", "4"), 0.05)
    together = conjugate_gradients(product_of(plain), right, damping, None, 300, 1e-11)
    for k in range(3):
        alone = conjugate_gradients(
            product_of(plain), {name: value[k : k + 1] for name, value in right.items()}, damping, None, 300, 1e-11
        )
        difference = plain.flat(alone.vectors)[0] - plain.flat(together.vectors)[k]
        assert largest(difference, plain.flat(alone.vectors)) < 1e-9


def trained_language_model() -> tuple[Case, list, dict[str, SolverState], Vectors, Product]:
    """A GPT-2 that has learned something, EK-FAC fitted on 24 sequences, gradients of 3 others, and G of the 24."""
    case, rows = gpt2(hidden=8, inner=12), markov_sequences(24, seed=3)
    train(case.model, markov_sequences(200, seed=0))
    fitted = fit(worker_for(case), batches_of(rows, 8), [SampledLabels(seed=5, pass_index=index) for index in range(8)])
    oracle = Oracle(case.model, case.layers)
    gradients = [oracle.trace(row).gradient for row in markov_sequences(3, seed=8)]
    right = {layer.name: torch.stack([gradient[layer.name] for gradient in gradients]) for layer in case.layers}
    newton = GaussNewton(LanguageNetwork(case.model), fitted.worker.selection.layers)
    return case, rows, fitted.solve("ekfac"), right, lambda vectors: newton(batches_of(rows, 24), vectors)


def test_the_preconditioner_saves_iterations_and_ekfac_is_far_from_the_solution():
    """Where it is of use, in the first ones: to the last digits of so small a model it takes more (docs/method.md)."""
    case, rows, states, right, product = trained_language_model()
    damping = {name: state.damping for name, state in states.items()}
    numbers = [torch.full_like(right[layer.name][0].flatten(), damping[layer.name]) for layer in case.layers]
    matrix = dense(case, rows) + torch.diag(torch.cat(numbers))
    expected = torch.linalg.solve(matrix, flat(case, right).T).T

    def errors(solver: dict[str, SolverState] | None, iterations: int) -> Tensor:
        """Of each vector, relative, in the norm that is minimised."""
        rest = flat(case, conjugate_gradients(product, right, damping, solver, iterations).vectors) - expected
        return (squared(rest, matrix) / squared(expected, matrix)).sqrt()

    first, fifth, tenth = (errors(states, iterations) for iterations in (1, 5, 10))
    assert bool((first > 0.5).all())  # EK-FAC at its best multiple
    assert bool((fifth < 0.7 * first).all())
    assert bool((tenth < 0.8 * fifth).all())
    assert bool((fifth < errors(None, 8)).all())  # 1.6 times as many without
    assert bool((tenth < errors(None, 10)).all())
    exact = conjugate_gradients(product, right, damping, None, 200, 1e-6)
    assert largest(flat(case, exact.vectors) - expected, expected) < 1e-4


def test_float32_reaches_what_float32_can():
    plain = mlp()
    right, damping = plain.vectors(2), dict.fromkeys(("0", "2", "4"), 0.05)
    expected = plain.solve(damping, right)
    newton = product_of(plain)

    def product(vectors: Vectors) -> Vectors:
        exact = newton({name: value.double() for name, value in vectors.items()})
        return {name: value.float() for name, value in exact.items()}

    single = {name: value.float() for name, value in right.items()}
    found = conjugate_gradients(product, single, damping, None, 200, 1e-6)
    assert largest(plain.flat(found.vectors).double() - expected, expected) < 1e-5


# --- LiSSA ------------------------------------------------------------------------------------------------------------


def test_lissa_converges_to_the_dense_solution():
    plain = mlp(examples=12)
    right, damping = plain.vectors(2), {"0": 0.5, "2": 0.6, "4": 0.4}
    product, generator = product_of(plain), torch.Generator().manual_seed(0)
    top = largest_eigenvalue(product, damping, right, 60, generator)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(plain.damped(damping))[-1]), rel=1e-4)
    found = lissa(lambda _step, vectors: product(vectors), right, damping, 150, 1 / top)
    expected = plain.solve(damping, right)
    assert largest(plain.flat(found.vectors) - expected, expected) < 1e-6
    assert (found.attempts, found.products, found.scale) == (1, 150, 1 / top)
    assert found.change_N[-1] < 1e-6 < found.change_N[0]


def test_lissa_notices_divergence_and_halves_its_scale():
    plain = mlp(examples=12)
    right, damping = plain.vectors(2), dict.fromkeys(("0", "2", "4"), 0.5)
    product = product_of(plain)
    top = float(torch.linalg.eigvalsh(plain.damped(damping))[-1])
    found = lissa(lambda _step, vectors: product(vectors), right, damping, 200, 15 / top)
    assert (found.scale, found.attempts) == (15 / top / 8, 4)  # the first below 2 / top, where it contracts
    assert found.products > 200
    expected = plain.solve(damping, right)
    assert largest(plain.flat(found.vectors) - expected, expected) < 1e-6


def test_lissa_of_mini_batches_is_near_the_dense_solution():
    plain = mlp(examples=24)
    right, damping = plain.vectors(1), dict.fromkeys(("0", "2", "4"), 0.5)
    newton, parts = GaussNewton(plain.network, plain.layers), plain.parts(6)
    scale = 0.02 / float(torch.linalg.eigvalsh(plain.damped(damping))[-1])
    found = lissa(lambda step, vectors: newton([parts[step % 4]], vectors), right, damping, 4000, scale)
    expected = plain.solve(damping, right)
    assert 1e-6 < largest(plain.flat(found.vectors) - expected, expected) < 0.05


def test_lissa_of_products_that_are_not_finite_fails():
    vectors = {"0": torch.ones(1, 2, 2)}
    with pytest.raises(ValueError, match="diverged at every scale"):
        lissa(lambda _step, given: {"0": given["0"] * math.nan}, vectors, {"0": 1.0}, 3, 1.0)


def squared(x_KP: Tensor, matrix_PP: Tensor) -> Tensor:
    """xᵀ A x."""
    return ((x_KP @ matrix_PP) * x_KP).sum(1)


# --- oracles ----------------------------------------------------------------------------------------------------------


def product_of(plain: Plain) -> Product:
    newton = GaussNewton(plain.network, plain.layers)
    return lambda vectors: newton([plain.examples], vectors)


def flat(case: Case, vectors: Vectors) -> Tensor:
    """[K, P], the layers' vec one after the other."""
    return torch.cat([vec(vectors[layer.name]) for layer in case.layers], dim=1)


def dense(case: Case, rows: list) -> Tensor:
    """G over all tracked layers, by Jacobians of the logits with respect to the weights; one sequence at a time."""
    oracle, total = Oracle(case.model, case.layers), torch.zeros(())
    for tokens in rows:
        logits_TV = oracle.logits(tokens)[:-1]
        p_TV = torch.softmax(logits_TV, dim=-1).detach()
        parameters = [p for layer in case.layers for p in oracle._parameters(layer)]
        basis = torch.eye(logits_TV.numel(), dtype=torch.float64)
        gradients = iter(torch.autograd.grad(logits_TV.flatten(), parameters, basis, is_grads_batched=True))
        J_TVP = torch.cat([vec(oracle._assemble(layer, gradients)) for layer in case.layers], dim=1)
        J_TVP = J_TVP.reshape(*p_TV.shape, -1)
        H_TVV = torch.diag_embed(p_TV) - p_TV[:, :, None] * p_TV[:, None, :]
        total = total + torch.einsum("tvp,tvw,twq->pq", J_TVP, H_TVV, J_TVP) / len(rows)
    return total


def _move(plain: Plain, vectors: Vectors, by: float) -> None:
    for layer in plain.layers:
        module, moved_OI = plain.network.model.get_submodule(layer.name), by * vectors[layer.name][0]
        module.weight.data += moved_OI[:, : layer.inputs]  # type: ignore[operator]
        if layer.bias:
            module.bias.data += moved_OI[:, -1]  # type: ignore[operator]
