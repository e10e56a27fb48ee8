"""A folder of an artifact that is read and written as if it were an artifact: for stages that make several of a kind.

A step that fits factors more than once writes each fit where the functions that make and read factors find it, and all
of it belongs to the step's own artifact: its checksums, its claim, what is resumed and what is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.errors import WriteFailed
from actors.store import Artifact


@dataclass(frozen=True)
class ArtifactFolder(Artifact):
    """The files below `folder`, under their names in it. It has no record: it is committed with its artifact.

    Attributes:
        folder: within the artifact, without a slash at either end.
    """

    folder: str = ""

    @classmethod
    def of(cls, artifact: Artifact, folder: str) -> ArtifactFolder:
        """A folder of an artifact."""
        return cls(artifact.store, artifact.kind, artifact.fingerprint, folder)

    @property
    def whole(self) -> Artifact:
        """The artifact."""
        return Artifact(self.store, self.kind, self.fingerprint)

    @property
    def uri(self) -> str:
        """The folder, for people to read."""
        return f"{self.whole.uri}/{self.folder}"

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def commit(
        self,
        config: Mapping[str, object],
        inputs: Mapping[str, str],
        counts: Mapping[str, object],
        seconds: float,
        extra: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Refused."""
        del config, inputs, counts, seconds, extra
        raise WriteFailed("a folder is committed with its artifact", file=self.uri)

    def exists(self, name: str) -> bool:
        """Whether a file of this name is in place."""
        return self.whole.exists(self._path(name))

    def list(self, prefix: str = "") -> list[str]:
        """Names of the files that begin with `prefix`, sorted."""
        found = self.whole.list(self._path(prefix))
        return [name.removeprefix(f"{self.folder}/") for name in found]

    def delete(self, name: str) -> None:
        """Delete one file of unfinished work."""
        self.whole.delete(self._path(name))

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file of bytes."""
        self.whole.write_bytes(self._path(name), data)

    def write_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write a safetensors file."""
        self.whole.write_tensors(self._path(name), tensors, metadata)

    def read_bytes(self, name: str) -> bytes:
        """Read a file of bytes, verified."""
        return self.whole.read_bytes(self._path(name))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file, verified, onto the CPU."""
        return self.whole.read_tensors(self._path(name))

    def read_metadata(self, name: str) -> dict[str, str]:
        """Read the metadata of a safetensors file."""
        return self.whole.read_metadata(self._path(name))

    def open_parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file, verified."""
        return self.whole.open_parquet(self._path(name))
