"""What the page says without unpacking anything: the run, its queries, the shape of their influences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from conf.schema import ReportConfig
from pipelines.progress import duration, short
from pipelines.report.packing import KINDS, PackedQuery, map_rows, rounded
from pipelines.report.reading import RunFolder
from pipelines.stages.agreement import shown
from pipelines.stages.convergence import in_words, low


def overview(run: RunFolder, queries: Sequence[PackedQuery], maps: int, config: ReportConfig) -> dict[str, Any]:
    """The record that the page reads first.

    Args:
        run: the run.
        queries: what is shown of each of its queries.
        maps: up to which rank there are layer × token maps.
        config: title, and what was asked for.
    """
    summary = run.summary
    rows = map_rows(run.layers)
    kinds = {kind for query in queries for item in query.sequences for kind in item.header.get("peaks", {})}
    return clean(
        {
            "title": title_of(summary, config),
            "name": summary["name"],
            "facts": facts(run),
            "stages": [_stage(name, stage) for name, stage in summary["stages"].items()],
            "unit": summary["score_unit"],
            "measurement": summary["config"]["queries"]["measurement"],
            "corpus_sequences": summary["corpus"]["sequences"],
            "rows": {"labels": rows.labels, "groups": rows.groups, "layers": len(run.layers.names)},
            "kinds": [kind for kind in KINDS if kind in kinds],
            "maps": maps,
            "tolerance": run.step.get("tolerance"),
            "notes": _notes(run, queries, maps, config),
            "queries": [_query(run, query, packed) for query, packed in zip(summary["queries"], queries, strict=True)],
        }
    )


def title_of(summary: Mapping[str, Any], config: ReportConfig) -> str:
    """The page's title."""
    return config.title or f"whence: {summary['name']}"


def clean(value: Any) -> Any:
    """JSON-able data in which what is not finite, which JSON has no word for, is null."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What was run on what, as labels and text."""
    summary = run.summary
    config, corpus = summary["config"], summary["corpus"]
    scores = summary["stages"]["scores"]["counts"]["sequences"]
    found = [
        ("model", config["model"]["path"]),
        ("layers", summary["layers"]),
        ("corpus", _corpus(config["corpus"]["path"], corpus)),
        ("curvature", _curvature(config)),
        ("scanned", f"{scores:,} of {corpus['sequences']:,} sequences"),
        ("candidates", _candidates(summary["candidates"]["per_feed"])),
        ("fidelity", _fidelity(summary["fidelity"])),
    ]
    if summary.get("refinement"):
        found.append(("conjugate gradients", _refinement(summary["refinement"])))
    if summary.get("convergence"):
        found.append(("convergence", _convergence(summary["convergence"], corpus["sequences"])))
    if "seconds" in summary:
        found.append(("this run took", duration(summary["seconds"])))
    if summary.get("agreement"):
        worst = shown(summary["agreement"]["minimum"])
        found.append(("precision", f"correlation with float32 scores at worst {worst}"))
    if summary.get("excluded"):
        found.append(("set aside", ", ".join(f"{stage}: {len(named)}" for stage, named in summary["excluded"].items())))
    return found


def _corpus(path: str, corpus: Mapping[str, Any]) -> str:
    text = f"{path}: {corpus['documents']:,} documents, {corpus['sequences']:,} sequences, {corpus['tokens']:,} tokens"
    skipped = sum(corpus["skipped"].values())
    if not skipped:
        return text
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in corpus["skipped"].items())
    return f"{text}; {skipped:,} records skipped ({reasons})"


def _candidates(per_feed: Mapping[str, int]) -> str:
    names = {"bm25": "{} proposed by BM25", "unfiltered": "{} unfiltered"}
    return ", ".join(names.get(feed, f"{{}} {feed}").format(f"{count:,}") for feed, count in per_feed.items())


def _curvature(config: Mapping[str, Any]) -> str:
    factors = config["factors"]
    blocks = "undivided factors" if factors["blocks"] == 1 else f"factors of {factors['blocks']} blocks"
    return f"{factors['solver']}, damping factor {factors['damping_factor']}, {blocks}, {factors['labels']} labels"


def _fidelity(fidelity: Mapping[str, Any]) -> str:
    if not fidelity:
        return "full-rank queries, or not measured"
    return (
        f"correlation with full-rank scores {shown(fidelity['mean'])} on average, {shown(fidelity['minimum'])} at "
        f"worst, on {fidelity['sample']} sequences"
    )


