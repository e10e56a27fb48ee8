"""A whole trace: what it leaves, that brute force gives the same scores, and what a second run computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.queries import read_queries
from actors.sequences import read_candidates
from pipelines import tracing
from pipelines.tracing import TraceResult, run_trace
from tests.integration.brute import Brute, tokens_of
from tests.integration.world import QUERIES, World, cached, ids, matrix, relative, run_locally, write_lines

FLOAT64 = {"model__dtype": "float64", "scan__product_dtype": "float64", "scan__sum_dtype": "float64"}
SMALL = {"corpus__limit": 40, "prefilter__top": 10, "unfiltered__sequences": 20}
FACTORS = {"layers", "sequences", "covariance", "eigenbasis", "correction"}
MEASURED = {"fidelity", "agreement"}  # nothing depends on these
SCORED = {"scores", "top", "attribution", "tails"} | MEASURED
ASKED = {"gradients", "convergence"}  # all that depends on the queries and on no factor
STEPS = FACTORS | ASKED | {"ihvp", "queries", "candidates"} | SCORED


def test_the_run_folder_holds_what_was_promised(traced: TraceResult):
    assert sorted(path.name for path in traced.run_dir.iterdir()) == [
        "attribution.parquet",
        "plots",
        "report.html",
        "scores",
        "summary.json",
        "tables",
        "tails.json",
        "tails.parquet",
        "top.parquet",
    ]
    assert sorted(path.name for path in (traced.run_dir / "scores").iterdir()) == [
        f"shard-{number:06d}.parquet" for number in range(traced.summary["stages"]["scores"]["counts"]["shards"])
    ]
    scores = pq.read_table(traced.run_dir / "scores")
    assert scores.column_names == ["sequence_id", "feed", "scores"]
    assert len(scores) == traced.summary["candidates"]["sequences"]
    assert traced.query_ids == [query["query_id"] for query in QUERIES]


def test_the_summary_says_what_ran_for_how_long_and_where_it_is(traced: TraceResult):
    summary = json.loads((traced.run_dir / "summary.json").read_text())
    assert {"torch", "ray", "transformers", "python"} <= summary["versions"].keys()
    assert summary["stages"].keys() == summary["artifacts"].keys() == STEPS
    assert all(Path(uri, "artifact.json").exists() for uri in summary["artifacts"].values())
    for stage in ("sequences", "covariance", "correction", "scores"):
        entry = summary["stages"][stage]
        assert entry["seconds"] > 0
        assert entry["tokens_per_second"] == pytest.approx(entry["counts"]["tokens"] / entry["seconds"])
    sequences = tokens_of(traced.artifact("sequences"))
    assert summary["corpus"]["sequences"] == len(sequences)
    assert summary["corpus"]["tokens"] == sum(len(row) for row in sequences)
    assert summary["corpus"]["documents"] == 120
    assert summary["corpus"]["skipped"] == {}
    assert summary["stages"]["covariance"]["counts"] == {
        "sequences": len(sequences),
        "tokens": sum(len(row) - 1 for row in sequences),
        "excluded": 0,
    }
    assert summary["coverage"] == pytest.approx(6 * 16 * 24 / 16_720)
    assert summary["fidelity"] == summary["agreement"] == summary["convergence"] == summary["excluded"] == {}


def test_scores_equal_brute_force_in_float32(world: World, traced: TraceResult):
    brute = Brute(world.root / "llama", tokens_of(traced.artifact("sequences")))
    scores = traced.scores_table()
    expected = brute.scores(read_queries(world.config(world.root)))
    assert relative(matrix(scores), expected[ids(scores)]) < 1e-4
    assert matrix(scores).dtype == np.float32


@pytest.fixture(scope="module")
def exact(world: World, traced: TraceResult, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`exact(**changes)`: a run in float64 on a part of the corpus, its scores and the queries' tokens."""

    def run(**changes: Any) -> tuple[TraceResult, list]:
        config = world.config(store, model__path=str(world.root / "gpt2"), **FLOAT64, **SMALL, **changes)
        return run_locally(config, tmp_path_factory.mktemp("exact")), read_queries(config)

    return run


