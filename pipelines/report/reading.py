"""What a run's folder holds for the report; each of the later stages' files may be missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from actors.errors import ConfigError, WhenceError

ROWS = 64  # of attribution.parquet that are in memory at once

Survival = Mapping[str, Mapping[str, tuple[list[float], list[float]]]]  # by query and feed: influences, shares


class ReportError(WhenceError):
    """A file of a run that cannot be read for its report."""


@dataclass(frozen=True)
class Layers:
    """The layers of a token × layer matrix, in its order.

    Attributes:
        names: module paths.
        groups: where each belongs, such as `block 0`.
        kinds: what each is, such as `gate_proj`.
    """

    names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attribution:
    """Where in a sequence, and in which layers, its influence on a query comes from.

    Attributes:
        pieces: text of each of T tokens, which joined are the sequence.
        matrix_TL: Equation 31, a cell for each token and layer.
        output_T: Equation 36, of each token as a target; None if it was not computed.
        input_T: Equation 38, of each token as an input; None if it was not computed.
        row: the other columns of the table.
    """

    pieces: list[str]
    matrix_TL: np.ndarray
    output_T: np.ndarray | None
    input_T: np.ndarray | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run as its report sees it.

    Attributes:
        path: the folder.
        summary: `summary.json`.
        rows: the top and bottom sequences of each query, by query id and side; at most as many as are shown.
        layers: those that attributions are split into.
        step: the record of the finite-difference step of Equations 36 and 38.
        tails: by query, what `tails.json` says.
        survival: by query and feed, points of the survival function.
    """

    path: Path
    summary: Mapping[str, Any]
    rows: Mapping[tuple[str, str], list[dict[str, Any]]]
    layers: Layers = field(default_factory=Layers)
    step: Mapping[str, Any] = field(default_factory=dict)
    tails: Mapping[str, Any] = field(default_factory=dict)
    survival: Survival = field(default_factory=dict)

    @property
    def attributed(self) -> bool:
        """Whether influences were split into tokens and layers."""
        return (self.path / "attribution.parquet").exists()

    def attributions(self, query_id: str, most: int) -> Iterator[tuple[str, Attribution]]:
        """Side and attribution of a query's sequences up to a rank, some of them in memory at once."""
        if not self.attributed:
            return
        wanted = (pc.field("query_id") == query_id) & (pc.field("rank") <= most)
        with _named(self.path / "attribution.parquet") as path:
            for batch in ds.dataset(path).to_batches(filter=wanted, batch_size=ROWS, use_threads=False):
                for index in range(batch.num_rows):
                    yield batch.column("side")[index].as_py(), _attribution(batch, index)


def read_run(path: Path, sequences: int) -> RunFolder:
    """Read a run's folder.

    Args:
        path: the folder.
        sequences: of each query and side.

    Raises:
        ConfigError: the folder is not one of a run.
        ReportError: a file cannot be read.
    """
    summary = read_summary(path)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for side in ("top", "bottom"):
        for row in _table(path / f"{side}.parquet", [("rank", "<=", sequences)]):
            rows[row["query_id"], side].append(row)
    layers, step = _layers(path / "attribution.parquet")
    tails = _record(path / "tails.json").get("queries", {})
    return RunFolder(path, summary, rows, layers, step, tails, _survival(path / "tails.parquet"))


def read_summary(path: Path) -> dict[str, Any]:
    """`summary.json` of a run.

    Raises:
        ConfigError: the folder is not one of a run.
        ReportError: the file cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(
            "there is no such folder", file=str(path), remedy="give the folder of a run, such as runs/NAME/TIME"
        )
    missing = [name for name in ("summary.json", "top.parquet") if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"this is not the folder of a finished run: {' and '.join(missing)} missing",
            file=str(path),
            remedy=_nearby(path) or "give the folder of a run, such as runs/NAME/TIME",
        )
    summary = _record(path / "summary.json")
    if not {"queries", "config", "stages", "corpus"} <= summary.keys():
        raise ReportError("it is not the summary of a trace", file=str(path / "summary.json"))
    return summary


def _nearby(path: Path) -> str | None:
    """The runs below a folder, which may be what was meant."""
    found = sorted(file.parent for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}/summary.json"))
    return f"{found[-1]} is one" if found else None


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Turn what pyarrow or json says of a file into an error that names the file."""
    try:
        yield path
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ReportError(
            f"it cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            file=str(path),
            remedy="run whence trace again with the same settings: it writes the folder anew",
        ) from error


def _record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with _named(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _table(path: Path, filters: list[tuple[str, str, Any]] | None = None) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with _named(path):
        return pq.read_table(path, filters=filters).to_pylist()


def _layers(path: Path) -> tuple[Layers, dict[str, Any]]:
    if not path.exists():
        return Layers(), {}
    with _named(path):
        metadata = pq.read_schema(path).metadata or {}
        names, groups, kinds = (
            tuple(json.loads(metadata[key])) for key in (b"layer_names", b"layer_groups", b"layer_kinds")
        )
        return Layers(names, groups, kinds), json.loads(metadata.get(b"step", b"null")) or {}


def _survival(path: Path) -> Survival:
    points: dict[str, dict[str, tuple[list[float], list[float]]]] = defaultdict(dict)
    for row in _table(path):
        influences, shares = points[row["query_id"]].setdefault(row["feed"], ([], []))
        influences.append(row["influence"])
        shares.append(row["survival"])
    return dict(points)


def _attribution(batch: pa.RecordBatch, index: int) -> Attribution:
    def numbers(name: str) -> np.ndarray | None:
        value = batch.column(name)[index]
        return np.asarray(value.values, dtype=np.float32) if value.is_valid else None

    pieces = batch.column("pieces")[index].as_py()
    matrix = numbers("matrix")
    assert matrix is not None
    columns = ("rank", "sequence_id", "score", "total", "sparsity", "spurious", "before", "after")
    row = {name: batch.column(name)[index].as_py() for name in columns}
    return Attribution(pieces, matrix.reshape(len(pieces), -1), numbers("output_tokens"), numbers("input_tokens"), row)
