"""Stage `language_additions`: what a sequence that is added with weight 1/N, one copy, does, measured in two ways.

- By the proximal Bregman objective at ε = 1/N, whether or not responses are linear there.
- By training on from the final weights, with and without it. All weights move, not those of the tracked layers alone:
  Adam as in training, the same batches, a small learning rate, and (1/N) L(z_m) added to the mean loss of every step. A
  check on reality, which stops before the weights are at a new optimum and knows no damping.

Legend: Q queries, N training sequences, P that are added, C checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.objectives import respond_all
from pipelines.validation.language.problem import FITTED, LanguageProblem, load_problem

RANDOM = 10  # of the points of `language_objectives` that are added; the sequences of highest score are too
STEPS = (10, 20, 40, 80)  # after which the queries are measured
RATE = 3e-4  # the last one of the almanac's training
BATCH = 64


def run(context: StageContext) -> StageResult:
    """Write `additions.safetensors` {response_PQ, gradient_P, change_CQP, places_P, seconds}.

    response_PQ: N times the change by the objective at ε = 1/N, gradient_P how far it is minimised; change_CQP: how
    much higher the measurement is than without the sequence, trained on; places_P: where the sequences stand in
    `language_objectives`. Reads of the config: `validation.seed`, `.pbo_gradients`, `.pbo_tolerance`, and
    `factors.damping_factor`.
    """
    objectives = context.inputs["language_objectives"]
    random = objectives.read_json("objectives.json")["points"]
    numbers_P = objectives.read_tensors("responses.safetensors")["numbers_P"]
    places_P = torch.tensor([*range(min(RANDOM, random)), *range(random, len(numbers_P))])
    numbers = numbers_P[places_P].tolist()
    size = context.inputs["sequences"].read_json("index.json")["sequences"]
    found = respond_all(context, numbers, 1 / size)
    change_CQP, seconds = _trained_on(context, numbers)
    tensors = {
        "response_PQ": found["response_PQ"],
        "gradient_P": found["gradient_P"],
        "change_CQP": change_CQP,
        "places_P": places_P,
        "seconds": torch.tensor([seconds + float(found["seconds"].sum())], dtype=torch.float64),
    }
    context.artifact.write_tensors("additions.safetensors", tensors)
    return StageResult({"sequences": len(places_P), "checkpoints": len(STEPS)})


def train_on(problem: LanguageProblem, added: int | None, seed: int, steps: Sequence[int]) -> Tensor:
    """Train on from the weights of a problem, and measure the queries on the way.

    Args:
        problem: its model is changed; load it anew for each call.
        added: the sequence that gets a weight of 1/N beside the others; None adds none.
        seed: of the order of batches.
        steps: after which the queries are measured, ascending.

    Returns:
        f, float64 [C, Q].
    """
    network, found = problem.network, []
    network.model.requires_grad_(True)
    optimizer = torch.optim.Adam(network.model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(0)
    for step in range(1, steps[-1] + 1):
        if len(order) < min(BATCH, problem.size):
            order = torch.randperm(problem.size, generator=generator)
        numbers, order = order[:BATCH], order[BATCH:]
        loss = _losses(problem, numbers).mean()
        if added is not None:
            loss = loss + _losses(problem, torch.tensor([added])).sum() / problem.size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            found.append(problem.measure(network))
    return torch.stack(found)


def train_on_added(
    config: RunConfig, fitted: Mapping[str, Artifact], output: Artifact, name: str, added: int | None
) -> None:
    """Write `NAME`.safetensors {measured_CQ, seconds}."""
    begun = time.perf_counter()
    measured_CQ = train_on(load_problem(config, fitted), added, config.validation.seed, STEPS)
    seconds = torch.tensor([time.perf_counter() - begun], dtype=torch.float64)
    output.write_tensors(f"{name}.safetensors", {"measured_CQ": measured_CQ, "seconds": seconds})


def _losses(problem: LanguageProblem, numbers: Tensor) -> Tensor:
    batch, network = problem.draw(numbers), problem.network
    return network.loss.value(network.outputs(batch), network.targets(batch))


def _trained_on(context: StageContext, numbers: Sequence[int]) -> tuple[Tensor, float]:
    """The change of every query by each added sequence, [C, Q, P], and seconds of all tasks."""
    output, config = context.artifact, context.config
    fitted = {name: context.inputs[name] for name in FITTED}
    wanted: dict[str, int | None] = {"parts/trained/none": None} | {
        f"parts/trained/{number:06d}": number for number in numbers
    }
    waiting = [name for name in wanted if not output.exists(f"{name}.safetensors")]
    progress = context.progress("training on", len(wanted), "models")
    progress.resume(len(wanted) - len(waiting))
    for _ in context.cluster.map(train_on_added, [(config, fitted, output, name, wanted[name]) for name in waiting]):
        progress.advance(1)
    progress.close()
    parts = {name: output.read_tensors(f"{name}.safetensors") for name in wanted}
    base_CQ = parts["parts/trained/none"]["measured_CQ"]
    change_PCQ = torch.stack([parts[f"parts/trained/{number:06d}"]["measured_CQ"] - base_CQ for number in numbers])
    return change_PCQ.permute(1, 2, 0), float(sum(part["seconds"] for part in parts.values()))


def identity(config: RunConfig) -> dict[str, Any]:
    """What moves the results beside the inputs."""
    return {
        "seed": config.validation.seed,
        "random": RANDOM,
        "steps": list(STEPS),
        "rate": RATE,
        "batch": BATCH,
        "gradients": config.validation.pbo_gradients,
    }