@pytest.fixture(scope="module")
def brute(world: World, exact: Any) -> Brute:
    return Brute(world.root / "gpt2", tokens_of(exact()[0].artifact("sequences")))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factors__blocks": 2},
        {"factors__damping_factor": 0.01},
        {"factors__solver": "kfac"},
        {"factors__solver": "identity"},
        {"queries__measurement": "contrast"},
        {"queries__measurement": "sequence_log_probability"},
        {"scan__contraction": "factored", "queries__fidelity": 1.0, "queries__fidelity_sample": 0},
    ],
    ids=str,
)
def test_scores_equal_brute_force_in_float64(exact: Any, brute: Brute, changes: dict):
    result, queries = exact(**changes)
    given = {name.removeprefix("factors__"): value for name, value in changes.items() if name.startswith("factors__")}
    scores = result.scores_table()
    assert matrix(scores).dtype == np.float64
    tolerance = 1e-6 if "queries__fidelity" in changes else 1e-8  # factors of compressed queries are float32
    assert relative(matrix(scores), brute.scores(queries, **given)[ids(scores)]) < tolerance


def test_scores_with_the_corpus_own_labels_equal_brute_force(world: World, exact: Any):
    result, queries = exact(factors__labels="empirical")
    brute = Brute(world.root / "gpt2", tokens_of(result.artifact("sequences")), seed=None)
    scores = result.scores_table()
    assert relative(matrix(scores), brute.scores(queries)[ids(scores)]) < 1e-8


def test_top_is_the_head_of_the_sorted_scores(traced: TraceResult):
    scores = traced.scores_table()
    numbers, values = ids(scores), matrix(scores)
    top = traced.top.to_pylist()
    for column, query_id in enumerate(traced.query_ids):
        rows = [row for row in top if row["query_id"] == query_id]
        order = sorted(range(len(numbers)), key=lambda row: (-values[row, column], numbers[row]))[:10]
        assert [row["sequence_id"] for row in rows] == [numbers[row] for row in order]
        assert [row["score"] for row in rows] == [values[row, column] for row in order]
        assert [row["rank"] for row in rows] == list(range(1, 11))


def test_feeds_are_those_of_the_candidates(traced: TraceResult):
    proposed: dict[str | None, dict[int, float]] = {}
    for row in read_candidates(traced.artifact("candidates")).to_pylist():
        proposed.setdefault(row["query_id"], {})[row["sequence_id"]] = row["bm25_score"]
    plain = proposed.pop(None)
    for row in traced.scores_table().to_pylist():
        by_bm25 = any(row["sequence_id"] in found for found in proposed.values())
        by_sample = row["sequence_id"] in plain
        assert row["feed"] == ("both" if by_bm25 and by_sample else "bm25" if by_bm25 else "unfiltered")
        assert by_bm25 or by_sample
    seen = set()
    for row in traced.top.to_pylist():
        mine, by_sample = row["sequence_id"] in proposed[row["query_id"]], row["sequence_id"] in plain
        expected = {(True, True): "both", (True, False): "bm25", (False, True): "unfiltered", (False, False): "other"}
        assert row["feed"] == expected[mine, by_sample]
        assert row["bm25_score"] == pytest.approx(proposed[row["query_id"]].get(row["sequence_id"]))
        seen.add(row["feed"])
    assert seen == {"both", "bm25", "unfiltered", "other"}


def test_text_and_place_of_the_top_are_those_of_the_corpus(world: World, traced: TraceResult):
    lines = [json.loads(line)["text"] for line in (world.root / "corpus.jsonl").read_text().splitlines()]
    everything = "".join(lines)
    for row in traced.top.to_pylist():
        assert row["text"] in everything
        assert row["document_id"].startswith("corpus.jsonl:")
        document = lines[int(row["document_id"].rpartition(":")[2]) - 1]
        if row["offset"] == 0:
            assert row["text"].startswith(document) or document.startswith(row["text"])


