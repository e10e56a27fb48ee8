"""Studies from what the stages record: each in the one shape that everything that shows them reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.probes import write_section
from benchmarks.validation import changes, fill
from conf.keys import validation_paths
from conf.load import compose_config
from conf.schema import RunConfig, Subject, ValidationConfig, plain
from pipelines.almanac.evaluate import Judgement
from pipelines.almanac.world import STATING
from pipelines.validation.language import datamodels, intervals, removal, scale, tracing
from pipelines.validation.language.responses import response_results
from pipelines.validation.presentation.figures import figures
from pipelines.validation.presentation.markdown import terminal
from pipelines.validation.presentation.sections import sections
from pipelines.validation.results import document, language, networks
from pipelines.validation.results.document import studies
from pipelines.validation.results.networks import Scored
from pipelines.validation.results.responses import response
from pipelines.validation.results.solved import solved
from pipelines.validation.results.statistics import slopes, statistic
from tests.pipelines.validated import facts_document, language_document, network_document

SOLVERS = ("identity", "kfac", "ekfac", "ekfac_cg")
ROOT = Path(__file__).parents[2]
STAT = {"mean": 0.5, "interval": [0.4, 0.6], "by_query": {"a": 0.45, "b": 0.55}}
SAME = {"mean": 0.5, "interval": [0.4, 0.6], "values": [0.45, 0.55]}
MEASURED = {
    "points": 3,
    "measurements": 2,
    "numbers": [1, 4, 6],
    "optimiser": "Newton’s steps",
    "epsilon": 1e-3,
    "linearity": {
        "epsilons": [
            {"epsilon": 1e-2, "against": 1e-3, "correlation": 0.9, "difference": 0.4},
            {"epsilon": 1e-3, "against": 1e-4, "correlation": 0.999, "difference": 0.02},
        ],
        "chosen_by": "linearity",
    },
    "convergence": {"tolerance": 0.01, "gradients": [1e-4, 2e-4, 3e-3], "converged": 3, "halfway": 0.9999},
}


def test_statistics_have_one_shape() -> None:
    assert statistic(STAT) == SAME
    assert statistic({"mean": 0.5, "low": 0.4, "high": 0.6, "count": 2, "values": [0.45, 0.55]}) == SAME
    assert statistic(0.5, [0.4, 0.6]) == SAME | {"values": []}
    assert statistic({"mean": 0.5, "low": None, "high": None, "values": [0.5]})["interval"] is None
    assert statistic(None) == {"mean": None, "interval": None, "values": []}


def test_slopes_are_those_of_least_squares_through_the_origin() -> None:
    x, y = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    expected = [torch.linalg.lstsq(x[q, :, None], y[q, :, None]).solution.item() for q in range(3)]
    assert slopes(x, y).tolist() == pytest.approx(expected)
    assert slopes(x, -2 * x).tolist() == pytest.approx([-2.0] * 3)
    assert slopes(torch.zeros(1, 4), torch.ones(1, 4)).tolist() == [0.0]


def scored(converged: list[bool] | None = None) -> Scored:
    generator = torch.Generator().manual_seed(1)
    truth_QP = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    noise_QP = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    scores = {"identity": noise_QP, "ekfac": 2 * truth_QP + noise_QP, "exact": 2 * truth_QP}
    mask_P = None if converged is None else torch.tensor(converged)
    return Scored(scores, truth_QP, list(range(30)), list(range(4)), mask_P)


def test_agreement_with_the_response() -> None:
    found = networks.agreement(scored())
    assert found is not None
    assert (found["points"], found["measurements"]) == (30, 4)
    exact = found["methods"]["exact"]
    assert exact["pearson"]["mean"] == pytest.approx(1.0)
    assert exact["slope"]["values"] == pytest.approx([0.5] * 4)
    assert found["methods"]["identity"]["slope"] is None
    assert found["methods"]["ekfac"]["exact"] == found["methods"]["ekfac"]["pearson"]
    assert found["differences"]["exact - ekfac"]["mean"] > 0
    assert all(record["converged"] is None for record in found["methods"].values())
    assert networks.agreement(Scored({}, None, [], [], None)) is None


def test_without_a_response_the_exact_solution_is_the_truth() -> None:
    given = scored()
    found = solved(given.scores)
    assert found is not None
    assert (found["points"], found["measurements"], list(found["methods"])) == (30, 4, ["identity", "ekfac"])
    ekfac = found["methods"]["ekfac"]
    with_truth = networks.agreement(given)
    assert with_truth is not None
    assert ekfac["pearson"] == with_truth["methods"]["ekfac"]["exact"]
    assert ekfac["slope"]["values"] == pytest.approx(slopes(given.scores["ekfac"], given.scores["exact"]).tolist())
    assert found["methods"]["identity"]["slope"] is None
    assert found["differences"]["ekfac - identity"]["mean"] > 0
    assert solved({"ekfac": given.scores["ekfac"]}) is None
    assert solved({"exact": given.scores["exact"]}) is None


def test_points_that_did_not_converge_are_left_out_in_a_column_of_its_own() -> None:
    some = networks.agreement(scored([number % 3 > 0 for number in range(30)]))
    assert some is not None
    truth_QP, ekfac_QP = scored().response_QP, scored().scores["ekfac"]
    assert truth_QP is not None
    kept = [number for number in range(30) if number % 3]
    pairs = [torch.stack([ekfac_QP[q, kept], truth_QP[q, kept]]) for q in range(4)]
    expected = [torch.corrcoef(pair)[0, 1].item() for pair in pairs]
    assert some["methods"]["ekfac"]["converged"]["values"] == pytest.approx(expected)
    everything = networks.agreement(scored([True] * 30))
    assert everything is not None
    assert everything["methods"]["ekfac"]["converged"] is None


def test_the_response_is_described_and_what_failed_is_said() -> None:
    assert response(MEASURED)["warnings"] == []
    bad = json.loads(json.dumps(MEASURED))
    bad["epsilon"] = 1e-2
    bad["convergence"] |= {"gradients": [1e-4, 0.5, 0.3], "converged": 1, "halfway": 0.8}
    warned = response(bad)["warnings"]
    assert len(warned) == 2
    assert warned[0].startswith("The objective of 2 of 3 points was not minimised")
    assert "differ by 40% from those at a smaller one" in warned[1]
    bad["epsilon"] = 1.0
    assert "Responses were not shown to be linear at the ε that was used." in response(bad)["warnings"]


def test_retraining_of_networks() -> None:
    lds = {
        "lds": 0.2,
        "interval": [0.1, 0.3],
        "interval_subsets": [0.15, 0.25],
        "lds_measurements": 0.2,
        "seconds": 1.0,
    }
    found = networks.datamodels(
        {
            **{"subsets": 6, "share": 0.5, "retrainings": 2, "train": 100, "tests": 10},
            "methods": {"ekfac": lds, "exact": lds},
            "differences": {"exact": {"mean": 0.01, "interval": [0, 0.02], "interval_subsets": [-0.1, 0.1]}},
            "ceiling": {"ceiling": 0.7, "interval": [0.6, 0.8]},
            "dampings": [{"multiple": 10.0, "damping": None, "methods": {"ekfac": lds}, "differences": {}}],
            "seconds": {"retraining": 1.0},
        }
    )
    assert found is not None
    assert found["methods"]["ekfac"] == {
        "lds": {"mean": 0.2, "interval": [0.15, 0.25], "values": []},
        "tests": {"mean": 0.2, "interval": [0.1, 0.3], "values": []},
        "difference": None,
    }
    assert found["methods"]["exact"]["difference"]["interval"] == [-0.1, 0.1]
    assert found["ceiling"]["mean"] == 0.7
    assert networks.datamodels({"subsets": 0}) is None
    assert networks.removal({"removal": 0.0}) is None


def test_blocks_need_no_response() -> None:
    records = {
        name: {"bytes": {"factors": 100 // blocks}, "blocks": blocks, "seconds": {"fit": 1.0}}
        for blocks, name in ((1, "ekfac"), (2, "ekfac_blocks_2"))
    }
    given = scored()
    scores = {"ekfac": given.scores["ekfac"], "ekfac_blocks_2": given.scores["exact"]}
    found = networks.blocks({"methods": records}, Scored(scores, None, [], [], None), None)
    assert found is not None
    assert found["truth"] == "whole factors"
    assert [row["blocks"] for row in found["rows"]] == [1, 2]
    assert [row["relative_bytes"] for row in found["rows"]] == [1.0, 0.5]
    assert found["rows"][0]["agreement"]["mean"] == pytest.approx(1.0)
    assert networks.blocks({"methods": {"ekfac": records["ekfac"]}}, given, None) is None


# --- language models --------------------------------------------------------------------------------------------------


def test_costs_of_language_models_count_the_fit_once_for_each_method() -> None:
    steps = {"sequences": 9.0, "covariance": 1.0, "eigenbasis": 2.0, "correction": 3.0, "gradients": 0.5, "ihvp": 0.25}
    steps |= {"scores": 4.0}
    seconds = {"ekfac": steps, "identity": {"gradients": 0.5, "scores": 4.0}}
    solves = {
        "lissa": {"seconds": [8.0, 12.0], "products": [60, 60], "scale": [3.0, 3.0], "change": [0.01, 0.02]},
        "exact": {"seconds": 30.0, "iterations": 2, "residuals": [[0.5, 0.4], [1e-3, 1e-4]]},
    }
    found = language.cost(2, seconds, solves)["methods"]
    assert found["ekfac"]["seconds"] == {"fit": 6.0, "solve": 0.75, "score": 4.0, "total": 10.75}
    assert found["lissa"]["seconds"]["total"] == 24.0
    assert found["lissa"]["products"] == 60
    assert found["lissa"]["notes"] == {"scale": 3.0, "change": 0.02}
    assert found["exact"]["residual"] == 1e-3


def test_iterations_have_both_measures() -> None:
    curves = {"curve": [{"iterations": 1, **STAT}, {"iterations": 2, **STAT}]}
    found = language.iterations(curves, {"curve": [{"iterations": 2, **STAT}]})
    assert found == [
        {"iterations": 1, "pearson": SAME, "lds": None},
        {"iterations": 2, "pearson": SAME, "lds": SAME},
    ]
    assert language.iterations(None, None) is None


@pytest.mark.parametrize("unit", ["documents", "sentences"])
def test_tracing(unit: str) -> None:
    record = {"recall": STAT, "reciprocal_rank": STAT, "recall_by_kind": {}}
    given = {
        **{"k": 10, "documents": 600, "candidates": 100, "queries": 2, "reference": "ekfac"},
        "methods": {"ekfac": record, "bm25": record},
        "differences": {"bm25": {"recall": STAT, "reciprocal_rank": STAT}},
    }
    found = language.tracing(given, unit)
    assert found["methods"]["bm25"] == {"recall": SAME, "reciprocal_rank": SAME, "difference": SAME}
    assert (found["unit"], found["methods"]["ekfac"]["difference"]) == (unit, None)


def test_removal_of_documents() -> None:
    given: dict[str, Any] = {"share": 0.01, "dropped": 6, "documents": 600, "seeds": 2, "base": {"a": -1.0, "b": -3.0}}
    methods = {"ekfac": STAT | {"against_random": STAT, "against_bm25": STAT}, "random": dict(STAT)}
    found = language.removal(given | {"methods": methods})
    assert found is not None
    assert (found["base"], found["measured"]) == (-2.0, "log-probability")
    assert found["methods"]["ekfac"]["over_bm25"] == SAME
    assert found["methods"]["random"]["over_random"] is None


class Recorded:
    """An artifact of which there is but its records."""

    def __init__(self, **records: Any) -> None:
        self.records = records
        self.uri = "somewhere"

    def read_json(self, name: str) -> Any:
        return self.records[name.removesuffix(".json")]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    """What the steps of a language model record, by their own functions, of made-up scores."""
    monkeypatch.setattr(intervals, "RESAMPLES", 10)
    generator, queries, sizes = np.random.default_rng(2), ["a", "b", "c"], (3, 20)
    methods = {name: generator.normal(size=sizes) for name in (*SOLVERS, "lissa", "exact", "bm25")}
    curve_KQN = np.stack([methods["ekfac"], methods["ekfac_cg"], methods["exact"]])
    kept_SN = generator.random((6, 20)) < 0.5
    measured_QP = methods["exact"][:, :8] + 0.1 * generator.normal(size=(3, 8))
    judgements = [Judgement(name, {kind: np.array([n]) for kind in STATING}, {}) for n, name in enumerate(queries)]
    scores = {
        "queries": [{"query_id": name} for name in queries],
        **{"sequences": 20, "documents": 20, "damping": {"mlp": 0.1}, "parameters": {"tracked": 5, "model": 9}},
        "seconds": {name: {"covariance": 1.0, "gradients": 1.0, "ihvp": 1.0, "scores": 1.0} for name in SOLVERS},
    }
    responses = MEASURED | {"queries": queries, "points": 8}
    predicted = {name: values[:, :8] / 20 for name, values in methods.items() if name != "bm25"}
    checkpoint = {"steps": 9, "methods": scale.lines(predicted | {"pbo": measured_QP}, measured_QP)}
    pairs = {"predicted": {name: values.T.tolist() for name, values in predicted.items()}}
    pairs |= {name: (measured_QP.T / 20).tolist() for name in ("pbo", "training_on")}
    halves = {"subsets": 6, "seeds": 1, "documents": 20, "share": 0.5, "seconds": 1.0, "ceiling": None}
    lds = datamodels.lds_results(methods, curve_KQN, kept_SN, generator.normal(size=(3, 6)), queries)
    removed = {name: generator.normal(size=3) for name in ("ekfac", "bm25", "random")}
    about = {"share": 0.05, "dropped": 1, "documents": 20, "seeds": 1, "base": dict.fromkeys(queries, -1.0)}
    return {
        "language_scores": Recorded(scores=scores),
        "language_responses": Recorded(
            responses=responses | response_results(methods, curve_KQN, measured_QP, list(range(8)), queries)
        ),
        "scale": Recorded(
            scale={
                "weight": 0.05,
                "points": 8,
                "queries": 3,
                "pairs": pairs,
                "pbo": scale.lines(predicted, measured_QP),
            }
            | {"training_on": {"checkpoints": [checkpoint]}}
        ),
        "language_datamodels": Recorded(datamodels=halves | lds),
        "language_removal": Recorded(removal=about | {"methods": removal.changes(removed, queries)}),
        "tracing": Recorded(tracing=tracing.trace_results(methods, judgements, 20) | {"candidates": 5}),
    }


def test_a_language_model_without_a_response_is_compared_with_exact_solves(
    recorded: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth_QN = np.random.default_rng(3).normal(size=(3, 20))
    methods = {"identity": truth_QN[:, ::-1].copy(), "ekfac": 2 * truth_QN, "exact": truth_QN}
    monkeypatch.setattr(document, "methods_and_curve", lambda artifacts: (methods, truth_QN[None]))
    solves = {"exact": {"seconds": 9.0, "iterations": 1, "residuals": [[0.1]]}}
    solves["lissa"] = {"seconds": 5.0, "products": 7, "depth": 7, "scale": 0.1, "attempts": 1, "change": 0.01}
    artifacts = {"language_scores": recorded["language_scores"], "language_solves": Recorded(solves=solves)}
    config = RunConfig(validation=ValidationConfig(subject=Subject.language))
    found = studies(config, artifacts)["solved"]  # type: ignore[arg-type]
    assert list(found["methods"]) == ["identity", "ekfac"]
    assert found["methods"]["ekfac"]["pearson"]["values"] == pytest.approx([1.0] * 3)
    assert found["methods"]["ekfac"]["slope"]["values"] == pytest.approx([0.5] * 3)


def test_everything_that_a_language_model_records_is_shown(recorded: dict[str, Recorded]) -> None:
    config = RunConfig(validation=ValidationConfig(subject=Subject.almanac))
    found = {name: study for name, study in studies(config, recorded).items() if study}  # type: ignore[arg-type]
    json.dumps(found, allow_nan=False)
    document = network_document() | {"studies": found}
    shown = [section.name for section in sections(document)]
    expected = [
        "agreement",
        "differences",
        "time",
        "response",
        "iterations",
        "datamodels",
        "removal",
        "tracing",
        "scale",
    ]
    assert shown == expected
    assert [row["iterations"] for row in found["iterations"]] == [1, 2, 3]
    assert set(found["agreement"]["methods"]) == {*SOLVERS, "lissa", "exact", "bm25"}
    assert found["agreement"]["methods"]["exact"]["pearson"]["mean"] > 0.9
    assert found["removal"]["methods"]["ekfac"]["over_bm25"]["mean"] is not None
    assert {name for name, _, _ in figures([document])} >= {"agreement", "iterations", "scale", "tracing", "removal"}
    assert terminal(document)


# --- the page of results ----------------------------------------------------------------------------------------------


def test_a_command_has_what_was_set_beside_its_experiment() -> None:
    settings = ["experiment=mnist", "validation.points=7", "factors.damping_factor=0.5", "seed=3"]
    config = compose_config(settings, needs=validation_paths)
    document = {"name": "validate_mnist", "subject": "mnist", "config": plain(config)}
    assert changes(document) == ["validation.points=7", "factors.damping_factor=0.5"]
    document["config"]["corpus"]["limit"] = 24
    assert changes(document)[0] == "corpus.limit=24"


def test_the_page_of_results_is_filled(tmp_path: Path) -> None:
    page = tmp_path / "validation.md"
    shutil.copy(ROOT / "docs/results/validation.md", page)
    documents = [network_document(), network_document("validate_energy", "energy", 0.1)]
    for _ in range(2):
        write_section(page, "provenance", "of an earlier time")
    fill(page, [*documents, language_document(), facts_document()])
    text = page.read_text(encoding="utf-8")
    assert "Not measured yet." not in text
    assert "of an earlier time" not in text
    pictures = [line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"validation-agreement.svg", "validation-time.svg"} <= set(pictures)
    for picture in pictures:
        assert 0 < (tmp_path / picture).stat().st_size < 300_000
    assert not list(tmp_path.glob("*.png"))
    assert "| Energy | `whence validate experiment=energy" in text
    for section in sections(documents[0]):
        if section.name in ("datamodels", "removal"):
            assert text.count(section.about[0]) == 1
