"""The proximal Bregman objective against its definition, its optimum against dense solutions and against Adam."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from influence.batch import DUMMY, Batch
from influence.conjugate_gradients import precondition
from influence.gauss_newton import Examples, LanguageNetwork, Network, Vectors
from influence.layers import select_layers
from influence.newton import Descent, Precondition, minimise
from influence.proximal import Proximal, measured, moved
from influence.solvers import SolverState
from tests.networks import Plain, convolutional, mlp

DAMPING = 0.05
NETWORKS = {"mlp": mlp, "convolutional": convolutional}


def by_layer(states: dict[str, SolverState]) -> Precondition:
    """M⁻¹ of a fitted solver, layer by layer; the identity where there is none."""
    return lambda vectors: {name: precondition(states.get(name), value) for name, value in vectors.items()}


UNCONDITIONED = by_layer({})


def damping(plain: Plain, least: float = DAMPING) -> dict[str, float]:
    return {layer.name: least * (1 + number) for number, layer in enumerate(plain.layers)}


def objective(plain: Plain, size: int = 5, least: float = DAMPING) -> Proximal[Examples]:
    return Proximal(plain.network, plain.layers, damping(plain, least), plain.parts(size))


def alone(plain: Plain, numbers: list[int]) -> list[Examples]:
    x, y = plain.examples.inputs, plain.examples.targets
    return [Examples(x[number : number + 1], y[number : number + 1]) for number in numbers]


def dense_gradients(plain: Plain, points: list[Examples]) -> Tensor:
    """∇L(z_m, θˢ), [S, P], by autograd of the parameters."""
    found = []
    for point in points:
        model = plain.network.model
        tracked = [p for layer in plain.layers for p in model.get_submodule(layer.name).parameters()]
        for parameter in tracked:
            parameter.requires_grad_(True)
        plain.network.loss.value(model(point.inputs), point.targets).sum().backward()
        rows = []
        for layer in plain.layers:
            module = model.get_submodule(layer.name)
            weight = module.weight.grad.flatten(1)
            rows.append((torch.cat([weight, module.bias.grad[:, None]], 1) if layer.bias else weight).flatten())
        found.append(torch.cat(rows))
        for parameter in tracked:
            parameter.requires_grad_(False)
            parameter.grad = None
    return torch.stack(found)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
def test_gradients_are_those_of_the_objective_as_it_is_defined(kind: str, loss: str):
    plain = NETWORKS[kind](loss)
    proximal, points, epsilon = objective(plain, 4), alone(plain, [0, 3]), 0.3
    direction = plain.vectors(2, seed=2)
    weights = {name: 0.1 * value for name, value in plain.vectors(2, seed=1).items()}
    found = proximal.gradients(points, weights, epsilon)
    step = 1e-5
    ahead, behind = (
        proximal.values(points, {n: v + sign * step * direction[n] for n, v in weights.items()}, epsilon)
        for sign in (1, -1)
    )
    slope_S = (plain.flat(found) * plain.flat(direction)).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * step) / epsilon**2, slope_S, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_the_value_is_equation_7_written_out(loss: str):
    plain = mlp(loss)
    point, epsilon, weights = alone(plain, [2]), 0.2, plain.vectors(1)
    x, y, network = plain.examples.inputs, plain.examples.targets, plain.network
    reference = network.model(x)
    with moved(network.model, plain.layers, weights, 0, epsilon):
        outputs, own = network.model(x), network.loss.value(network.model(point[0].inputs), point[0].targets)
    value = network.loss.value
    slope = network.loss.gradient(reference, y)
    bregman = value(outputs, y) - value(reference, y) - (slope * (outputs - reference)).sum(1)  # Equation 8
    near = sum(damping(plain)[name] / 2 * (epsilon * v).square().sum() for name, v in weights.items())
    expected = bregman.mean() + epsilon * own + near
    torch.testing.assert_close(objective(plain).values(point, weights, epsilon), expected)


def test_moved_weights_come_back_to_the_last_bit():
    plain = mlp()
    model, weights = plain.network.model, plain.vectors(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail() -> None:
        with moved(model, plain.layers, weights, 0, 0.1):
            expected = before["0.bias"] + 0.1 * weights["0"][0, :, -1]
            torch.testing.assert_close(model.state_dict()["0.bias"], expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_the_response_differs_from_the_damped_gauss_newton_solution_in_proportion_to_epsilon(kind: str, loss: str):
    plain = NETWORKS[kind](loss)
    points = alone(plain, [1, 4])
    exact_SP = -torch.linalg.solve(plain.damped(damping(plain)), dense_gradients(plain, points).T).T
    off = []
    for epsilon in (1e-4, 1e-5):
        found = minimise(objective(plain, 24), points, epsilon, UNCONDITIONED, Descent(6, 400, 1e-6))
        off.append((plain.flat(found.weights) - exact_SP).norm(dim=1) / exact_SP.norm(dim=1))
    assert bool((off[1] < 1e-3).all())
    torch.testing.assert_close(off[0] / off[1], torch.full_like(off[0], 10.0), rtol=0.3, atol=0)
    test = Examples(plain.examples.inputs[:3], plain.examples.targets[:3])
    influence_SQ = exact_SP @ -dense_gradients(plain, alone(plain, [0, 1, 2])).T
    response_SQ = measured(plain.network, plain.layers, found.weights, epsilon, partial(minus_loss, test))
    torch.testing.assert_close(response_SQ, influence_SQ, rtol=0.01, atol=1e-4)


def minus_loss(test: Examples, network: Network[Examples]) -> Tensor:
    return -network.loss.value(network.outputs(test), test.targets)


def test_at_the_optimum_the_gradient_vanishes_and_the_value_is_least():
    plain = mlp("softmax")
    proximal, points, epsilon = objective(plain, 24), alone(plain, [0, 5]), 0.03
    found = minimise(proximal, points, epsilon, UNCONDITIONED, Descent(30, 400, 1e-7))
    start, end = proximal.gradients(points, None, epsilon), proximal.gradients(points, found.weights, epsilon)
    assert (plain.flat(end).norm(dim=1) / plain.flat(start).norm(dim=1)).max() < 1e-5
    least_S = proximal.values(points, found.weights, epsilon)
    for seed in range(3):
        noise = plain.vectors(2, seed)
        near = {name: value + 0.01 * noise[name] for name, value in found.weights.items()}
        assert bool((proximal.values(points, near, epsilon) > least_S).all())
    assert bool((found.errors_S <= 1e-7).all())
    assert bool((found.steps_S > 2).all()), "at this epsilon the objective is not quadratic"


def test_relative_gradients_bound_the_error_where_the_preconditioner_is_below_the_curvature():
    plain = mlp("softmax")
    proximal, points, epsilon = objective(plain), alone(plain, [0, 5]), 1e-6
    rough = minimise(proximal, points, epsilon, by_layer(divided(plain)), Descent(2, 3, 1e-8))
    matrix = plain.damped(damping(plain))
    exact_SP = -torch.linalg.solve(matrix, dense_gradients(plain, points).T).T
    off_SP = plain.flat(rough.weights) - exact_SP
    error_S = ((off_SP @ matrix * off_SP).sum(1) / (exact_SP @ matrix * exact_SP).sum(1)).sqrt()
    assert bool((error_S > 1e-4).all()), "it should not have converged"
    assert bool((rough.errors_S >= error_S * 0.99).all())


def divided(plain: Plain) -> dict[str, SolverState]:
    """λ⁻¹ as a solver: in the basis of the weights, with no eigenvalue."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return {name: SolverState(None, None, zero, value) for name, value in damping(plain).items()}


