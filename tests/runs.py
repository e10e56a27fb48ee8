"""Folders of runs as `whence trace` leaves them, made up: of any size, with or without what later steps add.

Values are heavy-tailed and fall off around a few tokens, as influences do; texts are drawn from a vocabulary with the
frequencies of Zipf's law, so that a page of them deflates about as well as prose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.schema import RunConfig, plain
from pipelines.stages.top import SCHEMA

KINDS = ("gate_proj", "up_proj", "down_proj")
ATTRIBUTION = pa.schema(
    [
        ("query_id", pa.string()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("score", pa.float64()),
        ("pieces", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.float32())),
        ("layers", pa.list_(pa.float32())),
        ("matrix", pa.list_(pa.float32())),
        ("output_tokens", pa.list_(pa.float32())),
        ("input_tokens", pa.list_(pa.float32())),
        ("total", pa.float64()),
        ("sparsity", pa.float32()),
        ("spurious", pa.bool_()),
        ("before", pa.string()),
        ("after", pa.string()),
    ]
)


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    queries: int = 3
    top: int = 8
    bottom: int = 3
    tokens: int = 24
    blocks: int = 3


def query_ids(size: Size) -> list[str]:
    """Names as users give them: with colons, spaces, signs that mean something in an address."""
    odd = ["capital:Foo & Bar", "a #1 + 100% query?", "引力"]
    return [odd[number] if number < len(odd) else f"query {number}" for number in range(size.queries)]


def write_run(folder: Path, size: Size | None = None, seed: int = 0, texts: Sequence[Sequence[str]] = ()) -> Path:
    """Write a whole run.

    Args:
        folder: Of the run; it is created.
        size: How large it is.
        seed: Of its numbers and words.
        texts: Pieces of the first sequences of the first query; all others are drawn.
    """
    size, generator = size or Size(), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = query_ids(size)
    words = vocabulary(generator)
    writer = pq.ParquetWriter(folder / "attribution.parquet", with_layers(size.blocks, names))
    listed: dict[str, list[dict[str, Any]]] = {"top": [], "bottom": []}
    for number, name in enumerate(names):
        rows = []
        for side, count in (("top", size.top), ("bottom", size.bottom)):
            for rank in range(1, count + 1):
                given = texts[rank - 1] if number == 0 and side == "top" and rank <= len(texts) else None
                pieces = list(given) if given else drawn(generator, words, size.tokens)
                rows.append(attribution(generator, name, side, rank, pieces, size))
                listed[side].append(listed_row(rows[-1]))
        writer.write_table(pa.Table.from_pylist(rows, schema=ATTRIBUTION))
    writer.close()
    for side, rows in listed.items():
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / f"{side}.parquet")
    write_json(folder / "summary.json", summary_of(queries=[query(name) for name in names]))
    write_tails(folder, names, generator)
    return folder


def with_layers(blocks: int, names: Sequence[str]) -> pa.Schema:
    """The table's schema with what it says of layers."""
    metadata = {
        "layer_names": [f"model.layers.{block}.mlp.{kind}" for block in range(blocks) for kind in KINDS],
        "layer_groups": [f"block {block}" for block in range(blocks) for _ in KINDS],
        "layer_kinds": [kind for _ in range(blocks) for kind in KINDS],
        "step": {
            "tolerance": 0.01,
            "queries": {name: {"alpha": 1e-3, "output": 0.002, "input": 0.02} for name in names},
        },
    }
    return ATTRIBUTION.with_metadata({key: json.dumps(value) for key, value in metadata.items()})


