"""Tables and plots of a run's folder: complete, right, safe to open in a spreadsheet, and nothing left of before."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.errors import ConfigError, WhenceError
from pipelines.export import binned, cell, export, layer_bins, shares
from tests.pipelines.finished import (
    GROUPS,
    HOSTILE,
    KINDS,
    LAYERS,
    attribute,
    describe_tails,
    finished_run,
)

IDS = np.arange(0, 900, 3)
SCORES_NQ = np.random.default_rng(5).standard_t(2.5, (len(IDS), 2)).astype(np.float32)
QUERIES = ("capital:A/../b", HOSTILE.encode("utf-8", "replace").decode())


def whole_run(folder: Path) -> Path:
    finished_run(folder, IDS, SCORES_NQ, QUERIES, text=HOSTILE)
    attribute(folder, ["=1+1", "中", " of", "$x$"] * 5)
    describe_tails(folder, IDS, SCORES_NQ, QUERIES, 100)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run's folder and what was written into it."""
    run = whole_run(tmp_path_factory.mktemp("exported") / "run")
    return run, export(run)


@pytest.fixture
def run(exported: tuple[Path, list[Path]]) -> Path:
    return exported[0]


def table(run: Path, name: str) -> list[dict[str, str]]:
    csv.field_size_limit(10**7)
    with (run / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_written_and_returned(exported: tuple[Path, list[Path]]):
    run, written = exported
    assert sorted(path.relative_to(run) for path in written) == sorted(
        path.relative_to(run) for name in ("tables", "plots") for path in (run / name).iterdir()
    )
    names = {path.name for path in written}
    tables = ("queries", "top", "bottom", "attribution", "layers", "tails", "fits", "share", "prefilter", "survival")
    assert {f"{name}.csv" for name in tables} <= names
    plots = {name for name in names if not name.endswith(".csv")}
    assert {"survival.svg", "survival.png", "share.svg", "layers.svg"} <= plots
    assert len([name for name in plots if name.startswith("map-") and name.endswith(".svg")]) == 2
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)


def test_an_export_is_the_same_again_and_leaves_nothing_of_before(exported: tuple[Path, list[Path]], tmp_path: Path):
    _, written = exported
    again = whole_run(tmp_path / "again")
    (again / "plots").mkdir()
    (again / "plots" / "map-gone.svg").write_text("stale")
    (again / "plots" / "mine.txt").write_text("the user's")
    assert [path.read_bytes() for path in export(again)] == [path.read_bytes() for path in written]
    assert not (again / "plots" / "map-gone.svg").exists()
    assert (again / "plots" / "mine.txt").exists()


def test_a_run_without_later_steps_exports_what_it_has(tmp_path: Path):
    folder = finished_run(tmp_path / "run", IDS, SCORES_NQ)
    (folder / "bottom.parquet").unlink()
    assert sorted(path.name for path in export(folder)) == ["queries.csv", "top.csv"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="finished run"):
        export(tmp_path)
    run = finished_run(tmp_path / "run", IDS, SCORES_NQ)
    (run / "attribution.parquet").write_bytes(b"no parquet")
    with pytest.raises(WhenceError, match=r"attribution\.parquet"):
        export(run)


def test_numbers_stay_numbers_and_are_those_of_the_files(run: Path):
    rows, expected = table(run, "top"), pq.read_table(run / "top.parquet").to_pylist()
    assert [float(row["score"]) for row in rows] == [row["score"] for row in expected]
    assert [int(row["sequence_id"]) for row in rows] == [row["sequence_id"] for row in expected]
    assert {row["bm25_score"] for row in rows} == {""}
    lowest = table(run, "bottom")[0]["score"]
    assert lowest.startswith("-")
    assert float(lowest) == float(SCORES_NQ[:, 0].min())


def test_text_is_no_formula(run: Path):
    first = table(run, "top")[0]
    assert first["text"].startswith("'=cmd|")
    assert "<script>" in first["text"]
    assert "中文 😀" in first["text"]
    cells = [
        value
        for name in ("top", "queries", "attribution", "tails")
        for row in table(run, name)
        for value in row.values()
    ]
    assert not [value for value in cells if value.lstrip()[:1] in ("=", "+", "@")]
    assert not [value for value in cells if value[:1] == "-" and not _is_number(value)]
    assert "\0" not in (run / "tables" / "top.csv").read_text(encoding="utf-8")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (-1.5, -1.5),
        (7, 7),
        (None, ""),
        (float("nan"), ""),
        (True, "true"),
        ("plain", "plain"),
        ("=1", "'=1"),
        ("-1", "'-1"),
        ("+1", "'+1"),
        ("@x", "'@x"),
        ("  =1", "'  =1"),
        ("\t=1", "'\t=1"),
        ("＝1", "'＝1"),
        ("", ""),
        ("a=1", "a=1"),
        ("a\0b", "a\ufffdb"),
    ],
)
def test_cells(value: object, written: object):
    assert cell(value) == written


