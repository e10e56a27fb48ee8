"""The stage `responses` against exact influences, cut short and gone on with, and the choice of ε."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.store import Artifact, Store
from conf.schema import Subject
from influence.exact import solve_exactly
from influence.score_agreement import correlations
from influence.supervised import example_gradients, example_scores
from pipelines.steps import StageContext
from pipelines.validation import curvature, loading, responses
from pipelines.validation.curvature import setting_of
from pipelines.validation.dataset import RECORD, TENSORS
from pipelines.validation.linearity import FACTOR, RUNGS, Tried, choose, compare, sample
from pipelines.validation.loading import fresh
from tests.pipelines.retrained import InProcess, Killed, staged, table


def with_curvature(folder: Path, dataset: Artifact, **settings: Any) -> dict[str, Artifact]:
    """A network with its first weights on this data (nothing here asks that it has learnt), and its curvature."""
    training = staged(folder, "training", {}).artifact
    found = {"dataset": dataset, "training": training}
    context = damped(folder, "curvature", found, **settings)
    state = fresh(dataset, context.config.validation).network.model.state_dict()
    calm = {name: 0.3 * value if "norm" in name and name.endswith("weight") else value for name, value in state.items()}
    training.write_tensors(loading.MODEL, calm)
    curvature.run(context)
    return found | {"curvature": context.artifact}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    return with_curvature(tmp_path, table(tmp_path))


def context_of(folder: Path, inputs: dict[str, Artifact], **given: Any) -> StageContext:
    return damped(folder, "responses", inputs, **{"pbo_steps": 8, "pbo_tolerance": 0.02, **given})


def damped(*given: Any, damping_factor: float = 0.1, **settings: Any) -> StageContext:
    """The context of a stage, with a damping."""
    context = staged(*given, **settings)
    factors = replace(context.config.factors, damping_factor=damping_factor)
    return replace(context, config=replace(context.config, factors=factors))


def exact(context: StageContext) -> Tensor:
    """∇f_qᵀ (G + λ)⁻¹ ∇log p(z_m), [Q, P], of the dense system."""
    given, config = context.inputs, context.config
    problem = loading.load_problem_from(given["dataset"], given["training"], config.validation)
    setting = setting_of(problem, given["curvature"], config)
    gradients = example_gradients(problem.network, problem.layers, problem.test)
    right = {name: -value for name, value in gradients.items()}
    solved = solve_exactly(problem.network, problem.layers, problem.train, right, setting.damping)
    vectors = {name: value.to(problem.train.inputs.dtype) for name, value in solved.vectors.items()}
    return example_scores(problem.network, problem.layers, problem.points, vectors)


def images(folder: Path, shape: tuple[int, ...], sizes: dict[str, int], classes: int = 4) -> Artifact:
    """Images of noise, whose class is told by their first numbers."""
    generator = torch.Generator().manual_seed(5)
    dataset = Store(str(folder / "store")).folder("dataset", "1" * 64)
    tensors = {}
    for name, size in sizes.items():
        x = torch.randn(size, *shape, generator=generator)
        tensors |= {f"x_{name}": x, f"y_{name}": x.flatten(1)[:, :classes].argmax(1)}
    dataset.write_tensors(TENSORS, tensors)
    dataset.write_json(RECORD, {**sizes, "inputs": shape[0], "outputs": classes, "regression": False})
    return dataset


# --- the stage --------------------------------------------------------------------------------------------------------


def test_responses_are_exact_influences_as_far_as_they_are_linear(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs)
    result = responses.run(context)
    found = context.artifact.read_json("responses.json")
    json.dumps(found, allow_nan=False)
    assert result.counts == {"points": 10, "converged": 10}
    response_QP = context.artifact.read_tensors("responses.safetensors")["response_QP"]
    assert response_QP.shape == (3, 10)
    assert response_QP.dtype == torch.float64
    exact_QP = exact(context)
    assert float(correlations(response_QP, exact_QP).min()) > 0.999
    assert float((response_QP * exact_QP).sum() / exact_QP.square().sum()) == pytest.approx(1, abs=0.05)
    assert found["epsilon"] in [row["epsilon"] for row in found["linearity"]["epsilons"]]
    assert found["linearity"]["linear"]
    assert found["linearity"]["chosen_by"] == "linearity"
    convergence = found["convergence"]
    assert convergence["converged"] == 10
    assert convergence["bound"]
    assert max(convergence["gradients"]) <= 0.2 * 0.02
    assert convergence["halfway"] > 0.99
    assert len(found["numbers"]) == 10
    assert len(found["tests"]) == 3
    assert context.artifact.list("parts/") == []


def test_a_run_that_was_killed_goes_on_and_ends_at_the_same_responses(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(responses, "PART", 4)
    whole = context_of(tmp_path, inputs, epsilon=1e-4)
    responses.run(whole)
    broken = context_of(tmp_path, inputs, epsilon=1e-4, attempt="2", cluster=InProcess(fatal=2))
    with pytest.raises(Killed):
        responses.run(broken)
    assert not broken.artifact.exists("responses.json")
    done = [name for name in broken.artifact.list("parts/responses") if name.endswith("json")]
    assert done == ["parts/responses-0002.json"]
    before = broken.artifact.read_bytes(done[0])
    again = InProcess(fatal=1)
    with pytest.raises(Killed):
        responses.run(replace(broken, cluster=again))
    assert broken.artifact.read_bytes(done[0]) == before
    responses.run(replace(broken, cluster=InProcess(fatal=1)))  # the one part that is left
    for name in ("response_QP", "errors_P"):
        first, second = (each.artifact.read_tensors("responses.safetensors")[name] for each in (whole, broken))
        assert torch.equal(first, second)


def test_how_points_are_dealt_moves_no_response_beyond_its_tolerance(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
):
    whole = context_of(tmp_path, inputs, epsilon=1e-4)
    responses.run(whole)
    monkeypatch.setattr(responses, "PART", 3)
    parted = context_of(tmp_path, inputs, epsilon=1e-4, attempt="3")
    responses.run(parted)
    first, second = (each.artifact.read_tensors("responses.safetensors")["response_QP"] for each in (whole, parted))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


def test_a_given_epsilon_is_used_and_what_it_is_worth_is_said(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs, epsilon=1e-5)
    responses.run(context)
    found = context.artifact.read_json("responses.json")
    assert found["epsilon"] == 1e-5
    assert found["linearity"]["chosen_by"] == "given"
    assert [row["epsilon"] for row in found["linearity"]["epsilons"]] == [1e-5]
    assert found["linearity"]["linear"]


def test_steps_that_are_too_few_are_shown_as_not_converged(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs, epsilon=1.0, pbo_steps=1, pbo_tolerance=1e-4)
    result = responses.run(context)
    found = context.artifact.read_json("responses.json")
    assert result.counts["converged"] < 10
    assert max(found["convergence"]["gradients"]) > 1e-4
    assert not found["linearity"]["linear"]


def test_classifiers_in_float32_with_a_part_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "ROWS", 60)
    dataset = images(tmp_path, (6,), {"train": 30, "valid": 10, "test": 8})
    settings = {"subject": Subject.mnist, "points": 5, "measurements": 2}
    context = context_of(tmp_path, with_curvature(tmp_path, dataset, **settings), epsilon=1e-6, **settings)
    responses.run(context)
    found = context.artifact.read_json("responses.json")
    assert found["rows"] == 60
    assert found["trace_share"] < 1
    assert found["convergence"]["converged"] == 5
    response_QP = context.artifact.read_tensors("responses.safetensors")["response_QP"]
    assert float(correlations(response_QP, exact(context)).min()) > 0.995


@pytest.mark.slow
def test_convolutions_are_preconditioned_by_their_rows(tmp_path: Path):
    dataset = images(tmp_path, (3, 8, 8), {"train": 6, "valid": 2, "test": 3})
    settings = {"subject": Subject.cifar10, "points": 1, "measurements": 1, "damping_factor": 1e4}
    context = context_of(tmp_path, with_curvature(tmp_path, dataset, **settings), epsilon=1e-4, **settings)
    responses.run(context)
    found = context.artifact.read_json("responses.json")
    assert 0 < found["rows"] <= 6 * 10  # modes of examples, less those that are nothing in float32
    assert found["trace_share"] == pytest.approx(1)
    assert max(found["convergence"]["gradients"]) < 0.02


# --- the choice of ε --------------------------------------------------------------------------------------------------


def converged(response_SQ: Tensor) -> Tried:
    return Tried(response_SQ, torch.ones(len(response_SQ), dtype=torch.bool))


def curved(epsilon: float) -> Tried:
    """Responses that bend by ε · 20."""
    return converged(torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64) * (1 + 20 * epsilon))


def test_the_largest_epsilon_at_which_responses_are_linear_is_taken():
    found = choose(curved, size=10)
    assert found.epsilon == 0.1 / FACTOR**3  # bends by 2.3 % more than a quarter of it; its fourfold by 9 %
    assert [round(each.difference, 4) for each in found.comparisons] == [1.0, 0.3333, 0.0882 + 0.0027, 0.0233]
    assert found.comparisons[-1].slope == pytest.approx(1.0233, abs=1e-3)
    assert found.comparisons[-1].correlation == pytest.approx(1)
    assert found.linear
    assert not found.given


def test_where_nothing_is_linear_the_nearest_is_taken_and_said_not_to_be():
    noise = torch.Generator().manual_seed(0)

    def noisy(epsilon: float) -> Tried:
        return converged(curved(epsilon).response_SQ + torch.randn(2, 2, generator=noise) * 0.3)

    found = choose(noisy, size=10)
    assert len(found.comparisons) == RUNGS - 1
    assert found.epsilon == min(found.comparisons, key=lambda each: each.difference).epsilon
    assert not found.linear
    assert not found.as_json()["linear"]


def test_a_given_epsilon_is_kept():
    found = choose(curved, size=10, epsilon=0.5)
    assert (found.epsilon, found.given, found.linear) == (0.5, True, False)
    assert len(found.comparisons) == 1


def test_points_that_nothing_responds_to_are_linear():
    zero = converged(torch.zeros(2, 3, dtype=torch.float64))
    assert compare(zero, zero, 1.0, 0.25).difference == 0
    assert compare(converged(torch.ones(2, 3, dtype=torch.float64)), zero, 1.0, 0.25).difference == 1


def test_points_whose_objective_was_not_minimised_are_not_linear():
    same = torch.ones(4, 3, dtype=torch.float64)
    failed = Tried(same, torch.tensor([True, False, True, True]))
    found = compare(converged(same), failed, 1.0, 0.25)
    assert (found.difference, found.worst) == (0.5, 1.0)


def test_epsilon_is_tried_on_points_with_large_gradients_and_on_others():
    norms = torch.arange(100.0)
    found = sample(norms, 8)
    assert len(found) == 8
    assert {96, 97, 98, 99} <= set(found)
    assert min(found) == 0
    assert sample(norms[:3], 8) == [0, 1, 2]
