"""Reads the queries of a run (JSONL) and turns them into tokens; a query that measures nothing is an error.

Each line is an object with `query_id`, `prompt`, `completion` and, for a contrast, `contrast`: a second completion.
Unlike records of the corpus, a bad query is never skipped: its absence from the results could go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.errors import BadRecord, ConfigError
from actors.filesystem import locate
from actors.tokeniser import Limits, Tokeniser, load_tokeniser, model_limits, well_formed
from conf.schema import Measurement, RunConfig
from influence.measurement import MeasuredQuery


@dataclass(frozen=True)
class Query:
    """A query as its file states it.

    Attributes:
        query_id: Unique in the file.
        prompt: May be empty if the tokenizer has a BOS.
        completion: What is measured given the prompt.
        contrast: A second completion, whose log-probability is subtracted.
        row: The line of the file, from 1.
    """

    query_id: str
    prompt: str
    completion: str
    contrast: str | None = None
    row: int = 0


@dataclass(frozen=True)
class TokenisedQuery:
    """A query as token ids.

    Attributes:
        query: The text.
        input_ids: BOS (as in the corpus), prompt, completion.
        completion_start: Index of the first measured token in `input_ids`, and in `contrast_ids`. At least 1: for a
            whole sequence it is 1, as the first token is predicted from nothing.
        contrast_ids: The same prompt with the second completion, where the measurement is a contrast.
    """

    query: Query
    input_ids: tuple[int, ...]
    completion_start: int
    contrast_ids: tuple[int, ...] | None = None

    @property
    def query_id(self) -> str:
        """The query's name."""
        return self.query.query_id

    def measured(self) -> MeasuredQuery:
        """Give the tokens as the mathematics takes them."""
        return MeasuredQuery(self.input_ids, self.completion_start, self.contrast_ids)

    def record(self) -> dict:
        """Give what results say of the query, JSON-able."""
        return {
            "query_id": self.query.query_id,
            "prompt": self.query.prompt,
            "completion": self.query.completion,
            "contrast": self.query.contrast,
            "tokens": len(self.input_ids),
            "completion_start": self.completion_start,
        }


def read_queries(config: RunConfig) -> list[TokenisedQuery]:
    """Read and tokenise the queries of a run, in the order of the file.

    Raises:
        BadRecord: A query cannot be used; names the file, the line and the reason.
        ConfigError: The file is not there, or the model has no tokenizer.
    """
    queries = parse_queries(config.queries.path, config.queries.measurement)
    return tokenise_queries(queries, load_tokeniser(config.model), model_limits(config.model), config)


def queries_digest(config: RunConfig) -> str:
    """Identify the queries by what they say, in order (SHA-256); spaces and unknown fields of the file do not matter.

    Raises:
        BadRecord: As `parse_queries`.
    """
    queries = parse_queries(config.queries.path, config.queries.measurement)
    content = [[query.query_id, query.prompt, query.completion, query.contrast] for query in queries]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def parse_queries(path: str, measurement: Measurement) -> list[Query]:
    """Read the queries of a file, checking all that can be checked without a tokenizer.

    Raises:
        BadRecord: A line is no JSON object, a field is missing or not text, a `query_id` comes twice, or the file has
            no query.
        ConfigError: The file is not there.
    """
    queries: dict[str, Query] = {}
    for row, line in _lines(path):
        query = _parsed(line, path, row, measurement)
        if query.query_id in queries:
            first = queries[query.query_id].row
            raise _bad(path, row, f"query_id {query.query_id!r} was given to the query of row {first} already")
        queries[query.query_id] = query
    if not queries:
        raise BadRecord("the file has no query", file=path, remedy="write one JSON object a line")
    return list(queries.values())


def tokenise_queries(
    queries: Sequence[Query], tokeniser: Tokeniser, limits: Limits, config: RunConfig
) -> list[TokenisedQuery]:
    """Tokenise queries.

    The tokens of the prompt are those of the prompt alone. Prompt and completion are tokenised as one text; where
    that begins with the tokens of the prompt, the rest are the completion's. Where a token straddles the two (the
    prompt ends with a space, say), the completion is tokenised apart, so that exactly its text is measured.

    Raises:
        BadRecord: A completion has no tokens or nothing before it, or there are more tokens than the model's context.
    """
    return [_Encoder(tokeniser, limits, config).encode(query) for query in queries]


