"""How the scores of probes lie in their artifact: `probe-000000.parquet`, one file a probe and one row a sequence.

scores_BQ: on the queries of all probes; by_token_BLTQ: the shares of layers and tokens in the score on its own query.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from torch import Tensor

from actors.store import Artifact
from influence.batch import Batch
from influence.worker import ScoreBlock

SCHEMA = pa.schema(
    [
        ("sequence", pa.int32()),  # its place in the probe, from 0
        ("input_ids", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float64())),  # on the query of each probe; NaN where it is not finite
        ("layers", pa.list_(pa.float64())),  # shares of the score on its own query (Equation 31, summed over tokens)
        ("tokens", pa.list_(pa.float64())),  # the same by position, summed over layers; position t predicts token t + 1
    ]
)


def probe_file(number: int) -> str:
    """The file of one probe."""
    return f"probe-{number:06d}.parquet"


def probe_rows(batch: Batch, scores_BQ: Tensor, own: ScoreBlock) -> list[dict[str, Any]]:
    """Rows of a micro-batch.

    Args:
        batch: its `sequence_ids` are places in the probe.
        scores_BQ: on all queries.
        own: on the probe's own query alone, by token.
    """
    assert own.by_token_BLTQ is not None
    shares_BLT = own.by_token_BLTQ[..., 0].double().cpu()
    lengths = batch.lengths.tolist()
    columns = zip(
        batch.sequence_ids.tolist(), batch.input_ids.tolist(), scores_BQ.double().tolist(), shares_BLT, lengths,
        strict=True,
    )  # fmt: skip
    return [
        {
            "sequence": sequence,
            "input_ids": input_ids[:length],
            "scores": scores,
            "layers": shares_LT.sum(1).tolist(),
            "tokens": shares_LT.sum(0)[:length].tolist(),
        }
        for sequence, input_ids, scores, shares_LT, length in columns
    ]


def write_probe(output: Artifact, number: int, rows: Iterable[dict[str, Any]]) -> None:
    """Write the sequences of one probe in their order: the file is whole or not there."""
    ordered = sorted(rows, key=lambda row: row["sequence"])
    output.write_table(probe_file(number), pa.Table.from_pylist(ordered, schema=SCHEMA))


def read_probe(artifact: Artifact, number: int) -> list[dict[str, Any]]:
    """The rows of one probe."""
    return artifact.read_table(probe_file(number)).to_pylist()
