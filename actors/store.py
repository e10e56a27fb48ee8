"""The store of artifacts: folders named by fingerprint, checked on every read, committed by a record written last.

    <root>/<kind>/<fingerprint[:16]>/<name>             safetensors, Parquet, JSON
    <root>/<kind>/<fingerprint[:16]>/artifact.json      the record, which then holds the checksums of all files

Until the record is there, the folder is unfinished work: its files are whole and checked (`actors.checked`), and the
stage that resumes it decides which of them it can use.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from pyarrow.fs import FileType

from actors.checked import ALTERED, CHECKSUMS, CheckedFolder, Checksum
from actors.digests import remembered_digests
from actors.errors import ChecksumError, StaleArtifact, WriteFailed
from actors.filesystem import absolute, file_digest, is_local, locate, read_stream
from actors.records import FORMAT, difference, make_record, sealed
from actors.unfinished import is_missed, to_forget

logger = logging.getLogger(__name__)

RECORD = "artifact.json"


@dataclass(frozen=True)
class Store:
    """A folder of artifacts, shared by runs. Holds only its URI, so it pickles to any actor.

    Attributes:
        uri: A local path (made absolute) or a URI of pyarrow.fs or fsspec.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", absolute(self.uri))

    def folder(self, kind: str, fingerprint: str) -> Artifact:
        """The artifact of this kind and fingerprint, whether or not anything of it exists; creates nothing."""
        return Artifact(self, kind, fingerprint)