def vocabulary(generator: np.random.Generator, words: int = 8000) -> list[str]:
    """Words of pronounceable syllables, the first of them short."""
    syllables = [a + b for a in "bdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "ost")]
    return ["".join(generator.choice(syllables, size=1 + int(np.log10(number + 1)))) for number in range(words)]


def drawn(generator: np.random.Generator, words: Sequence[str], tokens: int) -> list[str]:
    """Pieces of a text of that many tokens."""
    ranks = np.minimum(generator.zipf(1.3, size=tokens) - 1, len(words) - 1)
    pieces = [f" {words[rank]}" for rank in ranks]
    for position in range(11, tokens, 12):
        pieces[position] = "." if position % 3 else ".\n"
    return pieces


def attribution(
    generator: np.random.Generator, name: str, side: str, rank: int, pieces: list[str], size: Size
) -> dict[str, Any]:
    """A row of attribution.parquet; positive in sum on top, negative at the bottom."""
    tokens, layers = len(pieces), len(KINDS) * size.blocks
    peaks = generator.choice(tokens, size=min(3, tokens), replace=False)
    nearness_T = np.exp(-np.abs(np.arange(tokens)[:, None] - peaks) / 4.0).sum(axis=1) + 0.02
    matrix_TL = (generator.standard_t(3, (tokens, layers)) * nearness_T[:, None]).astype(np.float32)
    total = float(matrix_TL.sum())
    wanted = (1000.0 if side == "top" else -400.0) / rank**0.5
    matrix_TL += ((wanted - total) / (nearness_T.sum() * layers) * nearness_T[:, None]).astype(np.float32)
    tokens_T = matrix_TL.sum(axis=1)
    sparsity = float(np.linalg.norm(tokens_T) / np.abs(tokens_T).sum())
    shifted_T = np.concatenate([[0.0], tokens_T[:-1]]) * generator.uniform(0.8, 1.2, tokens)
    return {
        "query_id": name,
        "side": side,
        "rank": rank,
        "sequence_id": 1000 * (side == "bottom") + 7 * rank,
        "score": float(matrix_TL.sum(dtype=np.float64)),
        "pieces": pieces,
        "tokens": tokens_T.tolist(),
        "layers": matrix_TL.sum(axis=0).tolist(),
        "matrix": matrix_TL.ravel().tolist(),
        "output_tokens": shifted_T.tolist(),
        "input_tokens": (generator.standard_t(3, tokens) * nearness_T).tolist(),
        "total": float(matrix_TL.sum(dtype=np.float64)),
        "sparsity": sparsity,
        "spurious": rank == 2,
        "before": "What stands before it.",
        "after": "What stands after it.",
    }


def listed_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row of top.parquet or bottom.parquet of the same sequence."""
    feed = ("bm25", "unfiltered", "both", "other")[row["rank"] % 4]
    return {
        **{key: row[key] for key in ("query_id", "rank", "sequence_id", "score")},
        "feed": feed,
        "bm25_score": 3.5 if feed in ("bm25", "both") else None,
        "document_id": f"file.jsonl:{row['rank']}",
        "offset": 512 * row["rank"],
        "text": "".join(row["pieces"]),
    }


def write_tails(folder: Path, names: Sequence[str], generator: np.random.Generator) -> None:
    """Both files of the distribution, of a feed with a power-law tail and of one that holds its largest values."""
    queries, points = {}, []
    for name in names:
        alpha = float(generator.uniform(2.2, 4.0))
        unfiltered = np.sort(generator.pareto(alpha - 1, 4000) + 1)
        for feed, values in (("unfiltered", unfiltered), ("bm25", unfiltered[-1500:])):
            survival = 1 - np.arange(len(values)) / len(values)
            kept = np.unique(np.geomspace(1, len(values), 80).astype(int)) - 1
            points += [
                {
                    "query_id": name,
                    "feed": feed,
                    "influence": float(values[-1 - at]),
                    "survival": float(survival[-1 - at]),
                }
                for at in kept
            ]
        power_law = {
            "alpha": alpha,
            "xmin": 2.0,
            "interval": [alpha - 0.2, alpha + 0.2],
            **{"ks": 0.03, "p_value": 0.4, "bootstraps": 200, "loglikelihood": -900.0, "aic": 1804.0},
        }
        fits = {"power_law": power_law, "exponential": {"rate": 0.5, "loglikelihood": -950.0, "aic": 1902.0}}
        feed = {
            **{"count": 8000, "positive": 4000, "negative": 4000, "sum_positive": 9000.0},
            "tail": {"n": 900, "cutoff": 2.0, "chosen_by": "share"},
            **{"fits": fits, "best": "power_law"},
            "comparisons": {"exponential": {"loglikelihood_ratio": 50.0, "p_value": 0.001}},
        }
        queries[name] = {
            "feeds": {"unfiltered": feed, "bm25": feed | {"fits": {}, "best": None, "comparisons": {}}},
            "needed": {"sequences": 120_000, "interval": [80_000, 200_000], "threshold": 12.0, "scanned": 8000},
            "share": [[p, min(1.0, 0.2 * p**0.35)] for p in (0.01, 0.1, 1, 10, 100)],
            "recall": {"10": 0.9, "100": 0.5, "1000": 0.2},
        }
    write_json(folder / "tails.json", {"queries": queries})
    pq.write_table(pa.Table.from_pylist(points), folder / "tails.parquet")


def summary_of(**changes: Any) -> dict[str, Any]:
    """A summary as `run_trace` writes it."""
    stage = {"cached": False, "seconds": 12.0, "counts": {"sequences": 7, "tokens": 70}, "tokens_per_second": 5.8}
    queries = changes.get("queries", [query("one"), query("two")])
    pearson = {found["query_id"]: 0.99 - 0.01 * number for number, found in enumerate(queries)}
    return {
        "name": "trace",
        "config": plain(RunConfig()),
        "seconds": 75.0,
        "stages": {"covariance": stage, "scores": stage | {"cached": True, "seconds": 4.0}},
        "corpus": {"sequences": 4000, "tokens": 70, "documents": 5, "skipped": {}},
        "layers": "tracked 2 layers\nnot tracked, embedding: 12",
        "candidates": {"per_feed": {"bm25": 3, "unfiltered": 4}},
        "fidelity": {"sample": 6, "minimum": min(pearson.values(), default=0.9), "mean": 0.985, "pearson": pearson},
        "agreement": {},
        "excluded": {},
        "queries": queries,
        "score_unit": "change of the measurement (nats) per unit weight",
    } | changes


def query(name: str, **changes: Any) -> dict[str, Any]:
    """A query as the summary has it."""
    found = {"query_id": name, "prompt": f"prompt of {name}", "completion": f" end of {name}", "measured": -1.5}
    return found | {"contrast": None, "total_rank": 64} | changes


def row(name: str, rank: int, **changes: Any) -> dict[str, Any]:
    """A row of top.parquet."""
    found = {"query_id": name, "rank": rank, "sequence_id": 40 + rank, "feed": "both", "score": 10.0 / rank}
    return (
        found | {"bm25_score": 0.5, "document_id": f"file:{rank}", "offset": 0, "text": f"text {name} {rank}"} | changes
    )


def write_plain_run(folder: Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """A run without what later steps add: `summary.json` and `top.parquet` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), folder / "top.parquet")
    return folder


def write_json(path: Path, value: Any) -> None:
    """JSON with escapes, so that any text has a UTF-8."""
    path.write_text(json.dumps(value), encoding="utf-8")
