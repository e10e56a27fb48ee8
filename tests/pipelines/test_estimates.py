"""The stages `curvature` and `estimates`: what they write, resuming, and the comparison of what they wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.store import Artifact
from influence.score_agreement import correlations
from influence.solvers import SOLVERS, LayerCurvature
from influence.supervised import fit, sampled_targets
from pipelines.steps import StageContext
from pipelines.validation import curvature, estimates, loading
from pipelines.validation.correlation import compare
from pipelines.validation.curvature import read_fitted, setting_of
from pipelines.validation.loading import fresh
from pipelines.validation.methods import METHODS, estimate
from pipelines.validation.setting import measurement_gradients
from pipelines.validation.sizes import scores_of
from tests.pipelines.retrained import SIZES, VALIDATION, InProcess, Killed, staged, table

BLOCKS = 4
METHOD_NAMES = [*METHODS, "ekfac_blocks_2", "ekfac_blocks_4"]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """A data set, a network with its first weights (nothing here asks that it has learnt), and its curvature."""
    dataset = table(tmp_path)
    training = staged(tmp_path, "training", {}).artifact
    training.write_tensors(loading.MODEL, fresh(dataset, VALIDATION).network.model.state_dict())
    found = {"dataset": dataset, "training": training}
    context = staged(tmp_path, "curvature", found)
    curvature.run(context)
    return found | {"curvature": context.artifact}


def context_of(folder: Path, inputs: dict[str, Artifact], **given: Any) -> StageContext:
    return staged(folder, "estimates", inputs, largest_blocks=BLOCKS, **given)


def scores(artifact: Artifact) -> dict[str, Tensor]:
    return {name: artifact.read_tensors(f"{name}.safetensors")["scores_QP"] for name in METHOD_NAMES}


def test_the_curvature_is_that_of_a_fit_on_all_training_examples(tmp_path: Path, inputs: dict[str, Artifact]):
    config = context_of(tmp_path, inputs).config
    problem = loading.load_problem_from(inputs["dataset"], inputs["training"], config.validation)
    found = read_fitted(inputs["curvature"], problem.layers)
    targets = sampled_targets(problem.network, problem.train, config.validation.seed)
    expected = fit(problem.network, problem.layers, problem.train, targets)
    for layer in problem.layers:
        torch.testing.assert_close(found.curvature[layer.name].correction_OI, expected[layer.name].correction_OI)
        damping = SOLVERS["ekfac"].fit(expected[layer.name], config.factors.damping_factor).damping
        assert found.damping[layer.name] == pytest.approx(damping, rel=1e-12)
    record = inputs["curvature"].read_json("curvature.json")
    assert record["examples"] == SIZES["train"]
    assert record["seconds"]["total"] > 0
    assert record["layers"]["hidden1"] | {"damping": 0, "mean_eigenvalue": 0} == {
        "inputs": 9, "outputs": 128, "places": 1.0, "damping": 0, "mean_eigenvalue": 0,
    }  # fmt: skip


def test_more_labels_an_example_all_enter_the_mean(tmp_path: Path, inputs: dict[str, Artifact]):
    context = staged(tmp_path, "curvature", inputs, attempt="1", label_draws=3)
    curvature.run(context)
    problem = loading.load_problem_from(inputs["dataset"], inputs["training"], context.config.validation)
    each = [
        fit(problem.network, problem.layers, problem.train, targets_N[None])["output"]
        for targets_N in sampled_targets(problem.network, problem.train, context.config.validation.seed, draws=3)
    ]
    found = read_fitted(context.artifact, problem.layers).curvature["output"]
    torch.testing.assert_close(
        (found.correction_OI.sum(), found.gradient.values[0].sum()),  # traces, which no choice of a basis moves
        tuple(torch.stack(one).mean() for one in zip(*map(_traces, each), strict=True)),
        rtol=1e-9,
        atol=0,
    )
    assert context.artifact.read_json("curvature.json")["draws"] == 3
    assert len({float(one.correction_OI.sum()) for one in each}) == 3


def _traces(found: LayerCurvature) -> tuple[Tensor, Tensor]:
    return found.correction_OI.sum(), found.gradient.values[0].sum()


def test_every_method_is_a_file_and_a_record(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs)
    result = estimates.run(context)
    found = context.artifact.read_json("estimates.json")
    json.dumps(found, allow_nan=False)
    assert list(found["methods"]) == METHOD_NAMES
    assert found["left_out"] == {}
    assert {key: found[key] for key in ("training", "points", "measurements")} == {
        "training": SIZES["train"], "points": 10, "measurements": 3,
    }  # fmt: skip
    assert result.counts == {"methods": 8, "sizes": 1}
    assert all(value.shape == (3, 10) and value.dtype == torch.float64 for value in scores(context.artifact).values())
    problem = loading.load_problem_from(inputs["dataset"], inputs["training"], context.config.validation)
    setting = setting_of(problem, inputs["curvature"], context.config)
    for name, scores_QP in scores(context.artifact).items():
        torch.testing.assert_close(estimate(name, setting).scores_QP, scores_QP, rtol=1e-9, atol=1e-12)


def test_a_run_that_was_killed_goes_on_and_ends_at_the_same_scores(tmp_path: Path, inputs: dict[str, Artifact]):
    whole = context_of(tmp_path, inputs)
    estimates.run(whole)
    broken = context_of(tmp_path, inputs, attempt="1", cluster=InProcess(fatal=3))
    with pytest.raises(Killed):
        estimates.run(broken)
    assert not broken.artifact.exists("estimates.json")
    before = broken.artifact.read_bytes("kfac.json")
    estimates.run(replace(broken, cluster=InProcess()))
    assert broken.artifact.read_bytes("kfac.json") == before
    for name, scores_QP in scores(broken.artifact).items():
        assert torch.equal(scores_QP, scores(whole.artifact)[name])
    assert broken.artifact.read_bytes("sizes.json") == whole.artifact.read_bytes("sizes.json")


def test_sizes_compare_fits_on_disjoint_halves(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs)
    estimates.run(context)
    found = context.artifact.read_json("sizes.json")
    assert (found["solver"], found["total"]) == ("ekfac", SIZES["train"])
    (entry,) = found["sizes"]
    assert entry["size"] == 20
    pair = context.artifact.read_tensors("sizes/0000020.safetensors")
    assert entry["between"]["values"] == correlations(pair["first"], pair["second"]).tolist()
    assert max(entry["between"]["values"]) < 1


def test_the_fit_of_all_examples_agrees_with_itself(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs)
    estimates.run(context)
    validation = context.config.validation
    problem = loading.load_problem_from(inputs["dataset"], inputs["training"], validation)
    vectors, damping = measurement_gradients(problem), context.config.factors.damping_factor
    targets_DN = sampled_targets(problem.network, problem.train, validation.seed)
    found = scores_of(problem, torch.arange(problem.size), targets_DN, vectors, damping)
    torch.testing.assert_close(found, scores(context.artifact)["ekfac"], rtol=1e-9, atol=1e-12)


def test_what_is_turned_off_is_not_there(tmp_path: Path, inputs: dict[str, Artifact]):
    context = staged(tmp_path, "estimates", inputs, largest_blocks=0, convergence=False)
    estimates.run(context)
    assert list(context.artifact.read_json("estimates.json")["methods"]) == list(METHODS)
    assert context.artifact.read_json("sizes.json")["sizes"] == []


def test_comparison_is_by_measurement_and_differences_are_paired(tmp_path: Path, inputs: dict[str, Artifact]):
    context = context_of(tmp_path, inputs)
    estimates.run(context)
    given = scores(context.artifact)
    found = compare(given, given["exact"])
    json.dumps(found, allow_nan=False)
    assert (found["measurements"], found["points"]) == (3, 10)
    assert found["methods"]["exact"]["pearson"]["mean"] == pytest.approx(1)
    expected = correlations(given["ekfac"], given["exact"])
    assert found["methods"]["ekfac"]["pearson"]["values"] == expected.tolist()
    difference = found["differences"]["ekfac_cg - ekfac"]
    assert difference["values"] == (correlations(given["ekfac_cg"], given["exact"]) - expected).tolist()
    only = compare({"ekfac": given["ekfac"]}, given["exact"])
    assert only["differences"] == {}
