"""Stage `datamodels`: the linear datamodeling score by training on random halves (`pipelines.validation.datamodeling`).

S subsets, R trainings on each, T test examples, N training examples, M methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.steps import StageContext, StageResult
from pipelines.validation.datamodeling import Datamodel, ceiling, datamodel, halves, predicted
from pipelines.validation.dataset import RECORD
from pipelines.validation.loading import MEASUREMENTS
from pipelines.validation.problem import chosen
from pipelines.validation.retraining import Retraining, measured, scored
from pipelines.validation.training import TRAINING

DOCUMENT = "datamodels.json"
TENSORS = "datamodels.safetensors"
LARGEST_TEST = 256  # test examples above which only the measurements are predicted
REFERENCE = "ekfac"  # that the other methods are compared with


def run(context: StageContext) -> StageResult:
    """Write `datamodels.safetensors` and `datamodels.json`.

    Reads validation.{subject, seed, epochs, measurements, subsets, retrainings, lissa_depth, lissa_batch},
    factors.cg_iterations, and the steps `dataset`, `training` and `curvature`. All test examples are predicted, or the
    measurements alone where there are more than 256. R trainings of a subset have seeds of their own, the same for
    every subset.

    `datamodels.safetensors`: `measured_SRT` (f = −L), `predicted_MTS` and `lds_MT`, methods in the order of the JSON.

    `datamodels.json`: `subsets`, `share` (of the examples in a subset), `retrainings`, `epochs`, `learning_rate`, `l2`,
    `train` (N), `tests` (T); `methods`: METHOD: {`lds`, `interval`, `interval_subsets`, `lds_measurements` (over the
    measurements alone), `seconds` (of its scores)}; `differences`: METHOD: {`mean`, `interval`, `interval_subsets`} of
    its score minus that of EK-FAC; `ceiling`: as `datamodeling.Ceiling.as_json`, or None with a single training;
    `seconds`: {`retraining`, `scores`} of all tasks together. Without subsets only `subsets`: 0.
    """
    validation, output = context.config.validation, context.artifact
    if not validation.subsets:
        output.write_json(DOCUMENT, {"subsets": 0})
        return StageResult({"subsets": 0})
    sizes = context.inputs["dataset"].read_json(RECORD)
    picked = chosen(validation.measurements, sizes["test"], validation.seed, MEASUREMENTS)
    tests_T = torch.arange(sizes["test"]) if sizes["test"] <= LARGEST_TEST else picked
    subsets_SK = halves(sizes["train"], validation.subsets, validation.seed)
    runs = [Retraining(kept, repeat) for kept in subsets_SK for repeat in range(validation.retrainings)]
    measured_RT, seconds = measured(context, "halves", runs, tests_T)
    measured_SRT = measured_RT.view(validation.subsets, validation.retrainings, -1)
    scores, scoring = scored(context, tests_T)
    sums = {method: predicted(scores_TN, list(subsets_SK)) for method, scores_TN in scores.items()}
    found = {method: datamodel(sums_TS, measured_SRT.mean(1).T, validation.seed) for method, sums_TS in sums.items()}
    output.write_tensors(
        TENSORS,
        {
            "measured_SRT": measured_SRT,
            "predicted_MTS": torch.stack(list(sums.values())),
            "lds_MT": torch.stack([each.lds_T for each in found.values()]),
        },
    )
    document = {
        "subsets": validation.subsets,
        "share": subsets_SK.shape[1] / sizes["train"],
        "retrainings": validation.retrainings,
        "epochs": validation.epochs,
        **context.inputs["training"].read_json(TRAINING)["chosen"],
        "train": sizes["train"],
        "tests": len(tests_T),
        **summary(found, measured_SRT, torch.isin(tests_T, picked), scoring, validation.seed),
        "seconds": {"retraining": seconds, "scores": sum(scoring.values())},
    }
    output.write_json(DOCUMENT, document)
    return StageResult({"subsets": validation.subsets, "trainings": len(runs)})


def summary(
    found: Mapping[str, Datamodel],
    measured_SRT: Tensor,
    measurement_T: Tensor,
    seconds: Mapping[str, float],
    seed: int,
) -> dict[str, Any]:
    """`methods`, `differences` and `ceiling` of the JSON.

    Args:
        found: by method.
        measured_SRT: measurements of all trainings.
        measurement_T: which test examples are the measurements of the other studies.
        seconds: of the scores, by method.
        seed: of resamples.
    """
    limit = ceiling(measured_SRT, seed)
    reference = found.get(REFERENCE)
    return {
        "methods": {
            method: each.as_json() | {"lds_measurements": _mean(each.lds_T[measurement_T]), "seconds": seconds[method]}
            for method, each in found.items()
        },
        "differences": {
            method: each.beyond(reference)
            for method, each in found.items()
            if reference is not None and method != REFERENCE
        },
        "ceiling": None if limit is None else limit.as_json(),
    }


def _mean(values: Tensor) -> float | None:
    defined = values[torch.isfinite(values)]
    return float(defined.mean()) if len(defined) else None
