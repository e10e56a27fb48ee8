"""How the response was measured, as a study: ε and linearity, convergence, and what did not come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STRAIGHT = 0.1  # relative difference of responses at ε and at a smaller weight, above which they are not called linear
HALFWAY = 0.95  # correlation of responses earlier in the descent with those at the end, below which it is pointed out
WORDS = {"given": "as given", "linearity": "the largest of those tried at which responses are linear"}


def response(found: Mapping[str, Any]) -> dict[str, Any]:
    """The study, from `responses.json` of networks or of language models."""
    convergence, linearity = found["convergence"], found["linearity"]
    gradients = convergence["gradients"]
    study = {
        "epsilon": found["epsilon"],
        "linearity": [dict(row) for row in linearity["epsilons"]],
        "chosen_by": linearity["chosen_by"],
        "straight": linearity.get("tolerance", STRAIGHT),
        "gradients": gradients,
        "tolerance": convergence["tolerance"],
        "converged": convergence["converged"],
        "halfway": convergence["halfway"],
    }
    return study | {"facts": _facts(found, study), "warnings": _warnings(study)}


def used(study: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is known of linearity at the ε that was used."""
    rows = [row for row in study["linearity"] if abs(row["epsilon"] / study["epsilon"] - 1) < 1e-6]
    return rows[0] if rows else None


def _facts(found: Mapping[str, Any], study: Mapping[str, Any]) -> list[list[str]]:
    row, gradients = used(study), study["gradients"]
    chosen = WORDS.get(study["chosen_by"], study["chosen_by"])
    if row is not None and study["chosen_by"] == "linearity" and row["difference"] > study["straight"]:
        chosen = "at which they are nearest to linear, of those tried"
    facts = [
        ["minimised by", found["optimiser"]],
        ["ε", f"{study['epsilon']:.3g}, {chosen}"],
    ]
    if row is not None:
        facts.append(
            ["linearity at that ε", f"responses differ by {row['difference']:.2g} from those at a smaller one"]
        )
    return [
        *facts,
        ["gradient at the end", f"{_median(gradients):.2g} of the added point’s, at most {max(gradients):.2g}"],
        ["objectives minimised", f"{study['converged']:,} of {len(gradients):,} (at most {study['tolerance']:g})"],
        ["earlier in the descent", f"responses correlate with those at the end by {_rounded(study['halfway'])}"],
    ]


def _warnings(study: Mapping[str, Any]) -> list[str]:
    warnings = []
    failed = len(study["gradients"]) - study["converged"]
    if failed:
        worst = max(study["gradients"])
        warnings.append(
            f"The objective of {failed:,} of {len(study['gradients']):,} points was not minimised: their gradients at "
            f"the end are above {study['tolerance']:g} of the added point’s, at most {worst:.2g}. More steps "
            "(validation.pbo_steps) would help."
        )
    row = used(study)
    if row is None:
        warnings.append("Responses were not shown to be linear at the ε that was used.")
    elif row["difference"] > study["straight"]:
        warnings.append(
            f"Responses at the ε that was used differ by {row['difference']:.0%} from those at a smaller one: they are "
            "not linear, so correlations with them are lower than they should be."
        )
    if study["halfway"] is not None and study["halfway"] < HALFWAY:
        warnings.append(
            f"Responses earlier in the descent correlate with those at the end by {study['halfway']:.2f} only."
        )
    return warnings


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
