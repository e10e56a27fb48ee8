"""What the steps of a language model's validation found, as studies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.validation.results.statistics import statistic

FIT = ("covariance", "eigenbasis", "correction")
SOLVE = ("gradients", "refinement", "ihvp", "queries")
SCAN = ("scores",)
NOTES = ("scale", "attempts", "depth", "change", "iterations")  # of LiSSA and of exact solves
PAIRS = ("ekfac", "identity"), ("ekfac", "kfac"), ("ekfac", "lissa"), ("ekfac_cg", "ekfac"), ("exact", "ekfac_cg")


def model(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Which model was validated, on what."""
    parameters, damping = scores["parameters"], list(scores["damping"].values())
    facts = [
        ["training sequences", f"{scores['sequences']:,}, of {scores['documents']:,} documents"],
        ["queries", f"{len(scores['queries']):,}"],
        ["parameters", f"{parameters['model']:,}, of which {parameters['tracked']:,} tracked"],
        ["damping", f"{min(damping):.3g} to {max(damping):.3g} by layer"],
    ]
    return {"kind": "language", "facts": facts, "warnings": []}


def agreement(responses: Mapping[str, Any]) -> dict[str, Any]:
    """Correlations with the measured response."""
    methods = {
        name: {
            "pearson": statistic(record),
            "spearman": statistic(record["spearman"]),
            "slope": None,
            "exact": None,
            "converged": None,
        }
        for name, record in responses["methods"].items()
    }
    return {
        "points": responses["points"],
        "measurements": len(responses["queries"]),
        "methods": methods,
        "differences": {name: statistic(value) for name, value in (responses.get("differences") or {}).items()},
    }


def iterations(
    responses: Mapping[str, Any] | None, datamodels: Mapping[str, Any] | None
) -> list[dict[str, Any]] | None:
    """Correlation with the response, and linear datamodeling score, by iterations of conjugate gradients."""
    rows: dict[int, dict[str, Any]] = {}
    for found, key in ((responses, "pearson"), (datamodels, "lds")):
        for point in (found or {}).get("curve") or []:
            row = rows.setdefault(
                point["iterations"], {"iterations": point["iterations"], "pearson": None, "lds": None}
            )
            row[key] = statistic(point)
    return [rows[count] for count in sorted(rows)] or None


