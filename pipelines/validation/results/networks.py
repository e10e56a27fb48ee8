"""What the steps of a small network's validation found, as studies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.store import Artifact
from influence.score_agreement import correlations, mean_interval
from pipelines.validation.presentation.wording import BLOCKS
from pipelines.validation.responses import RECORD, TENSORS
from pipelines.validation.results.solved import with_truth
from pipelines.validation.results.statistics import Statistic, of_interval, statistic

LADDERS = {"learning_rate": "learning rate", "l2": "L2"}


@dataclass(frozen=True)
class Scored:
    """What every method says of every point, and what was measured of it.

    Attributes:
        scores: [Q, P] float64 by method.
        response_QP: measured; None where it was not.
        points_P: numbers of the training examples.
        test_Q: numbers of the test examples.
        converged_P: whether the objective of a point was minimised to the tolerance.
    """

    scores: Mapping[str, Tensor]
    response_QP: Tensor | None
    points_P: Sequence[int]
    test_Q: Sequence[int]
    converged_P: Tensor | None


def agreement(scored: Scored) -> dict[str, Any] | None:
    """Correlations with the measured response, paired differences, and correlations with exact solves."""
    truth_QP = scored.response_QP
    if truth_QP is None:
        return None
    found = with_truth(scored.scores, truth_QP)
    exact_QP, converged_P = scored.scores.get("exact"), scored.converged_P
    kept = None if converged_P is None or bool(converged_P.all()) or int(converged_P.sum()) < 3 else converged_P
    for name, scores_QP in scored.scores.items():
        found["methods"][name] |= {
            "exact": None if exact_QP is None else _correlation(scores_QP, exact_QP),
            "converged": None if kept is None else _correlation(scores_QP[:, kept], truth_QP[:, kept]),
        }
    return found


def _correlation(first_QP: Tensor, second_QP: Tensor) -> Statistic:
    return of_interval(mean_interval(correlations(first_QP, second_QP)))


def cost(estimates: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, bytes and products of each method for all measurements together."""
    methods = {}
    for name, record in estimates["methods"].items():
        residuals = [value for value in record.get("residuals") or [] if value is not None]
        methods[name] = {
            "seconds": record["seconds"],
            "cpu_seconds": record["cpu_seconds"],
            "bytes": sum(record["bytes"].values()),
            "products": record["products"],
            "residual": max(residuals, default=None),
            "notes": record.get("notes") or {},
        }
    about = {key: estimates[key] for key in ("measurements", "threads")}
    return about | {"methods": methods, "left_out": dict(estimates.get("left_out") or {})}