class _Encoder:
    def __init__(self, tokeniser: Tokeniser, limits: Limits, config: RunConfig) -> None:
        self._tokeniser, self._limits = tokeniser, limits
        self._measurement, self._path = config.queries.measurement, config.queries.path
        self._bos = [tokeniser.bos] if config.corpus.add_bos and tokeniser.bos is not None else []

    def encode(self, query: Query) -> TokenisedQuery:
        prompt = self._ids(query.prompt)
        if self._bos and prompt[:1] == self._bos:
            prompt = prompt[1:]
        head = [*self._bos, *prompt]
        whole = self._measurement is Measurement.sequence_log_probability
        ids = [*head, *self._completion(query, query.completion, may_be_empty=whole)]
        contrast = None
        if self._measurement is Measurement.contrast and query.contrast is not None:
            contrast = (*head, *self._completion(query, query.contrast))
        if whole and len(ids) < 2:
            raise _bad(self._path, query.row, "the sequence has fewer than two tokens: none is predicted from another")
        if not whole and not head:
            reason = "the prompt is empty and there is no BOS: nothing comes before the completion's first token"
            raise _bad(self._path, query.row, reason)
        for tokens in (ids, contrast or ()):
            self._check(query, tokens)
        return TokenisedQuery(query, tuple(ids), 1 if whole else len(head), contrast)

    def _completion(self, query: Query, completion: str, may_be_empty: bool = False) -> list[int]:
        prompt, joint = self._ids(query.prompt), self._ids(query.prompt + completion)
        ids = joint[len(prompt) :] if joint[: len(prompt)] == prompt else self._apart(completion)
        if not ids and not may_be_empty:
            raise _bad(self._path, query.row, f"the completion {completion!r} has no tokens")
        return ids

    def _apart(self, text: str) -> list[int]:
        """Tokenise text as if something came before it: tokenizers that begin every text with a space must not here."""
        before, joint = self._ids("\n"), self._ids("\n" + text)
        return joint[len(before) :] if joint[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self._tokeniser.encode([text])[0] if text else []

    def _check(self, query: Query, ids: Sequence[int]) -> None:
        context, vocabulary = self._limits.context, self._limits.vocabulary
        if context is not None and len(ids) > context:
            reason = f"the query has {len(ids):,} tokens, where the model's context has {context:,}"
            raise _bad(self._path, query.row, reason)
        if ids and max(ids) >= vocabulary:
            reason = f"token id {max(ids)} is outside the model's vocabulary of {vocabulary:,} tokens"
            raise _bad(self._path, query.row, reason)


def _bad(path: str, row: int, reason: str) -> BadRecord:
    return BadRecord(reason, file=path, row=row, remedy="correct or remove this query")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    filesystem, base = locate(path)
    try:
        with filesystem.open_input_stream(base) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise ConfigError(f"queries.path={path!r} does not exist", remedy="give a JSONL file") from error
    for row, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield row, line


def _parsed(line: bytes, path: str, row: int, measurement: Measurement) -> Query:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(path, row, f"invalid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, row, f"malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise _bad(path, row, "not a JSON object")
    query_id = record.get("query_id")
    if isinstance(query_id, int) and not isinstance(query_id, bool):
        query_id = record["query_id"] = str(query_id)
    fields = ["query_id", "prompt", "completion"]
    fields += ["contrast"] if measurement is Measurement.contrast or record.get("contrast") is not None else []
    for field in fields:
        if record.get(field) is None:
            needed = " (queries.measurement=contrast needs it)" if field == "contrast" else ""
            raise _bad(path, row, f"the query has no {field!r}{needed}")
        if not isinstance(record[field], str):
            raise _bad(path, row, f"{field!r} is not text")
    if not query_id:
        raise _bad(path, row, "'query_id' is empty")
    return Query(*(well_formed(record[field]) for field in fields), row=row)
