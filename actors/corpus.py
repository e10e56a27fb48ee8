"""What a corpus is made of: its files, the parts that tasks read, and the digest that identifies it.

A corpus is a file, a folder or a glob, local or by URI. It is cut into `Part`s, descriptors small enough for the
driver to hold: a byte range of a JSONL or text file (a line belongs to the part that its first byte is in), row
groups of a Parquet file, or a whole file where nothing smaller can be read alone (compressed lines, Arrow streams).
Parts depend on the files and on `corpus.part_bytes` only, never on the machine. `actors.documents` reads a part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from actors.digests import remembered_digests
from actors.errors import BadRecord, ConfigError, Unreachable, WhenceError
from actors.filesystem import absolute, locate, shown
from conf.schema import BadRecord as OnBadRecord
from conf.schema import CorpusConfig, CorpusFormat

logger = logging.getLogger(__name__)

_EXTENSIONS = {
    CorpusFormat.jsonl: (".jsonl", ".ndjson", ".json"),
    CorpusFormat.parquet: (".parquet", ".pq"),
    CorpusFormat.text: (".txt", ".text", ".md"),
    CorpusFormat.datasets: (".arrow",),
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
_THREADS = 8


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
        path: Where it is in the corpus's filesystem.
        name: Its name relative to the corpus: what errors, document ids and the digest show.
        size: Bytes.
        format: How it is read, never `auto`.
    """

    path: str
    name: str
    size: int
    format: CorpusFormat

    @property
    def compressed(self) -> bool:
        """Whether lines have to be decompressed from the start of the file."""
        return self.format in (CorpusFormat.jsonl, CorpusFormat.text) and self.path.endswith(_COMPRESSED)


@dataclass(frozen=True)
class Part:
    """What one task reads.

    Attributes:
        index: Its place in the corpus.
        root: The corpus path, from which a task finds the filesystem again.
        file: The file it is a part of.
        start: First byte (lines), or first row group (Parquet).
        stop: The end, exclusive.
        bytes: How much of the corpus it stands for, to show progress.
        limit: Documents to stop after; None is all.
    """

    index: int
    root: str
    file: CorpusFile
    start: int
    stop: int
    bytes: int
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """The parts of a corpus, and what had to be skipped to make them.

    Attributes:
        parts: In the order of the corpus.
        skipped: Reason and count, where `corpus.on_bad_record=skip` let a file go.
    """

    parts: tuple[Part, ...]
    skipped: dict[str, int]


def filesystem(root: str) -> fs.FileSystem:
    """Find the filesystem that a corpus path (a local path or a URI, perhaps with a glob) lives in."""
    return _locate(root)[0]


def list_files(config: CorpusConfig) -> list[CorpusFile]:
    """List the files of a corpus in a fixed order: by name, or as a `datasets` folder lists its own.

    Files whose name or folder begins with `.` or `_` are left out, and so are, in a folder, those whose extension no
    format has.

    Raises:
        ConfigError: Nothing is there, no file has a known format, or the folder holds several splits.
    """
    filesystem, base, pattern = _locate(config.path)
    info = filesystem.get_file_info(base)
    if pattern is None and info.type == fs.FileType.File:
        found = [CorpusFile(base, PurePosixPath(base).name, info.size, _format(base, config.format, config.path))]
    elif info.type == fs.FileType.Directory:
        found = _in_datasets_folder(filesystem, base) if pattern is None else None
        found = found if found is not None else _in_folder(filesystem, base, pattern, config)
    else:
        raise ConfigError(
            f"corpus.path={shown(config.path)!r} does not exist", remedy="give a file, a folder or a glob"
        )
    if not found:
        known = ", ".join(extension for extensions in _EXTENSIONS.values() for extension in extensions)
        raise ConfigError(
            f"corpus.path={shown(config.path)!r} holds no file with a known extension ({known}, lines also compressed)",
            remedy="correct the path, or name the format with corpus.format",
        )
    return found


