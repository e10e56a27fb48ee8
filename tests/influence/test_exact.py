"""Exact damped solutions against dense solves, by the kernel and by conjugate gradients; float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from influence.exact import ITERATIVE, KERNEL, ExactSolution, solve_exactly
from influence.gauss_newton import Examples, TensorNetwork
from influence.layers import TrackedLayer
from tests.networks import Plain, convolutional, mlp

NETWORKS: dict[str, Callable[[], Plain]] = {
    "mlp, softmax": mlp,
    "mlp, squared error": lambda: mlp("squares"),
    "mlp, first layer not tracked": lambda: mlp(frozen_first=True),
    "convolutions": convolutional,
}


def damping_of(plain: Plain) -> dict[str, float]:
    """Another one in each layer."""
    return {layer.name: 0.02 * 3**index for index, layer in enumerate(plain.layers)}


def solve(plain: Plain, **options) -> ExactSolution:
    return solve_exactly(plain.network, plain.layers, plain.examples, plain.vectors(3), damping_of(plain), **options)


def error(plain: Plain, found: ExactSolution) -> float:
    expected = plain.solve(damping_of(plain), plain.vectors(3))
    return float((plain.flat(found.vectors) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_gives_the_dense_solution_whatever_the_batch(name: str, batch: int):
    plain = NETWORKS[name]()
    found = solve(plain, batch=batch)
    assert (found.way, found.products) == (KERNEL, 0)
    assert found.rows == 3 * len(plain.examples.inputs)
    assert error(plain, found) < 1e-10
    assert float(found.residual_K.max()) < 1e-11


@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_conjugate_gradients_reach_it_to_the_stated_residual(name: str, size: int):
    """Whatever the size of the preconditioner."""
    plain = NETWORKS[name]()
    number = 8 * sum(layer.parameters for layer in plain.layers)
    found = solve(plain, largest_kernel=size, most=min(size, 10) * number, tolerance=1e-9)
    assert found.way == ITERATIVE
    assert found.products == found.iterations
    assert float(found.residual_K.max()) < 2e-9
    assert error(plain, found) < 1e-7


def test_more_rows_in_the_preconditioner_take_fewer_iterations():
    few, many = (solve(mlp(), largest_kernel=rows).iterations for rows in (1, 60))
    assert many < 0.7 * few


def test_a_layer_of_several_modules_is_one():
    """A weight that is used twice: its rows are sums over uses."""
    plain = mlp("squares")
    assert isinstance(plain.network.model, torch.nn.Sequential)
    parts = list(plain.network.model)
    model = torch.nn.Sequential(parts[0], parts[1], parts[2], parts[3], parts[2], torch.nn.Tanh(), parts[4])
    shared = Plain(TensorNetwork(model, plain.network.loss), _renamed(plain), plain.examples)
    for most, way in ((1 << 30, KERNEL), (20_000, ITERATIVE)):
        found = solve(shared, tolerance=1e-9, most=most)
        assert found.way == way
        assert error(shared, found) < 1e-7


def test_a_float32_network_is_solved_in_float64():
    plain = mlp()
    single = TensorNetwork(plain.network.model.float(), plain.network.loss)
    examples = Examples(plain.examples.inputs.float(), plain.examples.targets)
    vectors = {name: value.float() for name, value in plain.vectors(3).items()}
    found = solve_exactly(single, plain.layers, examples, vectors, damping_of(plain))
    assert {value.dtype for value in found.vectors.values()} == {torch.float64}
    assert next(single.model.parameters()).dtype == torch.float32
    assert float(found.residual_K.max()) < 1e-11


def test_nothing_to_solve_has_no_residual():
    plain = mlp()
    zeros = {name: torch.zeros_like(value) for name, value in plain.vectors(1).items()}
    found = solve_exactly(plain.network, plain.layers, plain.examples, zeros, damping_of(plain))
    assert found.residual_K.tolist() == [0.0]
    assert not _flat(found).any()


def _flat(found: ExactSolution) -> Tensor:
    return torch.cat([value.flatten() for value in found.vectors.values()])


def _renamed(plain: Plain) -> tuple[TrackedLayer, ...]:
    """The last layer lies at another place of the network."""
    last = replace(plain.layers[-1], name="6", modules=("6",), input_group="6")
    return (*plain.layers[:-1], last)
