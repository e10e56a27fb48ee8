"""Parts of the attribution: what replicas find of pairs of a sequence and a query, and how it lies in the store.

A part is one Parquet file, `parts/KIND-000000.parquet`, with what its replica reports in the file's own metadata; one
that is there is finished work. Rows are sorted by query, and row groups are small, so that the rows of one query are
read without the others.

cells_PTL: pairs, positions, layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from actors.store import Artifact
from influence.attribution import Queries, Step, cells, choose_steps, token_influence
from influence.batch import Batch
from influence.worker import Worker

CELL_BYTES = 1 << 28  # of cells that a rank holds at once; a micro-batch with more pairs takes several passes
ROW_GROUP = 8
REPORT = b"whence.attribution"

CELLS, STEPS, TOKENS = "cells", "steps", "tokens"
PAIR = [("query", pa.int32()), ("sequence_id", pa.int64())]
VECTOR = pa.list_(pa.float32())
SCHEMAS = {
    CELLS: pa.schema(
        [*PAIR, ("total", pa.float64()), ("tokens", VECTOR), ("layers", VECTOR), ("matrix", VECTOR)]  # [T, L] by rows
    ),
    STEPS: pa.schema(
        [
            ("query", pa.int32()),
            *((name, pa.float64()) for name in ("alpha", "relative", "output", "input")),  # NaN: not a number
        ]
    ),
    TOKENS: pa.schema([*PAIR, ("output_tokens", VECTOR), ("input_tokens", VECTOR)]),
}

Pair = tuple[int, int]  # sequence_id, query


@dataclass(frozen=True)
class PartReport:
    """What is known of a part besides its rows: tokens that were gone through, and seconds of its replica."""

    tokens: int
    seconds: float


def part_file(kind: str, part: int) -> str:
    """The file of a part."""
    return f"parts/{kind}-{part:06d}.parquet"


def finished_parts(output: Artifact) -> set[str]:
    """The files of parts that are finished, by one look at the folder."""
    return {name for name in output.list("parts/") if name.endswith(".parquet")}


def queries_of(pairs: Iterable[Pair]) -> dict[int, list[int]]:
    """The queries of each sequence."""
    found: dict[int, list[int]] = {}
    for sequence_id, query in pairs:
        found.setdefault(sequence_id, []).append(query)
    return found


# --- in a replica -------------------------------------------------------------------------------------------------


def cell_rows(worker: Worker, batch: Batch, wanted: Mapping[int, Sequence[int]], queries: Queries) -> list[dict]:
    """Rows of `CELLS` for the sequences of a micro-batch, each with its queries."""
    pairs = [(row, query) for row, number in enumerate(batch.sequence_ids.tolist()) for query in wanted[number]]
    each = batch.input_ids.shape[1] * len(worker.selection.layers) * worker.precision.sums.itemsize
    step = max(1, CELL_BYTES // each)
    found = []
    for start in range(0, len(pairs), step):
        chosen = pairs[start : start + step]
        for (row, query), cells_TL in zip(chosen, cells(worker, batch, chosen, queries).cpu(), strict=True):
            cells_TL = cells_TL[: int(batch.lengths[row])].double()
            found.append({"query": query, "sequence_id": int(batch.sequence_ids[row]), **_cell_columns(cells_TL)})
    return found


def _cell_columns(cells_TL: Tensor) -> dict[str, Any]:
    return {
        "total": float(cells_TL.sum()),
        "tokens": _single(cells_TL.sum(1)),
        "layers": _single(cells_TL.sum(0)),
        "matrix": _single(cells_TL.flatten()),
    }


def token_rows(
    worker: Worker, batch: Batch, pairs: Sequence[Pair], steps: Sequence[float], queries: Queries
) -> list[dict]:
    """Rows of `TOKENS` for a micro-batch whose ids are places in `pairs` and `steps`."""
    places = batch.sequence_ids.tolist()
    steps_B = torch.tensor([steps[place] for place in places], dtype=torch.float64, device=batch.input_ids.device)
    found = token_influence(worker, batch, [pairs[place][1] for place in places], steps_B, queries)
    rows = zip(places, batch.lengths.tolist(), found.output_BT.cpu(), found.input_BT.cpu(), strict=True)
    return [
        {
            "query": pairs[place][1],
            "sequence_id": pairs[place][0],
            "output_tokens": _finite(output_T[:length]),
            "input_tokens": _finite(input_T[:length]),
        }
        for place, length, output_T, input_T in rows
    ]


def step_rows(
    worker: Worker, batch: Batch, pairs: Sequence[Pair], queries: Queries, relative: float | None
) -> list[dict]:
    """Rows of `STEPS` for a micro-batch whose ids are places in `pairs`, one for each query."""
    chosen = [pairs[place][1] for place in batch.sequence_ids.tolist()]
    steps = choose_steps(worker, batch, chosen, queries, relative)
    return [{"query": query, **asdict(step)} for query, step in zip(chosen, steps, strict=True)]


def _single(values: Tensor) -> np.ndarray:
    return values.to(torch.float32).numpy()


def _finite(values_T: Tensor) -> np.ndarray | None:
    """The values, or nothing where one is not a number: a sequence whose loss is not finite at a step away."""
    return _single(values_T) if bool(torch.isfinite(values_T).all()) else None


# --- in the store -------------------------------------------------------------------------------------------------


def write_part(output: Artifact, kind: str, part: int, rows: Sequence[dict], report: PartReport) -> None:
    """Write the rows of a part, sorted by query and sequence."""
    ordered = sorted(rows, key=lambda row: (row["query"], row.get("sequence_id", 0)))
    schema = SCHEMAS[kind]
    columns = [pa.array([row[field.name] for row in ordered], field.type) for field in schema]
    table = pa.Table.from_arrays(columns, schema=schema.with_metadata({REPORT: json.dumps(asdict(report))}))
    output.write_table(part_file(kind, part), table, ROW_GROUP)


def read_part_report(output: Artifact, name: str) -> PartReport:
    """What a part says of itself.

    Raises:
        ChecksumError: if the file is not what was written.
    """
    with output.open_parquet(name) as file:
        return PartReport(**json.loads(file.schema_arrow.metadata[REPORT]))


def read_query(output: Artifact, kind: str, query: int) -> pa.Table:
    """The rows of one query in all parts of a kind."""
    found = [SCHEMAS[kind].empty_table()]
    for name in sorted(finished_parts(output)):
        if not name.startswith(f"parts/{kind}-"):
            continue
        with output.open_parquet(name) as file:
            place = file.metadata.schema.names.index("query")
            bounds = [file.metadata.row_group(group).column(place).statistics for group in range(file.num_row_groups)]
            groups = [group for group, bound in enumerate(bounds) if bound is None or bound.min <= query <= bound.max]
            table = file.read_row_groups(groups)
        found.append(table.filter(pc.field("query") == query).cast(SCHEMAS[kind]))
    return pa.concat_tables(found)


def read_steps(output: Artifact) -> dict[int, Step]:
    """The step of every query."""
    names = [name for name in sorted(finished_parts(output)) if name.startswith(f"parts/{STEPS}-")]
    rows = [row for name in names for row in output.read_table(name).to_pylist()]
    return {row.pop("query"): Step(**row) for row in rows}


def json_number(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None
