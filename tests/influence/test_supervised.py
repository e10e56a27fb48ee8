"""EK-FAC statistics of plain networks against brute force in float64: autograd of parameters, and the exact matrix.

B examples, T places, I columns and O outputs of a layer, D draws of targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.func import functional_call, grad

from influence.gauss_newton import Examples
from influence.layers import TrackedLayer
from influence.solvers import LayerCurvature, kronecker_eigenvalues
from influence.supervised import example_gradients, fit, fit_covariance, sampled_targets
from tests.networks import Plain, convolutional, mlp

NETWORKS: dict[str, Callable[[], Plain]] = {
    "mlp, softmax": mlp,
    "mlp, squared error": lambda: mlp("squares"),
    "convolutions": convolutional,
    "convolutions, squared error": lambda: convolutional("squares"),
}


def fitted(plain: Plain, draws: int = 1, **options: int) -> dict[str, LayerCurvature]:
    targets = sampled_targets(plain.network, plain.examples, seed=5, draws=draws)
    return fit(plain.network, plain.layers, plain.examples, targets, **options)


def repeated(plain: Plain, times: int) -> Plain:
    """Each example many times over, each with a target of its own."""
    x, y = (given.repeat_interleave(times, 0) for given in (plain.examples.inputs, plain.examples.targets))
    return replace(plain, examples=Examples(x, y))


# --- brute force ------------------------------------------------------------------------------------------------------


def gradients(plain: Plain, targets: Tensor) -> dict[str, Tensor]:
    """∇L of each example with respect to [W b], [B, O, I], by autograd of the parameters, one example at a time."""
    named = dict(plain.network.model.named_parameters())

    def value(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return plain.network.loss.value(functional_call(plain.network.model, given, (x[None],)), y[None])[0]

    rows = [grad(value)(named, x, y) for x, y in zip(plain.examples.inputs, targets, strict=True)]
    found = {}
    for layer in plain.layers:
        weight = torch.stack([row[f"{layer.name}.weight"].flatten(1) for row in rows])
        if layer.bias:
            bias = torch.stack([row[f"{layer.name}.bias"] for row in rows])
            weight = torch.cat([weight, bias[..., None]], dim=2)
        found[layer.name] = weight
    return found


def rows_of(plain: Plain, layer: TrackedLayer, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ā [B, T, I] and ∇L of the layer's outputs [B, T, O], by running the network in two parts."""
    assert isinstance(plain.network.model, nn.Sequential)
    before, module, after = (
        plain.network.model[: int(layer.name)],
        plain.network.model[int(layer.name)],
        plain.network.model[int(layer.name) + 1 :],
    )
    act = before(plain.examples.inputs)
    output = module(act).detach().requires_grad_()
    grad_of = torch.autograd.grad(plain.network.loss.value(after(output), targets).sum(), output)[0]
    if isinstance(module, nn.Conv2d):
        padded = functional.pad(act, (module.padding[1],) * 2 + (module.padding[0],) * 2)  # type: ignore[operator]
        windows = padded.unfold(2, module.kernel_size[0], module.stride[0])
        windows = windows.unfold(3, module.kernel_size[1], module.stride[1])  # [B, C, H, W, k, k]
        act = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        grad_of = grad_of.permute(0, 2, 3, 1).flatten(1, 2)
    else:
        act, grad_of = act[:, None], grad_of[:, None]
    ones = torch.ones_like(act[..., :1])
    return (torch.cat([act, ones], dim=2) if layer.bias else act), grad_of


def whole(basis) -> Tensor:
    """Q, with zeros between blocks."""
    return torch.block_diag(*basis.vectors)


