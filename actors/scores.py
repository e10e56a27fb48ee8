"""Files of scores: one for each shard of candidates, with what its replica reports of it in the file's own metadata.

A file that is there is finished work: it is moved into place whole, and nothing beside it has to vouch for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from actors.store import Artifact

REPORT = b"whence.scan"
PREFIX, SUFFIX = "shard-", ".parquet"


@dataclass(frozen=True)
class ShardReport:
    """What is known of a finished shard besides its scores.

    Attributes:
        sequences: candidates in it, those set aside included.
        tokens: of all of them.
        seconds: that its replica took.
        excluded: reason for each sequence that was set aside, by its id.
    """

    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    excluded: Mapping[str, str] = field(default_factory=dict)


def score_file(shard: int) -> str:
    """The name of a shard's file."""
    return f"{PREFIX}{shard:06d}{SUFFIX}"


def finished_shards(output: Artifact) -> set[str]:
    """Names of the files of shards that are finished, by one look at the folder."""
    return {name for name in output.list(PREFIX) if name.endswith(SUFFIX)}


def write_scores(
    output: Artifact, shard: int, ids_B: np.ndarray, feeds: Sequence[str], scores_BQ: np.ndarray, report: ShardReport
) -> None:
    """Write a shard: sequence_id, feed and a list of the scores of all queries, ascending by sequence id."""
    columns = {
        "sequence_id": pa.array(ids_B, pa.int64()),
        "feed": pa.array(feeds, pa.string()).dictionary_encode(),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores_BQ.reshape(-1)), scores_BQ.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({REPORT: json.dumps(asdict(report))})
    output.write_table(score_file(shard), table)


def read_report(output: Artifact, name: str) -> ShardReport:
    """What a shard's file says of itself.

    Raises:
        ChecksumError: if the file is not what was written.
    """
    with output.open_parquet(name) as file:
        return ShardReport(**json.loads(file.schema_arrow.metadata[REPORT]))