@dataclass(frozen=True)
class Artifact:
    """The output of one step: unfinished until `commit`, unchangeable after it. Pickles to any actor.

    Names of files may contain `/`. Every read verifies the file and raises `ChecksumError` where it is not the one
    that was written, or `FileNotFoundError` where it has not been written yet; a file is hashed once per process for
    as long as its size and modification time stay. Every write raises `WriteFailed` if it does not succeed.

    Attributes:
        store: The store that it is in.
        kind: What it is: `sequences`, `covariance`, ...
        fingerprint: Of everything that determines its bits, in full.
    """

    store: Store
    kind: str
    fingerprint: str

    @property
    def uri(self) -> str:
        """The artifact's folder, for people to read: a URI's credentials and options are left out."""
        return self._folder.uri

    @property
    def _folder(self) -> CheckedFolder:
        return CheckedFolder(self.store.uri, f"{self.kind}/{self.fingerprint[:16]}")

    # The record

    @property
    def committed(self) -> bool:
        """Whether the record is there and is the one wanted."""
        return self._record() is not None

    def record(
        self, config: Mapping[str, object] | None = None, inputs: Mapping[str, str] | None = None
    ) -> dict[str, Any] | None:
        """The record of a committed artifact, or None if it is unfinished.

        Args:
            config: The configuration that is wanted, compared where given.
            inputs: The fingerprints of dependencies that are wanted, compared where given.

        Raises:
            ChecksumError: If the record itself is damaged.
            StaleArtifact: If it is of another format, kind, fingerprint, configuration or dependency.
        """
        record = self._record()
        if record is None:
            return None
        wanted = {"config": config, "inputs": inputs}
        self._refuse_if_stale({key: value for key, value in wanted.items() if value is not None}, record)
        return deepcopy(record)

    def _record(self) -> dict[str, Any] | None:
        info = self._folder.info(RECORD)
        if info.type is FileType.NotFound:
            return None
        record = _parse_record(self.store.uri, info.path, info.size, info.mtime_ns)
        if record is None:
            raise self._damaged(RECORD, "the record of this artifact is damaged")
        self._refuse_if_stale({"format": FORMAT, "kind": self.kind, "fingerprint": self.fingerprint}, record)
        return record

    def _refuse_if_stale(self, wanted: Mapping[str, object], record: Mapping[str, object]) -> None:
        if changed := difference(wanted, record):
            raise StaleArtifact(
                f"the artifact is not the one that is wanted: {changed}",
                file=f"{self.uri}/{RECORD}",
                remedy=f"move the folder {self.uri} away and run again, or give another `store`",
            )

    def commit(
        self,
        config: Mapping[str, object],
        inputs: Mapping[str, str],
        counts: Mapping[str, object],
        seconds: float,
        extra: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Write the record, last of all: from here on the artifact is finished and refuses writes.

        Args:
            config: The configuration that determines its bits.
            inputs: Fingerprint of each artifact that it was made from.
            counts: Sequences, tokens, rows: what a reader wants to know of its size.
            seconds: Wall time of the attempt that finished it.
            extra: Anything else, JSON-able.

        Returns:
            The record.

        Raises:
            ChecksumError: If a file is of another size than what was written, or missing.
        """
        self._refuse_if_committed(RECORD)
        names = self.list()
        for name in sorted(self._folder.with_checksum().difference(names)):
            if is_missed(name, names):
                raise self._damaged(name, "the file is missing")
        record = make_record(
            kind=self.kind,
            fingerprint=self.fingerprint,
            config=config,
            inputs=inputs,
            counts=counts,
            seconds=seconds,
            extra=extra or {},
            files={name: asdict(self._settled(name)) for name in names},
        )
        self._folder.write_unchecked(RECORD, json.dumps(record, indent=1).encode())
        try:
            self._folder.tidy()
        except OSError as error:
            logger.warning("%s is committed, but its temporary files could not be removed: %s", self.uri, error)
        return record

    def _settled(self, name: str) -> Checksum:
        """The one checksum of a file, without hashing it unless a replacement of it was cut short."""
        accepted = self._accepted(name)
        if len(accepted) == 1 and accepted[0].bytes == self._folder.info(name).size:
            return accepted[0]
        digest = file_digest(self._folder.filesystem, self._verified(name))
        return next(checksum for checksum in accepted if checksum.sha256 == digest)

    # Files

    def exists(self, name: str) -> bool:
        """Whether a file of this name is in place; it is whole, since nothing else is moved there."""
        return self._folder.exists(name)

    def list(self, prefix: str = "") -> list[str]:
        """Names of the files that begin with `prefix`, sorted; the record and checksums are left out.

        Of a committed artifact it is the files that it was committed with, so that one which was lost since is missed.
        """
        record = self._record()
        names = self._folder.names() if record is None else sorted(record["files"])
        return [name for name in names if name.startswith(prefix) and name != RECORD]

    def delete(self, name: str) -> None:
        """Delete one file of unfinished work; a file that is not there is no error."""
        self._refuse_if_committed(name)
        self._folder.delete(name)

    def forget(self, file: str) -> list[str]:
        """Make a damaged file of unfinished work be computed again: delete it, and whatever vouches for it.

        Files that have no checksum, because the record or the folder of checksums was lost, go with it.

        Args:
            file: As a `ChecksumError` names it.

        Returns:
            The files that were deleted; none where the file is another artifact's, or this one is committed.
        """
        name = file.removeprefix(f"{self.uri}/")
        if name == file or self.exists(RECORD):
            return []
        name = name.removeprefix(f"{CHECKSUMS}/").removesuffix(".json") if name.startswith(f"{CHECKSUMS}/") else name
        names = self.list()
        vouched = self._folder.with_checksum()
        doomed = sorted(to_forget(name, names) | {each for each in names if each not in vouched} | {name})
        for each in doomed:
            self._folder.delete(each)
        return doomed

    def _refuse_if_committed(self, name: str) -> None:
        if self.exists(RECORD):
            raise WriteFailed(
                "the artifact is committed and can no longer change",
                file=f"{self.uri}/{name}",
                remedy="another process finished it meanwhile: run again to use it",
            )

    # Writing

    def _refuse_write(self, name: str) -> None:
        if name == RECORD or name.startswith(f"{CHECKSUMS}/"):
            raise ValueError(f"{name!r} is a name that the store keeps for itself")
        self._refuse_if_committed(name)

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file of bytes."""
        self._refuse_write(name)
        self._folder.write(name, data)

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file; NaN and infinity are refused."""
        self.write_bytes(name, json.dumps(value, indent=1, allow_nan=False).encode())

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a Parquet file, in row groups of `row_group_size` rows."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=row_group_size, compression="zstd")
        self.write_bytes(name, sink.getvalue())

    def write_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write a safetensors file, from any device; strided tensors and views are packed."""
        packed = _packed(tensors)
        filesystem = self._folder.filesystem
        if not is_local(filesystem):
            self.write_bytes(name, safetensors.torch.save(packed, metadata))
            return

        def write(aside: str) -> Checksum:
            safetensors.torch.save_file(packed, aside, metadata)
            return Checksum(file_digest(filesystem, aside), os.path.getsize(aside))

        self._refuse_write(name)
        self._folder.write_by(name, write)

    # Reading

    def _accepted(self, name: str) -> list[Checksum]:
        """Checksums of what a file may hold: from the record if the artifact is committed."""
        record = self._record()
        if record is None and (checksums := self._folder.checksums(name)):
            return checksums
        record = record or self._record() or {"files": {}}  # committed between the two looks
        return [Checksum(**record["files"][name])] if name in record["files"] else []

    def _verified(self, name: str) -> str:
        """Check a file and return its path."""
        accepted = self._accepted(name)
        if not accepted and not self.exists(name):
            raise FileNotFoundError(f"{self.uri}/{name} has not been written")
        if self._folder.fault(name, accepted):  # look again: it may be in the middle of being replaced
            fault = self._folder.fault(name, self._accepted(name), fresh=True)
            if fault:
                raise self._damaged(name, fault)
        return self._folder.path_of(name)

    def _damaged(self, name: str, fault: str) -> ChecksumError:
        return ChecksumError(
            fault,
            file=f"{self.uri}/{name}",
            remedy=f"delete the folder {self.uri} and run again; only this artifact is computed anew",
        )

    def verify(self, names: Sequence[str]) -> None:
        """Check files of a committed artifact, reading only those that changed since they were last read.

        For files that go on to others as they are. What is trusted is said in `actors.digests`; a file that is read
        through this class is checked by its content, whatever is remembered.

        Raises:
            ChecksumError: If one of them is not what was written.
        """
        folder = self._folder
        wrong = {name: fault for name in names if (fault := folder.misfit(name, self._accepted(name)))}
        if not wrong:
            paths = [folder.path_of(name) for name in names]
            found = remembered_digests(folder.filesystem, paths, f"{self.store.uri} {self.kind} {self.fingerprint}")
            for name, digest in zip(names, found, strict=True):
                if digest not in {each.sha256 for each in self._accepted(name)}:
                    wrong[name] = ALTERED
        for name, fault in wrong.items():
            raise self._damaged(name, fault)

    def read_bytes(self, name: str) -> bytes:
        """Read a file of bytes, once where nothing is wrong with it."""
        if self.exists(name):
            data = read_stream(self._folder.filesystem, self._folder.path_of(name))
            if Checksum.of(data) in self._accepted(name):
                return data
        return read_stream(self._folder.filesystem, self._verified(name))

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads(self.read_bytes(name))

    def open_parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file, verified, for reading by row group; close it, or use it in a `with` block."""
        return pq.ParquetFile(self._verified(name), filesystem=self._folder.filesystem)

    def read_table(self, name: str, columns: list[str] | None = None, row_groups: list[int] | None = None) -> pa.Table:
        """Read a Parquet file, or some columns and row groups of it."""
        with self.open_parquet(name) as file:
            groups = range(file.num_row_groups) if row_groups is None else row_groups
            return file.read_row_groups(list(groups), columns=columns)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file onto the CPU."""
        if is_local(self._folder.filesystem):
            return safetensors.torch.load_file(self._verified(name))
        return safetensors.torch.load(self.read_bytes(name))

    def read_metadata(self, name: str) -> dict[str, str]:
        """Read the metadata of a safetensors file, without its tensors."""
        with self._folder.filesystem.open_input_file(self._verified(name)) as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)).get("__metadata__", {})


@lru_cache(maxsize=256)
def _parse_record(root: str, path: str, size: int | None, mtime_ns: int | None) -> dict[str, Any] | None:
    """The record in a file, or None if it is damaged; parsed once while its size and modification time stay."""
    try:
        record = json.loads(read_stream(locate(root)[0], path))
    except ValueError:
        return None
    return record if sealed(record) else None


def _packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, contiguous, each alone in its storage: what safetensors writes."""
    packed: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage()
        if storage.nbytes() != dense.nbytes or storage.data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        packed[name] = dense
    return packed
