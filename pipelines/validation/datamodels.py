"""Stage `datamodels`: the linear datamodeling score by training on random halves (`pipelines.validation.datamodeling`).

S subsets, R trainings on each, T test examples, N training examples, M methods.

Training again is not what damped influence answers for: θ stays near θˢ in the one, and starts afresh in the other.
What K steps of SGD with rate η from some first weights have learnt of a direction of curvature g is 1 − (1 − ηg)ᴷ of
what there is, about g / (g + 1/ηK): early stopping is a damping of 1/ηK (Ali et al. 2019), the same in every layer, and
the L2 adds to it. The damping of the other studies, made for a response near θˢ, may be hundreds of times smaller;
exact solutions then count directions that no training gets to. So EK-FAC, its refinement and the exact solution are
also scored with that damping, and the first and the last with multiples of the usual one.
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
from pipelines.validation.methods import METHODS
from pipelines.validation.problem import chosen
from pipelines.validation.retraining import EVERY_METHOD, Retraining, Scoring, measured, scored
from pipelines.validation.training import TRAINING

DOCUMENT = "datamodels.json"
TENSORS = "datamodels.safetensors"
LARGEST_TEST = 256  # test examples above which only the measurements are predicted
REFERENCE = "ekfac"  # that the other methods are compared with
DAMPED = ("ekfac", "exact")  # methods that are scored with multiples of the usual damping
STOPPED = ("ekfac", "ekfac_cg", "exact")  # methods that are scored with the damping of early stopping
MULTIPLES = (1.0, 10.0, 100.0, 1000.0)  # of the usual damping


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
    `dampings`: [{`multiple` of the usual damping, or None, `damping`: that of early stopping in every layer, or None,
    `methods`: METHOD: {`lds`, `interval`, `interval_subsets`}, `differences`: as above, with the same damping}];
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
    training = context.inputs["training"].read_json(TRAINING)
    stopping = early_stopping(training, sizes["train"])
    scores, scoring = scored(context, tests_T, (*EVERY_METHOD, *_damped(stopping)))
    sums = {name: predicted(scores_TN, list(subsets_SK)) for name, scores_TN in scores.items()}
    models = {name: datamodel(sums_TS, measured_SRT.mean(1).T, validation.seed) for name, sums_TS in sums.items()}
    found = {method: models[method] for method in METHODS}
    output.write_tensors(
        TENSORS,
        {
            "measured_SRT": measured_SRT,
            "predicted_MTS": torch.stack([sums[method] for method in METHODS]),
            "lds_MT": torch.stack([each.lds_T for each in found.values()]),
        },
    )
    document = {
        "subsets": validation.subsets,
        "share": subsets_SK.shape[1] / sizes["train"],
        "retrainings": validation.retrainings,
        "epochs": validation.epochs,
        **training["chosen"],
        "train": sizes["train"],
        "tests": len(tests_T),
        **summary(found, measured_SRT, torch.isin(tests_T, picked), scoring, validation.seed),
        "dampings": _by_damping(models, stopping),
        "seconds": {"retraining": seconds, "scores": sum(scoring.values())},
    }
    output.write_json(DOCUMENT, document)
    return StageResult({"subsets": validation.subsets, "trainings": len(runs)})


def early_stopping(training: Mapping[str, Any], size: int) -> float:
    """1/ηK + L2: the damping that K steps of SGD amount to.

    Args:
        training: the content of `training.json`.
        size: training examples N.
    """
    steps = training["epochs"] * -(-size // training["batch"])
    return 1 / (training["chosen"]["learning_rate"] * steps) + training["chosen"]["l2"]


def _damped(stopping: float) -> list[Scoring]:
    """Scores beside those of every method with the usual damping."""
    multiples = [Scoring(method, multiple) for multiple in MULTIPLES if multiple != 1 for method in DAMPED]
    return [*multiples, *(Scoring(method, None, stopping) for method in STOPPED)]


def _by_damping(models: Mapping[str, Datamodel], stopping: float) -> list[dict[str, Any]]:
    dampings = [*((multiple, None, DAMPED) for multiple in MULTIPLES), (None, stopping, STOPPED)]
    rows = []
    for multiple, damping, methods in dampings:
        found = {method: models[Scoring(method, multiple, damping).name] for method in methods}
        record = {method: each.as_json() for method, each in found.items()}
        rows.append({"multiple": multiple, "damping": damping, "methods": record, "differences": _differences(found)})
    return rows


def _differences(found: Mapping[str, Datamodel]) -> dict[str, Any]:
    reference = found[REFERENCE]
    return {method: each.beyond(reference) for method, each in found.items() if method != REFERENCE}


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
    return {
        "methods": {
            method: each.as_json() | {"lds_measurements": _mean(each.lds_T[measurement_T]), "seconds": seconds[method]}
            for method, each in found.items()
        },
        "differences": _differences(found),
        "ceiling": None if limit is None else limit.as_json(),
    }


def _mean(values: Tensor) -> float | None:
    defined = values[torch.isfinite(values)]
    return float(defined.mean()) if len(defined) else None
