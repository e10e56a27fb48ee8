"""A folder whose files are moved into place whole, and checked against their SHA-256 when they are read.

    <folder>/<name>                   a file, as it was written
    <folder>/checksums/<name>.json    its SHA-256 and size, written before the file is moved into place
    <folder>/.../.tmp-<uuid>          a file that is being written

Whatever dies leaves either a whole file that can be verified or none. Until the move is done, a checksum names the new
version and all that were announced before it: an older one stays readable if the move never happens, and so does one of
another writer, a process that was given up for dead, say. On S3, where an object appears when it is complete, files are
written in their place at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType
from safetensors import SafetensorError

from actors.errors import ChecksumError, Unreachable, WriteFailed
from actors.filesystem import child, file_digest, is_local, locate, persistent, read_stream, shown

CHECKSUMS = "checksums"
ASIDE = ".tmp-"
ALTERED = "its content is not what was written (the SHA-256 differs)"


@dataclass(frozen=True)
class Checksum:
    """What a file held when it was written."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, data: bytes | pa.Buffer) -> Checksum:
        """The checksum of bytes in memory."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True)
class CheckedFolder:
    """A folder below a root; holds no connection, so it pickles.

    Attributes:
        root: A local path or URI.
        name: The folder's path below it.
    """

    root: str
    name: str

    @property
    def uri(self) -> str:
        """The folder, for people to read: without credentials and options of the root's URI."""
        return shown(child(self.root, self.name))

    @property
    def filesystem(self) -> FileSystem:
        """The file system of the root, opened once per process."""
        return locate(self.root)[0]

    @property
    def path(self) -> str:
        """The folder within its file system."""
        return f"{locate(self.root)[1].rstrip('/')}/{self.name}"

    def path_of(self, name: str) -> str:
        """A file within the file system; refuses names that lead out of the folder."""
        parts = name.split("/")
        if any(part in ("", ".", "..") or part.startswith(ASIDE) for part in parts):
            raise ValueError(f"not a name of a file in a store: {name!r}")
        return f"{self.path}/{name}"

    def info(self, name: str) -> FileInfo:
        """Type, size and modification time of a file."""
        return self.filesystem.get_file_info(self.path_of(name))

    def exists(self, name: str) -> bool:
        """Whether a file of this name is in place."""
        return self.info(name).type is FileType.File

    def names(self) -> list[str]:
        """Names of the files in place, sorted, without checksums."""
        return sorted(name for name in self._in_place() if not name.startswith(f"{CHECKSUMS}/"))

    def with_checksum(self) -> set[str]:
        """Names of the files that have a checksum beside them."""
        found = (name for name in self._in_place() if name.startswith(f"{CHECKSUMS}/"))
        return {name.removeprefix(f"{CHECKSUMS}/").removesuffix(".json") for name in found}

    def _in_place(self) -> Iterator[str]:
        """All files but those that a writer left aside when it died: of a checksum they are no name of a file."""
        return (name for name in self._everything() if not name.rpartition("/")[2].startswith(ASIDE))

    def _everything(self) -> Iterator[str]:
        found = self.filesystem.get_file_info(FileSelector(self.path, recursive=True, allow_not_found=True))
        base = self.path.lstrip("/") + "/"  # some file systems answer with a leading slash, some without
        return (info.path.lstrip("/").removeprefix(base) for info in found if info.type is FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file and its checksum; one that is not there is no error."""
        for each in (name, _sidecar(name)):
            if self.exists(each):
                self.filesystem.delete_file(self.path_of(each))

    def tidy(self) -> None:
        """Delete checksums and whatever was never moved into place."""
        for name in self._everything():
            if name.rpartition("/")[2].startswith(ASIDE):
                self.filesystem.delete_file(f"{self.path}/{name}")
        if self.info(CHECKSUMS).type is FileType.Directory:
            self.filesystem.delete_dir(self.path_of(CHECKSUMS))

    # Writing

    @property
    def appears_whole(self) -> bool:
        """Whether files of this file system appear when they are complete, so that none is written aside."""
        return persistent(self.filesystem) is not None

    @contextmanager
    def aside(self, name: str) -> Iterator[str]:
        """Yield a temporary path beside a file's place, which is moved there if the block ends well.

        Raises:
            WriteFailed: If there is no space, or the file cannot be written for another reason.
        """
        path = self.path_of(name)
        aside = f"{path.rpartition('/')[0]}/{ASIDE}{uuid.uuid4().hex}"
        with self._explained(name):
            try:
                self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
                yield aside
                _flush(self.filesystem, aside)
                self.filesystem.move(aside, path)
            except BaseException:
                with suppress(OSError):
                    self.filesystem.delete_file(aside)
                raise

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise _write_failed(f"{self.uri}/{name}", error) from error

    def write_unchecked(self, name: str, data: bytes) -> None:
        """Write a file that has no checksum beside it."""
        if self.appears_whole:
            with self._explained(name):
                write_stream(self.filesystem, self.path_of(name), data)
            return
        with self.aside(name) as aside:
            write_stream(self.filesystem, aside, data)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file with its checksum."""
        if not self.appears_whole:
            self.write_by(name, lambda aside: write_stream(self.filesystem, aside, data))
            return
        path, checksum = self.path_of(name), Checksum.of(data)
        with self._explained(name):
            replaced = self._replaced(name, checksum)
            write_stream(self.filesystem, path, data)
        if replaced:
            self._write_checksums(name, [checksum])

    def write_by(self, name: str, writer: Callable[[str], Checksum]) -> None:
        """Write a file with its checksum where a function has to write it.

        Args:
            name: The file's name.
            writer: Writes the path that it is given and says what it wrote.
        """
        with self.aside(name) as aside:
            checksum = writer(aside)
            replaced = self._replaced(name, checksum)
        if replaced:
            self._write_checksums(name, [checksum])

    def _replaced(self, name: str, checksum: Checksum) -> list[Checksum]:
        """Announce a file's new version; returns the others that were announced, one of which may be in place."""
        replaced = [each for each in self.checksums(name) if each != checksum]
        self._write_checksums(name, [checksum, *replaced])
        return replaced

    def _write_checksums(self, name: str, accepted: Sequence[Checksum]) -> None:
        value = {**asdict(accepted[0]), "replaces": [asdict(each) for each in accepted[1:]]}
        self.write_unchecked(_sidecar(name), json.dumps(value).encode())

    # Checking

    def checksums(self, name: str) -> list[Checksum]:
        """Checksums of the versions of a file that are right: one, more while it is replaced, none if never written."""
        if not self.exists(_sidecar(name)):
            return []
        try:
            value = json.loads(read_stream(self.filesystem, self.path_of(_sidecar(name))))
            return [Checksum(each["sha256"], each["bytes"]) for each in (value, *value["replaces"])]
        except (ValueError, KeyError, TypeError) as error:
            raise ChecksumError(
                f"the checksum of {name} is unreadable ({error})",
                file=f"{self.uri}/{_sidecar(name)}",
                remedy=f"delete {self.uri}/{name} and its checksum, and run again; the stage writes it anew",
            ) from error

    def fault(self, name: str, accepted: Sequence[Checksum], fresh: bool = False) -> str | None:
        """What is wrong with a file, in words.

        Args:
            name: The file's name.
            accepted: What it may hold.
            fresh: Hash it even if this process did already.
        """
        info = self.info(name)
        if fault := _misfit(info, accepted):
            return fault
        digest = _digest.__wrapped__ if fresh or info.mtime_ns is None else _digest
        found = digest(self.root, info.path, info.size, info.mtime_ns)
        return None if found in {each.sha256 for each in accepted if each.bytes == info.size} else ALTERED

    def misfit(self, name: str, accepted: Sequence[Checksum]) -> str | None:
        """What is wrong with a file, in words, as far as it shows without reading it."""
        return _misfit(self.info(name), accepted)


def write_stream(filesystem: FileSystem, path: str, data: bytes | pa.Buffer) -> Checksum:
    """Write bytes to a path and return their checksum."""
    if handler := persistent(filesystem):
        handler.put(path, data)
        return Checksum.of(data)
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)
    return Checksum.of(data)