def factor(basis) -> Tensor:
    """Q Λ Qᵀ."""
    return whole(basis) @ torch.diag(basis.all_values) @ whole(basis).T


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_brute_force(name: str):
    plain = NETWORKS[name]()
    targets_DN = sampled_targets(plain.network, plain.examples, seed=5, draws=2)
    found = fit(plain.network, plain.layers, plain.examples, targets_DN, batch=4)
    by_draw = [gradients(plain, targets) for targets in targets_DN]
    for layer in plain.layers:
        curvature = found[layer.name]
        pairs = [rows_of(plain, layer, targets) for targets in targets_DN]
        act_NI = torch.cat([act.flatten(0, 1) for act, _ in pairs])
        grad_NO = torch.cat([grad_of.flatten(0, 1) for _, grad_of in pairs])
        torch.testing.assert_close(
            factor(curvature.activation), act_NI.T @ act_NI / len(act_NI), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            factor(curvature.gradient), grad_NO.T @ grad_NO / len(grad_NO), rtol=1e-10, atol=1e-12
        )
        assert curvature.tokens_per_sequence == pairs[0][0].shape[1]
        rotated = torch.cat([g[layer.name] for g in by_draw])
        rotated = whole(curvature.gradient).T @ rotated @ whole(curvature.activation)
        assert curvature.correction_OI is not None
        torch.testing.assert_close(curvature.correction_OI, rotated.square().mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_correction_tends_to_the_diagonal_of_the_exact_matrix(name: str):
    """Sampled targets are unbiased for it: what is left of 600 for each example is noise."""
    plain = NETWORKS[name]()
    found, exact, start = fitted(repeated(plain, 600), batch=600), plain.gauss_newton(), 0
    for layer in plain.layers:
        curvature, stop = found[layer.name], start + layer.parameters
        basis_PP = torch.kron(whole(curvature.gradient), whole(curvature.activation))
        diagonal = (basis_PP.T @ exact[start:stop, start:stop] @ basis_PP).diagonal()
        start = stop
        assert curvature.correction_OI is not None
        error = (curvature.correction_OI.flatten() - diagonal).norm() / diagonal.norm()
        assert error < 0.05, f"{layer.name}: {error:.3f}"


def test_kfac_is_exact_where_gradients_and_inputs_are_independent():
    """A linear model with squared error: S = 1 whatever the input, so G = A ⊗ 1 and nothing is approximated."""
    plain = mlp("squares")
    first = plain.layers[0]
    model = nn.Sequential(nn.Linear(4, 3).double().requires_grad_(False))
    layer = TrackedLayer("0", ("0",), 4, 3, True, False, "0")
    network = type(plain.network)(model, plain.network.loss)
    examples = repeated(plain, 4000).examples
    found = fit(network, [layer], examples, sampled_targets(network, examples, 1), batch=4000)["0"]
    act = torch.cat([plain.examples.inputs, torch.ones(24, 1, dtype=torch.float64)], dim=1)
    assert first.columns == layer.columns
    expected = torch.linalg.eigvalsh(act.T @ act / 24).expand(3, 5)
    for eigenvalues in (kronecker_eigenvalues(found), found.correction_OI):
        torch.testing.assert_close(eigenvalues, expected, rtol=0.05, atol=1e-3)


def test_blocks_decompose_the_diagonal_blocks_and_small_factors_have_fewer():
    plain = mlp()
    one, several = fitted(plain), fitted(plain, blocks=4)
    for layer in plain.layers:
        basis, full = several[layer.name].gradient, factor(one[layer.name].gradient)
        assert len(basis.vectors) == min(4, layer.outputs)
        mask = torch.block_diag(*[torch.ones_like(block) for block in basis.vectors])
        torch.testing.assert_close(factor(basis), full * mask, rtol=1e-10, atol=1e-12)
        means = [found[layer.name].correction_OI.mean() for found in (one, several)]  # type: ignore[union-attr]
        torch.testing.assert_close(means[0], means[1], rtol=1e-12, atol=0)  # so is the damping


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp, softmax", "convolutions"])
def test_batch_sizes_move_nothing_but_rounding(name: str):
    plain = NETWORKS[name]()
    targets = [sampled_targets(plain.network, plain.examples, 5, 2, batch) for batch in (1, 24)]
    assert torch.equal(targets[0], targets[1])
    one, other = (fit(plain.network, plain.layers, plain.examples, targets[0], batch=batch) for batch in (1, 24))
    for layer in plain.layers:
        first, second = one[layer.name], other[layer.name]
        torch.testing.assert_close(factor(first.activation), factor(second.activation), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(first.correction_OI.mean(), second.correction_OI.mean(), rtol=1e-12, atol=0)  # type: ignore[union-attr]


def test_seeds_and_draws_differ_and_repeat():
    plain = mlp("squares")
    first, again = (sampled_targets(plain.network, plain.examples, 5, 3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, sampled_targets(plain.network, plain.examples, 6, 3))
    assert torch.equal(first[0], sampled_targets(plain.network, plain.examples, 5)[0])


def test_float32_networks_have_sums_in_float64():
    plain = mlp()
    model = plain.network.model.float()
    network = type(plain.network)(model, plain.network.loss)
    examples = Examples(plain.examples.inputs.float(), plain.examples.targets)
    sums = fit_covariance(network, plain.layers, examples, examples.targets[None])
    assert {value.dtype for moment in sums.activation.values() for value in moment.strips.values()} == {torch.float64}


def test_outputs_that_are_not_finite_are_named():
    plain = mlp()
    broken = plain.examples.inputs.clone()
    broken[7] = torch.nan
    with pytest.raises(ValueError, match="outputs of 1 examples are not finite, the first of them 7"):
        sampled_targets(plain.network, Examples(broken, plain.examples.targets), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_examples_are_those_of_autograd(name: str):
    plain = NETWORKS[name]()
    found, expected = (
        example_gradients(plain.network, plain.layers, plain.examples),
        gradients(plain, plain.examples.targets),
    )
    for layer in plain.layers:
        torch.testing.assert_close(found[layer.name], expected[layer.name], rtol=1e-12, atol=1e-13)
