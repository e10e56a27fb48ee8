"""Reads the documents of one part of a corpus, and says which records cannot be used: file, row and reason.

Rows are counted from 0 within a part; only when a record is bad are the rows before the part counted, so that the
message has the number that a user finds in the file (from 1). Nothing of a record is executed or interpreted: JSON
is parsed, Parquet and Arrow columns are copied, and text may hold anything that UTF-8 can.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.corpus import Part, filesystem
from actors.errors import BadRecord, Unreachable
from conf.schema import BadRecord as OnBadRecord
from conf.schema import CorpusConfig, CorpusFormat

TOKENS_FIELD = "input_ids"
_BUFFER = 2**20
_ROWS = 1024
_REMEDY = "correct or remove the record, or set corpus.on_bad_record=skip"


@dataclass(frozen=True)
class Document:
    """One document: text, or tokens that the corpus already holds.

    Attributes:
        row: Its row within the part, from 0.
        content: Text, or int64 token ids.
        name: What the corpus calls it (`corpus.id_field`); None where rows number the documents.
    """

    row: int
    content: str | np.ndarray
    name: str | None = None


class PartLog:
    """What is noted while a part is read: its rows, and its bad records (the first is raised, or all are counted).

    Args:
        part: The part being read.
        on_bad_record: Raise or count.

    Attributes:
        rows: Rows of the file that were read, the bad and the blank ones too.
        skipped: Reason and count of what was left out.
    """

    def __init__(self, part: Part, on_bad_record: OnBadRecord) -> None:
        self._part = part
        self._skip = on_bad_record is OnBadRecord.skip
        self.rows = 0
        self.skipped: Counter[str] = Counter()

    def reject(self, row: int, reason: str, detail: str = "") -> None:
        """Refuse one record. `reason` is what it is counted under, `detail` what else the message says.

        Raises:
            BadRecord: The run does not skip.
        """
        if not self._skip:
            number = row + 1 + rows_before(self._part)
            raise BadRecord(f"{reason}{detail}", file=self._part.file.name, row=number, remedy=_REMEDY)
        self.skipped[reason] += 1

    def reject_rest(self, reason: str, detail: str = "") -> None:
        """Refuse what is left of the part, as `reject` does one record."""
        if not self._skip:
            remedy = "correct or remove the file, or set corpus.on_bad_record=skip"
            raise BadRecord(f"{reason}{detail}", file=self._part.file.name, remedy=remedy)
        self.skipped[reason] += 1


def read_documents(part: Part, config: CorpusConfig, log: PartLog) -> Iterator[Document]:
    """Read the documents of a part one by one, at most `part.limit` of them; nothing but a buffer is held.

    Raises:
        BadRecord: A record cannot be used and the run does not skip, or the file cannot be decompressed.
    """
    if part.file.format is CorpusFormat.jsonl:
        documents = _from_json_lines(part, config, log)
    elif part.file.format is CorpusFormat.text:
        documents = _from_text(part, log)
    else:
        documents = _from_columns(part, config, log)
    return itertools.islice(documents, part.limit)


def rows_before(part: Part) -> int:
    """Count the rows (lines) of the file that come before a part. Cost: reads that much of a file of lines."""
    if part.start == 0:
        return 0
    with filesystem(part.root).open_input_file(part.file.path) as stream:
        if part.file.format is CorpusFormat.parquet:
            metadata = pq.ParquetFile(stream).metadata
            return sum(metadata.row_group(group).num_rows for group in range(part.start))
        reader = _buffered(stream)
        left, lines, last = _aligned(reader, part.start), 0, b"\n"
        reader.seek(0)
        while left > 0 and (chunk := reader.read(min(left, _BUFFER))):
            left, lines, last = left - len(chunk), lines + chunk.count(b"\n"), chunk[-1:]
        return lines + (last != b"\n")


def _aligned(stream: io.BufferedReader, start: int) -> int:
    """Move to the first line that begins at or after byte `start`, and say where that is."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    return start - 1 + len(stream.readline())


def _lines(part: Part) -> Iterator[bytes]:
    """Read the lines whose first byte is in the part."""
    source = filesystem(part.root)
    if part.file.compressed:
        try:
            with source.open_input_stream(part.file.path, compression="detect") as stream:
                yield from _buffered(stream)
        except Unreachable:
            raise
        except OSError as error:
            raise BadRecord(f"the file cannot be decompressed: {error}", file=part.file.name) from error
        return
    with source.open_input_file(part.file.path) as stream:
        reader = _buffered(stream)
        position = _aligned(reader, part.start)
        while position < part.stop and (line := reader.readline()):
            position += len(line)
            yield line


def _buffered(stream: pa.NativeFile) -> io.BufferedReader:
    return io.BufferedReader(stream, _BUFFER)  # type: ignore[arg-type]


def _from_json_lines(part: Part, config: CorpusConfig, log: PartLog) -> Iterator[Document]:
    for row, line in enumerate(_lines(part)):
        log.rows = row + 1
        if row == 0 and part.start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            log.reject(row, "invalid UTF-8", f" at byte {error.start} of the line")
            continue
        except (ValueError, RecursionError) as error:
            log.reject(row, "malformed JSON", f": {error}")
            continue
        if not isinstance(record, dict):
            log.reject(row, "not a JSON object", f": the line holds {_kind(record)}")
            continue
        document = _from_record(row, record, config, log)
        if document is not None:
            yield document


