"""Stage `scale`: what a score means: predicted and measured change of log p when a sequence is added with weight 1/N.

Predicted: score / N, and as a method of its own `response`, the response at a weight so small that it is linear, over
N: what a score approximates. Measured (`language_additions`): by the proximal Bregman objective at ε = 1/N, and by
training on with the sequence.

Legend: Q queries, N training sequences, P sequences that are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.additions import BATCH, RATE, STEPS
from pipelines.validation.language.intervals import line
from pipelines.validation.language.scores import BM25, methods_and_curve


def run(context: StageContext) -> StageResult:
    """Write `scale.json`.

    `weight` (1/N), `epsilon` (at which `response` was measured, in units of the weight), `points` P, `numbers` of the
    sequences, `queries`, `pbo` (a line each method, as `intervals.line` gives it), `training_on` (`steps`,
    `learning_rate`, `batch`, `checkpoints`: `steps` and `methods`, the objective at 1/N among them as `pbo`), `pairs`
    (`predicted` by method [P][Q], `pbo` [P][Q], `training_on` [P][Q] after all steps: changes of log p in nats),
    `seconds`.
    """
    inputs = context.inputs
    record = inputs["language_objectives"].read_json("objectives.json")
    objectives = inputs["language_objectives"].read_tensors("responses.safetensors")
    additions = inputs["language_additions"].read_tensors("additions.safetensors")
    scores, _ = methods_and_curve(inputs)
    size = scores[BM25].shape[1]
    numbers = objectives["numbers_P"][additions["places_P"]].tolist()
    predicted = {name: scores_QN[:, numbers] / size for name, scores_QN in scores.items() if name != BM25}
    predicted["response"] = objectives["response_PQ"][additions["places_P"]].numpy().T / size
    pbo_QP = additions["response_PQ"].numpy().T / size
    change_CQP = additions["change_CQP"].numpy()
    found = {
        "weight": 1 / size,
        "epsilon": record["epsilon"] * size,
        "points": len(numbers),
        "numbers": numbers,
        "queries": len(record["queries"]),
        "pbo": lines(predicted, pbo_QP),
        "training_on": {
            "steps": STEPS[-1],
            "learning_rate": RATE,
            "batch": BATCH,
            "checkpoints": [
                {"steps": steps, "methods": lines(predicted | {"pbo": pbo_QP}, change_QP)}
                for steps, change_QP in zip(STEPS, change_CQP, strict=True)
            ],
        },
        "pairs": {
            "predicted": {name: values.T.tolist() for name, values in predicted.items()},
            "pbo": pbo_QP.T.tolist(),
            "training_on": change_CQP[-1].T.tolist(),
        },
        "seconds": float(additions["seconds"]),
    }
    context.artifact.write_json("scale.json", found)
    return StageResult({"points": len(numbers), "queries": len(record["queries"])})


def lines(predicted: Mapping[str, np.ndarray], measured_QP: np.ndarray) -> dict[str, Any]:
    """The line of every method through the origin."""
    return {name: line(values, measured_QP) for name, values in predicted.items()}
