"""The table of a sweep, from folders as jobs leave them: whatever became of a job, it has a row."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from pipelines.comparison import compare, load_outcome, rank_correlation
from pipelines.sweep import JobRecord, recorded, swept_values, table_of

LAYERS = 4
IDS = np.arange(0, 300, 2)
RANDOM = np.random.default_rng(3)
SCORES_NQ = RANDOM.normal(size=(len(IDS), 2)).astype(np.float32)


def finished(
    folder: Path,
    scores_NQ: np.ndarray = SCORES_NQ,
    ids: np.ndarray = IDS,
    queries: Sequence[str] = ("one", "two"),
    ranks: Sequence[int | None] = (8, 16),
    computed: int = 1,
    top: int = 100,
) -> Path:
    """The folder of a finished run, as far as it matters here."""
    (folder / "scores").mkdir(parents=True)
    for part, rows in enumerate(np.array_split(np.arange(len(ids)), 3)):
        values = pa.FixedSizeListArray.from_arrays(pa.array(scores_NQ[rows].ravel()), len(queries))
        table = pa.table({"sequence_id": ids[rows], "scores": values})
        pq.write_table(table, folder / "scores" / f"shard-{part:06d}.parquet")
    rows = [
        {"query_id": query, "rank": rank, "sequence_id": int(ids[at])}
        for column, query in enumerate(queries)
        for rank, at in enumerate(np.argsort(-scores_NQ[:, column])[:top], start=1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "top.parquet")
    stages = {"layers": {"cached": computed < 1, "counts": {"layers": LAYERS}}, "scores": {"cached": computed < 2}}
    summary = {
        "stages": stages,
        "queries": [{"query_id": name, "total_rank": rank} for name, rank in zip(queries, ranks, strict=True)],
        "fidelity": {"minimum": 0.97, "mean": 0.98},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def job(sweep: Path, number: int, *overrides: str, state: str = "done", seconds: float = 2.5, error: str = "") -> Path:
    """A job's folder with its record."""
    folder = sweep / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    JobRecord(number, ("model.path=m", *overrides), state, seconds, error).write(folder)
    return folder


def test_a_run_in_numbers(tmp_path: Path) -> None:
    outcome = load_outcome(finished(tmp_path / "a", computed=1))
    assert (outcome.computed, outcome.cached) == (1, 1)
    assert outcome.rank == (8 + 16) / 2 / LAYERS
    assert outcome.fidelity == 0.97
    assert load_outcome(finished(tmp_path / "b", ranks=(None, None))).rank is None


def test_a_run_agrees_with_itself_and_its_opposite_does_not(tmp_path: Path) -> None:
    same = compare(finished(tmp_path / "a"), finished(tmp_path / "b"))
    assert (same.top10, same.top100) == (1, 1)
    assert same.spearman == pytest.approx(1)
    opposite = compare(tmp_path / "a", finished(tmp_path / "c", -SCORES_NQ))
    assert (opposite.top10, opposite.top100) == (0, (2 * 100 - len(IDS)) / 100)
    assert opposite.spearman == pytest.approx(-1)


def test_agreement_is_scipys_and_the_mean_over_queries(tmp_path: Path) -> None:
    others_NQ = SCORES_NQ + RANDOM.normal(size=SCORES_NQ.shape).astype(np.float32)
    found = compare(finished(tmp_path / "a"), finished(tmp_path / "b", others_NQ))
    expected = [spearmanr(SCORES_NQ[:, query], others_NQ[:, query]).statistic for query in (0, 1)]
    assert found.spearman == pytest.approx(np.mean(expected), rel=1e-9)
    shares = [
        len(set(np.argsort(-SCORES_NQ[:, query])[:10]) & set(np.argsort(-others_NQ[:, query])[:10])) / 10
        for query in (0, 1)
    ]
    assert found.top10 == pytest.approx(np.mean(shares))


def test_queries_meet_by_name_and_sequences_by_number(tmp_path: Path) -> None:
    half = IDS[50:] + 0
    other = finished(tmp_path / "b", SCORES_NQ[50:, ::-1], half, queries=("two", "one"))
    found = compare(finished(tmp_path / "a"), other)
    assert found.spearman == pytest.approx(1)
    strangers = compare(tmp_path / "a", finished(tmp_path / "c", queries=("three", "four")))
    assert (strangers.top10, strangers.top100, strangers.spearman) == (None, None, None)


