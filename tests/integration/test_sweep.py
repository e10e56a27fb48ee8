"""Sweeps by Hydra's own launcher and as Ray tasks: shared factors are fitted once, and a table ends it."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.command import main
from tests.integration.clusters import OPEN, PATIENCE, Nodes, cluster
from tests.integration.processes import command
from tests.integration.world import World, write_lines

SWEPT = ("queries.rank=2,8", "factors.damping_factor=0.01,0.1")
JOBS = [("2", "0.01"), ("2", "0.1"), ("8", "0.01"), ("8", "0.1")]
SHARED = ("sequences", "covariance", "eigenbasis", "correction", "candidates")
CHANGES: dict[str, Any] = {"unfiltered__kind": "all", "scan__top": 100, "cluster__num_cpus": None}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Hydra replaces the handlers of the process that calls it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="module")
def basic(ray_session: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose jobs ran one after the other."""
    folder = tmp_path_factory.mktemp("basic")
    overrides = world.overrides(folder / "store", **CHANGES, cluster__address="local")
    assert main(["trace", *overrides, "--multirun", *SWEPT, f"hydra.sweep.dir={folder / 'sweep'}"]) == 0
    return folder / "sweep"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def times_computed(folder: Path, stage: str) -> int:
    summaries = [json.loads(file.read_text()) for file in folder.glob("*/summary.json")]
    return sum(not summary["stages"][stage]["cached"] for summary in summaries)


def check_table(folder: Path) -> None:
    """A row a job, with what their summaries and scores say."""
    found = rows(folder)
    assert [(row["queries.rank"], row["factors.damping_factor"]) for row in found] == JOBS
    assert [row["state"] for row in found] == ["done"] * 4
    assert [float(row["rank"]) for row in found] == [2, 2, 8, 8]
    worst = [json.loads((folder / str(job) / "summary.json").read_text())["fidelity"]["minimum"] for job in range(4)]
    assert [float(row["fidelity"]) for row in found] == worst
    for stage in SHARED:
        assert times_computed(folder, stage) == 1, stage
    assert times_computed(folder, "ihvp") == 2
    assert times_computed(folder, "scores") == 4
    stages = json.loads((folder / "0/summary.json").read_text())["stages"]
    assert all(int(row["computed"]) + int(row["cached"]) == len(stages) for row in found)
    agreement = [[float(row[name]) for name in ("top10", "top100", "spearman")] for row in found]
    assert agreement[2] == pytest.approx([1, 1, 1]), "the reference has the highest rank, and comes first among those"
    assert all(0.5 < value < 1 for value in agreement[0])
    assert all(seconds > 0 for seconds in (float(row["seconds"]) for row in found))
    assert "with job 2" in (folder / "sweep.md").read_text()


@pytest.mark.slow
def test_jobs_one_after_the_other(basic: Path) -> None:
    check_table(basic)


@pytest.mark.heavy
def test_jobs_side_by_side_on_a_ray_of_their_own(basic: Path, world: World, tmp_path: Path) -> None:
    words = [*world.overrides(tmp_path / "store", **CHANGES, cluster__address="local"), *SWEPT]
    folder, output = tmp_path / "sweep", tmp_path / "run" / "output.txt"
    launcher = ("--multirun", "hydra/launcher=whence_ray", f"hydra.sweep.dir={folder}")
    with command("trace", *words, *launcher, run_dir=tmp_path / "run") as process:
        assert process.wait(4 * PATIENCE) == 0, output.read_text()
    check_table(folder)
    assert (folder / "sweep.md").read_text() in output.read_text()
    assert "is being computed by" in output.read_text(), "no job waited for what another one computed"
    for number in range(len(JOBS)):
        mine, other = (pq.read_table(sweep / str(number) / "scores") for sweep in (folder, basic))
        assert mine.equals(other)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster that is running: a head without CPUs, and one node of two."""
    monkeypatch.setenv("RAY_AUTH_MODE", OPEN["RAY_AUTH_MODE"])
    with cluster(1, cpus=2) as found:
        yield found


@pytest.mark.heavy
def test_jobs_share_the_few_cpus_of_a_cluster_and_one_that_fails_hides_no_other(
    nodes: Nodes, world: World, tmp_path: Path
) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"query_id": "empty", "prompt": "The mill", "completion": ""}])
    good = world.root / "queries.jsonl"
    changes = CHANGES | {"cluster__address": nodes.address}
    words = [word for word in world.overrides(tmp_path / "store", **changes) if not word.startswith("queries.path=")]
    words += [f"queries.path={good},{bad}", "queries.rank=8,full"]
    folder, output = tmp_path / "sweep", tmp_path / "run" / "output.txt"
    launcher = ("--multirun", "hydra/launcher=whence_ray", f"hydra.sweep.dir={folder}")
    with command("trace", *words, *launcher, run_dir=tmp_path / "run") as process:
        assert process.wait(4 * PATIENCE) == 1, output.read_text()
    found = rows(folder)
    assert [row["state"].partition(":")[0] for row in found] == ["done", "failed"] * 2
    assert all("completion" in row["state"] for row in found[1::2])
    assert [row["rank"] for row in found] == ["8.0", "", "full", ""]
    assert float(found[2]["spearman"]) == pytest.approx(1)
    assert float(found[0]["spearman"]) > 0.9
    assert (folder / "0/report.html").exists()
    assert (folder / "sweep.md").read_text() in output.read_text()
