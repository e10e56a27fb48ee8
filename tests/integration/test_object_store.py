"""The store, the corpus and the queries on S3, against a real server, through a network that fails now and then."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors import remote
from actors.checked import CheckedFolder
from actors.corpus import corpus_digest, list_files, plan_parts
from actors.documents import PartLog, read_documents
from actors.errors import ChecksumError, ConfigError, Unreachable, WriteFailed
from actors.filesystem import locate
from actors.store import Artifact, Store
from conf.schema import CorpusConfig
from pipelines.claims import Claims, Holder
from pipelines.tracing import TraceResult
from tests.integration.object_stores import FAULTS, KEY, S3, SECRET, network, s3_server
from tests.integration.processes import PATIENCE, command, finished
from tests.integration.world import World, cached, documents, fork, matrix, run_locally, write_lines
from tests.pipelines.test_runner import start

BUCKET = "whence"
FINGERPRINT = "0123456789abcdef" * 4
TABLE = pa.table({"sequence_id": pa.array(range(1000), pa.int64()), "text": [f"t{i}" for i in range(1000)]})
HASTE = remote.Patience(attempts=8, first=0.01, longest=0.05)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        server.bucket(BUCKET)
        yield server


@pytest.fixture
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses, so that a failing network costs a test no minutes."""
    monkeypatch.setattr(remote, "PATIENCE", HASTE)


