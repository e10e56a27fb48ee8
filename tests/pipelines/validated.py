"""Made-up documents of finished validations: a small network, a language model, facts; numbers mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.schema import RunConfig, plain

HOSTILE = "<script>alert(1)</script></style>\"'&amp; \u202e\u0000 $x^2$ | 引力"
METHODS = ("identity", "kfac", "ekfac", "lissa", "ekfac_cg", "exact", "ekfac_blocks_2", "ekfac_blocks_4")
MEANS = {"identity": 0.42, "kfac": 0.81, "ekfac": 0.88, "lissa": 0.9, "ekfac_cg": 0.97, "exact": 0.985}
SECONDS = {"identity": 0.21, "kfac": 1.4, "ekfac": 1.6, "lissa": 48.0, "ekfac_cg": 9.1, "exact": 31.0}


def statistic(mean: float | None, spread: float = 0.03, values: int = 10, seed: int = 0) -> dict[str, Any]:
    """A mean with its interval and values around it."""
    if mean is None:
        return {"mean": None, "interval": None, "values": [None] * values}
    drawn = np.clip(mean + spread * np.random.default_rng(seed).normal(size=values), -1, 1).tolist()
    return {"mean": mean, "interval": [mean - spread, min(mean + spread, 1.0)], "values": drawn}


def network_document(name: str = "validate_concrete", subject: str = "concrete", shift: float = 0.0) -> dict[str, Any]:
    """A validation of a small network that did everything."""
    studies = {
        "model": {
            "kind": "network",
            "facts": [["examples", "721 for training"], ["parameters", "17,793"]],
            "warnings": [],
        },
        "agreement": _agreement(shift),
        "cost": _cost(),
        "response": response(),
        "datamodels": _datamodels(shift),
        "removal": _removal("loss"),
        "blocks": _blocks("response"),
        "sizes": sizes(0.97),
    }
    return _document(name, subject, studies)


def language_document(name: str = "validate_almanac", subject: str = "almanac") -> dict[str, Any]:
    """A validation of a language model that did everything."""
    curve = [
        {"iterations": k, "pearson": statistic(0.9 + 0.09 * (1 - 0.6**k), 0.02), "lds": statistic(0.3)}
        for k in range(1, 13)
    ]
    network = network_document()["studies"]
    studies = {
        "model": {"kind": "language", "facts": [["training sequences", "600, of 600 documents"]], "warnings": []},
        **{key: network[key] for key in ("agreement", "cost", "response", "datamodels")},
        "iterations": curve,
        "removal": _removal("log-probability"),
        "tracing": tracing(),
        "ranks": ranks(),
        "blocks": _blocks("whole factors"),
        "scale": scale(),
    }
    return _document(name, subject, studies)


def facts_document() -> dict[str, Any]:
    """A validation of facts alone."""
    model = {"kind": "facts", "facts": [["sentences", "2,000"]], "warnings": []}
    return _document("validate_facts", "facts", {"model": model, "tracing": tracing("sentences")})


def _document(name: str, subject: str, studies: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "subject": subject,
        "date": "2026-11-28",
        "config": plain(RunConfig()),
        "versions": {"python": "3.11.2", "torch": "2.13.0", "ray": "2.60.0", "whence": "0.1.0"},
        "hardware": {"machine": "x86_64", "processor": "a processor", "cores": 2, "memory_bytes": 24e9, "gpus": []},
        "seconds": 812.0,
        "stages": {
            step: {"cached": step == "dataset", "seconds": 12.5, "counts": {}} for step in ("dataset", "training")
        },
        "studies": studies,
        "artifacts": {},
    }


def _agreement(shift: float) -> dict[str, Any]:
    methods = {}
    for place, name in enumerate(METHODS):
        mean = MEANS.get(name, 0.86 - 0.01 * place) - shift
        methods[name] = {
            "pearson": statistic(mean, 0.04, seed=place),
            "spearman": statistic(mean - 0.03, 0.04, seed=place),
            "slope": None if name == "identity" else statistic(1.02, 0.05),
            "exact": statistic(min(mean + 0.01, 1.0), 0.02),
            "converged": None,
        }
    differences = {
        "ekfac - lissa": {"mean": -0.01, "interval": [-0.03, 0.01], "values": []},
        "ekfac - identity": {"mean": 0.46, "interval": [0.41, 0.51], "values": []},
        "kfac - ekfac": {"mean": -0.07, "interval": [-0.09, -0.05], "values": []},
    }
    return {"points": 500, "measurements": 10, "methods": methods, "differences": differences}


def _cost() -> dict[str, Any]:
    methods = {}
    for name in METHODS:
        total = SECONDS.get(name, 1.5)
        fit = 0.0 if name in ("identity", "lissa") else 1.2
        parts = {"fit": fit, "gradients": 0.05, "solve": total - fit - 0.1, "score": 0.05, "total": total}
        methods[name] = {
            "seconds": parts,
            "cpu_seconds": {key: 1.8 * value for key, value in parts.items()},
            "bytes": 0 if name == "identity" else 1_250_000,
            "products": 721 if name == "lissa" else None,
            "residual": 3e-9 if name == "exact" else 0.04 if name == "ekfac_cg" else None,
            "notes": {"scale": 25.0, "attempts": 2, "change": 0.004} if name == "lissa" else {},
        }
    return {"measurements": 10, "threads": 2, "methods": methods}


def response(converged: int = 500) -> dict[str, Any]:
    """How the response was measured; `converged` of 500 points."""
    generator = np.random.default_rng(3)
    gradients = np.sort(10 ** generator.normal(-2.2, 0.3, 500))
    warnings = [] if converged == 500 else [f"The objective of {500 - converged} of 500 points was not minimised."]
    return {
        "epsilon": 0.01,
        "linearity": [
            {"epsilon": 10.0**-power, "difference": 10.0 ** (1 - power) * 2, "correlation": 1 - 10.0**-power}
            for power in (4, 3, 2, 1)
        ],
        "gradients": gradients.tolist(),
        "tolerance": 0.05,
        "converged": converged,
        "points": 500,
        "facts": [["ε", "0.01"], ["minimised by", "steps"], ["converged", f"{converged} of 500"]],
        "warnings": warnings,
    }


def _datamodels(shift: float) -> dict[str, Any]:
    found = {"identity": 0.05, "kfac": 0.21, "ekfac": 0.21, "ekfac_cg": 0.3, "exact": 0.31}
    methods = {
        name: {
            "lds": statistic(value - shift, 0.02),
            "tests": statistic(value - shift, 0.05),
            "difference": None if name == "ekfac" else statistic(value - 0.21, 0.01),
        }
        for name, value in found.items()
    }
    return {
        "subsets": 60,
        "share": 0.5,
        "retrainings": 5,
        "train": 721,
        "tests": 103,
        "unit": "training examples",
        "methods": methods,
        "ceiling": statistic(0.62, 0.02),
        "dampings": [
            {
                "multiple": 1.0,
                "damping": None,
                "methods": {"ekfac": statistic(0.21), "exact": statistic(0.1)},
                "differences": {"exact": statistic(-0.11)},
            },
            {
                "multiple": None,
                "damping": 2e-3,
                "methods": {"ekfac": statistic(0.22), "exact": statistic(0.21)},
                "differences": {"exact": statistic(-0.01)},
            },
        ],
        "seconds": {"retraining": 300.0},
    }


def _removal(measured: str) -> dict[str, Any]:
    sign = 1 if measured == "loss" else -1
    bm25 = {} if measured == "loss" else {"bm25": 0.01}
    methods = {
        name: {
            "change": statistic(sign * value, 0.004),
            "over_random": statistic(sign * (value - 0.001), 0.004),
            "over_bm25": statistic(sign * (value - 0.01), 0.003) if bm25 and name != "bm25" else None,
            "wins": 0.9,
        }
        for name, value in ({"identity": 0.008, "ekfac": 0.02, "ekfac_cg": 0.024} | bm25).items()
    }
    methods["random"] = {"change": statistic(sign * 0.001, 0.002), "over_random": None, "over_bm25": None, "wins": None}
    return {
        "share": 0.01,
        "dropped": 7,
        "retrainings": 5,
        "draws": 10,
        "unit": "training examples",
        "measured": measured,
        "base": 0.0621 * sign,
        "measurements": 10,
        "methods": methods,
        "seconds": {"retraining": 20.0},
    }


def _blocks(truth: str) -> dict[str, Any]:
    rows = [
        {
            "blocks": blocks,
            "agreement": statistic(0.9 - 0.01 * place, 0.02),
            "minimum": 0.8,
            "whole": statistic(1 - 0.01 * place, 0.002),
            "bytes": 400_000 // blocks,
            "relative_bytes": 1 / blocks,
            "seconds": 1.2 / blocks,
        }
        for place, blocks in enumerate((1, 2, 4, 8))
    ]
    return {"truth": truth, "timed": "fitting", "rows": rows}


def ranks() -> dict[str, Any]:
    """Low-rank queries of rank 1 to 64 and two fidelities."""
    rows = [
        {
            "name": f"rank {rank}",
            "rank": rank,
            "fidelity": None,
            "mean_rank": float(rank),
            "pearson": statistic(1 - 0.3 / rank, 0.05 / rank, seed=rank),
            "minimum": 0.9 - 0.3 / rank,
            "predicted": 1 - 0.31 / rank,
            "bytes": 1000 * rank,
            "relative_bytes": rank / 100,
            "seconds": 1.0,
        }
        for rank in (1, 2, 4, 8, 16, 32, 64)
    ]
    fidelity = rows[3] | {"name": "fidelity 0.99", "rank": None, "fidelity": 0.99}
    return {"sequences": 600, "queries": 10, "rows": [*rows, fidelity]}


def sizes(largest: float) -> dict[str, Any]:
    """Fits on disjoint samples of up to half of the examples, which agree by `largest`."""
    rows = [
        {
            "size": size,
            "between": statistic(largest - 0.3 / (place + 1) + 0.06),
            "with_full": statistic(0.99 - 0.1 / (place + 1)),
        }
        for place, size in enumerate((22, 45, 90, 180, 360))
    ]
    return {"solver": "ekfac", "total": 721, "unit": "examples", "rows": rows}


def tracing(unit: str = "documents") -> dict[str, Any]:
    """Recall of documents that state facts."""
    found = {"identity": 0.36, "ekfac": 0.62, "ekfac_cg": 0.66, "bm25": 0.48, "bm25_ekfac": 0.7, "random": 0.004}
    methods = {
        name: {
            "recall": statistic(value, 0.05)
            if name != "random"
            else statistic(value) | {"interval": None, "values": []},
            "reciprocal_rank": statistic(value + 0.1, 0.06),
            "difference": None if name in ("ekfac", "random") else statistic(value - 0.62, 0.04),
        }
        for name, value in found.items()
    }
    return {"k": 10, "documents": 600, "candidates": 100, "queries": 10, "unit": unit, "methods": methods}


def scale() -> dict[str, Any]:
    """Predicted and measured changes of log p."""
    generator = np.random.default_rng(5)
    predicted = generator.normal(size=(40, 10)) * 1e-3
    noisy = {"pbo": predicted * 0.97 + 5e-5 * generator.normal(size=predicted.shape)}
    noisy["training_on"] = predicted * 0.4 + 3e-4 * generator.normal(size=predicted.shape)
    lines = [
        {
            "against": against,
            "steps": steps,
            "method": name,
            "slope": statistic(slope, 0.02) | {"values": []},
            "correlation": statistic(0.9, 0.02) | {"values": []},
        }
        for against, steps, slope in (("Equation 7", None, 0.97), ("training on", 200, 0.4))
        for name in ("ekfac", "ekfac_cg")
    ]
    pairs = {"predicted": {name: predicted.tolist() for name in ("ekfac", "ekfac_cg")}}
    pairs |= {key: value.tolist() for key, value in noisy.items()}  # type: ignore[dict-item]
    return {"weight": 1 / 600, "points": 40, "queries": 10, "lines": lines, "pairs": pairs}


def write_pairs(path: Path, document: dict[str, Any], points: int = 60) -> Path:
    """A table of scores and responses for the document's methods."""
    generator, measurements = np.random.default_rng(7), document["studies"]["agreement"]["measurements"]
    response_N = generator.standard_t(3, measurements * points)
    columns: dict[str, Any] = {
        "measurement": np.repeat(np.arange(measurements), points),
        "test": np.repeat(np.arange(measurements) * 3, points),
        "point": np.tile(np.arange(points) * 2, measurements),
        "response": response_N,
    }
    for name in document["studies"]["agreement"]["methods"]:
        noise = 0.1 if name == "exact" else 0.6
        columns[name] = response_N + noise * generator.normal(size=len(response_N))
    pq.write_table(pa.table(columns), path)
    return path
