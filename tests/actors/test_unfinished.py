"""Which files of unfinished work go, so that a damaged one is made again."""

from __future__ import annotations

import pytest

from actors.unfinished import is_missed, to_forget

GROUPS = {
    f"parts/abc/group-{group:04d}/{name}"
    for group in range(2)
    for name in ("done.json", "rank-000/bundle-00.safetensors", "rank-001/bundle-00.safetensors")
}
CHUNKS = {"parts/000000.json", "parts/000000-00000.parquet", "parts/000001.json", "parts/000001-00000.parquet"}
SHARDS = {"shard-000000.parquet", "shard-000001.parquet"}
MERGED = {"layers/a.safetensors", "layers/b.safetensors", "merged.json"}
QUERIES = {"layers/a/queries-0000.safetensors", "parts/batch-0000.json"}


@pytest.mark.parametrize(
    ("name", "names", "forgotten"),
    [
        ("parts/abc/group-0001/rank-001/bundle-00.safetensors", GROUPS, {"parts/abc/group-0001/done.json"}),
        ("parts/abc/group-0001/done.json", GROUPS, set()),
        ("parts/000001-00000.parquet", CHUNKS, {"parts/000001.json"}),
        ("parts/000001.json", CHUNKS, set()),
        ("shard-000001.parquet", SHARDS, set()),
        ("layers/b.safetensors", MERGED, {"merged.json"}),
        ("layers/b.safetensors", MERGED | GROUPS, {"merged.json"} | {n for n in GROUPS if n.endswith(".json")}),
        ("merged.json", MERGED | GROUPS, {n for n in GROUPS if n.endswith(".json")}),
        ("layers/a/queries-0000.safetensors", QUERIES, {"parts/batch-0000.json"}),
        ("layers/a.safetensors", {"layers/a.safetensors", "layers/b.safetensors"}, set()),
    ],
)
def test_what_vouches_for_a_file_goes_with_it(name, names, forgotten):
    assert to_forget(name, names) == {name} | forgotten
    assert to_forget(name, names - {name}) == forgotten, "a file that is missing cannot be deleted"


def test_a_file_that_was_announced_is_missed_if_something_vouches_for_it():
    assert is_missed("layers/a.safetensors", {"layers/b.safetensors"})
    assert is_missed("parts/000001-00000.parquet", CHUNKS)
    assert is_missed("parts/abc/group-0001/rank-001/bundle-00.safetensors", GROUPS)
    assert not is_missed("parts/abc/group-0007/rank-001/bundle-00.safetensors", GROUPS)
    assert not is_missed("parts/000007-00000.parquet", CHUNKS)