def corpus_digest(config: CorpusConfig) -> str:
    """Identify a corpus by its content: SHA-256 over the name, size and SHA-256 of each file, in order.

    Where the corpus lies is no part of it. Cost: every byte is read once, by a few threads, nothing is held. From then
    on a file is believed to be the same while its size, times and inode are, or on S3 its ETag (`actors.digests`).
    """
    filesystem, _, _ = _locate(config.path)
    files = list_files(config)
    hashes = remembered_digests(filesystem, [file.path for file in files], absolute(config.path))
    lines = [json.dumps([file.name, file.size, digest]) for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def plan_parts(config: CorpusConfig) -> Plan:
    """Cut a corpus into the parts that tasks read; reads nothing but the footers of Parquet files.

    Raises:
        ConfigError: As `list_files`.
        BadRecord: A file is empty or is no Parquet file, unless `corpus.on_bad_record=skip`.
    """
    files = list_files(config)
    filesystem, _, _ = _locate(config.path)

    def ranges(file: CorpusFile) -> list[tuple[int, int, int]] | BadRecord:
        try:
            return list(_ranges(filesystem, file, config.part_bytes))
        except BadRecord as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        cuts = list(pool.map(ranges, files))
    parts: list[Part] = []
    skipped: Counter[str] = Counter()
    for file, cut in zip(files, cuts, strict=True):
        if isinstance(cut, BadRecord):
            if config.on_bad_record is OnBadRecord.fail:
                raise cut
            logger.warning("skipped: %s", cut)
            skipped["empty file" if file.size == 0 else "unreadable file"] += 1
            continue
        parts += [Part(len(parts) + i, config.path, file, *span) for i, span in enumerate(cut)]
    return Plan(tuple(parts), dict(skipped))


def with_limits(parts: tuple[Part, ...], documents_in: dict[int, int], limit: int) -> tuple[Part, ...]:
    """Keep the first `limit` documents of the corpus: `documents_in` counts those of the parts up to the limit."""
    kept, left = [], limit
    for part in parts:
        if left <= 0 or part.index not in documents_in:
            break
        kept.append(dataclasses.replace(part, limit=left))
        left -= documents_in[part.index]
    return tuple(kept)


def _ranges(filesystem: fs.FileSystem, file: CorpusFile, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Give (start, stop, bytes) of each part of a file."""
    if file.size == 0:
        raise BadRecord("the file is empty", file=file.name, remedy="remove it, or set corpus.on_bad_record=skip")
    if file.format is CorpusFormat.parquet:
        yield from _row_group_ranges(filesystem, file, part_bytes)
    elif file.format is CorpusFormat.datasets or file.compressed:
        yield 0, file.size, file.size
    else:
        for start in range(0, file.size, part_bytes):
            stop = min(start + part_bytes, file.size)
            yield start, stop, stop - start


def _row_group_ranges(filesystem: fs.FileSystem, file: CorpusFile, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    try:
        with filesystem.open_input_file(file.path) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except pa.ArrowInvalid as error:
        raise BadRecord(f"the file cannot be read as Parquet: {error}", file=file.name) from error
    except Unreachable:
        raise
    except OSError as error:  # perhaps the disk or the network: never skipped, as that could lose good records
        raise WhenceError(f"the file cannot be read: {error}", file=file.name) from error
    if metadata.num_rows == 0:
        raise BadRecord("the file has no rows", file=file.name)
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group + 1 == metadata.num_row_groups:
            yield start, group + 1, size
            start, size = group + 1, 0


def _locate(path: str) -> tuple[fs.FileSystem, str, str | None]:
    """Split a corpus path into its filesystem, a base that exists, and the glob below it (None without one)."""
    local = "://" not in path
    path = absolute(path)
    # in a URI, `?` begins the options of its filesystem, as in s3://bucket/folder?region=...
    address, mark, options = (path, "", "") if local else path.partition("?")
    wild = re.search(r"[*?\[]" if local else r"[*\[]", address)
    if wild is None or (local and os.path.exists(path)):
        return *locate(path), None
    cut = address.rindex("/", 0, wild.start())
    filesystem, base = locate((address[:cut] or "/") + mark + options)
    return filesystem, base, address[cut + 1 :]


def _in_datasets_folder(filesystem: fs.FileSystem, base: str) -> list[CorpusFile] | None:
    """List the Arrow files that `save_to_disk` wrote, or None where it did not write this folder."""
    if filesystem.get_file_info(f"{base}/dataset_dict.json").type == fs.FileType.File:
        with filesystem.open_input_stream(f"{base}/dataset_dict.json") as stream:
            splits = json.loads(stream.read()).get("splits", [])
        raise ConfigError(
            f"corpus.path={base!r} is a datasets folder with several splits: {', '.join(splits)}",
            remedy=f"name one, such as {base}/{splits[0] if splits else 'train'}",
        )
    if filesystem.get_file_info(f"{base}/state.json").type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(f"{base}/state.json") as stream:
        listed = json.loads(stream.read()).get("_data_files")
    if not listed:
        return None
    names = [entry["filename"] for entry in listed]
    infos = filesystem.get_file_info([f"{base}/{name}" for name in names])
    for name, info in zip(names, infos, strict=True):
        if info.type != fs.FileType.File:
            raise BadRecord("the file that state.json lists is missing", file=name)
    return [CorpusFile(i.path, name, i.size, CorpusFormat.datasets) for name, i in zip(names, infos, strict=True)]


def _in_folder(filesystem: fs.FileSystem, base: str, pattern: str | None, config: CorpusConfig) -> list[CorpusFile]:
    matches = re.compile(_glob(pattern)).fullmatch if pattern else (lambda name: True)
    files: list[CorpusFile] = []
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive=True)):
        name = info.path[len(base) :].lstrip("/")
        hidden = any(segment.startswith((".", "_")) for segment in name.split("/"))
        if info.type != fs.FileType.File or hidden or not matches(name):
            continue
        known = _by_extension(name)
        wanted = config.format if pattern and config.format is not CorpusFormat.auto else known
        if wanted is None or config.format not in (CorpusFormat.auto, wanted):
            logger.warning("%s is not read: its extension is not one of corpus.format=%s", name, config.format.name)
            continue
        files.append(CorpusFile(info.path, name, info.size, wanted))
    return sorted(files, key=lambda file: file.name)


def _glob(pattern: str) -> str:
    """Translate a glob to a regular expression: `*` and `?` stay within a folder, `**/` crosses folders."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meaning.get(token) or (token.replace("[!", "[^", 1) if len(token) > 1 else re.escape(token)) for token in tokens
    )


def _by_extension(name: str) -> CorpusFormat | None:
    stem, extension = os.path.splitext(name.lower())
    compressed = extension in _COMPRESSED
    if compressed:
        extension = os.path.splitext(stem)[1]
    found = next((kind for kind, extensions in _EXTENSIONS.items() if extension in extensions), None)
    return None if compressed and found not in (CorpusFormat.jsonl, CorpusFormat.text) else found


def _format(name: str, wanted: CorpusFormat, path: str) -> CorpusFormat:
    found = wanted if wanted is not CorpusFormat.auto else _by_extension(name)
    if found is None:
        allowed = ", ".join(kind.name for kind in _EXTENSIONS)
        raise ConfigError(
            f"the format of corpus.path={shown(path)!r} is not known", remedy=f"set corpus.format to {allowed}"
        )
    return found
