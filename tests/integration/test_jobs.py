"""`ray job submit` against a head that `ray start --head` started: its logs, its end, and what the next job finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.integration.clusters import OPEN, PATIENCE, RAY, Node, free_port, wait_until
from tests.integration.processes import ROOT
from tests.integration.world import World, documents, run_locally, write_lines

PACKAGES = ("conf", "influence", "actors", "pipelines")
MOMENT = 60.0  # seconds in which a job that is told to stop has stopped, on a machine under load
SLOWLY: dict[str, Any] = {
    "corpus__sequence_length": 40,
    "prefilter__kind": "none",
    "unfiltered__kind": "all",
    "scan__batch_size": 1,
    "scan__shard_sequences": 16,
    "cluster__address": "auto",
    "cluster__num_cpus": None,
    "cluster__progress_seconds": 1,
}


class Head:
    """A head with a job server, and jobs that the command line sends it."""

    def __init__(self, folder: Path) -> None:
        """Start it; the code is not on its path, so that a job has only what it brings along."""
        self.url = f"http://127.0.0.1:{free_port()}"
        words = ["--head", f"--port={free_port()}", f"--temp-dir={folder}", "--num-cpus=4"]
        words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        words += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.node = Node(*words, output=folder / "head.txt", PYTHONPATH="", PATH=path)
        wait_until(self._answers, pause=1.0)

    def submit(self, name: str, *words: str, working_dir: Path = ROOT) -> Job:
        """`ray job submit --working-dir . -- WORDS`, in that folder."""
        flags = ["--no-wait", "--submission-id", name, "--address", self.url, "--working-dir", "."]
        subprocess.run(
            [*RAY, "job", "submit", *flags, "--", *words],
            env=os.environ | OPEN,
            cwd=working_dir,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
        return Job(JobSubmissionClient(self.url), name)

    def _answers(self) -> bool:
        try:
            return JobSubmissionClient(self.url).list_jobs() == []
        except (ConnectionError, RuntimeError):
            return False


class Job:
    """A job that was sent."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name = client, name

    @property
    def logs(self) -> str:
        """What it has said so far."""
        return self._client.get_job_logs(self._name)

    @property
    def status(self) -> JobStatus:
        """Whether it has ended, and how."""
        return self._client.get_job_status(self._name)

    def goes_on_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, while the job is at work."""

        def reached() -> bool:
            if condition():
                return True
            assert not self.status.is_terminal(), self.logs
            return False

        wait_until(reached, pause=0.01)

    def ends(self) -> JobStatus:
        """Wait until it has ended."""
        wait_until(lambda: self.status.is_terminal(), seconds=2 * PATIENCE, pause=1.0)
        return self.status

    def stop(self) -> float:
        """What `ray job stop` asks for; returns the seconds until it had stopped."""
        began = time.monotonic()
        self._client.stop_job(self._name)
        assert self.ends() == JobStatus.STOPPED, self.logs
        return time.monotonic() - began


@contextmanager
def started_head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    head = Head(folder)
    try:
        yield head
    finally:
        head.node.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One head for the tests of this file."""
    with started_head() as found:
        yield found


def done(store: Path, kind: str, pattern: str) -> list[Path]:
    """Committed parts of a kind's unfinished artifact."""
    return sorted(store.glob(f"{kind}/*/{pattern}"))


@pytest.mark.slow
def test_a_job_that_was_stopped_is_continued_by_the_next_one(
    head: Head, world: World, ray_session: None, tmp_path: Path
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", ({"text": text} for text in documents(600, seed=11)))
    changes = SLOWLY | {"corpus__path": str(corpus)}
    alone = {**changes, "cluster__address": "local", "cluster__num_cpus": 4}
    undisturbed = run_locally(world.config(tmp_path / "undisturbed", **alone), tmp_path / "0")
    store = tmp_path / "store"
    words = ["python", "-m", "pipelines", "trace", *world.overrides(store, **changes)]

    def submit(number: int) -> Job:
        return head.submit(f"trace-{number}", *words, f"hydra.run.dir={tmp_path / str(number)}")

    first = submit(1)
    first.goes_on_until(lambda: len(done(store, "covariance", "**/done.json")) >= 2)
    assert first.stop() < MOMENT
    kept = {path: path.stat().st_mtime_ns for path in done(store, "covariance", "**/done.json")}
    assert 2 <= len(kept) < 16
    assert not list(store.glob("covariance/*/artifact.json"))
    assert "sequences: computed" in first.logs
    assert "whence trace: terminated. What was committed stays" in first.logs
    assert not list((store / "claims").glob("*.json")), "a claim of the stopped job is in the next one's way"

    second = submit(2)
    second.goes_on_until(lambda: len(done(store, "scores", "shard-*.parquet")) >= 2)
    scanned = {path: path.stat().st_mtime_ns for path in done(store, "scores", "shard-*.parquet")}
    second.stop()
    assert "covariance: goes on from" in second.logs

    third = submit(3)
    assert third.ends() == JobStatus.SUCCEEDED, third.logs
    said = third.logs
    assert "taking over" not in said
    assert "covariance: cached" in said
    assert "scores: goes on from" in said
    assert "gradient scan" in said, "no line of progress"
    assert {path: path.stat().st_mtime_ns for path in scanned} == scanned
    assert undisturbed.table() in said
    scores = pq.read_table(tmp_path / "3" / "scores")
    assert scores.equals(undisturbed.scores_table())


@pytest.mark.slow
def test_workers_run_the_code_that_the_job_brought(head: Head, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / ".whence").mkdir()
    (tmp_path / ".whence" / "large").write_text("not shipped")
    with (tmp_path / "actors" / "__init__.py").open("a") as file:
        file.write("\nCHANGED = 'brought along'\n")
    script = "import os, ray, actors; ray.init(); there = lambda: (__import__('actors').CHANGED, os.listdir('.'));"
    script += "print(ray.get(ray.remote(there).remote()))"
    job = head.submit("code", "python", "-c", script, working_dir=tmp_path)
    assert job.ends() == JobStatus.SUCCEEDED, job.logs
    assert "brought along" in job.logs
    assert ".whence" not in job.logs


@pytest.mark.slow
def test_a_store_that_would_go_away_with_the_job_is_refused(head: Head, world: World, tmp_path: Path) -> None:
    overrides = [*world.overrides(tmp_path / "store", **SLOWLY), "store=.whence/store"]
    job = head.submit("relative", "python", "-m", "pipelines", "trace", *overrides)
    assert job.ends() == JobStatus.FAILED
    assert "store=.whence/store: is a folder below the current one" in job.logs