def test_attribution_is_listed_with_the_feed_of_its_sequence(run: Path):
    rows = table(run, "attribution")
    source = pq.read_table(run / "attribution.parquet").to_pylist()
    assert len(rows) == len(source) == 400
    assert {row["feed"] for row in rows} == {"unfiltered"}
    assert {row["tokens"] for row in rows} == {"20"}
    for row, given in zip(rows, source, strict=True):
        assert float(row["total"]) == given["total"]
        assert row["spurious"] == str(given["sparsity"] > 2 / 3).lower()


def test_layers_are_means_over_the_first_fifty(run: Path):
    rows = [row for row in table(run, "layers") if row["query_id"] == QUERIES[0] and row["side"] == "top"]
    assert [(row["layer"], row["group"], row["kind"]) for row in rows] == list(zip(LAYERS, GROUPS, KINDS, strict=True))
    given = [
        np.array(row["layers"], np.float64)
        for row in pq.read_table(run / "attribution.parquet").to_pylist()
        if row["query_id"] == QUERIES[0] and row["side"] == "top" and row["rank"] <= 50
    ]
    expected = np.mean([values / values.sum() for values in given], axis=0)
    np.testing.assert_allclose([float(row["share"]) for row in rows], expected, rtol=1e-9)
    np.testing.assert_allclose([float(row["influence"]) for row in rows], np.sum(given, axis=0), rtol=1e-9)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)


def test_sequences_against_the_common_sign_have_no_share():
    parts = np.array([[3.0, 1.0], [-0.5, -0.5], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(shares(parts), [[0.75, 0.25], [0.5, 0.5]])
    np.testing.assert_allclose(shares(-parts), shares(parts))


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
def test_bins_of_layers_are_neighbours_and_lose_nothing(most: int):
    names, bins_L = layer_bins(GROUPS, most)
    assert len(names) <= most
    assert (np.diff(bins_L) >= 0).all()
    values = np.random.default_rng(0).normal(size=(5, len(GROUPS)))
    summed = binned(values, bins_L, len(names))
    np.testing.assert_allclose(summed.sum(1), values.sum(1))
    for number in range(len(names)):
        np.testing.assert_allclose(summed[:, number], values[:, bins_L == number].sum(1))


def test_bins_are_named_by_their_ends():
    assert layer_bins([f"block {n}" for n in range(6)], 3)[0] == ["block 0–1", "block 2–3", "block 4–5"]
    assert layer_bins(["embed", "block 0", "head"], 2)[0] == ["embed–block 0", "head"]
    assert layer_bins([], 3)[0] == []


def test_tails_have_a_row_a_feed_and_a_fit(run: Path):
    record = json.loads((run / "tails.json").read_text())["queries"]
    tails = table(run, "tails")
    assert [row["feed"] for row in tails] == ["unfiltered", "bm25"] * 2
    law = record[QUERIES[0]]["feeds"]["unfiltered"]["fits"]["power_law"]
    assert float(tails[0]["alpha"]) == law["alpha"]
    assert [float(tails[0][name]) for name in ("alpha_low", "alpha_high")] == law["interval"]
    fits = table(run, "fits")
    assert [row["distribution"] for row in fits[:3]] == ["power_law", "exponential", "weibull"]
    assert json.loads(fits[1]["parameters"]) == {"scale": 2.0}
    assert float(fits[1]["ratio_to_power_law"]) == 10.0
    assert table(run, "prefilter")[0]["recall_100"] == "0.35"
    prefilter = table(run, "prefilter")[0]
    assert float(prefilter["needed_high"]) == 2e4
    assert (float(prefilter["needed_power_law"]), prefilter["needed_empirical"]) == (12345.6, "")
    assert len(table(run, "survival")) == pq.read_metadata(run / "tails.parquet").num_rows
