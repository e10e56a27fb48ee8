"""Attribution in whole runs: totals are the scan's scores, texts are the sequences, and ranks move nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.tokeniser import load_tokeniser
from conf.schema import RunConfig
from influence.attribution import SPURIOUS
from pipelines.stages.attributed import SCHEMA
from pipelines.stages.attribution import TOLERANCE
from pipelines.tracing import TraceResult, run_trace
from tests.integration.brute import layers_of, tokens_of
from tests.integration.world import QUERIES, World, run_locally

FLOAT64 = {"model__dtype": "float64", "scan__product_dtype": "float64", "scan__sum_dtype": "float64"}
SMALL = {"corpus__limit": 40, "prefilter__top": 10, "unfiltered__sequences": 20}
VECTORS = ("tokens", "layers", "matrix", "output_tokens", "input_tokens")


def table_of(result: TraceResult) -> pa.Table:
    return pq.read_table(result.run_dir / "attribution.parquet")


def check(result: TraceResult, config: RunConfig, model: str, rounding: float) -> list[dict[str, Any]]:
    """What holds of the table of any run; its rows."""
    table = table_of(result)
    names = [layer.name for layer in layers_of(model)]
    metadata = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
    assert table.schema.remove_metadata().equals(SCHEMA)
    assert metadata["layer_names"] == names
    assert metadata["layer_groups"] == [f"block {name.split('.')[2]}" for name in names]
    assert metadata["layer_kinds"] == [name.split(".")[-1] for name in names]
    assert metadata["step"] == result.summary["attribution"]["step"]
    corpus, tokeniser = tokens_of(result.artifact("sequences")), load_tokeniser(config.model)
    rows = table.to_pylist()
    for row in rows:
        ids = corpus[row["sequence_id"]]
        matrix_TL = np.asarray(row["matrix"], np.float32).reshape(len(ids), len(names)).astype(np.float64)
        scale = np.abs(matrix_TL).sum()
        assert row["total"] == pytest.approx(row["score"], abs=rounding * scale)
        assert matrix_TL.sum() == pytest.approx(row["total"], abs=1e-6 * scale)
        np.testing.assert_allclose(matrix_TL.sum(1), row["tokens"], atol=1e-6 * scale)
        np.testing.assert_allclose(matrix_TL.sum(0), row["layers"], atol=1e-6 * scale)
        assert "".join(row["pieces"]) == tokeniser.decode(ids)
        assert len(row["pieces"]) == len(row["tokens"]) == len(ids)
        tokens_T = np.asarray(row["tokens"])
        assert row["sparsity"] == pytest.approx(np.linalg.norm(tokens_T) / np.abs(tokens_T).sum(), rel=1e-5)
        assert row["spurious"] == (row["sparsity"] > SPURIOUS)
        assert tokens_T[-1] == 0  # the last position predicts nothing
    return rows


def test_the_rows_are_those_of_the_top_table(traced: TraceResult, world: World, store: Path):
    rows = check(traced, world.config(store), "llama", rounding=1e-6)
    top = traced.top.to_pylist()
    for name in ("query_id", "rank", "sequence_id", "score"):
        assert [row[name] for row in rows] == [row[name] for row in top]
    assert {row["side"] for row in rows} == {"top"}
    summary = traced.summary["attribution"]
    assert summary["pairs"] == len(rows) == 10 * len(QUERIES)
    assert summary["sequences"] == len({row["sequence_id"] for row in rows})
    spurious = {
        query: sum(row["spurious"] for row in rows if row["query_id"] == query) for query in summary["spurious"]
    }
    assert summary["spurious"] == spurious
    assert summary["not_finite"] == 0
    assert traced.summary["stages"]["attribution"]["tokens_per_second"] > 0


def test_output_tokens_add_up_and_the_step_is_recorded(traced: TraceResult):
    step = traced.summary["attribution"]["step"]
    assert step["queries"].keys() == {query["query_id"] for query in QUERIES}
    assert step["worst"] == max(max(entry["output"], entry["input"]) for entry in step["queries"].values())
    assert 0 < step["worst"] < TOLERANCE
    assert step["doubtful"] == []
    assert (step["dtype"], step["chosen"]) == ("float32", "for each query")
    for row in table_of(traced).to_pylist():
        outputs_T = np.asarray(row["output_tokens"])
        gap = abs(outputs_T.sum() - row["total"]) / np.abs(outputs_T).sum()
        assert gap <= step["queries"][row["query_id"]]["sum"] + 1e-6
        assert gap < TOLERANCE
        assert (outputs_T[0], row["input_tokens"][-1]) == (0, 0)


def test_what_stands_around_a_sequence_is_what_the_corpus_has_there(traced: TraceResult, world: World, store: Path):
    config, corpus = world.config(store), tokens_of(traced.artifact("sequences"))
    tokeniser = load_tokeniser(config.model)
    whole = tokeniser.decode([token for row in corpus for token in row])  # one part: packed without a break
    for row in table_of(traced).to_pylist():
        here = tokeniser.decode(corpus[row["sequence_id"]])
        assert row["before"] + here + row["after"] in whole
        assert len(row["before"]) == 400 or whole.startswith(row["before"] + here)
        assert len(row["after"]) == 400 or whole.endswith(here + row["after"])


@pytest.fixture(scope="module")
def exact(ray_session: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TraceResult]:
    """GPT-2 in float64, compressed queries that the scan multiplies out, top and bottom."""
    changes = {**FLOAT64, **SMALL, "model__path": str(world.root / "gpt2"), "queries__rank": "3"}
    changes |= {"scan__contraction": "dense"}
    folder = tmp_path_factory.mktemp("exact")
    config = world.config(folder / "store", **changes, scan__bottom=4, scan__top=6, attribution__top=5)
    return config, run_locally(config, folder / "run")


def test_totals_are_the_scores_to_float64(exact: tuple[RunConfig, TraceResult]):
    config, result = exact
    rows = check(result, config, "gpt2", rounding=1e-13)
    assert all(row["rank"] <= 5 for row in rows if row["side"] == "top")
    assert (
        max(result.summary["attribution"]["step"]["queries"][row["query_id"]]["sum"] for row in rows) < 1e-6
    )  # kept in float32


def test_the_bottom_is_taken_apart_too(exact: tuple[RunConfig, TraceResult]):
    _, result = exact
    bottom = pq.read_table(result.run_dir / "bottom.parquet").to_pylist()
    found = [row for row in table_of(result).to_pylist() if row["side"] == "bottom"]
    assert [row["sequence_id"] for row in found] == [row["sequence_id"] for row in bottom]
    scores = result.scores_table()
    for number, query in enumerate(result.query_ids):
        negative = sorted(row[number] for row in scores.column("scores").to_pylist() if row[number] < 0)
        mine = [row for row in bottom if row["query_id"] == query]
        assert [row["score"] for row in mine] == negative[:4]
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
    assert len(bottom) > 2 * len(QUERIES)


def test_nothing_is_taken_apart_where_nothing_is_asked_for(
    ray_session: None, world: World, own_store: Path, tmp_path: Path
):
    result = run_locally(world.config(own_store, attribution__top=0), tmp_path / "run")
    assert result.summary["attribution"] == {}
    assert not (tmp_path / "run" / "attribution.parquet").exists()
    assert not (tmp_path / "run" / "bottom.parquet").exists()
    simple = run_locally(world.config(own_store, attribution__tokens="simple"), tmp_path / "run")
    assert simple.summary["attribution"]["step"] is None
    rows = table_of(simple).to_pylist()
    assert {(row["output_tokens"], row["input_tokens"]) for row in rows} == {(None, None)}


def test_a_lower_precision_is_differentiated_in_float32(ray_session: None, world: World, tmp_path: Path):
    lower = {"model__dtype": "bfloat16", "scan__product_dtype": "bfloat16"}
    config = world.config(tmp_path / "store", **SMALL, **lower, scan__top=4)
    result = run_locally(config, tmp_path / "run")
    step = result.summary["attribution"]["step"]
    assert step["dtype"] == "float32"
    assert step["worst"] < TOLERANCE
    check(result, config, "llama", rounding=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_model_is_taken_apart_as_a_whole_one(ray_session: None, world: World, tmp_path: Path, dtype: str):
    changes: dict[str, Any] = {"model__path": str(world.root / "gpt2"), "queries__rank": "4", "scan__batch_size": 5}
    changes |= SMALL | {"scan__top": 5, "model__dtype": dtype}
    expected = run_locally(world.config(tmp_path / "alone", **changes), tmp_path / "expected")
    found = run_trace(world.config(tmp_path / "store", **changes, cluster__world_size=2), tmp_path / "found")
    tolerance = 5e-3 if dtype == "float32" else 0.1  # of which a step that rounding chose makes most
    assert_same(found, expected, tolerance)


@pytest.mark.slow
def test_ranks_that_share_the_queries_find_the_same(ray_session: None, world: World, tmp_path: Path):
    changes: dict[str, Any] = SMALL | {"scan__top": 5}
    expected = run_locally(world.config(tmp_path / "alone", **changes), tmp_path / "expected")
    sharing = {"cluster__world_size": 2, "cluster__memory_per_rank": 6000, "scan__batch_size": 3}
    found = run_trace(world.config(tmp_path / "store", **changes, **sharing), tmp_path / "found")
    assert_same(found, expected, 5e-3)


def assert_same(found: TraceResult, expected: TraceResult, tolerance: float) -> None:
    """The same pairs, where scores are not too near one another to tell, with the same vectors."""
    by_pair = {(row["query_id"], row["sequence_id"]): row for row in table_of(expected).to_pylist()}
    rows = [row for row in table_of(found).to_pylist() if (row["query_id"], row["sequence_id"]) in by_pair]
    assert len(rows) >= 0.8 * len(by_pair)
    for row in rows:
        other = by_pair[row["query_id"], row["sequence_id"]]
        for name in VECTORS:
            mine, theirs = np.asarray(row[name]), np.asarray(other[name])
            assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs), name
