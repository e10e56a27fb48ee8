"""Tokenises one part of a corpus and packs it into sequences. Plain: no Ray, no model, one process.

Documents follow one another, each as BOS, tokens, EOS (where the tokenizer has them and the config wants them), and
the stream is cut every `sequence_length` tokens; the last sequence of a part is as short as it comes. Packing never
crosses a part, so sequences depend on the corpus and the config only. A BOS is not written right after an EOS that is
the same token (GPT-2, GPT-NeoX: one <|endoftext|> parts two documents), nor doubled where tokenised documents have one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from actors.corpus import Part
from actors.documents import Document, PartLog, read_documents
from actors.errors import ConfigError
from actors.tokeniser import Limits, Tokeniser, outside_vocabulary, well_formed
from conf.schema import CorpusConfig

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2**20
_NEWLINES = re.compile(r"(?:\r?\n){2,}")

CHUNK_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("document", pa.string()),  # null where rows number the documents
        ("row", pa.int64()),  # of that document, within the part
        ("offset", pa.int64()),
    ]
)


@dataclass(frozen=True)
class PartSummary:
    """What became of a part.

    Attributes:
        index: The part.
        chunks: Sequences in each chunk that was emitted.
        tokens: Tokens in all of them.
        documents: Documents in them; the empty ones and the bad ones are not.
        rows: Rows of the file that the part covers, those without a document too.
        skipped: Reason and count of records that were left out.
    """

    index: int
    chunks: list[int]
    tokens: int
    documents: int
    rows: int
    skipped: dict[str, int]


class Packer:
    """Cuts a stream of documents into sequences.

    Args:
        length: Tokens a sequence.
        pack: False cuts after every document too.

    Attributes:
        tokens: Tokens in all sequences so far.
    """

    def __init__(self, length: int, pack: bool) -> None:
        self._length, self._pack = length, pack
        self.tokens = 0
        self._pieces: list[np.ndarray] = []
        self._filled = 0
        self._origin: tuple[str | None, int, int] = (None, 0, 0)
        self._rows: list[np.ndarray] = []
        self._origins: list[tuple[str | None, int, int]] = []

    def __len__(self) -> int:
        """Give the number of whole sequences that wait to be taken."""
        return len(self._rows)

    def add(self, name: str | None, row: int, ids: np.ndarray) -> None:
        """Append the tokens (int32) of a document."""
        start = 0
        while start < len(ids):
            if not self._filled:
                self._origin = (name, row, start)
            piece = ids[start : start + self._length - self._filled]
            self._pieces.append(piece)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == self._length:
                self.cut()
        if not self._pack:
            self.cut()

    def add_whole(self, name: str | None, row: int, ids: np.ndarray) -> None:
        """Append a row that is a sequence already."""
        self._origin = (name, row, 0)
        self._pieces, self._filled = [ids], len(ids)
        self.cut()

    def cut(self) -> None:
        """End the sequence that is being filled, if it has begun."""
        if self._filled:
            self._rows.append(self._pieces[0] if len(self._pieces) == 1 else np.concatenate(self._pieces))
            self._origins.append(self._origin)
            self.tokens += self._filled
            self._pieces, self._filled = [], 0

    def take(self, count: int) -> pa.Table:
        """Remove the first `count` whole sequences and give them as a table of `CHUNK_SCHEMA`."""
        rows, self._rows = self._rows[:count], self._rows[count:]
        origins, self._origins = self._origins[:count], self._origins[count:]
        bounds = np.cumsum([0] + [len(row) for row in rows], dtype=np.int32)
        values = np.concatenate([*rows, np.empty(0, dtype=np.int32)]).astype(np.int32, copy=False)
        names, places, offsets = zip(*origins, strict=True) if origins else ((), (), ())
        columns = [pa.ListArray.from_arrays(bounds, values), *map(pa.array, (names, places, offsets))]
        return pa.table(
            [column.cast(field.type) for column, field in zip(columns, CHUNK_SCHEMA, strict=True)], CHUNK_SCHEMA
        )


def tokenise_part(
    part: Part,
    config: CorpusConfig,
    tokeniser: Tokeniser,
    limits: Limits,
    emit: Callable[[int, pa.Table], None],
) -> PartSummary:
    """Tokenise and pack one part.

    Args:
        part: What to read.
        config: How.
        tokeniser: The model's; it is not used for documents that hold tokens already, but for their BOS and EOS.
        limits: The model's vocabulary and context.
        emit: Takes the number of a chunk and its table, of `config.shard_sequences` rows but for the last. Only one
            chunk is held at a time.

    Raises:
        BadRecord: A record cannot be used and `config.on_bad_record` is `fail`.
    """
    log = PartLog(part, config.on_bad_record)
    intake = _Intake(config, limits, log, tokeniser)
    chunks: list[int] = []
    documents = 0

    def emit_chunks(least: int) -> None:
        while len(intake.packer) >= least:
            table = intake.packer.take(config.shard_sequences)
            emit(len(chunks), table)
            chunks.append(len(table))

    for document, ids in _tokenised(part, config, tokeniser, log):
        documents += intake.accept(document, ids)
        emit_chunks(config.shard_sequences)
    intake.packer.cut()
    emit_chunks(1)
    return PartSummary(part.index, chunks, intake.packer.tokens, documents, log.rows, dict(sorted(log.skipped.items())))


def count_documents(parts: tuple[Part, ...], config: CorpusConfig, limit: int) -> dict[int, int]:
    """Count the documents of each part, in order, until there are `limit`: what `corpus.with_limits` needs."""
    counts: dict[int, int] = {}
    for part in parts:
        if sum(counts.values()) >= limit:
            break
        counts[part.index] = sum(1 for _ in read_documents(part, config, PartLog(part, config.on_bad_record)))
    return counts


def encode_text(text: str, config: CorpusConfig) -> str:
    """Give the text as it goes to the tokenizer: with `corpus.collapse_newlines`, runs of newlines are one."""
    return _NEWLINES.sub("\n", text) if config.collapse_newlines else text


def framed(ids: np.ndarray, bos: int | None, eos: int | None) -> np.ndarray:
    """Put the tokens of a document between BOS and EOS, where there are any and they are not there yet; int32."""
    pieces = [ids]
    if bos is not None and ids[0] != bos:
        pieces.insert(0, np.array([bos]))
    if eos is not None and ids[-1] != eos:
        pieces.append(np.array([eos]))
    return np.concatenate(pieces).astype(np.int32)


class _Intake:
    """Checks the tokens of documents, frames them by special tokens and packs them."""

    def __init__(self, config: CorpusConfig, limits: Limits, log: PartLog, tokeniser: Tokeniser) -> None:
        self.packer = Packer(config.sequence_length, config.pack)
        self._config, self._limits, self._log = config, limits, log
        self._bos = tokeniser.bos if config.add_bos else None
        self._eos = tokeniser.eos if config.add_eos else None
        self._last: int | None = None
        for token in (self._bos, self._eos):
            if token is not None and token >= limits.vocabulary:
                raise ConfigError(
                    f"the tokenizer's special token {token} is outside the model's vocabulary of {limits.vocabulary:,}",
                    remedy="set model.tokenizer to the tokenizer that the model was trained with",
                )

    def accept(self, document: Document, ids: np.ndarray) -> bool:
        """Pack a document with its tokens (int64), and say whether it could be."""
        if not len(ids):
            self._log.skipped["empty document"] += 1
            return False
        wrong = outside_vocabulary(ids, self._limits.vocabulary)
        if wrong is not None:
            detail = f": {wrong}, where the model's vocabulary has {self._limits.vocabulary:,} tokens"
            self._log.reject(document.row, "token id outside the vocabulary", detail)
            return False
        name = None if document.name is None else well_formed(document.name)
        if isinstance(document.content, str) or self._config.pack:
            self.packer.add(name, document.row, self._framed(ids))
            return True
        return self._accept_row(name, document.row, ids)

    def _accept_row(self, name: str | None, row: int, ids: np.ndarray) -> bool:
        context = self._limits.context
        if context is not None and len(ids) > context:
            detail = f": {len(ids):,} tokens, where the model's context has {context:,}"
            self._log.reject(row, "sequence longer than the context", detail)
            return False
        self.packer.add_whole(name, row, ids.astype(np.int32))
        return True

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        bos = None if self._config.pack and self._last == self._bos else self._bos
        whole = framed(ids, bos, self._eos)
        self._last = int(whole[-1])
        return whole


def _tokenised(
    part: Part, config: CorpusConfig, tokeniser: Tokeniser, log: PartLog
) -> Iterator[tuple[Document, np.ndarray]]:
    """Pair documents with their tokens (int64), encoding many short texts at once."""
    waiting: list[Document] = []
    characters = 0
    for document in read_documents(part, config, log):
        waiting.append(document)
        characters += len(document.content) if isinstance(document.content, str) else 0
        if len(waiting) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from _encoded(waiting, config, tokeniser)
            waiting, characters = [], 0
    yield from _encoded(waiting, config, tokeniser)


def _encoded(
    documents: list[Document], config: CorpusConfig, tokeniser: Tokeniser
) -> Iterator[tuple[Document, np.ndarray]]:
    texts = [encode_text(d.content, config) for d in documents if isinstance(d.content, str)]
    encoded = iter(tokeniser.encode(texts))
    for document in documents:
        if isinstance(document.content, str):
            yield document, np.asarray(next(encoded), dtype=np.int64)
        else:
            yield document, document.content
