"""Every option of a trace that changes what is computed, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.tracing import TraceResult
from tests.integration.world import World, cached, ids, matrix, relative, run_locally
from tests.pages import record

Run = Callable[..., TraceResult]


@pytest.fixture
def run(world: World, traced: TraceResult, store: Path, tmp_path: Path) -> Run:
    """`run(**changes)`: a run beside `traced`, in the same store."""

    def make(**changes: Any) -> TraceResult:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return run_locally(world.config(store, **changes), folder)

    return make


def correlations(result: TraceResult, other: TraceResult) -> list[float]:
    """Of the two runs' scores, query by query."""
    first, second = matrix(result.scores_table()), matrix(other.scores_table())
    return [float(np.corrcoef(first[:, query], second[:, query])[0, 1]) for query in range(first.shape[1])]


def test_solvers_give_different_scores(run: Run, traced: TraceResult):
    found = {solver: matrix(run(factors__solver=solver).scores_table()) for solver in ("kfac", "identity")}
    exact = matrix(traced.scores_table())
    assert relative(found["kfac"], exact) > 1e-2
    assert relative(found["identity"], exact) > 1e-2


def test_kfac_needs_no_correction_and_the_identity_no_factor(run: Run):
    kfac, identity = run(factors__solver="kfac").outcomes, run(factors__solver="identity").outcomes
    assert "eigenbasis" in kfac
    assert "correction" not in kfac
    assert not {"covariance", "eigenbasis", "correction"} & identity.keys()


def test_the_identity_does_not_depend_on_the_damping(run: Run):
    run(factors__solver="identity")
    again = run(factors__solver="identity", factors__damping_factor=7.0, factors__seed=3)
    assert all(cached(again).values())


@pytest.mark.parametrize("measurement", ["contrast", "sequence_log_probability"])
def test_measurements_change_what_is_measured(run: Run, traced: TraceResult, measurement: str):
    result = run(queries__measurement=measurement)
    before, after = ({q["query_id"]: q["measured"] for q in r.summary["queries"]} for r in (traced, result))
    assert all(before[name] != after[name] for name in before)
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) > 1e-2
    shown = record(result.report_path.read_text())
    assert shown["measurement"] == measurement
    assert all((query["contrast"] is not None) == (measurement == "contrast") for query in shown["queries"])


def test_rank_and_fidelity_trade_size_for_agreement(run: Run, traced: TraceResult):
    coarse, fine = run(queries__rank=1), run(queries__rank=8)
    asked = run(queries__fidelity=0.99)
    for result in (coarse, fine, asked):
        fidelity = result.summary["fidelity"]
        assert fidelity["pearson"].keys() == set(traced.query_ids)
        assert fidelity["minimum"] == min(fidelity["pearson"].values())
        assert min(correlations(result, traced)) == pytest.approx(fidelity["minimum"], abs=0.05)
        assert f"{fidelity['mean']:.5f}" in dict(record(result.report_path.read_text())["facts"])["fidelity"]
    assert coarse.summary["fidelity"]["minimum"] < fine.summary["fidelity"]["minimum"]
    assert min(correlations(asked, traced)) > 0.98
    assert [query["total_rank"] for query in coarse.summary["queries"]] == [6, 6, 6]


def test_unmeasured_fidelity_is_said_to_be_so(run: Run):
    result = run(queries__rank=8, queries__fidelity_sample=0)
    assert result.summary["fidelity"] == {}
    assert "not measured" in dict(record(result.report_path.read_text())["facts"])["fidelity"]


def test_a_sample_of_one_sequence_measures_no_correlation(run: Run):
    fidelity = run(queries__rank=3, queries__fidelity_sample=1).summary["fidelity"]
    assert fidelity["minimum"] is fidelity["mean"] is None


@pytest.mark.parametrize("changes", [{"scan__product_dtype": "bfloat16"}, {"model__dtype": "bfloat16"}], ids=str)
def test_lower_precision_reports_how_well_it_agrees(run: Run, traced: TraceResult, changes: dict):
    result = run(**changes)
    agreement = result.summary["agreement"]
    assert agreement["pearson"].keys() == set(traced.query_ids)
    assert 0.9 < agreement["minimum"] <= min(agreement["pearson"].values()) < 1
    assert min(correlations(result, traced)) > 0.9
    assert f"{agreement['minimum']:.5f}" in dict(record(result.report_path.read_text())["facts"])["precision"]
    assert matrix(result.scores_table()).dtype == np.float32


@pytest.mark.parametrize("contraction", ["dense", "factored"])
def test_both_contractions_give_the_same_scores(run: Run, contraction: str):
    auto = run(queries__rank=8)
    result = run(queries__rank=8, scan__contraction=contraction)
    assert relative(matrix(result.scores_table()), matrix(auto.scores_table())) < 1e-5


def test_each_feed_works_without_the_other(run: Run, traced: TraceResult):
    unfiltered, bm25 = run(prefilter__kind="none"), run(unfiltered__kind="none")
    assert set(unfiltered.scores_table().column("feed").to_pylist()) == {"unfiltered"}
    assert set(unfiltered.top.column("feed").to_pylist()) == {"unfiltered"}
    assert set(bm25.scores_table().column("feed").to_pylist()) == {"bm25"}
    assert set(bm25.top.column("feed").to_pylist()) <= {"bm25", "other"}
    assert len(unfiltered.scores_table()) == 60
    both = {*ids(unfiltered.scores_table()), *ids(bm25.scores_table())}
    assert both == set(ids(traced.scores_table()))
    values = dict(zip(ids(traced.scores_table()), matrix(traced.scores_table()), strict=True))
    for result in (unfiltered, bm25):  # what else is in a micro-batch moves no score beyond rounding
        table = result.scores_table()
        assert relative(matrix(table), np.stack([values[number] for number in ids(table)])) < 1e-5


def test_the_whole_corpus_can_be_scanned(run: Run):
    result = run(unfiltered__kind="all")
    assert ids(result.scores_table()) == list(range(result.summary["corpus"]["sequences"]))
    assert "other" not in result.top.column("feed").to_pylist()


def test_layers_can_be_attention_or_a_pattern(run: Run):
    attention, down = run(model__layers="attention"), run(model__layers=r".*down_proj")
    assert attention.outcomes["layers"].counts["layers"] == 8
    assert down.outcomes["layers"].counts["layers"] == 2
    assert down.summary["coverage"] == pytest.approx(2 * 16 * 24 / 16_720)


def test_curvature_can_be_fitted_on_a_sample(run: Run, traced: TraceResult):
    result = run(factors__samples=64)
    assert result.summary["stages"]["covariance"]["counts"]["sequences"] == 64
    assert min(correlations(result, traced)) > 0.9
