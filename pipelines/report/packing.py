"""Sequences with their attributions, small enough for a page of a hundred of each of thirty queries.

Legend: T tokens, L layers, R rows of the map that the page draws (layers, or groups of them).

What a query needs is one blob: the length of a JSON header as four bytes, the header, then one signed byte a token and
kind of attribution; deflated, in base64. Maps are blobs of their own, one a sequence, so that those which do not fit
can be left out.
"""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.report.reading import Attribution, Layers, RunFolder

LEVELS = 127  # of each sign, of a token
MAP_LEVELS = 31  # of a cell of a map: fewer deflate better, and colours tell no more of them apart
MOST_ROWS = 48  # of a map; more layers than that are drawn by group
KINDS = ("update", "output", "input")


@dataclass(frozen=True)
class Quantised:
    """Values as signed bytes: value = sign(code) · (code / levels)² · peak.

    The square gives small values finer steps than large ones: an error of at most |value|^½ peak^½ / levels, to first
    order, where equal steps would lose everything below peak / 2 levels.

    Attributes:
        codes: int8.
        peak: the largest magnitude.
    """

    codes: np.ndarray
    peak: float


def quantised(values: np.ndarray, levels: int = LEVELS) -> Quantised:
    """Quantise finite values of any shape; anything that is not finite counts as zero."""
    finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    peak = float(np.abs(finite).max(initial=0.0))
    if peak == 0.0:
        return Quantised(np.zeros(finite.shape, np.int8), 0.0)
    codes = np.sign(finite) * np.rint(levels * np.sqrt(np.abs(finite) / peak))
    return Quantised(codes.astype(np.int8), peak)


def restored(codes: np.ndarray, peak: float, levels: int = LEVELS) -> np.ndarray:
    """The values of codes, as the page computes them."""
    scaled = codes.astype(np.float64) / levels
    return np.sign(scaled) * scaled**2 * peak


@dataclass(frozen=True)
class MapRows:
    """The rows of a layer × token map.

    Attributes:
        labels: what each row is.
        groups: which group it belongs to.
        share_LR: one where a layer belongs to a row.
    """

    labels: tuple[str, ...]
    groups: tuple[str, ...]
    share_LR: np.ndarray