def test_points_of_no_gradient_do_not_move():
    plain = mlp("squared")
    x = plain.examples.inputs[:1]
    fitted = Examples(x, plain.network.model(x))
    found = minimise(objective(plain), [fitted, alone(plain, [3])[0]], 0.1, UNCONDITIONED)
    assert found.errors_S[0] == 0.0
    assert plain.flat(found.weights)[0].norm() == 0
    assert plain.flat(found.weights)[1].norm() > 0


def test_points_are_alone_whoever_is_beside_them():
    plain = mlp("softmax")
    proximal, descent = objective(plain), Descent(4, 200, 1e-4)
    together = minimise(proximal, alone(plain, [0, 5, 7]), 0.02, UNCONDITIONED, descent)
    for number, point in enumerate((0, 5, 7)):
        single = minimise(objective(plain, 24), alone(plain, [point]), 0.02, UNCONDITIONED, descent)
        torch.testing.assert_close(
            plain.flat(single.weights)[0], plain.flat(together.weights)[number], rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_adam_on_mini_batches_goes_to_the_same_optimum(loss: str):
    plain, least, epsilon = mlp(loss), 0.5, 0.05
    point = alone(plain, [6])
    found = minimise(objective(plain, 24, least), point, epsilon, UNCONDITIONED, Descent(20, 400, 1e-6))
    adam = _adam(plain, point[0], epsilon, damping(plain, least), steps=400)
    assert (plain.flat(adam) - plain.flat(found.weights)).norm() < 0.05 * plain.flat(found.weights).norm()


def _adam(plain: Plain, point: Examples, epsilon: float, damping: dict[str, float], steps: int) -> Vectors:
    """Appendix C's way: Adam on mini-batches of half of the examples, the objective differentiated by autograd."""
    u = {name: torch.zeros_like(value[0], requires_grad=True) for name, value in plain.vectors(1).items()}
    optimiser = torch.optim.Adam(list(u.values()), lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    x, y, network = plain.examples.inputs, plain.examples.targets, plain.network
    reference, generator = network.model(x), torch.Generator().manual_seed(0)

    def outputs(inputs: Tensor) -> Tensor:
        changed = dict(network.model.named_parameters())
        for layer in plain.layers:
            changed[f"{layer.name}.weight"] = (
                changed[f"{layer.name}.weight"] + epsilon * u[layer.name][:, : layer.inputs]
            )
            if layer.bias:
                changed[f"{layer.name}.bias"] = changed[f"{layer.name}.bias"] + epsilon * u[layer.name][:, -1]
        return torch.func.functional_call(network.model, changed, (inputs,))

    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[: len(x) // 2]
        value = network.loss.divergence(outputs(x[rows]), reference[rows], y[rows]).mean()
        value = value + epsilon * network.loss.value(outputs(point.inputs), point.targets).sum()
        value = value + sum(damping[name] / 2 * (epsilon * each).square().sum() for name, each in u.items())
        optimiser.zero_grad()
        (value / epsilon**2).backward()
        optimiser.step()
        schedule.step()
    return {name: value.detach()[None] for name, value in u.items()}


@pytest.mark.parametrize(("family", "step", "tolerance"), [("gpt2", 1e-4, 1e-4), ("llama", 1e-2, 1e-2)])
def test_language_models_have_the_same_objective(
    family: str, step: float, tolerance: float, request: pytest.FixtureRequest
):
    """A Llama computes its norms in float32 whatever its type, which a finite difference sees."""
    network = LanguageNetwork(request.getfixturevalue(f"tiny_{family}")())
    layers = select_layers(network.model, "mlp").layers
    rows = torch.randint(2, 40, (5, 6), generator=torch.Generator().manual_seed(1)).tolist()
    batches = [Batch.collate([0, 1], [rows[0], rows[1][:4]]), Batch.collate([2, 3, DUMMY], rows[2:])]
    point, epsilon = [Batch.collate([1], [rows[1][:4]])], 0.1
    proximal = Proximal(network, layers, {layer.name: 0.1 for layer in layers}, batches[:1])
    assert proximal.size == 2
    assert Proximal(network, layers, proximal.damping, batches).size == 4
    generator = torch.Generator().manual_seed(2)
    weights, direction = (
        {name: torch.randn(value.shape, generator=generator).double() for name, value in proximal.zero(1).items()}
        for _ in range(2)
    )
    found = proximal.gradients(point, weights, epsilon)
    ahead, behind = (
        proximal.values(point, {n: v + sign * step * direction[n] for n, v in weights.items()}, epsilon)
        for sign in (1, -1)
    )
    slope = sum((found[name] * direction[name]).sum() for name in found)
    assert float((ahead - behind) / (2 * step) / epsilon**2) == pytest.approx(float(slope), rel=tolerance)
