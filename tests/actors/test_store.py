"""Artifacts: whole or absent, verified on every read, unchangeable once committed, never stale."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from actors import checked
from actors.errors import ChecksumError, ConfigError, StaleArtifact, WriteFailed
from actors.store import Artifact, Store

FINGERPRINT = "0123456789abcdef" * 4
TABLE = pa.table({"sequence_id": pa.array(range(10), pa.int64()), "text": [f"t{i}" for i in range(10)]})


@pytest.fixture(params=["local", "file", "mock", "fsspec"])
def store(request, tmp_path) -> Store:
    name = tmp_path.name
    return Store(
        {
            "local": str(tmp_path / "a store"),
            "file": f"file://{tmp_path}/store",
            "mock": f"mock:///{name}",
            "fsspec": f"memory://{name}",
        }[request.param]
    )


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return Store(str(tmp_path)).folder("covariance", FINGERPRINT)


def commit(artifact: Artifact) -> dict:
    return artifact.commit(config={"samples": 3}, inputs={"tokenise": "f00"}, counts={"rows": 3}, seconds=1.5)


def local(artifact: Artifact, name: str) -> Path:
    return Path(artifact.uri) / name


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_round_trip_before_and_after_commit(store):
    artifact = store.folder("covariance", FINGERPRINT)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    artifact.write_tensors("layers/0.mlp.safetensors", tensors, {"rows": "7"})
    artifact.write_table("shard-00000.parquet", TABLE, row_group_size=4)
    artifact.write_json("index.json", {"shards": [1, 2.5, "é"]})
    artifact.write_bytes("report.html", b"<html>")

    def check() -> None:
        read = artifact.read_tensors("layers/0.mlp.safetensors")
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)
        assert artifact.read_metadata("layers/0.mlp.safetensors") == {"rows": "7"}
        assert artifact.read_table("shard-00000.parquet").equals(TABLE)
        part = artifact.read_table("shard-00000.parquet", columns=["text"], row_groups=[1])
        assert part["text"].to_pylist() == ["t4", "t5", "t6", "t7"]
        with artifact.open_parquet("shard-00000.parquet") as file:
            assert file.num_row_groups == 3
        assert artifact.read_json("index.json") == {"shards": [1, 2.5, "é"]}
        assert artifact.read_bytes("report.html") == b"<html>"
        assert artifact.list() == ["index.json", "layers/0.mlp.safetensors", "report.html", "shard-00000.parquet"]
        assert artifact.list("shard-") == ["shard-00000.parquet"]
        assert artifact.exists("index.json")
        assert not artifact.exists("other.json")

    check()
    assert artifact.record() is None
    assert not artifact.committed
    commit(artifact)
    check()
    assert artifact.committed


def test_record_says_what_made_it(artifact):
    artifact.write_bytes("part", b"12345")
    commit(artifact)

    record = json.loads(local(artifact, "artifact.json").read_text())

    assert record["config"] == {"samples": 3}
    assert record["inputs"] == {"tokenise": "f00"}
    assert record["fingerprint"] == FINGERPRINT
    assert (record["kind"], record["seconds"], record["counts"]) == ("covariance", 1.5, {"rows": 3})
    assert {"torch", "ray", "transformers", "whence", "python"} <= record["versions"].keys()
    assert {"cores", "memory_bytes", "gpus"} <= record["hardware"].keys()
    assert record["files"]["part"]["bytes"] == 5
    assert len(record["files"]["part"]["sha256"]) == 64


def test_a_committed_folder_holds_data_and_record_only(artifact):
    artifact.write_bytes("shards/part", b"12345")
    local(artifact, "shards/.tmp-left-by-a-killed-writer").write_bytes(b"half")

    assert artifact.list() == ["shards/part"]
    commit(artifact)

    left = sorted(str(path.relative_to(artifact.uri)) for path in Path(artifact.uri).rglob("*"))
    assert left == ["artifact.json", "shards", "shards/part"]


def test_what_a_killed_writer_left_of_a_checksum_is_no_file_that_was_lost(artifact):
    artifact.write_json("shards/0.json", {"rows": 3})
    local(artifact, "checksums/.tmp-left-by-a-killed-writer").write_bytes(b"half")
    local(artifact, "checksums/shards/.tmp-left-as-well").write_bytes(b"half")
    assert set(commit(artifact)["files"]) == {"shards/0.json"}


def test_looking_creates_nothing(tmp_path):
    artifact = Store(str(tmp_path / "store")).folder("covariance", FINGERPRINT)

    assert artifact.record() is None
    assert artifact.list() == []
    assert not artifact.exists("x")
    artifact.delete("x")
    assert list(tmp_path.iterdir()) == []


def test_relative_store_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("store").uri == str(tmp_path / "store")


def test_unknown_scheme_names_it_and_the_remedy():
    with pytest.raises(ConfigError, match=r"'nope://bucket/x'.*Remedy: .*s3://"):
        Store("nope://bucket/x").folder("a", FINGERPRINT).record()


def test_pickles_into_another_process(artifact):
    artifact.write_json("index.json", {"n": 1})
    program = "import sys, pickle; a = pickle.load(sys.stdin.buffer); print(a.read_json('index.json')['n'])"

    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(artifact), capture_output=True, check=True
    )

    assert done.stdout.strip() == b"1"


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", ["a.safetensors", "a.parquet", "a.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "append"])
def test_damage_is_named_never_read(artifact, committed, name, damage):
    artifact.write_tensors("a.safetensors", {"x": torch.arange(100.0)})
    artifact.write_table("a.parquet", TABLE)
    artifact.write_json("a.json", list(range(100)))
    if committed:
        commit(artifact)
    readers = {"a.safetensors": artifact.read_tensors, "a.parquet": artifact.read_table, "a.json": artifact.read_json}
    readers[name](name)  # verified once: damage that comes later must be seen all the same

    path = local(artifact, name)
    data = path.read_bytes()
    if damage == "flip":
        flip_bit(path)
    else:
        path.write_bytes(data[:-7] if damage == "truncate" else data + b"x")

    with pytest.raises(ChecksumError) as raised:
        readers[name](name)
    message = str(raised.value)
    assert str(path) in message
    assert f"Remedy: delete the folder {artifact.uri} and run again" in message
    if damage == "truncate":
        assert f"{len(data) - 7:,} bytes where {len(data):,}" in message


def test_a_flipped_bit_in_the_record_is_seen(artifact):
    artifact.write_bytes("part", b"12345")
    commit(artifact)
    path = local(artifact, "artifact.json")
    path.write_text(path.read_text().replace('"rows": 3', '"rows": 2'))

    with pytest.raises(ChecksumError, match=r"artifact\.json: the record of this artifact is damaged"):
        artifact.record()


def test_a_truncated_record_is_seen(artifact):
    commit(artifact)
    path = local(artifact, "artifact.json")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ChecksumError, match=r"artifact\.json"):
        assert artifact.committed


def test_a_damaged_checksum_is_seen(artifact):
    artifact.write_bytes("part", b"12345")
    local(artifact, "checksums/part.json").write_bytes(b"")
    with pytest.raises(ChecksumError, match=r"checksum of part is unreadable.*Remedy: delete"):
        artifact.read_bytes("part")


def test_missing_files(artifact):
    with pytest.raises(FileNotFoundError, match="part has not been written"):
        artifact.read_bytes("part")
    artifact.write_bytes("part", b"12345")
    commit(artifact)
    local(artifact, "part").unlink()
    with pytest.raises(ChecksumError, match=r"part: the file is missing"):
        artifact.read_bytes("part")


def test_a_file_smuggled_in_is_refused(artifact):
    artifact.write_bytes("part", b"12345")
    local(artifact, "other").write_bytes(b"x")
    with pytest.raises(ChecksumError, match="no checksum was recorded"):
        artifact.read_bytes("other")
    with pytest.raises(ChecksumError, match="no checksum was recorded"):
        commit(artifact)


def test_commit_refuses_a_truncated_part(artifact):
    artifact.write_bytes("part", b"12345")
    local(artifact, "part").write_bytes(b"123")
    with pytest.raises(ChecksumError, match="3 bytes where 5"):
        commit(artifact)
    assert not artifact.committed


def test_stale_fingerprint_config_and_inputs(artifact):
    commit(artifact)
    other = Artifact(artifact.store, artifact.kind, FINGERPRINT[:16] + "f" * 48)  # the same folder

    with pytest.raises(StaleArtifact, match=r"fingerprint is '0123.*Remedy: move the folder"):
        other.record()
    assert artifact.record(config={"samples": 3}, inputs={"tokenise": "f00"})
    with pytest.raises(StaleArtifact, match=r"config\.samples is 3, wanted 4"):
        artifact.record(config={"samples": 4})
    with pytest.raises(StaleArtifact, match=r"inputs\.tokenise is 'f00', wanted None"):
        artifact.record(inputs={})
    with pytest.raises(StaleArtifact):
        other.read_bytes("anything")


def test_committed_artifacts_refuse_writes(artifact):
    artifact.write_bytes("part", b"12345")
    commit(artifact)
    for change in (
        lambda: artifact.write_bytes("part", b"x"),
        lambda: artifact.delete("part"),
        lambda: commit(artifact),
    ):
        with pytest.raises(WriteFailed, match="committed and can no longer change"):
            change()
    assert artifact.read_bytes("part") == b"12345"


def test_replacing_unfinished_parts(store):
    artifact = store.folder("covariance", FINGERPRINT)
    for text in (b"first", b"other", b"a third, longer"):
        artifact.write_bytes("part", text)
        assert artifact.read_bytes("part") == text
        with artifact._folder.filesystem.open_input_stream(artifact._verified("part")) as stream:
            assert stream.read() == text
    artifact.delete("part")
    assert not artifact.exists("part")
    assert artifact.list() == []


def test_killed_while_replacing_keeps_the_older_version(artifact, monkeypatch):
    artifact.write_bytes("sums", b"older")
    monkeypatch.setattr(checked.CheckedFolder, "filesystem", _KilledBeforeMovingData())
    with pytest.raises(KeyboardInterrupt):
        artifact.write_bytes("sums", b"newer")
    monkeypatch.undo()

    assert artifact.read_bytes("sums") == b"older"
    commit(artifact)
    assert artifact.read_bytes("sums") == b"older"
    assert not list(Path(artifact.uri).glob(".tmp-*"))


class _KilledBeforeMovingData(LocalFileSystem):
    def move(self, src, dest) -> None:
        if "/checksums/" not in dest:
            raise KeyboardInterrupt
        super().move(src, dest)


def test_disk_full_names_the_file_and_commits_nothing(artifact, monkeypatch):
    artifact.write_bytes("done", b"12345")

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("actors.checked.write_stream", full)
    with pytest.raises(WriteFailed) as raised:
        artifact.write_bytes("layers/1", b"x")
    monkeypatch.undo()

    message = str(raised.value)
    assert message.startswith(f"{artifact.uri}/layers/1: the disk is full")
    assert "nothing of it was committed" in message
    assert "Remedy: free some space" in message
    assert "finished parts are kept" in message
    assert artifact.list() == ["done"]
    assert not list(Path(artifact.uri).rglob(".tmp-*"))


def test_disk_full_as_safetensors_says_it(artifact, monkeypatch):
    def full(*args) -> None:
        raise checked.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WriteFailed, match=r"a\.safetensors: the disk is full"):
        artifact.write_tensors("a.safetensors", {"x": torch.ones(2)})
    assert artifact.list() == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(WriteFailed, match=r"part: the file cannot be written.*Remedy: make the folder writable"):
        Store(str(tmp_path / "store")).folder("a", FINGERPRINT).write_bytes("part", b"x")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "", ".tmp-x", "artifact.json", "checksums/x.json"])
def test_names_stay_in_the_folder(artifact, name):
    with pytest.raises(ValueError, match="name"):
        artifact.write_bytes(name, b"x")


def test_views_and_strided_tensors_are_packed(artifact):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.T, "first": whole[:1], "last": whole[2:], "whole": whole, "again": whole, "empty": whole[:0]}
    artifact.write_tensors("x", tensors)
    read = artifact.read_tensors("x")
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    read["whole"].add_(1)
    assert torch.equal(artifact.read_tensors("x")["whole"], whole)


def test_json_refuses_what_it_cannot_say(artifact):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.write_json("x.json", float("nan"))


def test_each_file_is_hashed_once_per_process(artifact, monkeypatch):
    artifact.write_table("a.parquet", TABLE)
    hashed = []
    digest = checked.file_digest
    monkeypatch.setattr(checked, "file_digest", lambda *args: hashed.append(args) or digest(*args))

    for _ in range(3):
        artifact.read_table("a.parquet")
    commit(artifact)
    artifact.read_table("a.parquet")

    assert len(hashed) == 1


def test_an_empty_table_keeps_its_schema(artifact):
    artifact.write_table("a.parquet", TABLE.slice(0, 0))
    assert artifact.read_table("a.parquet").schema == TABLE.schema


def test_a_committed_artifact_lists_what_it_was_committed_with(artifact):
    artifact.write_bytes("a", b"1")
    artifact.write_bytes("b", b"2")
    commit(artifact)
    local(artifact, "a").unlink()
    local(artifact, "c").write_bytes(b"3")
    assert artifact.list() == ["a", "b"], "a file that was lost must be missed by whoever reads all of them"


@pytest.mark.parametrize("name", ["part", "layers/part"])
def test_commit_misses_a_file_that_was_lost(artifact, name):
    artifact.write_bytes(name, b"12345")
    artifact.write_bytes("other", b"12345")
    local(artifact, name).unlink()
    with pytest.raises(ChecksumError, match=rf"{name}: the file is missing. Remedy: delete the folder"):
        commit(artifact)
    assert not artifact.committed


def test_a_write_that_another_outlived_stays_readable(artifact, monkeypatch):
    """Two writers of one file, the first of which was given up for dead: whichever version is in place, it is right."""
    monkeypatch.setattr(checked.CheckedFolder, "filesystem", _KilledBeforeMovingData())
    with pytest.raises(KeyboardInterrupt):
        artifact.write_bytes("sums", b"the first's")
    with pytest.raises(KeyboardInterrupt):
        artifact.write_bytes("sums", b"the second's")
    monkeypatch.undo()
    local(artifact, "sums").write_bytes(b"the first's")  # its move came late
    assert artifact.read_bytes("sums") == b"the first's"


def test_forgetting_damage_of_unfinished_work(artifact):
    artifact.write_bytes("parts/g/sums", b"12345")
    artifact.write_json("parts/g/done.json", {})
    artifact.write_bytes("parts/h", b"12345")
    assert artifact.forget("/elsewhere/sums") == []
    assert artifact.forget(f"{artifact.uri}/parts/g/sums") == ["parts/g/done.json", "parts/g/sums"]
    assert artifact.list() == ["parts/h"]
    local(artifact, "checksums/parts/h.json").write_bytes(b"")
    with pytest.raises(ChecksumError) as raised:
        artifact.read_bytes("parts/h")
    assert artifact.forget(raised.value.file) == ["parts/h"]
    assert not list(Path(artifact.uri).rglob("*.json"))
    artifact.write_bytes("part", b"12345")
    commit(artifact)
    assert artifact.forget(f"{artifact.uri}/part") == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_files_that_go_on_as_they_are_can_be_verified(artifact, monkeypatch, damage):
    artifact.write_table("a.parquet", TABLE)
    artifact.write_table("b.parquet", TABLE)
    commit(artifact)
    artifact.verify(["a.parquet", "b.parquet"])
    path = local(artifact, "b.parquet")
    if damage == "delete":
        path.unlink()
    else:
        flip_bit(path) if damage == "flip" else path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ChecksumError, match=r"b\.parquet: .*Remedy: delete the folder"):
        artifact.verify(["a.parquet", "b.parquet"])
    artifact.verify(["a.parquet"])
