"""Folders of finished runs with the schemas of a real one, from scores that the test gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.schema import RunConfig, plain
from pipelines.stages.top import SCHEMA as TOP

LAYERS = tuple(f"model.layers.{block}.mlp.{kind}" for block in range(4) for kind in ("gate_proj", "down_proj"))
GROUPS = tuple(f"block {name.split('.')[2]}" for name in LAYERS)
KINDS = tuple(name.rpartition(".")[2] for name in LAYERS)
HOSTILE = "=cmd|' /C calc'!A0 <script>alert(1)</script> $x^{2$ \x00\x1b[31m\u202e 中文 😀 half \ud83d"
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


def finished_run(
    folder: Path,
    ids_N: np.ndarray,
    scores_NQ: np.ndarray,
    queries: Sequence[str] = ("one", "two"),
    *,
    shards: int = 3,
    top: int = 100,
    text: str = "the text of it",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    sequences: str = "/store/sequences/aaaa",
    documents: Sequence[str] | None = None,
    **summary: Any,
) -> Path:
    """A run that scanned these sequences: summary, scores in files of uneven size, top and bottom."""
    (folder / "scores").mkdir(parents=True)
    cuts = np.sort(np.random.default_rng(len(ids_N)).choice(np.arange(1, len(ids_N)), shards - 1, replace=False))
    for shard, rows in enumerate(np.split(np.arange(len(ids_N)), cuts)):
        values = pa.FixedSizeListArray.from_arrays(pa.array(scores_NQ[rows].ravel()), scores_NQ.shape[1])
        feeds = pa.array(["unfiltered"] * len(rows)).dictionary_encode()
        table = pa.table({"sequence_id": pa.array(ids_N[rows], pa.int64()), "feed": feeds, "scores": values})
        pq.write_table(table, folder / "scores" / f"shard-{shard:06d}.parquet", row_group_size=7)
    for side, sign in (("top", -1), ("bottom", 1)):
        rows = [
            {
                "query_id": query,
                "rank": rank,
                "sequence_id": int(ids_N[at]),
                "feed": "unfiltered",
                "score": float(scores_NQ[at, column]),
                "bm25_score": None,
                "document_id": documents[at] if documents else f"file.jsonl:{ids_N[at]}",
                "offset": 0,
                "text": text.encode("utf-8", "replace").decode() if rank == 1 else f"plain text {ids_N[at]}",
            }
            for column, query in enumerate(queries)
            for rank, at in enumerate(np.argsort(sign * scores_NQ[:, column], kind="stable")[:top], start=1)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=TOP), folder / f"{side}.parquet")
    record = _summary(queries, len(ids_N), sequences) | summary
    for group, changed in (settings or {}).items():
        record["config"][group] |= changed
    (folder / "summary.json").write_text(json.dumps(record))
    return folder


def _summary(queries: Sequence[str], scanned: int, sequences: str) -> dict[str, Any]:
    stage = {"cached": False, "seconds": 1.0, "counts": {"layers": len(LAYERS), "sequences": scanned, "tokens": 9}}
    config = plain(RunConfig())
    assert isinstance(config, dict)
    return {
        "name": "trace",
        "config": config,
        "seconds": 2.0,
        "stages": {"layers": stage, "scores": stage},
        "corpus": {"sequences": scanned, "tokens": 9 * scanned, "documents": scanned, "skipped": {}},
        "coverage": 0.5,
        "layers": "8 layers",
        "candidates": {"per_feed": {"bm25": 0, "unfiltered": scanned}},
        "fidelity": {"minimum": 0.97, "mean": 0.98, "sample": 64, "pearson": dict.fromkeys(queries, 0.97)},
        "agreement": {},
        "excluded": {},
        "queries": [
            {
                "query_id": query,
                "prompt": f"prompt of {query}",
                "completion": " its end",
                "contrast": None,
                "measured": -1.5,
                "predicted_fidelity": 0.99,
                "total_rank": 32 * len(LAYERS),
            }
            for query in queries
        ],
        "score_unit": "nats",
        "artifacts": {"sequences": sequences},
    }


def attribute(folder: Path, pieces: Sequence[str], seed: int = 0) -> None:
    """Write `attribution.parquet`: matrices at random, scaled so that each adds up to its sequence's score."""
    rng, rows = np.random.default_rng(seed), []
    for side in ("top", "bottom"):
        for row in pq.read_table(folder / f"{side}.parquet").to_pylist():
            matrix_TL = rng.standard_t(2, (len(pieces), len(LAYERS))) * np.linspace(0.2, 1.5, len(LAYERS))
            matrix_TL *= row["score"] / matrix_TL.sum()
            tokens_T = matrix_TL.sum(1)
            sparsity = float(np.linalg.norm(tokens_T) / np.abs(tokens_T).sum())
            rows.append(
                {
                    "side": side,
                    "pieces": list(pieces),
                    "tokens": tokens_T,
                    "layers": matrix_TL.sum(0),
                    "matrix": matrix_TL.ravel(),
                    "output_tokens": None,
                    "input_tokens": None,
                    "total": float(matrix_TL.sum()),
                    "sparsity": sparsity,
                    "spurious": sparsity > 2 / 3,
                    "before": "",
                    "after": "",
                }
                | {key: row[key] for key in ("query_id", "rank", "sequence_id", "score")}
            )
    named = {"layer_names": LAYERS, "layer_groups": GROUPS, "layer_kinds": KINDS, "step": {}}
    metadata = {key: json.dumps(value) for key, value in named.items()}
    table = pa.Table.from_pylist(rows, schema=ATTRIBUTION.with_metadata(metadata))
    pq.write_table(table, folder / "attribution.parquet", row_group_size=256)