def blocks(estimates: Mapping[str, Any], scored: Scored, agreed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Block-diagonal factors: agreement with the response (with whole factors, where none was measured) and memory."""
    records = {name: record for name, record in estimates["methods"].items() if name == "ekfac" or BLOCKS.match(name)}
    if len(records) < 2:
        return None
    whole = records["ekfac"]
    rows = []
    for name, record in records.items():
        with_whole = _correlation(scored.scores[name], scored.scores["ekfac"])
        factors = record["bytes"]["factors"]
        rows.append(
            {
                "blocks": record["blocks"] or 1,
                "agreement": agreed["methods"][name]["pearson"] if agreed else with_whole,
                "minimum": min((value for value in with_whole["values"] if value is not None), default=None),
                "whole": with_whole,
                "bytes": factors,
                "relative_bytes": factors / whole["bytes"]["factors"],
                "seconds": record["seconds"]["fit"],
            }
        )
    truth = "response" if agreed else "whole factors"
    return {"truth": truth, "timed": "fitting", "rows": sorted(rows, key=lambda row: row["blocks"])}


def sizes(found: Mapping[str, Any], unit: str) -> dict[str, Any] | None:
    """Agreement of two fits on disjoint samples, by their size, ascending."""
    rows = [
        {"size": row["size"], "between": statistic(row["between"]), "with_full": statistic(row["with_full"])}
        for row in found["sizes"]
    ]
    if not rows:
        return None
    return {
        "solver": found["solver"],
        "total": found["total"],
        "unit": unit,
        "rows": sorted(rows, key=lambda row: row["size"]),
    }


def datamodels(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Linear datamodeling scores; intervals are over subsets, and over test examples in `interval_tests`."""
    if not found.get("subsets"):
        return None
    differences = found.get("differences") or {}
    methods = {}
    for name, record in found["methods"].items():
        difference = differences.get(name)
        methods[name] = {
            "lds": statistic(record["lds"], record["interval_subsets"]),
            "tests": statistic(record["lds"], record["interval"]),
            "difference": difference and statistic(difference["mean"], difference["interval_subsets"]),
        }
    ceiling = found.get("ceiling")
    return {
        **{key: found[key] for key in ("subsets", "share", "retrainings", "train", "tests")},
        "unit": "training examples",
        "methods": methods,
        "ceiling": ceiling and statistic(ceiling["ceiling"], ceiling.get("interval")),
        "dampings": [_damped(row) for row in found.get("dampings") or []],
        "seconds": found["seconds"],
    }


def _damped(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scores with another damping."""
    methods = {name: statistic(each["lds"], each["interval_subsets"]) for name, each in row["methods"].items()}
    differences = {
        name: statistic(each["mean"], each["interval_subsets"]) for name, each in (row.get("differences") or {}).items()
    }
    damping = {key: row[key] for key in ("multiple", "damping")}
    return damping | {"methods": methods, "differences": differences}


def removal(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Change of the measurements' loss after training without the points of the highest scores."""
    if not found.get("removal"):
        return None
    methods = {
        name: {
            "change": statistic(record["change"], record["interval"]),
            "over_random": statistic(record["over_random"], record["over_random_interval"]),
            "over_bm25": None,
            "wins": record.get("wins"),
        }
        for name, record in found["methods"].items()
    }
    random = {"change": statistic(found["random"]["change"], found["random"]["interval"])}
    return {
        "share": found["removal"],
        "dropped": found["dropped"],
        "retrainings": found["retrainings"],
        "draws": found["draws"],
        "unit": "training examples",
        "measured": "loss",
        "base": found["base"],
        "measurements": len(found["measurements"]),
        "methods": methods | {"random": random | {"over_random": None, "over_bm25": None, "wins": None}},
        "seconds": found["seconds"],
    }


def model(dataset: Mapping[str, Any], training: Mapping[str, Any], curvature: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained, and how well."""
    chosen, losses, accuracy = training["chosen"], training["losses"], training.get("accuracy")
    damping = [layer["damping"] for layer in curvature["layers"].values()]
    parts = ("train", "valid", "test")
    facts = [
        [
            "examples",
            f"{dataset['train']:,} for training, {dataset['valid']:,} for validation, {dataset['test']:,} to test",
        ],
        ["parameters", f"{training['parameters']:,}"],
        ["trained by", _trained_by(training)],
        ["chosen", f"learning rate {chosen['learning_rate']:g}, L2 {chosen['l2']:g}, of {len(training['grid'])} pairs"],
        ["loss", ", ".join(f"{losses[part]:.4g} ({part})" for part in parts)],
        ["labels", f"{curvature['draws']:,} sampled for each example that EK-FAC is fitted on"],
        ["damping", f"{min(damping):.3g} to {max(damping):.3g} by layer"],
    ]
    if accuracy:
        facts.insert(5, ["accuracy", ", ".join(f"{accuracy[part]:.1%} ({part})" for part in parts)])
    edges = [
        f"The best {LADDERS.get(name, name)} lies at an end of its ladder: a longer one may have a better model."
        for name in training.get("edge") or []
    ]
    return {"kind": "network", "facts": facts, "warnings": edges}


def _trained_by(training: Mapping[str, Any]) -> str:
    momentum = f", momentum {training['momentum']:g}" if training.get("momentum") else ""
    schedule = training.get("schedule", "constant")
    how = "" if schedule == "constant" else f", learning rate {schedule}"
    return f"SGD, batches of {training['batch']}, {training['epochs']} epochs{momentum}{how}"


def read_scored(artifacts: Mapping[str, Artifact]) -> Scored:
    """Scores of the step `estimates`, and the response of the step `responses` where it ran."""
    estimates = artifacts["estimates"]
    names = list(estimates.read_json("estimates.json")["methods"])
    scores = {name: estimates.read_tensors(f"{name}.safetensors")["scores_QP"].double() for name in names}
    if "responses" not in artifacts:
        return Scored(scores, None, [], [], None)
    found, record = artifacts["responses"].read_tensors(TENSORS), artifacts["responses"].read_json(RECORD)
    convergence = record["convergence"]
    gradients = [math.inf if value is None else value for value in convergence["gradients"]]
    converged_P = torch.tensor(gradients, dtype=torch.float64) <= convergence["tolerance"]
    return Scored(scores, found["response_QP"].double(), record["numbers"], record["tests"], converged_P)
