"""Stage `removal`: drop the training points that a method calls most helpful, train again, and see what is lost.

Q measurements, R trainings of each set, D draws of random points, M methods, N training examples.

For each measurement the `removal` share of the training points with the highest scores is left out: those whose weight
lowers its loss most. What their removal does is the loss of networks trained without them minus that of networks
trained on everything, seed by seed. Random sets of the same size are left out for comparison, the same ones for all
measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence.score_agreement import finite, mean_interval
from pipelines.steps import StageContext, StageResult
from pipelines.validation.dataset import RECORD
from pipelines.validation.loading import MEASUREMENTS
from pipelines.validation.problem import chosen
from pipelines.validation.retraining import Retraining, measured, scored

DOCUMENT = "removal.json"
TENSORS = "removal.safetensors"
DRAWS = 10  # random sets


@dataclass(frozen=True)
class Removed:
    """Losses after training again, in float64.

    Attributes:
        base_RQ: trained on everything.
        random_DRQ: trained without random points.
        dropped_MQR: of measurement q, trained without the points that method m calls most helpful for it.
        methods: their names.
        tests_Q: numbers of the test examples.
    """

    base_RQ: Tensor
    random_DRQ: Tensor
    dropped_MQR: Tensor
    methods: tuple[str, ...]
    tests_Q: tuple[int, ...]


def run(context: StageContext) -> StageResult:
    """Write `removal.safetensors` and `removal.json`.

    Reads validation.{subject, seed, epochs, measurements, retrainings, removal, lissa_depth, lissa_batch},
    factors.cg_iterations, and the steps `dataset`, `training` and `curvature`.

    `removal.safetensors`: losses `base_RQ`, `random_DRQ`, `dropped_MQR`, methods in the order of the JSON.

    `removal.json`: `removal`, `dropped` (points), `train` (N), `retrainings`, `draws`, and what `summary` returns;
    `seconds`: {`retraining`, `scores`} of all tasks together. Where nothing is removed only `removal`: 0.
    """
    validation, output = context.config.validation, context.artifact
    if not validation.removal:
        output.write_json(DOCUMENT, {"removal": 0.0})
        return StageResult({"dropped": 0})
    sizes = context.inputs["dataset"].read_json(RECORD)
    tests_Q = chosen(validation.measurements, sizes["test"], validation.seed, MEASUREMENTS)
    count = dropped_points(sizes["train"], validation.removal)
    scores, scoring = scored(context, tests_Q)
    sets = [None, *without_random(sizes["train"], count, DRAWS, validation.seed)]
    sets += [kept for scores_QN in scores.values() for kept in without_top(scores_QN, count)]
    runs = [Retraining(kept, repeat) for kept in sets for repeat in range(validation.retrainings)]
    measured_RQ, seconds = measured(context, "removal", runs, tests_Q)
    found = _arranged(-measured_RQ, tuple(scores), tests_Q, validation.retrainings)
    output.write_tensors(
        TENSORS, {name: getattr(found, name).contiguous() for name in ("base_RQ", "random_DRQ", "dropped_MQR")}
    )
    document = {
        "removal": validation.removal,
        "dropped": count,
        "train": sizes["train"],
        "retrainings": validation.retrainings,
        "draws": DRAWS,
        **summary(found, scoring),
        "seconds": {"retraining": seconds, "scores": sum(scoring.values())},
    }
    output.write_json(DOCUMENT, document)
    return StageResult({"dropped": count, "trainings": len(runs)})


def dropped_points(size: int, share: float) -> int:
    """How many points are left out: the share of them, and at least one."""
    return max(1, round(share * size))


def without_top(scores_QN: Tensor, count: int) -> Tensor:
    """Numbers of all points but the `count` of highest score, by measurement, ascending: [Q, N − count]."""
    order_QN = scores_QN.argsort(dim=1, descending=True, stable=True)
    return order_QN[:, count:].sort(dim=1).values


def without_random(size: int, count: int, draws: int, seed: int) -> list[Tensor]:
    """Numbers of all points but `count` random ones, for each draw, ascending."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7)
    return [torch.randperm(size, generator=generator)[count:].sort().values for _ in range(draws)]


def _arranged(loss_RQ: Tensor, methods: tuple[str, ...], tests_Q: Tensor, retrainings: int) -> Removed:
    """The losses of all trainings, in the order in which `run` lists them, by what they are."""
    loss_SRQ = loss_RQ.view(-1, retrainings, len(tests_Q))
    dropped_MQRQ = loss_SRQ[1 + DRAWS :].view(len(methods), len(tests_Q), retrainings, len(tests_Q))
    own_MQR = dropped_MQRQ.diagonal(dim1=1, dim2=3).transpose(1, 2)
    return Removed(loss_SRQ[0], loss_SRQ[1 : 1 + DRAWS], own_MQR, methods, tuple(tests_Q.tolist()))


def summary(found: Removed, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the losses say. All intervals are 95 %, of Student's t; None for what is not defined.

    `methods`: METHOD: {`change`: mean over measurements of the loss without the points minus the loss with all, mean
    over seeds; `interval`: over measurements; `over_random`: that change minus the mean change by random draws, with
    `over_random_interval` over measurements; `relative`: change / base; `wins`: the share of measurements whose change
    exceeds the mean of random draws; `seconds`: of its scores}. `random`: {`change`, `interval`} over measurements.
    `base`: mean loss of the networks trained on everything. `measurements`: [{`test`, `base`, `random`: {`change`,
    `interval`: over draws}, `methods`: METHOD: {`change`, `interval`: over seeds}}].
    """
    random_DQ = (found.random_DRQ - found.base_RQ).mean(1)
    dropped_MQR = found.dropped_MQR - found.base_RQ.T
    random_Q, base_Q = random_DQ.mean(0), found.base_RQ.mean(0)
    methods = {
        method: _method(dropped_QR.mean(1), random_Q, base_Q) | {"seconds": seconds[method]}
        for method, dropped_QR in zip(found.methods, dropped_MQR, strict=True)
    }
    measurements = [
        {
            "test": test,
            "base": finite(float(base_Q[q])),
            "random": _change(random_DQ[:, q]),
            "methods": {method: _change(dropped_MQR[m, q]) for m, method in enumerate(found.methods)},
        }
        for q, test in enumerate(found.tests_Q)
    ]
    return {
        "methods": methods,
        "random": _change(random_Q),
        "base": finite(float(base_Q.mean())),
        "measurements": measurements,
    }


def _method(change_Q: Tensor, random_Q: Tensor, base_Q: Tensor) -> dict[str, Any]:
    over = _change(change_Q - random_Q)
    return _change(change_Q) | {
        "over_random": over["change"],
        "over_random_interval": over["interval"],
        "relative": finite(float(change_Q.mean() / base_Q.mean())),
        "wins": float((change_Q > random_Q).double().mean()),
    }


def _change(values: Tensor) -> dict[str, Any]:
    """A mean and its interval over the values."""
    found = mean_interval(values, largest=math.inf)
    return {"change": finite(found.mean), "interval": [finite(found.low), finite(found.high)]}
