"""Which sequences of several runs are the same.

Runs on the same tokenised corpus number its sequences alike. So do runs of models whose tokenizers are the same and
whose limits cut nothing off. Where tokenizers differ, sequences cover different text; only if documents were not
packed does the first sequence of a document begin at the same place in all of them, and those are then compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import pyarrow as pa

from actors.errors import ConfigError
from actors.filesystem import locate, read_stream
from actors.store import RECORD, Artifact, Store
from pipelines.comparing.runs import ComparedRun

READING = ("digest", "format", "text_field", "id_field", "collapse_newlines", "limit")  # which documents there are
CUTTING = ("sequence_length", "pack", "add_bos", "add_eos", "on_bad_record", "part_bytes")  # where sequences begin
COUNTED = ("sequences", "tokens", "documents", "skipped")
SPLITTING = ("digest", "add_bos", "add_eos")  # of the tokeniser; not the model's limits, whose effect is counted


class Matching(Enum):
    """What makes two sequences the same: their number, or that they are the beginning of the same document."""

    sequence = "sequence_id"
    document = "document_id"


def matching(runs: Sequence[ComparedRun]) -> Matching:
    """How sequences of these runs are matched.

    Raises:
        ConfigError: they cannot be: the corpora differ, or are packed with different tokens, or nobody can tell.
    """
    if len({_fingerprint(run) for run in runs}) == 1:
        return Matching.sequence
    identities = [_identity(run) for run in runs]
    for run, identity in zip(runs[1:], identities[1:], strict=True):
        if differing := _differing(identities[0]["corpus"], identity["corpus"], READING):
            what = "holds other documents" if "digest" in differing else f"was read with another {differing[0]}"
            raise ConfigError(
                f"its corpus {what} than that of {runs[0].folder}, so no sequence is known to be in both",
                file=str(run.folder),
                remedy="compare runs with the same corpus.path and the same settings of its fields",
            )
    if all(_numbered_alike(runs[0], identities[0], *other) for other in zip(runs[1:], identities[1:], strict=True)):
        return Matching.sequence
    packed = [run for run, identity in zip(runs, identities, strict=True) if identity["corpus"]["pack"]]
    if packed:
        raise ConfigError(
            "its corpus was cut into other sequences than that of another run (other tokens or lengths), and packed, "
            "so that no two sequences begin at the same place",
            file=str(packed[0].folder),
            remedy="trace all with the same corpus settings and tokenizer, or all with corpus=documents, which starts "
            "a sequence at each document",
        )
    return Matching.document


def _fingerprint(run: ComparedRun) -> str:
    return str(run.summary["artifacts"]["sequences"]).rstrip("/").rpartition("/")[2]


def _identity(run: ComparedRun) -> Mapping[str, Any]:
    """What determined the run's sequences: from its summary, or of an older run from the store."""
    known = run.summary["corpus"].get("identity")
    if known:
        return known
    return (sequences_of(run).record() or {})["config"]


def sequences_of(run: ComparedRun) -> Artifact:
    """The run's tokenised corpus in the store.

    Raises:
        ConfigError: the store is out of reach.
    """
    uri = str(run.summary["artifacts"]["sequences"])
    root, kind, _ = uri.rsplit("/", 2)
    try:
        record = json.loads(read_stream(*locate(f"{uri}/{RECORD}")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"its sequences are not those of the other runs, and {uri}, which says how they differ, cannot be read",
            file=str(run.folder),
            remedy="compare where the run's store can be reached, or runs of the same corpus and tokenizer",
        ) from error
    return Artifact(Store(root), kind, record["fingerprint"])


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if first.get(key) != second.get(key)]


def _numbered_alike(
    first: ComparedRun, identity: Mapping[str, Any], second: ComparedRun, other: Mapping[str, Any]
) -> bool:
    """Whether the sequences of two runs have the same tokens and numbers, though they are different artifacts."""
    return not (
        _differing(identity["corpus"], other["corpus"], CUTTING)
        or _differing(identity["tokeniser"], other["tokeniser"], SPLITTING)
        or _differing(first.summary["corpus"], second.summary["corpus"], COUNTED)
    )


def document_key(document_id: str) -> int:
    """Eight bytes of a digest, as a number."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def first_sequences(run: ComparedRun, keep: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sequences with which documents begin, ascending, and the key of each one's document.

    Documents whose id another one has too are left out.

    Args:
        run: Whose corpus it is; a file of it is in memory at a time.
        keep: Which keys are of interest, as a mask.
    """
    artifact = sequences_of(run)
    ids, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in artifact.read_json("index.json")["shards"]:
        table = artifact.read_table(shard["name"], columns=["sequence_id", "document_id", "offset"])
        begins = table.filter(pa.array(table["offset"].to_numpy() == 0))
        found = np.array([document_key(name) for name in begins["document_id"].to_pylist()], np.int64)
        kept = keep(found)
        ids.append(begins["sequence_id"].to_numpy()[kept])
        keys.append(found[kept])
    all_ids, all_keys = np.concatenate(ids), np.concatenate(keys)
    _, inverse, counts = np.unique(all_keys, return_inverse=True, return_counts=True)
    alone = counts[inverse] == 1
    return all_ids[alone], all_keys[alone]


def top_keys(run: ComparedRun, query_id: str, how: Matching) -> list[object]:
    """What identifies each of a query's top sequences, in order; what cannot be in another run is its own."""
    rows = run.top.get(query_id, [])
    if how is Matching.sequence:
        return [row["sequence_id"] for row in rows]
    return [row["document_id"] if row["offset"] == 0 else (run.label, row["sequence_id"]) for row in rows]


def ranks_by_key(runs: Sequence[ComparedRun], query_id: str, how: Matching) -> list[dict[object, int]]:
    """Of each run, the ranks of its top sequences by what identifies them."""
    return [{key: rank for rank, key in enumerate(top_keys(run, query_id, how), start=1)} for run in runs]
