"""How the response was measured, as a study: ε and linearity, convergence, and what did not come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRAIGHT = 0.1  # relative difference of responses at ε and at a smaller weight, above which they are not called linear
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
        "setting": convergence.get("setting", "validation.pbo_steps"),
    }
    return study | {"facts": _facts(found, study), "warnings": _warnings(study)}


def used(study: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is known of linearity at the ε that was used."""
    rows = [row for row in study["linearity"] if abs(row["epsilon"] / study["epsilon"] - 1) < 1e-6]
    return rows[0] if rows and rows[0]["difference"] is not None else None


def _facts(found: Mapping[str, Any], study: Mapping[str, Any]) -> list[list[str]]:
    row, gradients = used(study), study["gradients"]
    chosen = WORDS.get(study["chosen_by"], study["chosen_by"])
    if study["chosen_by"] == "linearity" and (row is None or row["difference"] > study["straight"]):
        chosen = "at which they are nearest to linear, of those tried"
    facts = [
        ["minimised by", found["optimiser"]],
        ["ε", f"{study['epsilon']:.3g}, {chosen}"],
        ["objectives minimised", f"{study['converged']:,} of {len(gradients):,} (at most {study['tolerance']:g})"],
    ]
    if row is not None:
        linearity = f"responses differ by {row['difference']:.2g} from those at a smaller one"
        facts.append(["linearity at that ε", linearity])
    known = sorted(value for value in gradients if value is not None)
    if known:
        left = f"{known[len(known) // 2]:.2g} of the added point’s (median), at most {known[-1]:.2g}"
        facts.append(["gradient at the end", left])
    if study["halfway"] is not None:
        earlier = f"responses correlate with those at the end by {study['halfway']:.4f}"
        facts.append(["earlier in the descent", earlier])
    return facts


def _warnings(study: Mapping[str, Any]) -> list[str]:
    return [warning for warning in (_not_minimised(study), _not_linear(study)) if warning is not None]


def _not_minimised(study: Mapping[str, Any]) -> str | None:
    gradients = study["gradients"]
    failed = len(gradients) - study["converged"]
    if not failed:
        return None
    return (
        f"The objective of {failed:,} of {len(gradients):,} points was not minimised: their gradients at the end are "
        f"above {study['tolerance']:g} of the added point’s. More steps ({study['setting']}) may help."
    )


def _not_linear(study: Mapping[str, Any]) -> str | None:
    row = used(study)
    if row is None:
        return "Responses were not shown to be linear at the ε that was used."
    if row["difference"] <= study["straight"]:
        return None
    return (
        f"Responses at the ε that was used differ by {row['difference']:.0%} from those at a smaller one: they are not "
        "linear, so correlations with them are lower than they should be."
    )