def cost(
    queries: int, seconds: Mapping[str, Mapping[str, float]], solves: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Wall time of each method for all queries together; LiSSA and exact solves share the scan of another method.

    Args:
        queries: how many.
        seconds: of each step of a trace, by method.
        solves: what the step `language_solves` says of LiSSA and of exact solves.
    """
    methods = {name: _seconds(steps) for name, steps in seconds.items() if name != "bm25"}
    scan = methods.get("ekfac", {}).get("seconds", {}).get("score")
    for name in ("lissa", "exact"):
        record = (solves or {}).get(name)
        if record is None:
            continue
        took = sum(_batches(record["seconds"]))
        parts = {"fit": None, "solve": took, "score": scan, "total": took + (scan or 0.0)}
        notes = {key: max(_batches(record[key])) for key in NOTES if record.get(key) is not None}
        last = (record.get("residuals") or [None])[-1]
        products = _batches(record["products"])[0] if record.get("products") is not None else None
        methods[name] = _method(parts, notes, max(last) if last else None, products)
    return {"measurements": queries, "threads": None, "methods": methods}


def _batches(value: Any) -> list[Any]:
    """Of each batch of queries: they are solved one beside the other."""
    return value if isinstance(value, list) else [value]


def _seconds(steps: Mapping[str, float]) -> dict[str, Any]:
    parts = {
        part: sum(seconds for step, seconds in steps.items() if step in names)
        for part, names in (("fit", FIT), ("solve", SOLVE), ("score", SCAN))
    }
    return _method(parts | {"total": sum(parts.values())})


def _method(
    seconds: Mapping[str, float | None],
    notes: Mapping[str, Any] | None = None,
    residual: float | None = None,
    products: int | None = None,
) -> dict[str, Any]:
    return {
        "seconds": dict(seconds),
        "cpu_seconds": None,
        "bytes": None,
        "products": products,
        "residual": residual,
        "notes": dict(notes or {}),
    }


def datamodels(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Linear datamodeling scores; intervals are over subsets and queries."""
    if not found.get("subsets"):
        return None
    methods = {
        name: {"lds": statistic(record), "tests": None, "difference": None} for name, record in found["methods"].items()
    }
    for name, value in (found.get("differences") or {}).items():
        if name in methods:
            methods[name]["difference"] = statistic(value)
    ceiling = found.get("ceiling")
    return {
        "subsets": found["subsets"],
        "share": found["share"],
        "retrainings": found["seeds"],
        "train": found["documents"],
        "tests": None,
        "unit": "documents",
        "methods": methods,
        "ceiling": ceiling and statistic(ceiling),
        "dampings": [],
        "seconds": {"retraining": found.get("seconds")},
    }


def removal(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Change of log p after training without the documents of the highest scores."""
    if not found.get("share"):
        return None
    methods = {}
    for name, record in found["methods"].items():
        beside = {key: record.get(key) for key in ("against_random", "against_bm25")}
        methods[name] = {
            "change": statistic(record),
            "over_random": beside["against_random"] and statistic(beside["against_random"]),
            "over_bm25": beside["against_bm25"] and statistic(beside["against_bm25"]),
            "wins": None,
        }
    base = list(found["base"].values())
    return {
        "share": found["share"],
        "dropped": found["dropped"],
        "retrainings": found["seeds"],
        "draws": None,
        "unit": "documents",
        "measured": "log-probability",
        "base": sum(base) / len(base),
        "measurements": len(base),
        "methods": methods,
        "seconds": {"retraining": found.get("seconds")},
    }


def tracing(found: Mapping[str, Any], unit: str = "documents") -> dict[str, Any]:
    """recall@k and MRR of the documents (sentences) that state a fact."""
    differences = found.get("differences") or {}
    methods = {}
    for name, record in found["methods"].items():
        difference = (differences.get(name) or {}).get("recall")
        methods[name] = {
            "recall": statistic(record["recall"]),
            "reciprocal_rank": statistic(record["reciprocal_rank"]),
            "difference": difference and statistic(difference),
        }
    about = {key: found.get(key) for key in ("k", "documents", "candidates")}
    return about | {"queries": found["queries"], "unit": unit, "methods": methods}


def facts_model(found: Mapping[str, Any]) -> dict[str, Any]:
    """Which model was trained on the sentences, and what it learnt."""
    training = found["training"]
    facts = [
        ["sentences", f"{found['documents']:,}, which state {found['facts']:,} facts"],
        ["asked", f"{found['answerable']:,} of them; {found['completed']:,} are completed, {found['known']:,} known"],
        ["queries", f"{found['queries']:,} of the facts that the model knows: more likely than after other subjects"],
        ["parameters", f"{training['parameters']:,}, vocabulary {training['vocabulary']:,}"],
        ["trained", f"{training['epochs']} epochs, loss {training['loss']:.3g} nats a token"],
    ]
    return {"kind": "facts", "facts": facts, "warnings": []}


def ranks(found: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement with full rank by rank and at the fidelity settings."""
    rows = []
    for variant in found["variants"]:
        kept = ("name", "rank", "fidelity", "mean_rank", "predicted", "bytes", "relative_bytes")
        rows.append(
            {key: variant[key] for key in kept}
            | {
                "pearson": statistic(variant["pearson"]),
                "minimum": variant["pearson"]["minimum"],
                "seconds": sum(variant["seconds"].values()),
            }
        )
    return {"sequences": found["sequences"], "queries": len(found["queries"]), "rows": rows}


def block_factors(found: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement with whole factors, and memory, by blocks."""
    rows = [
        {
            "blocks": variant["blocks"],
            "agreement": statistic(variant["pearson"]),
            "minimum": variant["pearson"]["minimum"],
            "whole": None,
            "bytes": variant["bytes"]["covariance"] + variant["bytes"]["eigenbasis"],
            "relative_bytes": variant["relative_bytes"],
            "seconds": variant["decomposition_seconds"],
        }
        for variant in found["variants"]
    ]
    return {"truth": "whole factors", "timed": "eigendecompositions", "rows": rows}


def scale(found: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted against measured change of log p: slope and correlation by method."""
    lines = [_line("Equation 7", None, name, line) for name, line in found["pbo"].items()]
    for checkpoint in found["training_on"]["checkpoints"]:
        lines += [_line("training on", checkpoint["steps"], name, line) for name, line in checkpoint["methods"].items()]
    kept = ("weight", "points", "queries", "pairs")
    return {key: found[key] for key in kept} | {"lines": lines}


def _line(against: str, steps: int | None, name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "against": against,
        "steps": steps,
        "method": name,
        "slope": statistic(line["slope"], line["slope_interval"]),
        "correlation": statistic(line["correlation"], line["correlation_interval"]),
    }