def describe_tails(folder: Path, ids_N: np.ndarray, scores_NQ: np.ndarray, queries: Sequence[str], bm25: int) -> None:
    """Write `tails.json` and `tails.parquet`; the `bm25` sequences of lowest number are BM25's feed."""
    record, points = {}, []
    for column, query in enumerate(queries):
        feeds = {"unfiltered": scores_NQ[:, column], "bm25": scores_NQ[ids_N < np.sort(ids_N)[bm25], column]}
        described = {}
        for feed, values in feeds.items():
            best = np.sort(values[values > 0])[::-1]
            picked = np.unique(np.geomspace(1, len(best), 120).astype(int))
            points += [
                {"query_id": query, "feed": feed, "influence": float(best[n - 1]), "survival": n / len(values)}
                for n in picked
            ]
            size = max(10, len(values) // 1000)
            cutoff, alpha = float(best[size - 1]), 1 + size / float(np.log(best[:size] / best[size - 1]).sum())
            described[feed] = {
                "count": len(values),
                "positive": len(best),
                "negative": int((values < 0).sum()),
                "sum_positive": float(best.sum()),
                "tail": {"n": size, "cutoff": cutoff, "chosen_by": "share"},
                "fits": {
                    "power_law": {
                        "alpha": alpha,
                        "xmin": cutoff,
                        "interval": [alpha * 0.8, alpha * 1.2],
                        "ks": 0.05,
                        "p_value": 0.4,
                        "bootstraps": 200,
                        "loglikelihood": -10.0,
                        "aic": 22.0,
                    },
                    "exponential": {"scale": 2.0, "loglikelihood": -20.0, "aic": 42.0},
                    "weibull": {"reason": "the search ended outside the bounds"},
                },
                "best": "power_law",
                "comparisons": {"exponential": {"loglikelihood_ratio": 10.0, "p_value": 0.01}},
            }
        best = np.sort(np.maximum(scores_NQ[:, column], 0))[::-1]
        percents = [float(f"{p:.4g}") for p in np.geomspace(100 / len(best), 100, 30)]
        share = [[p, float(best[: max(1, round(p / 100 * len(best)))].sum() / best.sum())] for p in percents]
        estimates = {"power_law": {"sequences": 12345.6, "interval": [8e3, 2e4]}}
        needed = estimates["power_law"] | {"threshold": 3.2, "scanned": len(ids_N), "estimates": estimates}
        recall = {"10": 0.4, "100": 0.35}
        record[query] = {"feeds": described, "needed": needed, "share": share, "recall": recall}
    (folder / "tails.json").write_text(json.dumps({"queries": record}))
    pq.write_table(pa.Table.from_pylist(points), folder / "tails.parquet")
