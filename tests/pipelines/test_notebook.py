"""A run in a notebook: what it shows, and its tables."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.store import Store
from pipelines.report.notebook import heat
from pipelines.runner import StageOutcome
from pipelines.tracing import TraceResult
from tests.pages import Markup
from tests.runs import Size, query, query_ids, row, summary_of, write_plain_run, write_run

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\n\u202e</bdi></table><script>alert(1)</script>"


def result_of(folder: Path, summary: dict | None = None) -> TraceResult:
    return TraceResult(folder, summary or summary_of(), {})


def test_what_a_notebook_shows_is_escaped(tmp_path: Path):
    summary = summary_of(queries=[query(HOSTILE, prompt=HOSTILE, completion=HOSTILE)])
    write_plain_run(tmp_path / "a", summary, [row(HOSTILE, 1, text=HOSTILE, feed=HOSTILE), row(HOSTILE, 4)])
    write_plain_run(tmp_path / "b", summary_of(queries=[query("one")]), [row("one", 1), row("one", 4)])
    ours, plain = (Markup(result_of(tmp_path / name)._repr_html_()) for name in "ab")
    assert ours.tags == plain.tags
    assert ours.text.count("<img src=x onerror=alert(1)>") == 5
    assert not re.search("[\x1b\u202e]", ours.text)
    write_plain_run(tmp_path / "c", summary_of(queries=[query("one")]), [row("one", 1, score=-12345.6)])
    assert "<td>\u221212,346<td>" in result_of(tmp_path / "c")._repr_html_()
    assert plain.tags.count("tr") == 3  # the head, the query, its first sequence; the fourth is beyond what is shown


def test_a_notebook_shows_the_strongest_tokens_in_their_colours(tmp_path: Path):
    write_run(tmp_path, Size(queries=14, top=4, bottom=2, tokens=60))
    shown = result_of(tmp_path)._repr_html_()
    assert "one before the token predicted" in shown
    assert "and 2 queries more" in shown
    assert shown.count("rgba(") > 12 * 3
    assert Markup(shown).tags.count("tr") == 1 + 12 * (1 + 3)
    assert "script" not in Markup(shown).tags


def test_colours_are_shares_of_the_strongest_token():
    text = heat(["a", " b", " c", " d"], np.array([4.0, -8.0, 0.1, 2.0], np.float32))
    assert re.findall(r"rgba\(([\d,]+),([\d.]+)\)", text) == [
        ("239,90,69", "0.40"),
        ("40,160,150", "0.80"),
        ("239,90,69", "0.20"),
    ]
    assert "</span> c<span" in text  # too faint for a colour
    assert [part.count("dashed") for part in text.split("</span>")] == [0, 1, 0, 0]  # what lowers it, underlined
    long = heat([f" {n}" for n in range(100)], np.eye(100, dtype=np.float32)[70], tokens=10)
    assert Markup(long).text == "…  65 66 67 68 69 70 71 72 73 74 …"


def test_tables_of_a_whole_run(tmp_path: Path):
    size = Size(queries=2, top=4, bottom=3)
    result = result_of(write_run(tmp_path, size))
    assert (len(result.top), len(result.bottom)) == (8, 6)
    assert set(result.survival.column("feed").to_pylist()) == {"unfiltered", "bm25"}
    mine = result.attribution(query_ids(size)[1])
    assert mine.column("query_id").unique().to_pylist() == [query_ids(size)[1]]
    assert (len(mine), len(result.attribution())) == (7, 14)
    assert max(result.frame("bottom")["score"].tolist()) < 0
    assert result.frame().shape == (8, len(result.top.column_names))


def test_tables_of_a_run_without_later_steps_are_empty(tmp_path: Path):
    result = result_of(write_plain_run(tmp_path, summary_of(), [row("one", 1)]))
    assert [len(table) for table in (result.bottom, result.attribution(), result.survival)] == [0, 0, 0]
    assert result.bottom.schema.names == result.top.schema.names


def test_scores_as_a_frame_have_a_column_a_query(tmp_path: Path):
    artifact = Store(str(tmp_path / "store")).folder("scores", "0" * 64)
    values = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0, 3.0, 4.0], pa.float32()), 2)
    artifact.write_table(
        "shard-000000.parquet", pa.table({"sequence_id": [5, 6], "feed": ["bm25"] * 2, "scores": values})
    )
    artifact.commit({}, {}, {}, 0.0)
    outcome = StageOutcome(artifact, False, 1.0, {}, {})
    frame = TraceResult(tmp_path, summary_of(), {"scores": outcome}).frame("scores")
    assert frame.columns.tolist() == ["sequence_id", "feed", "one", "two"]
    assert frame["two"].tolist() == [2.0, 4.0]


def test_a_frame_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = result_of(write_run(tmp_path))
    with pytest.raises(ValueError, match=r"name='tops': allowed: attribution, bottom, scores, survival, top"):
        result.frame("tops")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pandas" else found(name))
    with pytest.raises(ImportError, match="pip install pandas"):
        result.frame()
    assert len(result.top) == pq.read_metadata(tmp_path / "top.parquet").num_rows
