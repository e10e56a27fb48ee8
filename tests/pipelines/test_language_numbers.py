"""Validation on language models, the arithmetic: intervals, rankings, datamodels, removal, iterates, exact scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from influence.conjugate_gradients import conjugate_gradients
from influence.gauss_newton import GaussNewton, LanguageNetwork, Vectors
from influence.measurement import MeasuredQuery, completion_log_probability
from influence.solvers import SolverState
from pipelines.almanac.evaluate import Judgement, evaluate
from pipelines.validation.language import datamodels, halves, intervals, removal, solves
from pipelines.validation.language.problem import LanguageProblem
from pipelines.validation.language.tracing import bm25_then, trace_results
from tests.fitted import batches_of, selection_of
from tests.influence.test_conjugate_gradients import dense, flat
from tests.networks import mlp
from tests.tiny import Case, gpt2, llama, sequences

QUERY = MeasuredQuery.of([1, 4, 2], [5, 3])


class Asked:
    """A query that was tokenised."""

    query_id = "one"

    def measured(self) -> MeasuredQuery:
        return QUERY


def problem_of(case: Case, rows: list, damping: float = 0.3) -> LanguageProblem:
    """A tiny model with its layers undamped by anything fitted: the same λ everywhere, no preconditioner."""
    selection = selection_of(case)
    states = {layer.name: SolverState(None, None, None, damping) for layer in selection.layers}
    return LanguageProblem(LanguageNetwork(case.model), selection, rows, [Asked()], "log_probability", states)  # type: ignore[list-item]


def gradient_of(case: Case, problem: LanguageProblem, tokens: torch.Tensor, first: int) -> Vectors:
    """∇ Σ_{t ≥ first} log p(token t) by autograd of the weights."""
    modules = [(layer, case.model.get_submodule(layer.name)) for layer in problem.layers]
    named = [(layer, part) for layer, module in modules for part in module.parameters(recurse=False)]
    for _, part in named:
        part.requires_grad_(True)
    logp_TV = torch.log_softmax(case.model(input_ids=tokens[None]).logits[0], dim=-1)
    value = logp_TV[torch.arange(first - 1, len(tokens) - 1), tokens[first:]].sum()
    found = torch.autograd.grad(value, [part for _, part in named])
    for _, part in named:
        part.requires_grad_(False)
    gathered: dict[str, dict[int, torch.Tensor]] = {}
    for (layer, part), gradient in zip(named, found, strict=True):
        oriented = gradient.T if layer.transposed and part.dim() == 2 else gradient
        gathered.setdefault(layer.name, {})[part.dim()] = oriented
    return {
        name: torch.cat([parts[2], parts[1][:, None]], dim=1)[None] if 1 in parts else parts[2][None]
        for name, parts in gathered.items()
    }


# --- intervals ------------------------------------------------------------------------------------------------------


def test_means_over_queries_have_the_interval_of_student():
    values = np.array([0.1, 0.4, 0.2, np.nan])
    found = intervals.over_queries(values, ["a", "b", "c", "d"])
    expected = stats.t.interval(0.95, 2, loc=values[:3].mean(), scale=stats.sem(values[:3]))
    assert found["mean"] == pytest.approx(values[:3].mean())
    assert found["interval"] == pytest.approx(list(expected))
    assert found["by_query"] == {"a": 0.1, "b": 0.4, "c": 0.2, "d": None}
    assert intervals.over_queries([np.nan], ["a"]) == {"mean": None, "interval": None, "by_query": {"a": None}}


def test_correlations_are_those_of_scipy():
    left, right = np.random.default_rng(0).normal(size=(2, 3, 20))
    right[2] = 1.0
    pearson, spearman = intervals.correlations(left, right), intervals.rank_correlations(left, right)
    for row in range(2):
        assert pearson[row] == pytest.approx(stats.pearsonr(left[row], right[row])[0])
        assert spearman[row] == pytest.approx(stats.spearmanr(left[row], right[row])[0])
    assert np.isnan(pearson[2])
    assert intervals.compared(left[:2], left[:2], ["a", "b"])["spearman"]["mean"] == pytest.approx(1)


def test_a_line_through_the_origin_is_found_with_its_interval():
    generator = np.random.default_rng(1)
    predicted = generator.normal(size=(4, 50)) * np.array([[1], [10], [0.1], [3]])
    measured = 0.5 * predicted * (1 + 0.2 * generator.normal(size=predicted.shape))
    found = intervals.line(predicted, measured)
    low, high = found["slope_interval"]
    assert low < 0.5 < high < low + 0.2
    assert found["correlation"] > 0.95
    assert intervals.line(predicted, 2 * predicted)["slope"] == pytest.approx(2)


# --- rankings ---------------------------------------------------------------------------------------------------------


def test_bm25s_candidates_are_put_in_the_order_of_a_method():
    bm25 = np.array([[5.0, 0.0, 3.0, 4.0, 0.0, 1.0]])
    scores = np.array([[0.1, 9.0, 0.3, np.nan, 8.0, 7.0]])
    order = np.argsort(-bm25_then(scores, bm25, candidates=3)[0]).tolist()
    assert order == [2, 0, 3, 5, 1, 4]  # candidates 0, 3, 2 by score, no score last; then the others by BM25
    assert np.argsort(-bm25_then(scores, bm25, candidates=10)[0]).tolist() == [5, 2, 0, 3, 1, 4]


def test_methods_are_judged_and_compared_query_by_query():
    judgements = [Judgement(name, {"forward": np.array([at])}, {}) for name, at in (("a", 0), ("b", 2), ("c", 1))]
    methods = {"ekfac": np.eye(3)[[0, 2, 1]], "bm25": np.array([[1.0, 2, 3]] * 3)}
    found = trace_results(methods, judgements, documents=3, k=1)
    assert found["methods"]["ekfac"]["recall"]["mean"] == 1
    by_hand = [
        evaluate(scores, judgement, 1).reciprocal_rank
        for scores, judgement in zip(methods["bm25"], judgements, strict=True)
    ]
    assert list(found["methods"]["bm25"]["reciprocal_rank"]["by_query"].values()) == by_hand == [1 / 3, 1, 1 / 2]
    assert found["differences"]["bm25"]["reciprocal_rank"]["mean"] == pytest.approx(np.mean(by_hand) - 1)
    assert found["methods"]["random"]["recall"]["mean"] == pytest.approx(1 / 3)


# --- training again ---------------------------------------------------------------------------------------------------


def test_halves_are_nested_and_of_their_size():
    many, few = halves.halves(21, 8, seed=3), halves.halves(21, 4, seed=3)
    np.testing.assert_array_equal(many[:4], few)
    assert set(many.sum(1).tolist()) == {10}
    assert len(np.unique(many, axis=0)) == 8
    assert not np.array_equal(halves.halves(21, 4, seed=4), few)


def test_datamodels_of_an_additive_world_are_perfect():
    generator = np.random.default_rng(2)
    truth_QN, noise_QN = generator.normal(size=(2, 3, 30))
    kept_SN = halves.halves(30, 16, seed=0)
    measured_QS = truth_QN @ kept_SN.T - 4.0
    methods = {"true": 7 * truth_QN, "noise": noise_QN}
    found = datamodels.lds_results(methods, np.stack([noise_QN, truth_QN]), kept_SN, measured_QS, ["a", "b", "c"])
    assert found["methods"]["true"]["mean"] == pytest.approx(1)
    assert found["methods"]["true"]["interval"] == pytest.approx([1, 1])
    expected = stats.spearmanr(noise_QN[1] @ kept_SN.T, measured_QS[1])[0]
    assert found["methods"]["noise"]["by_query"]["b"] == pytest.approx(expected)
    assert [entry["iterations"] for entry in found["curve"]] == [1, 2]
    assert found["curve"][1]["mean"] == pytest.approx(1)


def test_the_ceiling_is_what_the_truth_reaches():
    """Ranks lose a little against the attenuation of Pearson's correlation, for which the formula is exact."""
    generator = np.random.default_rng(4)
    truth_QS = generator.normal(size=(40, 60))
    measured_QSR = truth_QS[..., None] + 0.8 * generator.normal(size=(40, 60, 2))
    ids = [str(number) for number in range(40)]
    found = datamodels.ceiling(measured_QSR, ids)
    assert found is not None
    reached = intervals.rank_correlations(truth_QS, measured_QSR.mean(-1)).mean()
    assert found["mean"] == pytest.approx(reached, abs=0.02)
    assert datamodels.ceiling(measured_QSR[..., :1], ids) is None


