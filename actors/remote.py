"""S3 over a network that fails now and then: what fails in passing is asked for again, after pauses that grow.

The SDK inside pyarrow repeats a request by itself for less than a second, silently. What lasts longer is repeated
here, each time with a line in the log, for as long as `Patience` says; then the user reads which object could not be
reached and what to do (`Unreachable`). A file is read in ranges, and each range is repeated alone; a file is written
as a whole, in several parts at once where it is large, and repeated as a whole. Objects appear when they are complete,
so that nothing is written aside and moved.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from actors.errors import ConfigError, Unreachable

logger = logging.getLogger(__name__)

T = TypeVar("T")

RANGE_BYTES = 32 * 1024 * 1024  # of a file that is read as a whole, in one request
SDK_ATTEMPTS = 5  # to repeat one request, with pauses of 25 ms that double
SILENCE_SECONDS = 30.0  # without a byte, after which a request has failed; a server may copy or join large objects

_PASSING = re.compile(
    r"curlCode|AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT"
    r"|REQUEST_EXPIRED|NO_SUCH_UPLOAD|UNKNOWN \(HTTP status (429|5\d\d)\))"
)
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|INVALID_SIGNATURE|UNKNOWN \(HTTP status (400|401|403)\))"
    r"|Expired"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket '.*' not found", re.IGNORECASE)
_ORDINARY = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class _CutShort(OSError):
    """Fewer bytes came than were asked for."""


@dataclass(frozen=True)
class Patience:
    """How often what failed in passing is tried again, and after which pauses.

    Attributes:
        attempts: In all.
        first: Seconds before the second; each further pause is twice the last.
        longest: Seconds that no pause exceeds.
    """

    attempts: int = 7
    first: float = 0.5
    longest: float = 20.0

    def pause(self, failures: int, luck: float) -> float:
        """Seconds to wait after a number of failures; `luck` in [0, 1) spreads those who failed together."""
        return min(self.longest, self.first * 2 ** (failures - 1)) * (0.5 + luck / 2)


PATIENCE = Patience()


def is_passing(error: OSError) -> bool:
    """Whether a request may succeed if it is made again: lost connections, an overloaded or a failing server."""
    return isinstance(error, _CutShort) or (not isinstance(error, _ORDINARY) and bool(_PASSING.search(str(error))))


def persist(action: Callable[[], T], uri: str) -> T:
    """Do something with an object, again and again while it fails in passing.

    Raises:
        Unreachable: If it goes on failing, or was refused; names the object and the remedy.
        OSError: If it fails in an ordinary way: there is no such object, say.
    """
    for failures in range(1, PATIENCE.attempts + 1):
        try:
            return action()
        except Unreachable:
            raise
        except OSError as error:
            if isinstance(error, _ORDINARY):
                raise
            if not is_passing(error) or failures == PATIENCE.attempts:
                raise unreachable(uri, error, failures) from error
            pause = PATIENCE.pause(failures, random.random())
            logger.warning("%s: %s; trying again in %.1f s (attempt %d failed)", uri, error, pause, failures)
            time.sleep(pause)
    raise AssertionError("unreachable code")


def unreachable(uri: str, error: OSError, attempts: int) -> Unreachable:
    """Say what is wrong with an object store, and what to do about it."""
    reason = str(error)
    if is_passing(error):
        how = f"the object store does not answer, after {attempts} attempts"
        remedy = "check the network and the endpoint (AWS_ENDPOINT_URL, or endpoint_override in the URI)"
    elif _NO_BUCKET.search(reason):
        how, remedy = "there is no such bucket", "create the bucket, or correct the URI"
    elif _REFUSED.search(reason):
        how = "the object store refuses"
        remedy = (
            "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) and what they allow"
        )
    else:
        how, remedy = "the object store failed", "check the URI, the credentials and the network"
    return Unreachable(f"{how} ({reason})", file=uri, remedy=f"{remedy}, and run again: finished parts are kept")


def open_s3(uri: str, shown: str) -> tuple[fs.FileSystem, str]:
    """Open an S3 file system that persists, and the path within it.

    Args:
        uri: `s3://[key:secret@]bucket/path[?region=..&endpoint_override=..&scheme=..]`; credentials, region and
            endpoint that it does not name are those of the AWS_... variables and configuration files.
        shown: The same without secrets, for messages.

    Raises:
        ConfigError: If the URI is malformed.
        Unreachable: If the bucket's region has to be asked for, and there is no answer.
    """

    def opened() -> tuple[fs.FileSystem, str]:
        return fs.FileSystem.from_uri(uri)

    try:
        plain, path = persist(opened, shown)
    except (pa.ArrowInvalid, ValueError) as error:
        raise ConfigError(f"{shown}: {error}", remedy="give s3://bucket/path") from error
    settings = plain.__reduce__()[1][0]  # what the constructor takes, environment and URI read
    strategy = fs.AwsDefaultS3RetryStrategy(max_attempts=SDK_ATTEMPTS)
    ours = {"retry_strategy": strategy, "allow_delayed_open": True, "request_timeout": SILENCE_SECONDS}
    return fs.PyFileSystem(Persistent(fs.S3FileSystem(**{**settings, **ours}))), path


class Persistent(fs.FileSystemHandler):
    """A file system whose requests persist.

    Args:
        inner: The file system that makes them.
        scheme: Of URIs in messages.
    """

    def __init__(self, inner: fs.FileSystem, scheme: str = "s3") -> None:
        self._inner, self._scheme = inner, scheme

    def _do(self, name: str, path: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self._inner, name)
        return persist(lambda: method(*arguments, **options), f"{self._scheme}://{path}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Persistent) and self._inner == other._inner

    def __hash__(self) -> int:
        return hash(self._scheme)

    def get_type_name(self) -> str:
        """The type of file system: what it is inside."""
        return self._inner.type_name

    def normalize_path(self, path: str) -> str:
        """The path in the one way that the file system writes it."""
        return self._inner.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Type, size and modification time of objects."""
        return [self._do("get_file_info", path, path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """Those of all objects below a folder."""
        return self._do("get_file_info", selector.base_dir, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Mark a folder, which objects do not need."""
        self._do("create_dir", path, path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        """Delete a folder."""
        self._do("delete_dir", path, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete what is in a folder."""
        self._do("delete_dir_contents", path, path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        """Refuse to delete every bucket."""
        raise NotImplementedError("whence deletes no buckets")

    def delete_file(self, path: str) -> None:
        """Delete an object."""
        self._do("delete_file", path, path)

    def move(self, src: str, dest: str) -> None:
        """Copy an object and delete it where it was."""
        self._do("move", src, src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object."""
        self._do("copy_file", src, src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Open an object to read it from start to end."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open an object to read it anywhere."""
        inner = self._do("open_input_file", path, path)
        return pa.PythonFile(_Ranges(inner, f"{self._scheme}://{path}"), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Open an object to write it in pieces, each of which is repeated by the SDK alone; see `put`."""
        return self._do("open_output_stream", path, path, compression=None, metadata=metadata or None)

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Refuse: objects do not grow."""
        raise NotImplementedError("objects cannot be appended to")

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a whole object."""

        def write() -> None:
            with self._inner.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        persist(write, f"{self._scheme}://{path}")

    def etag(self, path: str) -> str | None:
        """What the store calls this version of an object, which changes when its content does."""

        def look() -> str | None:
            with self._inner.open_input_file(path) as file:
                value = dict(file.metadata() or {}).get("ETag")
            return value.decode() if isinstance(value, bytes) else value

        return persist(look, f"{self._scheme}://{path}")


class _Ranges(io.RawIOBase):
    """An object as a Python file: reads ranges, each of which persists."""

    def __init__(self, inner: pa.NativeFile, uri: str) -> None:
        super().__init__()
        self._inner, self._uri = inner, uri
        self._size, self._place = inner.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, all that are left where it is negative."""
        left = max(0, self._size - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        pieces = []
        while wanted > 0:
            piece = self._range(min(wanted, RANGE_BYTES))
            wanted -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, size: int) -> bytes:
        place = self._place

        def ask() -> bytes:
            data = self._inner.read_at(size, place)
            if len(data) != size:
                raise _CutShort(f"{len(data)} bytes came where {size} were asked for")
            return data

        data = persist(ask, self._uri)
        self._place += size
        return data

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()