@pytest.fixture
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and endpoint as a user has them."""
    for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("ENDPOINT_URL", s3.endpoint)):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def bucket_store(s3: S3, request: pytest.FixtureRequest) -> Store:
    return Store(s3.uri(f"{BUCKET}/{re.sub('[^a-z]', '', request.node.name)}"))


def artifact_of(store: Store) -> Artifact:
    return store.folder("covariance", FINGERPRINT)


def fill(artifact: Artifact) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    artifact.write_tensors("layers/0.mlp.safetensors", tensors, {"rows": "7"})
    artifact.write_table("shard-00000.parquet", TABLE, row_group_size=400)
    artifact.write_json("index.json", {"shards": [1, 2.5, "é"]})
    artifact.write_bytes("parts/old", b"x")
    artifact.delete("parts/old")
    return tensors


def check(artifact: Artifact, tensors: dict[str, torch.Tensor]) -> None:
    read = artifact.read_tensors("layers/0.mlp.safetensors")
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert artifact.read_metadata("layers/0.mlp.safetensors") == {"rows": "7"}
    assert artifact.read_table("shard-00000.parquet").equals(TABLE)
    assert artifact.read_table("shard-00000.parquet", ["text"], [1])["text"][0].as_py() == "t400"
    assert artifact.read_json("index.json") == {"shards": [1, 2.5, "é"]}
    assert artifact.list() == ["index.json", "layers/0.mlp.safetensors", "shard-00000.parquet"]


def within(artifact: Artifact) -> str:
    return artifact.uri.removeprefix(f"s3://{BUCKET}/")


def keys(s3: S3, prefix: str) -> list[str]:
    found = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [entry["Key"] for entry in found if not entry["Key"].endswith("/")]


def test_artifacts_make_the_round_trip(s3: S3, bucket_store: Store):
    artifact = artifact_of(bucket_store)
    tensors = fill(artifact)
    check(artifact, tensors)
    assert not artifact.committed
    artifact.commit({"samples": 3}, {}, {}, 1.0)
    assert artifact.committed
    check(artifact, tensors)
    folder = within(artifact)
    names = ["artifact.json", "index.json", "layers/0.mlp.safetensors", "shard-00000.parquet"]
    assert keys(s3, folder) == [f"{folder}/{name}" for name in names]


def test_as_the_environment_says(environment: None):
    artifact = artifact_of(Store(f"s3://{BUCKET}/environment/"))
    tensors = fill(artifact)
    check(artifact, tensors)
    assert artifact.uri == f"s3://{BUCKET}/environment/covariance/{FINGERPRINT[:16]}"


def test_no_credentials_and_options_are_shown(bucket_store: Store):
    artifact = artifact_of(bucket_store)
    assert artifact.uri.startswith(f"s3://{BUCKET}/")
    with pytest.raises(FileNotFoundError) as caught:
        artifact.read_bytes("part")
    assert "s3cret" not in str(caught.value) + artifact.uri
    assert "endpoint" not in str(caught.value) + artifact.uri


def test_large_files_go_up_in_parts(s3: S3, bucket_store: Store, haste: None):
    with network(s3) as watched:
        artifact = artifact_of(Store(bucket_store.uri.replace(s3.address, watched.s3.address)))
        values = torch.arange(3_000_000, dtype=torch.float32)
        artifact.write_tensors("large.safetensors", {"values": values})
        assert torch.equal(artifact.read_tensors("large.safetensors")["values"], values)
        requests = list(watched.requests)
        watched.share = 0.3
        artifact.write_tensors("again.safetensors", {"values": values})
        assert torch.equal(artifact.read_tensors("again.safetensors")["values"], values)
        assert len(watched.seen) > 1, "something failed on the way"
    (key,) = keys(s3, f"{within(artifact)}/large")
    head = s3.client().head_object(Bucket=BUCKET, Key=key)
    assert head["ContentLength"] > 12_000_000
    assert head["ETag"].strip('"').endswith("-2")  # what S3 says of an object of two parts
    uploads = [request for request in requests if re.search(r"^PUT .*partNumber=[12]&uploadId", request)]
    assert len(uploads) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_on_the_server_is_named(s3: S3, bucket_store: Store, damage: str):
    artifact = artifact_of(bucket_store)
    fill(artifact)
    artifact.commit({}, {}, {}, 1.0)
    client = s3.client()
    (key,) = keys(s3, f"{within(artifact)}/shard")
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        client.delete_object(Bucket=BUCKET, Key=key)
    else:
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data if damage == "flip" else data[:-3]))
    with pytest.raises(ChecksumError) as caught:
        artifact.read_table("shard-00000.parquet")
    assert f"{artifact.uri}/shard-00000.parquet: " in str(caught.value)
    assert f"Remedy: delete the folder {artifact.uri} and run again" in str(caught.value)
    with pytest.raises(ChecksumError):
        artifact.verify(["shard-00000.parquet"])


def test_a_failing_network_changes_nothing(s3: S3, bucket_store: Store, haste: None, caplog: pytest.LogCaptureFixture):
    with network(s3, share=0.5, seed=3) as bad, caplog.at_level(logging.WARNING):
        artifact = artifact_of(Store(bucket_store.uri.replace(s3.address, bad.s3.address)))
        tensors = fill(artifact)
        check(artifact, tensors)
        artifact.commit({}, {}, {}, 1.0)
        check(artifact, tensors)
    assert all(bad.seen[fault] for fault in FAULTS), bad.seen
    repeated = [record.getMessage() for record in caplog.records if "trying again in" in record.getMessage()]
    assert repeated, "at one failure in two, the SDK's own attempts cannot always be enough"
    assert all(line.startswith(f"s3://{BUCKET}/") for line in repeated)


def test_a_network_that_stays_away_is_named(
    s3: S3, bucket_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(remote, "PATIENCE", dataclasses.replace(HASTE, attempts=3))
    with network(s3, share=1.0) as dead, caplog.at_level(logging.WARNING):
        artifact = artifact_of(Store(bucket_store.uri.replace(s3.address, dead.s3.address)))
        with pytest.raises(Unreachable) as caught:
            artifact.write_bytes("part", b"12345")
        with pytest.raises(Unreachable) as unread:
            artifact.read_bytes("part")
    for message in (str(caught.value), str(unread.value)):
        assert f"{artifact.uri}/" in message
        assert "the object store does not answer, after 3 attempts" in message
        assert "Remedy: check the network and the endpoint (AWS_ENDPOINT_URL" in message
        assert "run again: finished parts are kept" in message
    assert sum("trying again" in record.getMessage() for record in caplog.records) == 4


def test_what_cannot_pass_is_not_repeated(s3: S3, haste: None, caplog: pytest.LogCaptureFixture):
    artifact = artifact_of(Store(s3.uri("no-such-bucket/store")))
    with pytest.raises(WriteFailed, match=r"no-such-bucket.*there is no such bucket.*Remedy: create the bucket, or"):
        artifact.write_bytes("part", b"12345")
    assert "trying again" not in caplog.text
    with pytest.raises(ConfigError, match=r"s3://b/p: .*nonsense.*Remedy: give s3://bucket/path"):
        locate("s3://key:secret@b/p?nonsense=1")


def test_corpora_are_read_and_identified(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, haste: None):
    monkeypatch.setenv("WHENCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "corpus" / "a.jsonl", ({"text": text} for text in documents(40)))
    write_lines(tmp_path / "corpus" / "b.jsonl", ({"text": text} for text in documents(40, seed=2)))
    client = s3.client()
    for path in (tmp_path / "corpus").iterdir():
        client.upload_file(str(path), BUCKET, f"corpus/deep/{path.name}")
    local = CorpusConfig(path=str(tmp_path / "corpus"), part_bytes=1000)
    with network(s3, share=0.2, seed=1) as bad:
        there = CorpusConfig(path=bad.s3.uri(f"{BUCKET}/corpus/deep"), part_bytes=1000)
        assert corpus_digest(there) == corpus_digest(local)
        texts = [
            [d.content for part in plan_parts(c).parts for d in read_documents(part, c, PartLog(part, c.on_bad_record))]
            for c in (there, local)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 80
        globbed = CorpusConfig(path=bad.s3.uri(f"{BUCKET}/corpus/**/a.*"))
        assert [file.name for file in list_files(globbed)] == ["deep/a.jsonl"]

        before = len(bad.requests)
        assert corpus_digest(there) == corpus_digest(local)
        assert not [request for request in bad.requests[before:] if request.startswith("GET") and ".jsonl" in request]
        client.put_object(Bucket=BUCKET, Key="corpus/deep/b.jsonl", Body=b'{"text": "other"}\n')
        assert corpus_digest(there) != corpus_digest(local)


def test_one_of_two_gets_the_claim_and_a_dead_one_is_taken_over(bucket_store: Store, caplog: pytest.LogCaptureFixture):
    artifact = artifact_of(bucket_store)
    claims = Claims(bucket_store, heartbeat=0.2, dead_after=1.0, poll=0.05, settle=0.3)
    with claims.acquire(artifact, lambda: False) as claim:
        looks = iter([False] * 5 + [True])
        assert Claims(bucket_store, poll=0.05).acquire(artifact, lambda: next(looks)) is None
        claim.check()
    stranger = Holder(**{**vars(Holder.here()), "machine": "elsewhere", "pid": 1})
    claims._write(f"covariance-{FINGERPRINT[:16]}.json", stranger)
    with claims.acquire(artifact, lambda: False) as claim:
        claim.check()
    assert "its holder is dead" in caplog.text
    assert CheckedFolder(bucket_store.uri, "claims").names() == []


@pytest.fixture(scope="module")
def uploaded(s3: S3, world: World) -> World:
    """The corpus and the queries, on the server."""
    client = s3.client()
    for name in ("corpus.jsonl", "queries.jsonl"):
        client.upload_file(str(world.root / name), BUCKET, f"world/{name}")
    return world


def settings(s3: S3) -> dict[str, str]:
    return {
        "corpus__path": s3.uri(f"{BUCKET}/world/corpus.jsonl"),
        "queries__path": s3.uri(f"{BUCKET}/world/queries.jsonl"),
    }


@pytest.mark.slow
def test_a_trace_gives_the_same_scores_through_a_failing_network(
    s3: S3, uploaded: World, traced: TraceResult, tmp_path: Path, haste: None
):
    with network(s3, share=0.1, seed=5) as bad:
        config = uploaded.config(bad.s3.uri(f"{BUCKET}/traced"), **settings(bad.s3))  # type: ignore[arg-type]
        result = run_locally(config, tmp_path / "run")
        assert np.array_equal(matrix(result.scores_table()), matrix(traced.scores_table()))
    assert all(bad.seen[fault] for fault in FAULTS), bad.seen
    assert result.top.drop_columns("document_id").equals(traced.top.drop_columns("document_id"))
    assert not any(cached(result).values())
    config = uploaded.config(s3.uri(f"{BUCKET}/traced"), **settings(s3))  # type: ignore[arg-type]
    again = run_locally(config, tmp_path / "again")
    assert all(cached(again).values())
    for name in ("report.html", "summary.json"):
        assert SECRET[:6] not in (tmp_path / "run" / name).read_text(), name


@pytest.mark.slow
def test_the_command_takes_credentials_and_endpoint_from_the_environment(
    uploaded: World, traced: TraceResult, store: Path, tmp_path: Path, environment: None
):
    solver = {"factors__solver": "identity"}
    there = {name: f"s3://{BUCKET}/world/{name}" for name in ("corpus.jsonl", "queries.jsonl")}
    paths = {"corpus__path": there["corpus.jsonl"], "queries__path": there["queries.jsonl"]}
    words = uploaded.overrides(f"s3://{BUCKET}/commanded", **solver, **paths)  # type: ignore[arg-type]
    folder = tmp_path / "commanded"
    with command("trace", *words, run_dir=folder) as process:
        finished([process], [folder / "output.txt"])
    own = fork(store.parent / "untouched", tmp_path / "store", ("layers", "sequences", "candidates", "gradients"))
    local = run_locally(uploaded.config(own, **solver), tmp_path / "local")
    assert np.array_equal(matrix(pq.read_table(folder / "scores")), matrix(local.scores_table()))
    assert Path(folder / "report.html").exists()


def test_two_runs_at_the_same_time_compute_once(tmp_path: Path, environment: None):
    both = [start(tmp_path, "together", f"s3://{BUCKET}/together") for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(" ".join(out for out, _ in said).split()) == ["a", "b"]
    assert (tmp_path / "computed.txt").read_text().split() == ["a", "b"]
    assert any("computed by another run" in err for _, err in said)


def test_a_run_that_died_on_another_machine_is_succeeded(tmp_path: Path, environment: None):
    killed = start(tmp_path, "die elsewhere", f"s3://{BUCKET}/died")
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == 9
    heir = start(tmp_path, "live", f"s3://{BUCKET}/died", dead_after=3.0)
    out, err = heir.communicate(timeout=PATIENCE)
    assert heir.returncode == 0, err
    assert out.split() == ["a", "b"]
    assert "its holder is dead" in err
    assert "a: goes on from 3 files of an earlier attempt" in err