def _misfit(info: FileInfo, accepted: Sequence[Checksum]) -> str | None:
    if info.type is not FileType.File:
        return "the file is missing"
    if not accepted:
        return "no checksum was recorded for it"
    if all(each.bytes != info.size for each in accepted):
        return f"it has {info.size:,} bytes where {accepted[0].bytes:,} were written"
    return None


def _sidecar(name: str) -> str:
    return f"{CHECKSUMS}/{name}.json"


@lru_cache(maxsize=65_536)
def _digest(root: str, path: str, size: int | None, mtime_ns: int | None) -> str:
    """The digest of a file, hashed once per process while its size and modification time stay."""
    return file_digest(locate(root)[0], path)


def _flush(filesystem: FileSystem, path: str) -> None:
    """Have a local file reach the disk before it is moved into place: a power cut must not leave its name alone."""
    if is_local(filesystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_failed(file: str, error: Exception) -> WriteFailed:
    if isinstance(error, Unreachable):
        return WriteFailed(f"{error.message}; nothing of it was committed", file=file, remedy=error.remedy)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)
    return WriteFailed(
        f"{'the disk is full' if full else 'the file cannot be written'} ({error}); nothing of it was committed",
        file=file,
        remedy=f"{'free some space' if full else 'make the folder writable'}, or give another `store`, and run again: "
        "finished parts are kept",
    )
