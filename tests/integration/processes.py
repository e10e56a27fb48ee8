"""Runs of the command in processes of their own, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds that a process under load may take


@contextmanager
def command(*words: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m pipelines WORDS`, in a session of its own of which nothing is left when the block ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (run_dir / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *words, f"hydra.run.dir={run_dir}"],
            cwd=run_dir,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and all that it started, and wait until they are gone."""
    members = [process.pid, *session(process.pid)]
    for pid in dict.fromkeys(members):
        if process.returncode is None or pid != process.pid:
            _kill(pid)
    process.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while left := session(process.pid):
        assert time.monotonic() < deadline, f"processes {left} do not end"
        for pid in left:
            _kill(pid)
        time.sleep(0.05)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def session(leader: int) -> list[int]:
    """The living processes of a session, its leader left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == leader:
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], output: Path) -> None:
    """Wait until something holds, while a process is at work."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.002)


def finished(processes: Sequence[subprocess.Popen[str]], outputs: Sequence[Path]) -> None:
    """Wait until processes have ended well."""
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait(PATIENCE) == 0, output.read_text()
