"""Stage `estimates`: influences by every method, timed, and how far the factors depend on the sample.

Methods run one after the other, each in a task of its own with the same threads and nothing of this run beside it, so
that their wall clocks compare; CPU time is recorded as well, for machines that do something else meanwhile. A finished
method is a file. The study of sample sizes is not timed: its tasks run side by side.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from actors.store import Artifact
from conf.schema import RunConfig, ValidationConfig
from influence.score_agreement import halvings
from pipelines.steps import StageContext, StageResult
from pipelines.validation.curvature import setting_of
from pipelines.validation.loading import load_problem_from
from pipelines.validation.methods import METHODS, block_methods, estimate
from pipelines.validation.problem import parameters
from pipelines.validation.setting import too_large, warm_up
from pipelines.validation.sizes import fit_size, read_sizes, size_file

log = logging.getLogger(__name__)

ESTIMATES = "estimates.json"
SIZES = "sizes.json"


def run(context: StageContext) -> StageResult:
    """Write METHOD.safetensors {scores_QP} and METHOD.json of each method, `estimates.json` and `sizes.json`.

    Reads validation.subject, seed, label_draws, points, measurements, lissa_depth, lissa_batch, largest_blocks and
    convergence, and factors.cg_iterations; and, of the study of sizes, factors.damping_factor. The steps are `dataset`,
    `training` and `curvature`.

    `estimates.json`: `training` N, `points` P, `measurements` Q, `parameters` D, `threads`; `left_out`: methods that
    are too costly for this network, with the reason; `methods`: by name, in the order of the registry, the record of
    `pipelines.validation.methods.record_of`:

    - `seconds`, `cpu_seconds`: of `fit` (with what the method needs of the step `curvature`), `gradients` (of the Q
      measurements), `solve`, `score`, and `total`;
    - `products` with Gauss-Newton matrices, of the Q vectors together; `examples` that these went over in all;
    - `residuals`: ‖V − (G + λ) X‖ / ‖V‖ of each vector; None where it is not known;
    - `bytes`: `factors` (A and S), `correction` (Λ), `vectors` (what the solver holds besides V);
    - `blocks` of the factors or None; `notes`: what is particular to a method.

    `sizes.json`: `pipelines.validation.sizes.read_sizes`; no sizes where validation.convergence is off.
    """
    output, config, inputs = context.artifact, context.config, context.inputs
    given = (inputs["dataset"], inputs["training"], inputs["curvature"], config)
    names = method_names(config.validation)
    progress = context.progress("estimates", len(names), "methods")
    for name in names:
        if not output.exists(f"{name}.json"):
            for _ in context.cluster.map(estimate_and_write, [(output, name, *given)]):
                pass
        progress.advance(1)
    progress.close()
    total = inputs["curvature"].read_json("curvature.json")["examples"]
    sizes = halvings(total) if config.validation.convergence else []
    arguments = [(output, size, *given) for size in sizes if not output.exists(size_file(size))]
    for _ in context.cluster.map(fit_size, arguments) if arguments else ():
        pass
    full_QP = output.read_tensors("ekfac.safetensors")["scores_QP"]
    output.write_json(SIZES, read_sizes(output, sizes, total, full_QP))
    document = _document(output, names)
    output.write_json(ESTIMATES, document)
    return StageResult({"methods": len(document["methods"]), "sizes": len(sizes)}, {})


def method_names(validation: ValidationConfig) -> list[str]:
    """The methods of a validation, in the order in which they run."""
    return [*METHODS, *(method.name for method in block_methods(validation.largest_blocks))]


def estimate_and_write(
    output: Artifact, name: str, dataset: Artifact, training: Artifact, curvature: Artifact, config: RunConfig
) -> None:
    """One method's scores and record, or why it has none. A Ray task."""
    problem = load_problem_from(dataset, training, config.validation)
    common = {
        "training": problem.size,
        "points": len(problem.points_P),
        "measurements": len(problem.test.inputs),
        "parameters": parameters(problem),
        "threads": torch.get_num_threads(),
    }
    reason = too_large(name, problem)
    if reason is not None:
        log.warning("%s is left out: %s", name, reason)
        output.write_json(f"{name}.json", {"common": common, "left_out": reason})
        return
    warm_up(problem)
    found = estimate(name, setting_of(problem, curvature, config))
    output.write_tensors(f"{name}.safetensors", {"scores_QP": found.scores_QP.cpu()})
    output.write_json(f"{name}.json", {"common": common, "record": found.record})


def _document(output: Artifact, names: list[str]) -> dict[str, Any]:
    found = {name: output.read_json(f"{name}.json") for name in names}
    return {
        **next(iter(found.values()))["common"],
        "methods": {name: entry["record"] for name, entry in found.items() if "record" in entry},
        "left_out": {name: entry["left_out"] for name, entry in found.items() if "left_out" in entry},
    }