class NoCluster:
    """Refuses to start: for runs that need nothing computed."""

    def __init__(self, config: object) -> None:
        raise AssertionError("a cluster was asked for")


def test_a_second_identical_run_computes_nothing(
    world: World, traced: TraceResult, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracing, "Cluster", NoCluster)
    again = run_trace(world.config(own_store, cluster__max_replicas=2, scan__batch_size=3), tmp_path / "again")
    assert cached(again) == dict.fromkeys(STEPS, True)
    assert again.scores_table().equals(traced.scores_table())
    assert again.top.equals(traced.top)
    assert again.report_path.exists()


RANK = {"queries__rank": 4}
LOW = {"scan__product_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("before", "changes", "computed"),
    [
        ({}, {"factors__damping_factor": 0.03}, {"ihvp", "queries"} | SCORED),
        ({}, RANK, {"ihvp", "queries"} | SCORED),
        (RANK, {"queries__rank": 5}, {"queries"} | SCORED),
        (RANK, RANK | {"queries__fidelity_sample": 10}, {"fidelity"}),
        (RANK, RANK | {"queries__fidelity_sample": 0}, {"fidelity"}),
        ({}, {"queries__fidelity_sample": 10}, set()),
        ({}, {"queries__fidelity": 0.95}, {"ihvp", "queries"} | SCORED),
        ({}, {"unfiltered__seed": 1}, {"candidates", "scores", "top", "attribution", "tails"}),
        ({}, {"prefilter__top": 7}, {"candidates", "scores", "top", "attribution", "tails"}),
        ({}, {"scan__top": 3}, {"top", "attribution"}),
        ({}, {"attribution__top": 3}, {"attribution"}),
        ({}, {"tails__bootstraps": 20}, {"tails"}),
        ({}, {"queries__measurement": "contrast"}, {"ihvp", "queries"} | ASKED | SCORED),
        ({}, LOW, STEPS - {"layers", "sequences", "candidates"} - ASKED),
        (LOW, LOW | {"scan__agreement_sample": 5}, {"agreement"}),
        ({}, {"scan__agreement_sample": 5}, set()),
        ({}, {"factors__seed": 1}, STEPS - {"layers", "sequences", "candidates"} - ASKED),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_change_computes_only_what_depends_on_it(
    world: World, own_store: Path, tmp_path: Path, before: dict, changes: dict, computed: set
):
    if before:
        run_locally(world.config(own_store, **before), tmp_path / "before")
    result = run_locally(world.config(own_store, **changes), tmp_path / "run")
    assert {name for name, was in cached(result).items() if not was} == computed


def test_the_seed_of_the_samples_moves_no_score(world: World, own_store: Path, tmp_path: Path):
    """With a solver that draws no labels, the run's seed is that of the samples alone."""
    changes = {
        "factors__solver": "identity",
        **RANK,
        **LOW,
        "queries__fidelity_sample": 20,
        "scan__agreement_sample": 20,
    }
    first = run_locally(world.config(own_store, **changes), tmp_path / "first")
    second = run_locally(world.config(own_store, **changes, seed=3), tmp_path / "second")
    assert {name for name, was in cached(second).items() if not was} == MEASURED
    for name in MEASURED:
        assert first.summary[name]["sample"] == second.summary[name]["sample"] == 20
        assert first.summary[name]["pearson"] != second.summary[name]["pearson"]


def test_other_queries_refit_no_factor(world: World, own_store: Path, tmp_path: Path):
    path = write_lines(tmp_path / "other.jsonl", [{"query_id": "clock", "prompt": "A clock", "completion": " hums."}])
    result = run_locally(world.config(own_store, queries__path=str(path)), tmp_path / "run")
    assert {name for name, was in cached(result).items() if was} - MEASURED == FACTORS
    assert result.query_ids == ["clock"]


def test_an_untouched_corpus_and_model_elsewhere_are_the_same(own_store: Path, tmp_path: Path):
    moved = World.make(tmp_path / "elsewhere")
    result = run_locally(moved.config(own_store), tmp_path / "run")
    assert cached(result) == dict.fromkeys(STEPS, True)
