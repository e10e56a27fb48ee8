"""Files of the store that were altered, cut short or lost, and a disk that fills up: what the user reads."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.errors import ChecksumError, WriteFailed
from actors.pool import LocalPool
from actors.store import Store
from conf.schema import RunConfig
from pipelines import tracing
from pipelines.command import main
from pipelines.graph import build_steps
from pipelines.runner import Runner
from pipelines.stages import scan, tokenise
from pipelines.tracing import TraceResult
from tests.integration import world as world_module
from tests.integration.test_invariances import same_bits
from tests.integration.world import LocalCluster, World, cached, fork, run_locally


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "delete": Path.unlink}
FILES = {
    "layers": "selection.json",
    "sequences": "shard-*.parquet",
    "covariance": "gradient/*.safetensors",
    "eigenbasis": "activation/*.safetensors",
    "correction": "layers/*.safetensors",
    "gradients": "layers/*/*.safetensors",
    "ihvp": "layers/*.safetensors",
    "queries": "layers/*.safetensors",
    "candidates": "block-*.parquet",
    "scores": "shard-*.parquet",
    "top": "top.parquet",
    "tails": "tails.json",
    "attribution": "query-*.parquet",
}


def folder_of(store: Path, result: TraceResult, step: str) -> Path:
    """Where a step's artifact is in a copy of the store."""
    return store.joinpath(*Path(result.artifact(step).uri).parts[-2:])


def downstream(world: World, store: Path, step: str) -> list[str]:
    """The steps that depend on one, directly or not."""
    found = [step]
    for other in build_steps(world.config(store)):
        if set(other.inputs) & set(found):
            found.append(other.name)
    return found[1:]


def forgotten(world: World, store: Path, result: TraceResult, step: str) -> Path:
    """Remove what was made from a step's artifact, so that the next run reads it; returns the artifact's folder."""
    for name in downstream(world, store, step):
        shutil.rmtree(folder_of(store, result, name))
    return folder_of(store, result, step)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", FILES)
def test_a_damaged_file_is_named_and_never_scored(
    world: World, traced: TraceResult, own_store: Path, tmp_path: Path, step: str, damage: str
):
    folder = forgotten(world, own_store, traced, step)
    victim = sorted(folder.glob(FILES[step]))[0]
    DAMAGES[damage](victim)
    with pytest.raises(ChecksumError) as caught:
        run_locally(world.config(own_store), tmp_path / "run")
    said = str(caught.value)
    assert f"{victim}: " in said
    assert f"Remedy: delete the folder {folder} and run again; only this artifact is computed anew" in said
    assert not list((tmp_path / "run").glob("scores/*"))

    shutil.rmtree(folder)  # the remedy
    assert same_bits(run_locally(world.config(own_store), tmp_path / "run"), traced)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_record_is_named(world: World, traced: TraceResult, own_store: Path, tmp_path: Path, damage: str):
    victim = folder_of(own_store, traced, "correction") / "artifact.json"
    DAMAGES[damage](victim)
    with pytest.raises(ChecksumError) as caught:
        run_locally(world.config(own_store), tmp_path / "run")
    assert f"{victim}: the record of this artifact is damaged. Remedy: delete the folder {victim.parent}" in str(
        caught.value
    )


@pytest.mark.parametrize("step", ["covariance", "eigenbasis", "gradients", "scores"])
def test_an_artifact_without_its_record_is_computed_again(
    world: World, traced: TraceResult, own_store: Path, tmp_path: Path, step: str, caplog: pytest.LogCaptureFixture
):
    (folder_of(own_store, traced, step) / "artifact.json").unlink()
    with caplog.at_level(logging.WARNING):
        result = run_locally(world.config(own_store), tmp_path / "run")
    assert [name for name, was in cached(result).items() if not was] == [step]
    assert f"{step}: " in caplog.text
    assert "no checksum was recorded for it; it is unfinished work" in caplog.text
    assert same_bits(result, traced)


