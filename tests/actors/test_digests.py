"""Digests that are remembered: a file is read once while nothing about it changes, and again when anything does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from actors import digests
from actors.digests import cache_folder, remembered_digests

OLD_NS = 10**18


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[str]:
    """The files that were read, with a cache of the test's own; files just written count as settled."""
    monkeypatch.setenv("WHENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "UNSETTLED_NS", -(10**12))
    found: list[str] = []
    given = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda fs, path: found.append(Path(path).name) or given(fs, path))
    return found


def write(folder: Path, **texts: str) -> list[str]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [str(folder / name) for name in texts]


def found(paths: list[str], topic: str = "corpus") -> list[str]:
    return remembered_digests(LocalFileSystem(), paths, topic)


def test_files_are_read_once_and_again_when_they_change(tmp_path, reads):
    paths = write(tmp_path, a="one", b="two")
    first = found(paths)
    assert first == [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
    assert found(paths) == first
    assert found(paths[:1]) == first[:1]
    assert sorted(reads) == ["a", "b"]

    before = os.stat(paths[0])
    Path(paths[0]).write_text("eno")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and the same time of modification
    assert found(paths)[0] == hashlib.sha256(b"eno").hexdigest()
    assert sorted(reads) == ["a", "a", "b", "b"], "b was no longer of the topic when a alone was asked for"


def test_another_file_in_its_place_is_read(tmp_path, reads):
    paths = write(tmp_path, a="one")
    found(paths)
    write(tmp_path, other="two")
    (tmp_path / "other").replace(paths[0])
    assert found(paths) == [hashlib.sha256(b"two").hexdigest()]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "UNSETTLED_NS", 10**12)
    paths = write(tmp_path, a="one")
    found(paths)
    found(paths)
    assert reads == ["a", "a"]


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"a": 1}', b"\xff"])
def test_a_damaged_memory_is_made_anew(tmp_path, reads, damage):
    paths = write(tmp_path, a="one")
    first = found(paths)
    (book,) = cache_folder().iterdir()
    book.write_bytes(damage)
    assert found(paths) == first
    assert found(paths) == first
    assert reads == ["a", "a"]


def test_no_memory_is_no_harm(tmp_path, reads, monkeypatch):
    write(tmp_path, cache="a file where the folder should be")
    paths = write(tmp_path, a="one")
    assert found(paths) == found(paths)
    assert reads == ["a", "a"]


def test_where_it_lies(monkeypatch):
    monkeypatch.delenv("WHENCE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/whence/digests")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/whence/digests")
