"""Where files are: local paths, and every URI that pyarrow.fs or fsspec knows."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from actors.errors import ConfigError
from actors.remote import Persistent, open_s3

CHUNK_BYTES = 4 * 1024 * 1024


def absolute(uri: str) -> str:
    """Make a local path absolute, so that it means the same in every process; a URI loses its last slash.

    Args:
        uri: A local path (`~` allowed) or a URI with a scheme.
    """
    if "://" in uri:
        address, mark, options = uri.partition("?")
        return (address.rstrip("/") if not address.endswith("://") else address) + mark + options
    return str(Path(uri).expanduser().absolute())


def child(uri: str, name: str) -> str:
    """A path below a local path or URI; in a URI, the options of its file system (`?region=...`) stay at the end."""
    address, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{address.rstrip('/')}/{name}{mark}{options}"


def shown(uri: str) -> str:
    """A path or URI for people to read: without credentials and without the options of its file system."""
    return without_secret(uri).partition("?")[0] if "://" in uri else uri


def without_secret(uri: str) -> str:
    """A path or URI without credentials: what may be written down and passed on."""
    return re.sub(r"^([\w+.-]+://)[^/?@]*@", r"\1", uri)


@lru_cache(maxsize=256)
def locate(uri: str) -> tuple[FileSystem, str]:
    """Open the file system of a URI or local path, once per process.

    Args:
        uri: A local path, a URI of pyarrow.fs (`file`, `s3`, `gs`, ...), or one of an installed fsspec protocol.

    Returns:
        The file system, and the path within it. Requests to S3 persist where they fail in passing (`actors.remote`).

    Raises:
        ConfigError: If neither library knows the scheme, or the URI is malformed.
        Unreachable: If an S3 bucket has to be asked for its region, and there is no answer.
    """
    if "://" not in uri:
        return LocalFileSystem(), absolute(uri)
    if uri.startswith("s3://"):
        return open_s3(uri, shown(uri))
    try:
        return FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        return _locate_by_fsspec(uri, str(error))


def _locate_by_fsspec(uri: str, reason: str) -> tuple[FileSystem, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"no file system for {shown(uri)!r} ({reason}; {error})",
            remedy="give a local path, or a URI such as file://, s3://, gs:// or of an installed fsspec protocol",
        ) from error
    return PyFileSystem(FSSpecHandler(filesystem)), path


def is_local(filesystem: FileSystem) -> bool:
    """Whether paths of this file system can be opened by the operating system."""
    return isinstance(filesystem, LocalFileSystem)


def persistent(filesystem: FileSystem) -> Persistent | None:
    """The handler of an S3 file system, where objects appear whole and requests persist; None for others."""
    handler = getattr(filesystem, "handler", None)
    return handler if isinstance(handler, Persistent) else None


def file_digest(filesystem: FileSystem, path: str) -> str:
    """The SHA-256 of a file in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_stream(filesystem: FileSystem, path: str) -> bytes:
    """All bytes of a file."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()