def _from_record(row: int, record: dict, config: CorpusConfig, log: PartLog) -> Document | None:
    field = config.text_field if config.text_field in record else TOKENS_FIELD
    name = None
    if config.id_field is not None:
        name = record.get(config.id_field)
        if name is None:
            log.reject(row, "missing id", f": no field {config.id_field!r}")
            return None
    if field not in record:
        log.reject(row, "missing text", f": no field {config.text_field!r}, the record has {_names(record)}")
        return None
    value = record[field]
    if isinstance(value, list):
        value = _token_ids(value)
    if not isinstance(value, (str, np.ndarray)):
        log.reject(row, "not text", f": field {field!r} is {_kind(record[field])}, neither text nor token ids")
        return None
    return Document(row, value, None if name is None else str(name))


def _token_ids(values: list) -> np.ndarray | None:
    if not all(type(value) is int and abs(value) < 2**62 for value in values):
        return None
    return np.asarray(values, dtype=np.int64)


def _from_text(part: Part, log: PartLog) -> Iterator[Document]:
    """Read a text file as one document; what does not fit in one part goes on as a document of its own."""
    data = b"".join(_lines(part))
    if part.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    name = part.file.name if part.start == 0 else f"{part.file.name}@{part.start}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        log.reject(data[: error.start].count(b"\n"), "invalid UTF-8")
        return
    if text:
        yield Document(0, text, name)


def _from_columns(part: Part, config: CorpusConfig, log: PartLog) -> Iterator[Document]:
    """Read Parquet row groups, or the record batches of an Arrow file."""
    row = 0
    try:
        with filesystem(part.root).open_input_file(part.file.path) as stream:
            batches = _parquet_batches if part.file.format is CorpusFormat.parquet else _arrow_batches
            for batch in batches(part, stream, config):
                yield from _from_batch(row, batch, config, log)
                log.rows = row = row + len(batch)
    except pa.ArrowInvalid as error:
        log.reject_rest("unreadable file", f": {error}")
    except Unreachable:
        raise
    except OSError as error:  # damage or a failing disk or network: never skipped, as that could lose good records
        raise BadRecord(f"the file cannot be read: {error}", file=part.file.name) from error
    except _WrongColumnsError as error:
        log.reject_rest("wrong columns", f": {error}")


class _WrongColumnsError(Exception):
    pass


def _parquet_batches(part: Part, stream: pa.NativeFile, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(stream)
    columns = _columns(file.schema_arrow, config)
    yield from file.iter_batches(_ROWS, row_groups=list(range(part.start, part.stop)), columns=columns)


def _arrow_batches(part: Part, stream: pa.NativeFile, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    if bytes(stream.read(6)) == b"ARROW1":  # the file format; `datasets` writes the stream format
        file = pa.ipc.open_file(stream)
        batches: Iterable[pa.RecordBatch] = (file.get_batch(index) for index in range(file.num_record_batches))
        schema = file.schema
    else:
        stream.seek(0)
        batches = reader = pa.ipc.open_stream(stream)
        schema = reader.schema
    columns = _columns(schema, config)
    for batch in batches:
        yield batch.select(columns)


def _columns(schema: pa.Schema, config: CorpusConfig) -> list[str]:
    """Choose the column of text or tokens, then the one that names documents."""
    wanted = config.text_field if config.text_field in schema.names else TOKENS_FIELD
    for name in filter(None, (wanted, config.id_field)):
        if name not in schema.names:
            missing = config.text_field if name == TOKENS_FIELD else name
            raise _WrongColumnsError(f"no column {missing!r}, the file has {', '.join(map(repr, schema.names))}")
    return list(dict.fromkeys(filter(None, (wanted, config.id_field))))


def _from_batch(first: int, batch: pa.RecordBatch, config: CorpusConfig, log: PartLog) -> Iterator[Document]:
    content = batch.column(0)
    values = _decoded(content) if not _is_list(content.type) else None
    ids = batch.column(config.id_field).to_pylist() if config.id_field else None
    for index in range(len(batch)):
        row, name = first + index, ids[index] if ids else None
        if ids and name is None:
            log.reject(row, "missing id", f": column {config.id_field!r} is null")
            continue
        value = values[index] if values is not None else _row_of_ids(content[index])
        if isinstance(value, UnicodeDecodeError):
            log.reject(row, "invalid UTF-8", f" at byte {value.start} of the text")
        elif value is None:
            log.reject(row, "missing text", f": column {batch.schema.names[0]!r} is null, or holds a null")
        else:
            yield Document(row, value, None if name is None else str(name))


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_integer(kind.value_type)


def _row_of_ids(scalar: pa.Scalar) -> np.ndarray | None:
    values = scalar.values if scalar.is_valid else None  # type: ignore[attr-defined]
    if values is None or values.null_count:
        return None
    return values.to_numpy(zero_copy_only=False).astype(np.int64)


def _decoded(column: pa.Array) -> list[str | UnicodeDecodeError | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    if not any(matches(kind) for matches in text):
        raise _WrongColumnsError(f"the column is of type {kind}, neither text nor a list of token ids")
    # as bytes first: one text that is not UTF-8 must not take its neighbours along
    return [None if value is None else _text(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _text(value: bytes) -> str | UnicodeDecodeError:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _names(record: dict) -> str:
    return ", ".join(repr(str(key)[:40]) for key in itertools.islice(record, 8)) or "no field"
