"""A folder of an artifact: its files are the artifact's own, under other names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from actors.errors import ChecksumError, WriteFailed
from actors.folders import ArtifactFolder
from actors.store import Artifact, Store


@pytest.fixture(params=["local", "memory"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    uri = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    return Store(uri).folder("convergence", "0123456789abcdef" * 4)


def test_what_is_written_in_it_lies_in_the_artifact_below_it(artifact: Artifact):
    folder = ArtifactFolder.of(artifact, "parts/first")
    folder.write_tensors("layers/up.safetensors", {"mean": torch.arange(3.0)}, {"rows": "3"})
    folder.write_json("tokens.json", {"up": 1.5})
    folder.write_table("rows.parquet", pa.table({"a": [1, 2]}))
    artifact.write_json("parts/firstly.json", 0)  # not in the folder
    names = ["layers/up.safetensors", "rows.parquet", "tokens.json"]
    assert folder.list() == names
    assert folder.list("layers/") == names[:1]
    assert artifact.list() == sorted([f"parts/first/{name}" for name in names] + ["parts/firstly.json"])
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301
    assert again == folder
    assert again.read_json("tokens.json") == artifact.read_json("parts/first/tokens.json") == {"up": 1.5}
    assert again.read_tensors("layers/up.safetensors")["mean"].tolist() == [0, 1, 2]
    assert again.read_metadata("layers/up.safetensors") == {"rows": "3"}
    assert again.read_table("rows.parquet").to_pylist() == [{"a": 1}, {"a": 2}]
    assert folder.uri == f"{artifact.uri}/parts/first"
    assert folder.exists("tokens.json")
    folder.delete("tokens.json")
    assert not folder.exists("tokens.json")
    assert not artifact.exists("parts/first/tokens.json")


def test_it_is_committed_with_its_artifact(artifact: Artifact):
    folder = ArtifactFolder.of(artifact, "fit")
    folder.write_json("a.json", 1)
    with pytest.raises(WriteFailed, match="a folder is committed with its artifact"):
        folder.commit({}, {}, {}, 0.0)
    artifact.commit({}, {}, {}, 0.0)
    assert folder.committed
    assert folder.read_json("a.json") == 1
    with pytest.raises(WriteFailed, match="the artifact is committed and can no longer change"):
        folder.write_json("b.json", 2)


def test_damage_is_named_by_the_path_that_the_artifact_knows(tmp_path: Path):
    artifact = Store(str(tmp_path)).folder("convergence", "0123456789abcdef" * 4)
    folder = ArtifactFolder.of(artifact, "parts/first")
    folder.write_json("a.json", 12)
    (Path(folder.uri) / "a.json").write_text("13")
    with pytest.raises(ChecksumError) as caught:
        folder.read_json("a.json")
    damaged = f"{artifact.uri}/parts/first/a.json"
    assert caught.value.file == damaged
    assert artifact.forget(damaged) == ["parts/first/a.json"]
    assert folder.list() == []
