"""SIGKILL for a whole run, driver, raylet and workers, in the middle of two stages; then it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.pool import LocalPool
from tests.integration import world as world_module
from tests.integration.processes import command, kill, wait_until
from tests.integration.test_invariances import same_bits
from tests.integration.world import World, cached, documents, fork, run_locally, write_lines

SLOWLY = {
    "corpus__sequence_length": 40,
    "prefilter__kind": "none",
    "unfiltered__kind": "all",
    "scan__batch_size": 1,
    "scan__shard_sequences": 16,
}


def parts(store: Path, kind: str, pattern: str) -> list[Path]:
    """The committed parts of the one unfinished artifact of a kind."""
    return sorted(store.glob(f"{kind}/*/parts/{pattern}"))


def scanned(store: Path) -> list[Path]:
    """The shards of the one unfinished artifact of scores that are finished."""
    return sorted(store.glob("scores/*/shard-*.parquet"))


def killed_at(world: World, store: Path, folder: Path, changes: dict, reached: Callable[[], bool]) -> str:
    """Run the command, kill it and all its processes as soon as something is reached, and return what it said."""
    output = folder / "output.txt"
    with command("trace", *world.overrides(store, **changes), run_dir=folder) as process:
        wait_until(reached, process, output)
        kill(process)
    return output.read_text()


@pytest.mark.slow
def test_a_run_that_was_killed_twice_goes_on_and_ends_with_the_same_bits(
    world: World, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    corpus = write_lines(tmp_path / "corpus.jsonl", ({"text": text} for text in documents(600, seed=11)))
    changes: dict[str, Any] = SLOWLY | {"corpus__path": str(corpus)}
    undisturbed = run_locally(world.config(tmp_path / "undisturbed", **changes), tmp_path / "0")
    store = fork(tmp_path / "undisturbed", tmp_path / "store", ("layers", "sequences"))

    killed_at(world, store, tmp_path / "1", changes, lambda: len(parts(store, "covariance", "*/*/done.json")) >= 2)
    assert 2 <= len(parts(store, "covariance", "*/*/done.json")) < 14
    assert not list(store.glob("covariance/*/artifact.json"))

    said = killed_at(world, store, tmp_path / "2", changes, lambda: len(scanned(store)) >= 2)
    assert "covariance: goes on from" in said
    assert "taking over covariance" in said
    record = json.loads(next(store.glob("covariance/*/artifact.json")).read_text())
    assert record["extra"]["resumed"] is True
    second = scanned(store)
    written = {path: path.stat().st_mtime_ns for path in second}
    assert not list(store.glob("scores/*/artifact.json"))

    dealt: list[str] = []

    class Watched(LocalPool):
        def run(self, method: str, tasks: Sequence[Any], *rest: Any) -> None:
            dealt.extend(str(task) for task in tasks if method == "scan")
            super().run(method, tasks, *rest)

    monkeypatch.setattr(world_module, "LocalPool", Watched)
    with caplog.at_level("INFO"):
        result = run_locally(world.config(store, **changes), tmp_path / "3")
    assert {name for name, was in cached(result).items() if not was} == {
        "scores",
        "agreement",
        "top",
        "attribution",
        "tails",
    }
    shards = result.summary["stages"]["scores"]["counts"]["shards"]
    assert len(dealt) == shards - len(second)
    assert {path: path.stat().st_mtime_ns for path in second} == written
    assert "scores: goes on from" in caplog.text
    assert same_bits(result, undisturbed)
