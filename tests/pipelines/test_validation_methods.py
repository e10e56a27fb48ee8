"""Every method's scores against dense matrices and gradients by autograd, in float64."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from influence.gauss_newton import Examples
from influence.solvers import LayerCurvature, kronecker_eigenvalues
from influence.supervised import fit, sampled_targets
from pipelines.validation import setting as settings
from pipelines.validation.curvature import damping_of
from pipelines.validation.methods import METHODS, block_methods, estimate, method_named
from pipelines.validation.problem import Problem
from pipelines.validation.setting import Options, Setting, too_large
from pipelines.validation.stochastic import mini_batches
from tests.networks import Plain, convolutional, mlp

NETWORKS = {"mlp": mlp, "mlp, squared error": lambda: mlp("squares"), "convolutions": convolutional}
OPTIONS = Options(seed=3, label_draws=2, cg_iterations=10, lissa_depth=15, lissa_batch=6)
TEST = 3  # examples that are measured on; the others are trained on


@functools.cache
def case(name: str) -> tuple[Plain, Setting]:
    """A network with its training examples, and what methods are given."""
    whole = NETWORKS[name]()
    x, y = whole.examples.inputs, whole.examples.targets
    plain = replace(whole, examples=Examples(x[TEST:], y[TEST:]))
    points = torch.arange(0, len(x) - TEST, 2)
    problem = Problem(plain.network, plain.layers, plain.examples, points, Examples(x[:TEST], y[:TEST]))
    targets = sampled_targets(plain.network, problem.train, OPTIONS.seed, OPTIONS.label_draws)
    curvature = fit(plain.network, plain.layers, problem.train, targets)
    seconds = dict.fromkeys(("labels", "covariance", "eigenbasis", "correction"), 1.0)
    return plain, Setting(problem, damping_of(curvature, 0.1), curvature, seconds, seconds, OPTIONS)


def gradients(plain: Plain, examples: Examples) -> Tensor:
    """−∇L of each example with respect to all tracked weights, [B, P], by autograd."""
    named = dict(plain.network.model.named_parameters())

    def value(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return -plain.network.loss.value(functional_call(plain.network.model, given, (x[None],)), y[None])[0]

    rows = []
    for x, y in zip(examples.inputs, examples.targets, strict=True):
        found = grad(value)(named, x, y)
        parts = []
        for layer in plain.layers:
            weight = found[f"{layer.name}.weight"].flatten(1)
            bias = [found[f"{layer.name}.bias"][:, None]] if layer.bias else []
            parts.append(torch.cat([weight, *bias], dim=1).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def curvature_matrix(setting: Setting, curvature: Mapping[str, LayerCurvature], corrected: bool) -> Tensor:
    """The matrix that a Kronecker-factored method inverts, damped, [P, P]: (Q_S ⊗ Q_A) diag (Q_S ⊗ Q_A)ᵀ + λ."""
    blocks = []
    for layer in setting.problem.layers:
        found = curvature[layer.name]
        basis = torch.kron(torch.block_diag(*found.gradient.vectors), torch.block_diag(*found.activation.vectors))
        values_OI = found.correction_OI if corrected else kronecker_eigenvalues(found)
        assert values_OI is not None
        blocks.append(basis @ torch.diag(values_OI.flatten() + setting.damping[layer.name]) @ basis.T)
    return torch.block_diag(*blocks)


def expected(plain: Plain, setting: Setting, matrix_PP: Tensor) -> Tensor:
    """∇f_qᵀ M⁻¹ (−∇L(z_m)), [Q, P]."""
    problem = setting.problem
    solved = torch.linalg.solve(matrix_PP, gradients(plain, problem.test).T).T
    return solved @ gradients(plain, problem.points).T


def largest(error: Tensor, of: Tensor) -> float:
    return float(error.abs().max() / of.abs().max())


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_of_direct_methods_are_those_of_dense_matrices(name: str):
    plain, setting = case(name)
    unit = torch.eye(sum(layer.parameters for layer in plain.layers), dtype=torch.float64)
    matrices = {
        "identity": unit,
        "kfac": curvature_matrix(setting, setting.curvature, corrected=False),
        "ekfac": curvature_matrix(setting, setting.curvature, corrected=True),
        "exact": plain.damped(dict(setting.damping)),
    }
    for method, matrix_PP in matrices.items():
        scores = expected(plain, setting, matrix_PP)
        found = estimate(method, setting).scores_QP
        assert found.dtype == torch.float64
        assert largest(found - scores, scores) < (1e-5 if method == "exact" else 1e-9), method


@pytest.mark.parametrize("blocks", [2, 4])
def test_block_diagonal_factors_are_fitted_to_the_same_targets(blocks: int):
    plain, setting = case("mlp")
    targets = sampled_targets(plain.network, setting.problem.train, OPTIONS.seed, OPTIONS.label_draws)
    curvature = fit(plain.network, plain.layers, setting.problem.train, targets, blocks)
    scores = expected(plain, setting, curvature_matrix(setting, curvature, corrected=True))
    found = estimate(f"ekfac_blocks_{blocks}", setting)
    assert largest(found.scores_QP - scores, scores) < 1e-9
    assert found.record["blocks"] == blocks


@pytest.mark.parametrize("name", NETWORKS)
def test_conjugate_gradients_end_at_the_exact_solution(name: str):
    plain, setting = case(name)
    scores = expected(plain, setting, plain.damped(dict(setting.damping)))
    few = estimate("ekfac_cg", setting)
    many = estimate("ekfac_cg", replace(setting, options=replace(OPTIONS, cg_iterations=100)))
    assert largest(many.scores_QP - scores, scores) < 1e-4
    assert largest(few.scores_QP - scores, scores) > 1e-4
    assert few.record["products"] == 10
    assert few.record["examples"] == 10 * setting.problem.size
    assert len(few.record["residuals"]) == TEST


def test_lissa_comes_near_the_exact_solution_where_it_can():
    """A damping of the size of the curvature, many steps, and all examples in each."""
    plain, given = case("mlp")
    damping = {name: 300 * value for name, value in given.damping.items()}
    setting = replace(
        given, damping=damping, options=replace(OPTIONS, lissa_depth=150, lissa_batch=len(plain.examples.inputs))
    )
    scores = expected(plain, setting, plain.damped(damping))
    found = estimate("lissa", setting)
    assert largest(found.scores_QP - scores, scores) < 1e-4
    assert found.record["notes"]["attempts"] == 1
    assert found.record["notes"]["alone"]["estimated_total"] > 0


def test_lissa_takes_the_depth_that_it_is_given():
    _, setting = case("mlp")
    record = estimate("lissa", setting).record
    assert record["notes"]["depth"] == 15
    assert record["products"] >= 15
    assert record["examples"] >= 15 * 6


@pytest.mark.parametrize("method", [*METHODS, "ekfac_blocks_2"])
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_micro_batches_move_nothing_but_rounding(name: str, method: str, monkeypatch: pytest.MonkeyPatch):
    _, setting = case(name)
    whole = estimate(method, setting).scores_QP
    monkeypatch.setattr(settings, "MEMORY", 1)
    assert settings.micro_batch(setting.problem, 1) == 1
    assert largest(estimate(method, setting).scores_QP - whole, whole) < 1e-6


def test_measurements_are_solved_together_as_they_are_alone():
    _, setting = case("mlp")
    problem = setting.problem
    first = Examples(problem.test.inputs[:1], problem.test.targets[:1])
    alone = replace(setting, problem=replace(problem, test=first))
    for method in METHODS:
        if method != "lissa":  # whose scale is tuned to all
            found, together = (estimate(method, given).scores_QP for given in (alone, setting))
            assert largest(found[0] - together[0], together[0]) < 1e-8, method


# --- the interface ----------------------------------------------------------------------------------------------------


def test_records_are_json_and_count_what_was_fitted():
    _, setting = case("mlp")
    fitted = {"identity": 0, "kfac": 3, "ekfac": 4, "lissa": 0, "ekfac_cg": 4, "exact": 0}
    for method, seconds in fitted.items():
        record = estimate(method, setting).record
        json.dumps(record, allow_nan=False)
        assert seconds <= record["seconds"]["fit"] < seconds + 0.5
        phases = [record["seconds"][phase] for phase in ("fit", "gradients", "solve", "score")]
        assert record["seconds"]["total"] == pytest.approx(sum(phases))
        assert record["cpu_seconds"].keys() == record["seconds"].keys()


def test_all_methods_share_the_damping():
    _, setting = case("mlp")
    other = replace(setting, damping={name: 3 * value for name, value in setting.damping.items()})
    for solver in ("kfac", "ekfac"):
        assert {name: state.damping for name, state in other.states(solver).items()} == dict(other.damping)


def test_blocks_take_less_memory():
    _, setting = case("mlp")
    bytes_of = [
        estimate(name, setting).record["bytes"] for name in ("ekfac", "ekfac_blocks_2", "ekfac_blocks_4", "identity")
    ]
    factors = [entry["factors"] for entry in bytes_of]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 8 * (5**2 + 5**2 + 6**2 + 5**2 + 5**2 + 3**2)
    assert factors[3] == bytes_of[3]["correction"] == 0
    assert bytes_of[0]["correction"] == 8 * sum(layer.parameters for layer in setting.problem.layers)


def test_names_of_methods():
    assert list(METHODS) == ["identity", "kfac", "ekfac", "lissa", "ekfac_cg", "exact"]
    assert [method.name for method in block_methods(8)] == ["ekfac_blocks_2", "ekfac_blocks_4", "ekfac_blocks_8"]
    assert block_methods(1) == []
    assert method_named("ekfac_blocks_16").blocks == 16
    assert method_named("kfac") is METHODS["kfac"]


def test_the_exact_solution_is_left_out_where_it_takes_too_long(monkeypatch: pytest.MonkeyPatch):
    _, setting = case("convolutions")
    assert too_large("exact", setting.problem) is None
    monkeypatch.setattr(settings, "LARGEST_EXACT", 100)
    assert "multiply-adds" in str(too_large("exact", setting.problem))
    assert too_large("ekfac_cg", setting.problem) is None


def test_mini_batches_go_through_all_examples():
    numbers = mini_batches(10, 4, 10, seed=0)
    assert numbers.shape == (10, 4)
    assert numbers.flatten()[:10].sort().values.tolist() == list(range(10))
    assert torch.equal(numbers[:3], mini_batches(10, 4, 3, seed=0))
    assert mini_batches(3, 3, 2, seed=0).shape == (2, 3)