def map_rows(layers: Layers, most: int = MOST_ROWS) -> MapRows:
    """A row a layer; a row a group where they are too many, and a row for some neighbouring groups beyond that."""
    if len(layers.names) <= most:
        labels = tuple(f"{group} · {kind}" for group, kind in zip(layers.groups, layers.kinds, strict=True))
        return MapRows(labels, layers.groups, np.eye(len(layers.names), dtype=np.float32))
    groups = list(dict.fromkeys(layers.groups))
    together = -(-len(groups) // most)
    rows = [groups[start : start + together] for start in range(0, len(groups), together)]
    names = tuple(row[0] if len(row) == 1 else f"{row[0]} – {row[-1]}" for row in rows)
    position = {group: index for index, row in enumerate(rows) for group in row}
    share = np.zeros((len(layers.names), len(rows)), np.float32)
    share[np.arange(len(layers.names)), [position[group] for group in layers.groups]] = 1
    return MapRows(names, names, share)


@dataclass(frozen=True)
class PackedSequence:
    """A sequence of one query: what the header says of it, its bytes, and its map in base64."""

    header: Mapping[str, Any]
    codes: bytes = b""
    map: str | None = None

    @property
    def rank(self) -> int:
        """From 1 on each side."""
        return self.header["rank"]

    @property
    def key(self) -> str:
        """Of its map."""
        return f"{self.header['side']}:{self.rank}"


@dataclass(frozen=True)
class PackedQuery:
    """The sequences of one query.

    Attributes:
        number: of the query in the run.
        sequences: top ones, then bottom ones.
        blob: their headers and bytes, in base64.
    """

    number: int
    sequences: tuple[PackedSequence, ...]
    blob: str

    def first(self, ranks: int) -> PackedQuery:
        """The same query with these ranks only."""
        kept = tuple(sequence for sequence in self.sequences if sequence.rank <= ranks)
        return self if len(kept) == len(self.sequences) else _packed(self.number, kept)

    def maps_blob(self, ranks: int) -> str:
        """JSON of the maps of these ranks, which is harmless in markup: keys are ours, values base64."""
        return json.dumps({item.key: item.map for item in self.sequences if item.map and item.rank <= ranks})


def pack_query(number: int, query_id: str, run: RunFolder) -> PackedQuery:
    """Pack what the run holds of a query."""
    rows = map_rows(run.layers)
    sides = {side: run.rows.get((query_id, side), []) for side in ("top", "bottom")}
    most = max((row["rank"] for side in sides.values() for row in side), default=0)
    attributed = {
        (side, found.row["sequence_id"]): _attributed(found, rows) for side, found in run.attributions(query_id, most)
    }
    sequences = []
    for side, row in ((side, row) for side, found in sides.items() for row in found):
        more = attributed.get((side, row["sequence_id"]), PackedSequence({}))
        sequences.append(PackedSequence(_header(side, row) | dict(more.header), more.codes, more.map))
    return _packed(number, tuple(sequences))


def fitting(queries: Sequence[PackedQuery], most: int, budget: int) -> int:
    """How many ranks of every query fit into so many characters without any map; at least one."""
    ranks, kept = most, list(queries)
    while ranks > 1 and (size := sum(len(query.blob) for query in kept)) > budget:
        ranks = max(1, min(ranks - 1, int(ranks * budget / size)))
        kept = [query.first(ranks) for query in kept]
    return ranks


def map_ranks(queries: Sequence[PackedQuery], budget: int) -> int:
    """Up to which rank the maps of all queries fit into so many characters."""
    sizes: dict[int, int] = {}
    for sequence in itertools.chain.from_iterable(query.sequences for query in queries):
        if sequence.map:
            entry = len(sequence.key) + len(sequence.map) + len('"": "", ')
            sizes[sequence.rank] = sizes.get(sequence.rank, 0) + entry
    used, found = 0, 0
    for rank in sorted(sizes):
        used += sizes[rank]
        if used > budget:
            break
        found = rank
    return found


def text_of(data: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which has no UTF-8, becomes its JSON escape."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="backslashreplace")


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number that reads the same in a page, in fewer characters; None for what is not finite."""
    return float(f"{value:.{digits}g}") if value is not None and np.isfinite(value) else None


def _packed(number: int, sequences: tuple[PackedSequence, ...]) -> PackedQuery:
    header = text_of({"sequences": [sequence.header for sequence in sequences]})
    body = b"".join(sequence.codes for sequence in sequences)
    return PackedQuery(number, sequences, _deflated(len(header).to_bytes(4, "little") + header + body))


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _header(side: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "side": side,
        "rank": row["rank"],
        "id": row["sequence_id"],
        "score": rounded(row["score"], 7),
        "feed": row["feed"],
        "bm25": rounded(row.get("bm25_score")),
        "document": row["document_id"],
        "offset": row["offset"],
        "text": row["text"],
    }


def _attributed(found: Attribution, rows: MapRows) -> PackedSequence:
    """What an attribution adds to the sequence's header, with its bytes and its map."""
    matrix_TR = found.matrix_TL @ rows.share_LR
    values = {"update": found.matrix_TL.sum(axis=1), "output": found.output_T, "input": found.input_T}
    kinds = {kind: quantised(values[kind]) for kind in KINDS if values[kind] is not None}
    cells = quantised(matrix_TR, MAP_LEVELS)
    header = {
        "text": "".join(found.pieces),
        "lengths": [_utf16(piece) for piece in found.pieces],
        "peaks": {kind: rounded(code.peak) for kind, code in kinds.items()},
        "rows": [rounded(float(value), 4) for value in matrix_TR.sum(axis=0)],
        "map_peak": rounded(cells.peak),
        "total": rounded(found.row["total"], 7),
        "sparsity": rounded(found.row["sparsity"]),
        "spurious": found.row["spurious"],
        "before": found.row["before"] or "",
        "after": found.row["after"] or "",
    }
    codes = b"".join(code.codes.tobytes() for code in kinds.values())
    return PackedSequence(header, codes, _deflated(cells.codes.tobytes()))


def _utf16(piece: str) -> int:
    """Length in the units that JavaScript counts."""
    return len(piece) if piece.isascii() else len(piece.encode("utf-16-le", errors="surrogatepass")) // 2
