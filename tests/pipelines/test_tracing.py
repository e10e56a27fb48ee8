"""What a run leaves, from artifacts that are there already: no model and no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import ChecksumError
from actors.store import Artifact, Store
from conf.schema import ModelConfig, RunConfig
from pipelines import tracing
from pipelines.runner import StageOutcome
from pipelines.stages import tails
from pipelines.stages.attributed import SCHEMA as ATTRIBUTION
from pipelines.stages.top import SCHEMA
from pipelines.tracing import render_table, run_trace

HOSTILE = "<img src=x>\x1b[31m\n\u202e"
QUERY = {"query_id": "one", "prompt": "The sea", "completion": " is", "contrast": None, "measured": -1.0}

TAILS = {
    "feeds": {"bm25": {"count": 4, "fits": {}, "reason": "few"}},
    "needed": {"reason": "few"},
    "share": [],
    "recall": {"reason": "few"},
}


def row(rank: int, query: str = "one", text: str = "text") -> dict[str, Any]:
    found = {"query_id": query, "rank": rank, "sequence_id": rank, "feed": "bm25", "score": 1.0 / rank}
    return found | {"bm25_score": 0.5, "document_id": "file:1", "offset": 0, "text": text}


def attributed(rank: int) -> dict[str, Any]:
    found = {"query_id": "one", "side": "top", "rank": rank, "sequence_id": rank, "score": 1.0 / rank, "total": 0.5}
    found |= {"pieces": ["te", "xt"], "before": "", "after": "", "sparsity": 1.0, "spurious": True, "layers": [0.5]}
    return found | {key: [0.5, 0.0] for key in ("tokens", "matrix", "output_tokens", "input_tokens")}


class Finished:
    """Stands in for the runner: every artifact is committed already."""

    shards = 2

    def __init__(self, store: Store, *_: object) -> None:
        self._store = store

    def run(self) -> dict[str, StageOutcome]:
        names = ("layers", "sequences", "candidates", "convergence", "fidelity", "scores", "agreement", "top")
        names += ("attribution", "tails")
        return {name: self._outcome(name) for name in names}

    def _outcome(self, name: str) -> StageOutcome:
        artifact = self._store.folder(name, f"{self.shards}" * 64)
        if not artifact.committed:
            getattr(self, name)(artifact)
            artifact.commit({}, {}, {}, 0.0)
        counts = {"sequences": 4, "tokens": 100}
        extra = {"coverage": 0.5, "description": "two layers", "replica_seconds": 4.0}
        return StageOutcome(artifact, True, 2.0 if name == "scores" else 0.0, counts, extra)

    def layers(self, artifact: Artifact) -> None:
        artifact.write_json("selection.json", {})

    def sequences(self, artifact: Artifact) -> None:
        index = {"sequences": 4, "tokens": 100, "documents": 3, "skipped": {"malformed JSON": 1}, "shards": []}
        artifact.write_json("index.json", index)

    def convergence(self, artifact: Artifact) -> None:
        artifact.write_json("convergence.json", {"samples": 4, "reason": "few"})

    def fidelity(self, artifact: Artifact) -> None:
        artifact.write_json("fidelity.json", {})

    def agreement(self, artifact: Artifact) -> None:
        artifact.write_json("agreement.json", {})

    def candidates(self, artifact: Artifact) -> None:
        artifact.write_json("index.json", {"per_feed": {"bm25": 4, "unfiltered": 0}, "files": [{"name": "x"}]})

    def scores(self, artifact: Artifact) -> None:
        for shard in range(self.shards):
            scores = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0], pa.float32()), 1)
            table = {"sequence_id": [2 * shard, 2 * shard + 1], "feed": ["bm25"] * 2, "scores": scores}
            artifact.write_table(f"shard-{shard:06d}.parquet", pa.table(table))
        artifact.write_json("queries.json", [QUERY | {"ranks": {"a": 3, "b": 4}, "predicted_fidelity": 0.9}])

    def top(self, artifact: Artifact) -> None:
        artifact.write_table("top.parquet", pa.Table.from_pylist([row(1), row(2)], schema=SCHEMA))

    def attribution(self, artifact: Artifact) -> None:
        for query in range(2):
            rows = [attributed(rank + 1) for rank in range(300)]
            artifact.write_table(f"query-{query:06d}.parquet", pa.Table.from_pylist(rows, schema=ATTRIBUTION))
        layers = {"names": ["h.0.up"], "groups": ["block 0"], "kinds": ["up"]}
        artifact.write_json("attribution.json", {"pairs": 600, "spurious": {"one": 1}, "step": None, "layers": layers})

    def tails(self, artifact: Artifact) -> None:
        artifact.write_json("tails.json", {"queries": {"one": TAILS}})
        artifact.write_table("tails.parquet", tails.SCHEMA.empty_table())


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(tracing, "Runner", Finished)
    monkeypatch.setattr(tracing, "build_steps", lambda config: [])
    return RunConfig(store=str(tmp_path / "store"), model=ModelConfig(path="model"))


def test_the_folder_is_filled_from_the_artifacts(config: RunConfig, tmp_path: Path):
    result = run_trace(config, tmp_path / "runs" / "deep" / "run")
    assert sorted(path.name for path in result.run_dir.rglob("*") if path.is_file()) == [
        "attribution.csv",
        "attribution.parquet",
        "fits.csv",
        "layers.csv",
        "layers.png",
        "layers.svg",
        "map-one.png",
        "map-one.svg",
        "prefilter.csv",
        "queries.csv",
        "report.html",
        "shard-000000.parquet",
        "shard-000001.parquet",
        "share.csv",
        "summary.json",
        "tails.csv",
        "tails.json",
        "tails.parquet",
        "top.csv",
        "top.parquet",
    ]
    assert result.top.to_pylist()[1]["sequence_id"] == 2
    assert sorted(result.scores_table().column("sequence_id").to_pylist()) == [0, 1, 2, 3]
    assert result.query_ids == ["one"]
    assert result.artifact("top").read_table("top.parquet").equals(result.top)


def test_the_attribution_of_all_queries_is_one_table_of_small_groups(config: RunConfig, tmp_path: Path):
    result = run_trace(config, tmp_path / "run")
    with pq.ParquetFile(tmp_path / "run" / "attribution.parquet") as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert groups == [256, 44, 256, 44]
        assert file.schema_arrow.remove_metadata().equals(ATTRIBUTION)
        assert json.loads(file.schema_arrow.metadata[b"layer_groups"]) == ["block 0"]
        assert json.loads(file.schema_arrow.metadata[b"step"]) is None
    assert result.summary["attribution"] == {"pairs": 600, "spurious": {"one": 1}, "step": None}


def test_the_summary_is_what_the_result_holds(config: RunConfig, tmp_path: Path):
    result = run_trace(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result.summary
    assert result.summary["queries"] == [QUERY | {"predicted_fidelity": 0.9, "total_rank": 7}]
    stage = result.summary["stages"]["scores"]
    assert stage["tokens_per_second"] == 50.0
    assert stage["tokens_per_replica_second"] == 25.0
    assert "tokens_per_second" not in result.summary["stages"]["top"]  # no time, no rate
    assert result.summary["corpus"]["skipped"] == {"malformed JSON": 1}
    assert result.summary["convergence"] == {"samples": 4, "reason": "few"}
    assert result.summary["candidates"] == {"per_feed": {"bm25": 4, "unfiltered": 0}}  # not a line a file
    assert result.summary["artifacts"]["top"] == result.artifact("top").uri
    reason = {"reason": "few"}
    short = {"feed": "bm25", "tail": reason, "needed": reason, "share": {}, "recall": reason}
    assert result.summary["tails"] == {"one": short}


def test_a_folder_that_is_used_again_holds_the_new_run_only(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_trace(config, tmp_path / "run")
    monkeypatch.setattr(Finished, "shards", 1)
    again = run_trace(config, tmp_path / "run")
    assert sorted(again.scores_table().column("sequence_id").to_pylist()) == [0, 1]
    monkeypatch.setattr(Finished, "shards", 2)
    assert len(run_trace(config, tmp_path / "run").scores_table()) == 4  # and the first run's artifact is whole


def test_files_are_copied_where_they_cannot_be_linked(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError("another device")

    monkeypatch.setattr(tracing.os, "link", refuse)
    result = run_trace(config, tmp_path / "run")
    assert len(result.scores_table()) == 4


def test_scores_are_linked_without_being_read(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_trace(config, tmp_path / "first")
    read = []
    given = Artifact.read_bytes
    monkeypatch.setattr(Artifact, "read_bytes", lambda self, name: read.append(name) or given(self, name))
    opened = Artifact.open_parquet
    monkeypatch.setattr(Artifact, "open_parquet", lambda self, name: read.append(name) or opened(self, name))
    result = run_trace(config, tmp_path / "second")
    assert not [name for name in read if name.startswith("shard-")]
    assert len(pq.read_table(result.run_dir / "scores")) == 4


def test_a_damaged_table_is_not_copied(config: RunConfig, tmp_path: Path):
    result = run_trace(config, tmp_path / "first")
    flip(Path(result.artifact("top").uri, "top.parquet"))
    with pytest.raises(ChecksumError, match=r"top\.parquet"):
        run_trace(config, tmp_path / "second")


def test_scores_that_were_cut_short_are_not_linked_and_damaged_ones_not_served(config: RunConfig, tmp_path: Path):
    result = run_trace(config, tmp_path / "first")
    path = Path(result.artifact("scores").uri, "shard-000001.parquet")
    flip(path)
    with pytest.raises(ChecksumError, match=r"shard-000001\.parquet"):
        run_trace(config, tmp_path / "second").scores_table()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ChecksumError, match=r"shard-000001\.parquet"):
        run_trace(config, tmp_path / "third")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_table_for_the_terminal_shows_the_head_of_every_query():
    queries = [QUERY, QUERY | {"query_id": "two", "prompt": "", "completion": "word"}]
    rows = [row(rank, query) for query in ("one", "two") for rank in range(1, 9)]
    lines = render_table(rows, queries, shown=3).splitlines()
    assert lines[0] == "one: The sea →  is"
    assert lines[1].split() == ["rank", "influence", "feed", "sequence", "text"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert lines[6] == "two:  → word"
    assert len(lines) == 11


def test_a_terminal_gets_no_control_characters():
    queries = [QUERY | {"query_id": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE}]
    table = render_table([row(1, HOSTILE, HOSTILE)], queries)
    assert not [char for char in table if char != "\n" and not char.isprintable()]
    assert len(table.splitlines()) == 3
