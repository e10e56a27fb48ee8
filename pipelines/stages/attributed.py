"""The rows of one query in the attribution: parts of replicas put together with the text; one task a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.attributing import CELLS, TOKENS, read_query
from actors.pieces import neighbouring_text, token_pieces
from actors.sequences import StoredSequences
from actors.store import Artifact
from actors.tokeniser import Tokeniser, load_tokeniser
from conf.schema import RunConfig
from influence.attribution import SPURIOUS, sparsity

ROW_GROUP = 256

_VECTOR = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("side", pa.string()),  # top or bottom
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("score", pa.float64()),  # of the scan
        ("pieces", pa.list_(pa.string())),  # text of each token
        ("tokens", _VECTOR),  # Eq. 31 over layers: position t is where the update happens, t + 1 what is predicted
        ("layers", _VECTOR),  # Eq. 31 over tokens
        ("matrix", _VECTOR),  # Eq. 31, [T, L] by rows
        ("output_tokens", _VECTOR),  # Eq. 36: token t as a target
        ("input_tokens", _VECTOR),  # Eq. 38: token t as an input
        ("total", pa.float64()),  # sum of the matrix
        ("sparsity", pa.float32()),
        ("spurious", pa.bool_()),
        ("before", pa.string()),
        ("after", pa.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """A sequence in the ranking of a query."""

    side: str
    rank: int
    sequence_id: int
    score: float


@dataclass(frozen=True)
class Job:
    """What the task of one query is given.

    Attributes:
        output: the attribution artifact.
        query: its number.
        query_id: its name.
        entries: its sequences, in the order of the rows.
        sequences: the tokenised corpus.
        tokens: whether output and input tokens were computed.
    """

    output: Artifact
    query: int
    query_id: str
    entries: tuple[Entry, ...]
    sequences: Artifact
    tokens: bool


def query_file(query: int) -> str:
    """The file of one query."""
    return f"query-{query:06d}.parquet"


def describe(job: Job, config: RunConfig) -> dict[str, Any]:
    """Write the rows of one query, in groups of `ROW_GROUP`. Runs as a Ray task.

    Returns:
        Of its pairs: `spurious` and `not_finite` are counts, `sum` is the largest |Σ_t output − score| / ‖output‖₁.
    """
    source, tokeniser = StoredSequences(job.sequences), load_tokeniser(config.model)
    found = _by_sequence(read_query(job.output, CELLS, job.query))
    apart = _by_sequence(read_query(job.output, TOKENS, job.query)) if job.tokens else {}
    texts = {
        entry.sequence_id: _text(entry.sequence_id, source, tokeniser, config)
        for entry in sorted(job.entries, key=lambda entry: entry.sequence_id)
    }
    rows = [
        {
            "query_id": job.query_id,
            **vars(entry),
            **texts[entry.sequence_id],
            **found[entry.sequence_id],
            **apart.get(entry.sequence_id, {"output_tokens": None, "input_tokens": None}),
        }
        for entry in job.entries
    ]
    for row in rows:
        row["sparsity"] = float(sparsity(torch.tensor(row["tokens"], dtype=torch.float64)))
        row["spurious"] = row["sparsity"] > SPURIOUS
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA]
    job.output.write_table(query_file(job.query), pa.Table.from_arrays(columns, schema=SCHEMA), ROW_GROUP)
    return _tally(rows, job.tokens)


def _by_sequence(table: pa.Table) -> dict[int, dict[str, Any]]:
    """Rows by sequence, lists as arrays."""
    names = [name for name in table.column_names if name not in ("query", "sequence_id")]
    columns = {name: table.column(name) for name in names}
    return {
        sequence_id: {name: _value(column[place]) for name, column in columns.items()}
        for place, sequence_id in enumerate(table.column("sequence_id").to_pylist())
    }


def _value(value: pa.Scalar) -> Any:
    if not pa.types.is_list(value.type):
        return value.as_py()
    return value.values.to_numpy(zero_copy_only=False) if value.is_valid else None


def _text(sequence_id: int, source: StoredSequences, tokeniser: Tokeniser, config: RunConfig) -> dict[str, Any]:
    corpus = config.corpus
    ids = source.read([sequence_id])[0].tolist()
    before, after = neighbouring_text(
        source, sequence_id, tokeniser, corpus.sequence_length, corpus.pack, config.attribution.context_characters
    )
    return {"pieces": token_pieces(tokeniser, ids), "before": before, "after": after}


def _tally(rows: Sequence[Mapping[str, Any]], tokens: bool) -> dict[str, Any]:
    lost = [row for row in rows if tokens and (row["output_tokens"] is None or row["input_tokens"] is None)]
    gaps = [_gap(row) for row in rows if row["output_tokens"] is not None]
    spurious = sum(row["spurious"] for row in rows)
    return {"spurious": spurious, "not_finite": len(lost), "sum": max(gaps, default=0.0)}


def _gap(row: Mapping[str, Any]) -> float:
    output_T = row["output_tokens"].astype(np.float64)
    size = float(np.abs(output_T).sum())
    return abs(float(output_T.sum()) - row["total"]) / size if size else 0.0