def test_many_sequences_are_thinned_alike(tmp_path: Path) -> None:
    noise_NQ = np.where(IDS[:, None] % 6 == 0, 0, RANDOM.normal(size=SCORES_NQ.shape)).astype(np.float32)
    mine, other = finished(tmp_path / "a"), finished(tmp_path / "b", SCORES_NQ + 9 * noise_NQ)
    assert compare(mine, other).spearman < 0.9
    assert compare(mine, other, most=len(IDS) // 3).spearman == pytest.approx(1)  # multiples of three are the same


def test_short_lists_of_top_sequences_are_not_called_a_hundred(tmp_path: Path) -> None:
    found = compare(finished(tmp_path / "a", top=20), finished(tmp_path / "b"))
    assert (found.top10, found.top100) == (1, None)


def test_equal_scores_have_no_ranks() -> None:
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(rank_correlation(np.ones(1), np.ones(1)))


def test_swept_are_the_settings_in_which_jobs_differ() -> None:
    jobs = [["model.path=m", "queries.rank=8", "seed=1"], ["model.path=m", "queries.rank=full", "seed=1"]]
    assert swept_values(jobs) == [{"queries.rank": "8"}, {"queries.rank": "full"}]
    assert swept_values([["a=1", "+b=2"], ["a=1"]]) == [{"b": "2"}, {}]
    assert swept_values([["x='a=b'"], ["x=c"]]) == [{"x": "'a=b'"}, {"x": "c"}]


def test_every_job_has_a_row(tmp_path: Path) -> None:
    finished(job(tmp_path, 0, "queries.rank=4"), ranks=(16, 16), computed=2)
    job(tmp_path, 1, "queries.rank=5", state="failed", error="a.jsonl, row 3: it is | empty")
    finished(job(tmp_path, 2, "queries.rank=full"), -SCORES_NQ, ranks=(None, None))
    job(tmp_path, 3, "queries.rank=6", state="unfinished", seconds=0)
    finished(job(tmp_path, 10, "queries.rank=8"), ranks=(32, 32))
    table = table_of(tmp_path)
    assert table.reference == 2, "full rank comes before any number"
    assert [row.job.number for row in table.rows] == [0, 1, 2, 3, 10]
    rows = [row.cells() for row in table.rows]
    assert [row["state"] for row in rows] == [
        *("done", "failed: a.jsonl, row 3: it is | empty", "done", "unfinished", "done"),
    ]
    assert [row["rank"] for row in rows] == [4, None, "full", None, 8]
    assert [row["computed"] for row in rows] == [2, None, 1, None, 1]
    assert [row["seconds"] for row in rows] == [2.5, 2.5, 2.5, None, 2.5]
    assert rows[0]["spearman"] == pytest.approx(-1)
    assert rows[2]["spearman"] == pytest.approx(1)
    assert rows[1]["spearman"] is None


def test_what_is_written(tmp_path: Path) -> None:
    finished(job(tmp_path, 0, "queries.rank=4"))
    job(tmp_path, 1, "queries.rank=5", state="failed", error="row 3: it is | empty")
    table_of(tmp_path).write(tmp_path)
    with (tmp_path / "sweep.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["job"], first["queries.rank"], first["state"], first["top10"]) == ("0", "4", "done", "1.0")
    assert (second["state"], second["spearman"]) == ("failed: row 3: it is | empty", "")
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[0].split() == [
        *("|", "job", "|", "queries.rank", "|", "state", "|", "seconds", "|", "computed", "|", "cached", "|", "rank"),
        *("|", "fidelity", "|", "top10", "|", "top100", "|", "spearman", "|"),
    ]
    assert {len(line) for line in lines[:4]} == {len(lines[0])}
    assert "it is \\| empty" in lines[3]
    assert "with job 0" in lines[-1]


def test_a_sweep_of_which_no_job_is_done(tmp_path: Path) -> None:
    job(tmp_path, 0, "seed=1", state="failed", error="no")
    text = table_of(tmp_path).markdown()
    assert "failed: no" in text
    assert "No job is done" in text


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "done", ""),
        (ValueError("first\nsecond"), "failed", "first"),
        (KeyError(), "failed", "KeyError"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_a_job_leaves_its_record(
    error: BaseException | None, state: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"job": {"num": 3}, "runtime": {"output_dir": str(tmp_path)}, "overrides": {"task": ["seed=1"]}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(given))

    def run() -> None:
        with recorded():
            assert JobRecord.read(tmp_path / "job.json").state == "unfinished"
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            run()
    else:
        run()
    record = JobRecord.read(tmp_path / "job.json")
    assert dataclasses.replace(record, seconds=0) == JobRecord(3, ("seed=1",), state, 0, said)
