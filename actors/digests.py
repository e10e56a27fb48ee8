"""Digests that are remembered from run to run, so that large files are read once and not each time.

What is trusted: a file whose stamp has not changed has not changed. The stamp of a local file is its size, its times of
modification and of change (which nothing but the kernel sets), inode and device; that of an S3 object is its ETag, as
a HEAD request tells it. A file that changed less than two seconds before it was read is not remembered, since clocks of
file systems are coarse. Files elsewhere have no stamp and are read each time. Damage that leaves the stamp as it is, a
bit that rots on the disk, is not seen this way: what a stage computes with is verified by reading it (`actors.store`).

Stamps are kept in a small file for each folder, below `$WHENCE_CACHE`, else `$XDG_CACHE_HOME/whence`, else
`~/.cache/whence`. They can be deleted at any time; then everything is read once more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pyarrow.fs import FileSystem

from actors.filesystem import file_digest, is_local, persistent

logger = logging.getLogger(__name__)

THREADS = 8
UNSETTLED_NS = 2_000_000_000

Stamp = list[int | str]
Known = dict[str, tuple[Stamp, str]]


def cache_folder() -> Path:
    """Where digests are remembered."""
    if folder := os.environ.get("WHENCE_CACHE"):
        return Path(folder) / "digests"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "whence" / "digests"


def remembered_digests(filesystem: FileSystem, paths: Sequence[str], topic: str) -> list[str]:
    """The SHA-256 of files, each read once for as long as its stamp stays.

    Args:
        filesystem: Where they are.
        paths: In that file system.
        topic: What the files are of (a corpus, a model, an artifact, by its URI); what is remembered of a topic is
            these files.

    Returns:
        A digest for each path, in their order.
    """
    book = cache_folder() / f"{hashlib.sha256(topic.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.json"
    known = _read(book)
    kept: Known = {}

    def digest(path: str) -> str:
        now, stamp = time.time_ns(), _stamp(filesystem, path)
        entry = known.get(path)
        if entry is not None and stamp is not None and entry[0] == stamp:
            kept[path] = entry
            return entry[1]
        found = file_digest(filesystem, path)
        if stamp is not None and _settled(stamp, now) and _stamp(filesystem, path) == stamp:
            kept[path] = (stamp, found)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(digest, paths))
    if kept != known:
        _write(book, kept)
    return found


def _stamp(filesystem: FileSystem, path: str) -> Stamp | None:
    """What tells one version of a file from another without reading it; None where nothing does."""
    if is_local(filesystem):
        found = os.stat(path)
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
    if store := persistent(filesystem):
        tag = store.etag(path)
        return [tag] if tag else None
    return None


def _settled(stamp: Stamp, now: int) -> bool:
    """Whether a later change would show in the stamp."""
    times = stamp[1:3]  # of a local file; an ETag has none
    return all(int(moment) < now - UNSETTLED_NS for moment in times)


def _read(book: Path) -> Known:
    try:
        return {path: (stamp, digest) for path, (stamp, digest) in json.loads(book.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.debug("%s cannot be used, and is made anew: %s", book, error)
        return {}


def _write(book: Path, known: Known) -> None:
    aside = book.with_name(f".{uuid.uuid4().hex}")
    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known))
        aside.replace(book)
    except OSError as error:
        logger.debug("digests cannot be remembered in %s: %s", book, error)
        with suppress(OSError):
            aside.unlink()