def test_as_the_user_reads_it(
    world: World,
    traced: TraceResult,
    own_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr(tracing, "Cluster", LocalCluster)
    monkeypatch.chdir(tmp_path)
    victim = sorted(forgotten(world, own_store, traced, "correction").glob("layers/*"))[0]
    flip(victim)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        status = main(["trace", *world.overrides(own_store), f"hydra.run.dir={tmp_path / 'run'}"])
    finally:
        root.handlers[:], root.level = handlers, level
    out, err = capsys.readouterr()
    assert status == 1, err
    assert f"ihvp: {victim}: its content is not what was written (the SHA-256 differs). Remedy: delete" in err
    assert "Traceback" not in out + err


# --- unfinished work


class Cut(Exception):
    """The end of an attempt, in the middle of a stage."""


def cut_before_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> Iterator[tuple[int, Any]]:
        raise Cut

    monkeypatch.setattr(LocalCluster, "map", cut)


def cut_before_finishing(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoShards(LocalPool):
        def run(self, method: str, tasks: Sequence[Any], *rest: Any) -> None:
            super().run(method, tasks[:2], *rest)
            raise Cut

    monkeypatch.setattr(world_module, "LocalPool", TwoShards)


def cut_before_numbering(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> None:
        raise Cut

    monkeypatch.setattr(tokenise, "_write_index", cut)


UNFINISHED = [
    ("covariance", "parts/*/group-0001/rank-000/*.safetensors", cut_before_merging),
    ("covariance", "parts/*/group-0001/done.json", cut_before_merging),
    ("correction", "parts/*/group-0002/rank-000/*.safetensors", cut_before_merging),
    ("scores", "shard-000001.parquet", cut_before_finishing),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("step", "pattern", "cut"), UNFINISHED)
def test_damaged_parts_are_done_again(
    world: World,
    traced: TraceResult,
    store: Path,
    tmp_path: Path,
    step: str,
    pattern: str,
    cut: Callable[[pytest.MonkeyPatch], None],
    damage: str,
    caplog: pytest.LogCaptureFixture,
):
    kinds = [name for name in traced.outcomes if name != step and name not in downstream(world, store, step)]
    own = fork(store.parent / "untouched", tmp_path / "store", kinds)
    config = world.config(own)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch)
        with pytest.raises(Cut):
            run_locally(config, tmp_path / "cut")
    (victim,) = own.glob(f"{step}/*/{pattern}")
    before = {path: path.stat().st_mtime_ns for path in own.glob(f"{step}/*/shard-*.parquet")}
    DAMAGES[damage](victim)
    with caplog.at_level(logging.WARNING):
        result = run_locally(config, tmp_path / "run")
    assert same_bits(result, traced)
    vouching = victim.suffix == ".json" or step == "scores"
    if not (vouching and damage == "delete"):  # without what vouches for it, work just counts as not done
        assert f"{step}: {victim}: " in caplog.text
        assert "it is unfinished work, of which" in caplog.text
    if step == "scores":
        assert sum(path.stat().st_mtime_ns == when for path, when in before.items() if path.exists()) == 1


def tokenised(config: RunConfig) -> list[pa.Table]:
    """Run no more than the step `sequences`, and read what it made."""
    steps = [step for step in build_steps(config) if step.name == "sequences"]
    artifact = Runner(Store(config.store), steps, config, lambda: LocalCluster(config)).run()["sequences"].artifact
    return [artifact.read_table(shard["name"]) for shard in artifact.read_json("index.json")["shards"]]


@pytest.mark.parametrize("damage", ["flip", "delete"])
@pytest.mark.parametrize("part", ["parts/000001-00000.parquet", "parts/000001.json"])
def test_damaged_parts_of_the_corpus_are_tokenised_again(
    world: World, ray_session: None, tmp_path: Path, part: str, damage: str, caplog: pytest.LogCaptureFixture
):
    config = world.config(tmp_path / "store", corpus__part_bytes=3000)
    with pytest.MonkeyPatch.context() as patch:
        cut_before_numbering(patch)
        with pytest.raises(Cut):
            tokenised(config)
    (victim,) = (tmp_path / "store").glob(f"sequences/*/{part}")
    DAMAGES[damage](victim)
    with caplog.at_level(logging.WARNING):
        found = tokenised(config)
    assert found == tokenised(world.config(tmp_path / "undisturbed", corpus__part_bytes=3000))
    if (part, damage) != ("parts/000001.json", "delete"):
        assert f"sequences: {victim}: " in caplog.text


def test_a_shard_that_is_damaged_again_and_again_stops_the_run(
    world: World, traced: TraceResult, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(forgotten(world, own_store, traced, "scores"))
    given = scan._finish

    def damaging(context: Any, *rest: Any) -> Any:
        flip(Path(context.artifact.uri, "shard-000001.parquet"))
        return given(context, *rest)

    monkeypatch.setattr(scan, "_finish", damaging)
    with pytest.raises(ChecksumError, match=r"^scores: .*/shard-000001\.parquet: .*Remedy: delete the folder"):
        run_locally(world.config(own_store), tmp_path / "run")


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("step", ["covariance", "scores", "sequences"])
def test_a_disk_that_fills_up_is_named_and_a_larger_one_goes_on(
    world: World, traced: TraceResult, store: Path, small_disk: Path, tmp_path: Path, step: str
):
    kinds = [name for name in traced.outcomes if name != step and name not in downstream(world, store, step)]
    own = small_disk / "store"
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    fork(store.parent / "untouched", own, kinds)
    own.mkdir(exist_ok=True)
    page = os.sysconf("SC_PAGE_SIZE")
    used = os.statvfs(small_disk)
    taken = (used.f_blocks - used.f_bfree) * used.f_frsize
    room = {"covariance": 24, "scores": 8, "sequences": 4}[step] * page
    subprocess.run(["mount", "-o", f"remount,size={taken + room}", str(small_disk)], check=True)

    with pytest.raises(WriteFailed) as caught:
        run_locally(world.config(own), tmp_path / "run")
    said = str(caught.value)
    assert str(own) in said
    assert "the disk is full (" in said
    assert "nothing of it was committed. Remedy: free some space, or give another `store`, and run again" in said
    assert not list(own.glob(f"{step}/*/artifact.json"))

    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    result = run_locally(world.config(own), tmp_path / "run")
    assert {name for name, was in cached(result).items() if was} >= set(kinds)
    assert same_bits(result, traced)
