"""Responses of language models: against dense solves for ε → 0, and against another minimisation for a large ε."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipelines.validation.language import objectives
from pipelines.validation.language.problem import LanguageProblem
from tests.influence.test_conjugate_gradients import dense, flat
from tests.pipelines.test_language_numbers import QUERY, gradient_of, problem_of
from tests.tiny import Case, gpt2, llama, sequences

CASES = {"gpt2": gpt2, "llama": llama}
POINTS = (1, 4)


@pytest.mark.parametrize("name", CASES)
def test_responses_to_little_weight_are_the_influences_of_the_dense_matrix(name: str):
    case, rows = CASES[name](blocks=1), sequences(7)
    problem = problem_of(case, rows)
    found = objectives.responses_to(problem, POINTS, epsilon=1e-6, evaluations=400, tolerance=1e-8)
    matrix = dense(case, rows)
    right = flat(case, gradient_of(case, problem, torch.tensor(QUERY.input_ids), QUERY.first_measured))
    answer = torch.linalg.solve(matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64), right.T)
    gradients = torch.cat([flat(case, gradient_of(case, problem, torch.tensor(rows[m]), 1)) for m in POINTS])
    torch.testing.assert_close(found["response_PQ"], gradients @ answer, rtol=1e-4, atol=1e-4)
    assert float(found["gradient_P"].max()) < 1e-7
    assert found["numbers_P"].tolist() == list(POINTS)


@pytest.mark.parametrize("name", CASES)
def test_responses_to_much_weight_are_those_of_another_minimisation(name: str):
    """Equation 7 written out, minimised over the parameters themselves."""
    case, rows = CASES[name](blocks=1), sequences(5)
    problem = problem_of(case, rows)
    epsilon = 0.2
    found = objectives.responses_to(problem, [3], epsilon, evaluations=400, tolerance=1e-8)["response_PQ"]
    before = float(problem.measure(problem.network))
    minimise_by_torch(case, problem, rows, 3, epsilon)
    expected = (float(problem.measure(problem.network)) - before) / epsilon
    again = problem_of(CASES[name](blocks=1), rows)
    linear = objectives.responses_to(again, [3], 1e-6, evaluations=400, tolerance=1e-8)["response_PQ"]
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert abs(float(linear) - expected) > 0.01 * abs(expected)  # it is not linear there


def minimise_by_torch(case: Case, problem: LanguageProblem, rows: list, point: int, epsilon: float) -> None:
    """Leave the tracked weights of the model at the minimum."""
    modules = [case.model.get_submodule(layer.name) for layer in problem.layers]
    parameters = [part for module in modules for part in module.parameters(recurse=False)]
    start = [part.detach().clone() for part in parameters]

    def logp(tokens: list[int]) -> Tensor:
        return torch.log_softmax(case.model(input_ids=torch.tensor([tokens])).logits[0, :-1], dim=-1)

    with torch.no_grad():
        references = [logp(tokens) for tokens in rows]
    for part in parameters:
        part.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, history_size=50)

    def objective() -> Tensor:
        optimizer.zero_grad()
        divergence = sum(
            nn.functional.kl_div(logp(tokens), reference, reduction="sum", log_target=True)
            for tokens, reference in zip(rows, references, strict=True)
        )
        added = -logp(rows[point]).gather(1, torch.tensor(rows[point][1:])[:, None]).sum()
        proximity = sum((part - old).square().sum() for part, old in zip(parameters, start, strict=True))
        value = divergence / len(rows) + epsilon * added + 0.3 / 2 * proximity
        value.backward()
        return value

    optimizer.step(objective)  # type: ignore[arg-type]
    for part in parameters:
        part.requires_grad_(False)


def test_linear_responses_are_told_from_others():
    response = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = {"difference": 0.0, "worst": 0.0, "slope": 1.0, "correlation": 1.0}
    assert objectives.linearity(response, response) == pytest.approx(same)
    bent = response.clone()
    bent[1] *= 1.2
    found = objectives.linearity(bent, response)
    assert found["worst"] == pytest.approx(0.2)
    assert found["difference"] == pytest.approx(float(0.2 * response[1].norm() / response.norm()))


def test_weights_at_which_much_would_change_are_not_tried():
    size = 100
    assert objectives.weights_to_try(1.0, size) == [copies / size for copies in objectives.COPIES]
    some = objectives.weights_to_try(1000.0, size)
    assert some == [copies / size for copies in objectives.COPIES if copies <= 0.2]
    assert objectives.weights_to_try(1e9, size) == [copies / size for copies in objectives.COPIES[-2:]]
