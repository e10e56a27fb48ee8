"""The attribution stage without a model: how work is cut, what is done again, and what people are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.attributing import CELLS, STEPS, TOKENS, PartReport, read_query, read_steps, write_part
from actors.factors import save_selection
from actors.store import Artifact, Store
from actors.tasks import AttributionTask, Done
from conf.schema import AttributionConfig, AttributionTokens, ModelConfig, RunConfig, ScanConfig
from influence.layers import LayerSelection, TrackedLayer
from pipelines.progress import Progress
from pipelines.stages import attribution
from pipelines.stages.attribution import layer_names
from pipelines.stages.top import SCHEMA as TOP
from pipelines.steps import StageContext
from tests.corpora import byte_model
from tests.integration.world import write_sequences

QUERY_IDS = ("b", "a")  # numbered as they are listed
LENGTH, LAYERS, SEQUENCES = 3, 2, 90
ENTRIES = {0: [4, 2, 80], 1: [2, 71, 5]}  # sequences of each query, best first


class Killed(Exception):
    pass


class Replicas:
    """A pool and a cluster whose replicas make numbers up from pairs; it dies when told to."""

    def __init__(self, fatal: int | None = None) -> None:
        self.dealt: list[tuple[str, AttributionTask]] = []
        self.fatal = fatal

    @property
    def pool(self) -> Replicas:
        return self

    def run(self, method: str, tasks: list[AttributionTask], done: Any, tick: Callable[[int], None]) -> None:
        for task in tasks:
            if len(self.dealt) == self.fatal:
                raise Killed
            self.dealt.append((method, task))
            write_part(task.output, *ROWS[method](task), PartReport(LENGTH * len(task.pairs), 1.0))
            tick(1)
            done(task, Done())

    def map(self, function: Callable[..., Any], arguments: list[tuple]) -> Iterator[tuple[int, Any]]:
        yield from reversed([(position, function(*given)) for position, given in enumerate(arguments)])


def cells_of(sequence_id: int, query: int) -> np.ndarray:
    return np.arange(LENGTH * LAYERS).reshape(LENGTH, LAYERS) + 100.0 * sequence_id + query


def cell_rows(task: AttributionTask) -> tuple[str, int, list[dict]]:
    rows = []
    for sequence_id, query in task.pairs:
        matrix = cells_of(sequence_id, query).astype(np.float32)
        row = {"total": float(matrix.sum()), "tokens": matrix.sum(1), "layers": matrix.sum(0), "matrix": matrix.ravel()}
        rows.append({"query": query, "sequence_id": sequence_id, **row})
    return CELLS, task.part, rows


def step_rows(task: AttributionTask) -> tuple[str, int, list[dict]]:
    errors = {0: 0.5, 1: float("nan")}
    rows = [
        {"query": query, "alpha": 2.0**query, "relative": 0.1, "output": errors[query], "input": 0.0}
        for _, query in task.pairs
    ]
    return STEPS, task.part, rows


def token_rows(task: AttributionTask) -> tuple[str, int, list[dict]]:
    rows = []
    for (sequence_id, query), step in zip(task.pairs, task.steps, strict=True):
        output_T = None if sequence_id == 71 else np.full(LENGTH, step, np.float32)
        row = {"output_tokens": output_T, "input_tokens": np.full(LENGTH, -step, np.float32)}
        rows.append({"query": query, "sequence_id": sequence_id, **row})
    return TOKENS, task.part, rows


ROWS = {"cells": cell_rows, "token_steps": step_rows, "token_influence": token_rows}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    store = Store(str(tmp_path / "store"))
    found = {name: store.folder(name, name[0] * 64) for name in ("layers", "queries", "top")}
    names = ("head", "model.layers.11.mlp.down_proj")
    layers = tuple(TrackedLayer(name, (name,), 2, 2, False, False, name) for name in names)
    save_selection(found["layers"], LayerSelection(layers, (), 8))
    found["queries"].write_json("queries.json", [{"query_id": name} for name in QUERY_IDS])
    rows = [
        {
            "query_id": QUERY_IDS[query],
            "rank": rank,
            "sequence_id": number,
            "score": float(cells_of(number, query).sum()),
        }
        for query, numbers in ENTRIES.items()
        for rank, number in enumerate(numbers, start=1)
    ]
    found["top"].write_table("top.parquet", pa.Table.from_pylist(rows, schema=TOP))
    lowest = [{"query_id": "a", "rank": 1, "sequence_id": 5, "score": -1.0}]
    found["top"].write_table("bottom.parquet", pa.Table.from_pylist(lowest, schema=TOP))
    found["sequences"] = write_sequences(store, [[2 + n % 50, 3, 4] for n in range(SEQUENCES)], shard=16)
    return found


@pytest.fixture
def context_of(inputs: dict[str, Artifact], tmp_path: Path) -> Callable[..., StageContext]:
    model = ModelConfig(path=str(byte_model(tmp_path / "model")))

    def make(replicas: Replicas, bottom: int = 1, **settings: Any) -> StageContext:
        scan = ScanConfig(bottom=bottom, shard_sequences=2)
        config = RunConfig(model=model, scan=scan, attribution=AttributionConfig(**settings))
        output = Store(inputs["top"].store.uri).folder("attribution", "f" * 64)
        return StageContext(config, replicas, output, inputs, partial(Progress, every=1e9, terminal=False))

    return make


def test_every_pair_has_its_row_with_what_was_found_of_it(context_of: Callable[..., StageContext]):
    replicas = Replicas()
    context = context_of(replicas)
    result = attribution.run(context)
    assert result.counts["pairs"] == 7
    assert result.counts["sequences"] == 5
    assert attribution.query_files(context.artifact) == ["query-000000.parquet", "query-000001.parquet"]
    rows = [
        row
        for name in attribution.query_files(context.artifact)
        for row in context.artifact.read_table(name).to_pylist()
    ]
    expected = [("b", "top", 1, 4), ("b", "top", 2, 2), ("b", "top", 3, 80)]
    expected += [("a", "top", 1, 2), ("a", "top", 2, 71), ("a", "top", 3, 5), ("a", "bottom", 1, 5)]
    assert [(row["query_id"], row["side"], row["rank"], row["sequence_id"]) for row in rows] == expected
    for row in rows:
        query = QUERY_IDS.index(row["query_id"])
        np.testing.assert_array_equal(row["matrix"], cells_of(row["sequence_id"], query).ravel())
        assert row["input_tokens"] == [-(2.0**query)] * LENGTH  # each with the step of its query
        assert len(row["pieces"]) == LENGTH
    assert [row["output_tokens"] is None for row in rows] == [row["sequence_id"] == 71 for row in rows]
    assert context.artifact.list("parts/") == []
    assert attribution.in_short(context.artifact)["not_finite"] == 1


def test_a_sequence_is_gone_through_once_for_all_queries(context_of: Callable[..., StageContext]):
    replicas = Replicas()
    attribution.run(context_of(replicas))
    by_method = {method: [task for name, task in replicas.dealt if name == method] for method in ROWS}
    assert [task.pairs for task in by_method["cells"]] == [((2, 0), (2, 1), (4, 0)), ((5, 1), (71, 1)), ((80, 0),)]
    assert [task.pairs for task in by_method["token_steps"]] == [((4, 0), (2, 1))]  # the best of each query
    pairs = [pair for task in by_method["token_influence"] for pair in task.pairs]
    assert pairs == [(2, 0), (4, 0), (80, 0), (2, 1), (5, 1), (71, 1)]  # those of a query side by side


@pytest.mark.parametrize("fatal", range(7))
def test_what_is_finished_is_not_dealt_again(context_of: Callable[..., StageContext], fatal: int):
    whole, cut = Replicas(), Replicas(fatal)
    with pytest.raises(Killed):
        attribution.run(context_of(cut))
    again = Replicas()
    context = context_of(again)
    attribution.run(context)
    dealt = [(method, task.part) for method, task in cut.dealt + again.dealt]
    assert len(dealt) == len(set(dealt)) == 7
    found = context.artifact.read_table("query-000001.parquet")
    for name in [*context.artifact.list()]:
        context.artifact.delete(name)
    attribution.run(context_of(whole))
    assert len(whole.dealt) == 7
    assert context.artifact.read_table("query-000001.parquet").equals(found)


def test_an_attempt_that_was_cut_short_after_its_record_only_tidies(context_of: Callable[..., StageContext]):
    context = context_of(Replicas())
    before = attribution.run(context)
    write_part(context.artifact, STEPS, 0, [], PartReport(1, 1.0))
    again = Replicas()
    assert attribution.run(context_of(again)) == before
    assert again.dealt == []
    assert context.artifact.list("parts/") == []


def test_a_rough_difference_is_warned_of(context_of: Callable[..., StageContext], caplog: pytest.LogCaptureFixture):
    context = context_of(Replicas())
    with caplog.at_level(logging.WARNING):
        attribution.run(context)
    assert "for 'b', 'a': their heatmaps are rough" in caplog.text
    step = attribution.in_short(context.artifact)["step"]
    assert step["doubtful"] == ["b", "a"]
    assert step["worst"] is None  # infinite
    assert step["queries"]["b"]["output"] == 0.5
    assert step["queries"]["a"]["output"] is None
    assert (
        attribution.table_metadata(context.artifact.read_json("attribution.json"))["layer_kinds"]
        == '["head", "down_proj"]'
    )


@pytest.mark.parametrize(
    ("settings", "methods"), [({"top": 0}, set()), ({"tokens": AttributionTokens.simple}, {"cells"})]
)
def test_what_is_not_asked_for_is_not_done(context_of: Callable[..., StageContext], settings: dict, methods: set):
    replicas = Replicas()
    context = context_of(replicas, **settings)
    result = attribution.run(context)
    assert {method for method, _ in replicas.dealt} == methods
    assert bool(attribution.in_short(context.artifact)) == bool(methods)
    assert result.counts["pairs"] == (7 if methods else 0)


def test_fewer_than_all_are_taken_apart(context_of: Callable[..., StageContext]):
    context = context_of(Replicas(), bottom=0, top=1)
    assert attribution.run(context).counts["pairs"] == 2


def test_layers_have_groups_and_kinds():
    names = ["transformer.h.0.mlp.c_fc", "transformer.h.12.mlp.c_proj", "lm_head", "blocks.3"]
    found = layer_names(names)
    assert found["names"] == names
    assert found["groups"] == ["block 0", "block 12", "lm_head", "block 3"]
    assert found["kinds"] == ["c_fc", "c_proj", "lm_head", "3"]


def test_rows_of_a_query_are_read_from_all_parts(tmp_path: Path):
    output = Store(str(tmp_path)).folder("attribution", "0" * 64)
    random = np.random.default_rng(0)
    pairs = [(int(number), int(query)) for number, query in zip(range(60), random.integers(0, 4, 60), strict=True)]
    for part in range(3):
        rows = [
            {"query": query, "sequence_id": number, "output_tokens": None, "input_tokens": [float(number)]}
            for number, query in pairs[part::3]
        ]
        write_part(output, TOKENS, part, rows, PartReport(1, 1.0))
    for query in range(5):
        found = read_query(output, TOKENS, query).to_pylist()
        assert sorted(row["sequence_id"] for row in found) == [number for number, of in pairs if of == query]
        assert all(row["query"] == query and row["input_tokens"] == [row["sequence_id"]] for row in found)
    assert read_steps(output) == {}