def _convergence(found: Mapping[str, Any], corpus: int) -> str:
    """What fits on other samples agree in, and what to do where it is little; the curve on lines of its own."""
    warning = low(found, corpus)
    lines = [in_words(found) + (f". Low: {warning}" if warning else "")]
    lines += [
        f"{entry['sequences']:,} sequences a fit: {shown(entry['mean'])} on average, {shown(entry['minimum'])} at worst"
        for entry in found.get("sizes", [])
    ]
    return "\n".join(lines)


def _refinement(found: Mapping[str, Any]) -> str:
    """How far the IHVPs are solved for; what the last iteration brought says more than the residual."""
    iterations, residuals = found["iterations"].values(), list(found["residual"].values())
    text = f"{max(iterations)} iterations at most; relative residual {median(residuals):.3g} (median), "
    text += f"{max(residuals):.3g} (worst), which falls in another norm and may grow here"
    gains = [gain for gain in found["gain"].values() if gain is not None]
    if gains:
        text += (
            f"; the last iteration brought {100 * median(gains):.3g} % (median), {100 * max(gains):.3g} % (most) of "
            "gradientᵀ answer: far from done above a few per cent"
        )
    return text


def _stage(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    rate = stage.get("tokens_per_second")
    return {
        "name": name,
        "cached": stage["cached"],
        "seconds": stage["seconds"],
        "time": duration(stage["seconds"]),
        "rate": short(rate) if rate else "",
    }


def _query(run: RunFolder, query: Mapping[str, Any], packed: PackedQuery) -> dict[str, Any]:
    name, summary = query["query_id"], run.summary
    contrast = summary["config"]["queries"]["measurement"] == "contrast"
    top = [item.header for item in packed.sequences if item.header["side"] == "top"]
    bottom = [item.header for item in packed.sequences if item.header["side"] == "bottom"]
    tails = run.tails.get(name) or {}
    survival = {feed: [_numbers(axis) for axis in axes] for feed, axes in run.survival.get(name, {}).items()}
    return {
        "id": name,
        "prompt": query["prompt"],
        "completion": query["completion"],
        "contrast": query["contrast"] if contrast else None,
        "measured": query["measured"],
        "fidelity": shown(summary["fidelity"]["pearson"].get(name)) if summary["fidelity"] else None,
        "convergence": _converged(summary, name),
        "refinement": _refined(summary, name),
        "rank": query.get("total_rank"),
        "top": len(top),
        "bottom": len(bottom),
        "highest": top[0]["score"] if top else None,
        "lowest": bottom[0]["score"] if bottom else None,
        "spurious": sum(bool(header.get("spurious")) for header in top),
        "steps": {kind: run.step.get("queries", {}).get(name, {}).get(kind) for kind in ("output", "input")},
        "attributed": sum("lengths" in header for header in top + bottom),
        "tails": tails | {"share": [[p, rounded(share)] for p, share in tails.get("share") or []]},
        "survival": survival,
    }


def _converged(summary: Mapping[str, Any], name: str) -> str | None:
    """The correlation of a query's scores with those by factors of another sample; None where it was not looked at."""
    outlook = (summary.get("convergence") or {}).get("extrapolated") or {"pearson": {}}
    return shown(outlook["pearson"][name]) if name in outlook["pearson"] else None


def _refined(summary: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    found = summary.get("refinement") or {"residual": {}}
    if name not in found["residual"]:
        return None
    return {key: found[key].get(name) for key in ("iterations", "residual", "gain")}


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [rounded(value) for value in values]


def _notes(run: RunFolder, queries: Sequence[PackedQuery], maps: int, config: ReportConfig) -> list[str]:
    """What this page leaves out, and why."""
    notes = []
    kept = max((item.rank for query in queries for item in query.sequences), default=0)
    there = min(max((row["rank"] for rows in run.rows.values() for row in rows), default=0), config.sequences)
    if kept < there:
        notes.append(
            f"The {kept} first sequences of each query and side are shown instead of {there}: more do not fit "
            f"into report.megabytes={config.megabytes}. All are in top.parquet."
        )
    mapped = max((item.rank for query in queries for item in query.sequences if item.map), default=0)
    if maps < mapped:
        notes.append(
            f"Layer × token maps are here for ranks 1 to {maps} only ({mapped} ranks have one): more do not fit into "
            f"report.megabytes={config.megabytes}. All are in attribution.parquet."
            if maps
            else f"Layer × token maps are left out: they do not fit into report.megabytes={config.megabytes}. "
            "They are in attribution.parquet."
        )
    if not run.attributed:
        notes.append("This run attributed nothing to tokens and layers (attribution.parquet is missing).")
    if not run.tails:
        notes.append("This run described no tails (tails.json is missing).")
    return notes