def test_what_is_removed_and_what_it_changes():
    assert removal.top(np.array([0.2, 5.0, np.nan, 3.0]), 2) == {1, 3}
    sets = removal.random_sets(50, 5, 6, seed=1)
    assert len(set(sets)) == 6
    assert {len(one) for one in sets} == {5}
    changes = {"ekfac": np.array([-3.0, -1.0]), "bm25": np.array([-2.0, -1.0]), "random": np.array([0.5, -0.5])}
    found = removal.changes(changes, ["a", "b"])
    assert found["ekfac"]["mean"] == -2
    assert found["ekfac"]["against_bm25"]["mean"] == -0.5
    assert found["bm25"]["against_random"]["mean"] == -1.5
    assert "against_bm25" not in found["bm25"]


# --- solving ----------------------------------------------------------------------------------------------------------


def test_iterates_are_those_of_separate_runs_for_the_products_of_one():
    plain, asked = mlp(), []
    curvature = GaussNewton(plain.network, plain.layers)

    def product(vectors: Vectors) -> Vectors:
        asked.append(len(vectors["0"]))
        return curvature(plain.parts(24), vectors)

    right, damping = plain.vectors(3), dict.fromkeys(("0", "2", "4"), 0.05)
    found = solves.iterates(product, right, damping, {}, iterations=6, residual=0.0)
    assert asked == [3] * 6
    for count, solution in enumerate(found, start=1):
        alone = conjugate_gradients(lambda v: curvature(plain.parts(24), v), right, damping, None, count)
        assert all(torch.equal(value, alone.vectors[name]) for name, value in solution.vectors.items())
    stopped = solves.iterates(product, right, damping, {}, iterations=60, residual=0.5)
    assert float(stopped[-1].residuals_NK[-1].max()) < 0.5 <= float(stopped[-2].residuals_NK[-1].max())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_exact_scores_of_a_language_model_are_those_of_a_dense_solve(make):
    case, rows = make(blocks=1), sequences(7)
    problem = problem_of(case, rows)
    right = gradient_of(case, problem, torch.tensor(QUERY.input_ids), QUERY.first_measured)
    found = solves.iterates(solves.gauss_newton_product(problem, 3), right, problem.damping, problem.states, 400, 1e-12)
    matrix = dense(case, rows)
    answer = torch.linalg.solve(matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64), flat(case, right).T)
    gradients = [gradient_of(case, problem, torch.tensor(row), 1) for row in rows]
    expected = torch.cat([flat(case, one) for one in gradients]) @ answer
    scores = solves.scores_of(problem, found[-1].vectors, 3)
    np.testing.assert_allclose(scores[0], expected[:, 0].numpy(), rtol=1e-9, atol=1e-9)
    f = completion_log_probability(problem.network.outputs(QUERY.batch), QUERY)
    assert float(problem.measure(problem.network)) == pytest.approx(float(f))


def test_sequences_of_a_problem_keep_their_numbers():
    problem = problem_of(gpt2(blocks=1), sequences(9))
    drawn = problem.draw(torch.tensor([4, 1]))
    assert drawn.sequence_ids.tolist() == [4, 1]
    assert drawn.input_ids[1, : drawn.lengths[1]].tolist() == problem.rows[1]
    ids = [number for batch in problem.batches(4) for number in batch.sequence_ids.tolist()]
    assert sorted(ids) == list(range(9))
    assert len(list(batches_of(problem.rows, 4))) == len(list(problem.batches(4)))
