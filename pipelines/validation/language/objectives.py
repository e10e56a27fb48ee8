"""Stage `language_objectives`: how every query responds when a training sequence is given weight ε (Equation 7).

    PBO(θ) = (1/N) Σ_i KL(p_s(· | z_i) ‖ p(· | z_i)) + ε L(z_m, θ) + Σ_ℓ λ_ℓ/2 ‖θ_ℓ − θˢ_ℓ‖²

over the weights of the tracked layers alone. The response of query q to sequence m is (f_q(θ(ε)) − f_q(θˢ)) / ε; it is
what a score estimates. Legend: Q queries, N training sequences, P of them whose response is measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig
from influence.batch import Batch
from influence.conjugate_gradients import precondition
from influence.gauss_newton import Vectors
from influence.lbfgs import Descended, descend
from influence.proximal import add_gradient, measured, moved
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.intervals import correlations, over_queries
from pipelines.validation.language.problem import FITTED, LanguageProblem, load_problem
from pipelines.validation.language.variants import read_scores
from pipelines.validation.linearity import FACTOR, RUNGS
from pipelines.validation.problem import chosen

POINTS = 1  # tells the draws of a validation's seed apart
PROBED = 4  # points that linearity is shown on; a multiple of AT_A_TIME, so that none is done twice
COPIES = tuple(1 / FACTOR**rung for rung in range(1, RUNGS))  # the weights ε that are tried, in copies: ε = copies / N
NATS = 2.0  # of change that EK-FAC predicts for a measurement, beyond which a weight is not tried; it exaggerates
LINEAR = 0.1  # relative difference of responses at ε and at a quarter of it, below which they count as linear
AT_A_TIME = 2  # points a task
MICRO = 64  # sequences that go through the model together


def run(context: StageContext) -> StageResult:
    """Write `responses.safetensors` and `objectives.json`.

    The tensors, as of `responses_to` with the `seconds` of each task, hold the P random points first, then the sequence
    with the highest EK-FAC score of each query, which enter the scale of scores and no correlation. The JSON: `points`
    P, `measurements` Q, `numbers`, `added`, `queries`, `optimiser` (in words), `steps` (gradients at most), `batch`
    (N), `epsilon`, `linearity` and `convergence` (as those of `pipelines.validation.responses`; `halfway` is after a
    quarter to a half of the gradients, `setting` what more of them is asked by), `seconds` of all tasks together.

    Reads of the config: `validation.seed`, `.points`, `.pbo_gradients`, `.pbo_tolerance`, `.epsilon`, and
    `factors.damping_factor`.
    """
    settings, output = context.config.validation, context.artifact
    ekfac_QN = read_scores(context.inputs["scores"]).scores_QN
    size = ekfac_QN.shape[1]
    numbers = chosen(settings.points, size, settings.seed, POINTS).tolist()
    added = sorted(set(ekfac_QN.argmax(1).tolist()) - set(numbers))
    probed = numbers[:PROBED]
    epsilon, linear = _epsilon(context, probed, weights_to_try(float(np.abs(ekfac_QN[:, probed]).max()), size))
    found = respond_all(context, [*numbers, *added], epsilon)
    output.write_tensors("responses.safetensors", found)
    query_ids = [query["query_id"] for query in context.inputs["gradients"].read_json("queries.json")]
    record = {
        "points": len(numbers),
        "measurements": len(query_ids),
        "numbers": numbers,
        "added": added,
        "queries": query_ids,
        "optimiser": f"L-BFGS with EK-FAC as its first metric, at most {settings.pbo_gradients} gradients over all "
        "training sequences",
        "steps": settings.pbo_gradients,
        "batch": size,
        "epsilon": epsilon,
        "linearity": linear,
        "convergence": _convergence(found, len(numbers), settings.pbo_tolerance, query_ids),
        "seconds": float(found["seconds"].sum()),
    }
    output.write_json("objectives.json", record)
    return StageResult({"points": len(found["numbers_P"]), "queries": len(query_ids)})


class Objective:
    """The objective of one sequence after another, in the type of the model; its gradient divided by ε.

    u is the response of the weights, θ = θˢ + ε u, in one vector of float64.
    """

    def __init__(self, problem: LanguageProblem, epsilon: float) -> None:
        self._problem, self._epsilon = problem, epsilon
        network = problem.network
        self._batches = list(problem.batches(MICRO))
        with torch.no_grad():
            self._references = [
                network.loss.gradient(network.outputs(batch), network.targets(batch)) for batch in self._batches
            ]

    @property
    def start_P(self) -> Tensor:
        """No response."""
        return torch.zeros(sum(layer.parameters for layer in self._problem.layers), dtype=torch.float64)

    def gradient(self, response_P: Tensor, point: Batch) -> Tensor:
        """∇PBO(θˢ + ε u) / ε, by a forward and a backward pass over all training sequences."""
        problem, network = self._problem, self._problem.network
        layers, weights = problem.layers, self.vectors(response_P)
        found = {name: problem.damping[name] * value for name, value in weights.items()}
        share = 1 / (problem.size * self._epsilon)
        with moved(network.model, layers, weights, 0, self._epsilon):
            for batch, reference in zip(self._batches, self._references, strict=True):
                targets = network.targets(batch)
                add_gradient(
                    network,
                    layers,
                    batch,
                    lambda out, y=targets, before=reference: (network.loss.gradient(out, y) - before) * share,
                    found,
                    0,
                )
            targets = network.targets(point)
            add_gradient(network, layers, point, lambda out: network.loss.gradient(out, targets), found, 0)
        return self.flat(found)

    def inverse(self, gradient_P: Tensor) -> Tensor:
        """M⁻¹ of the fitted EK-FAC."""
        vectors, states = self.vectors(gradient_P), self._problem.states
        return self.flat({name: precondition(states[name], value) for name, value in vectors.items()})

    def minimise(self, point: Batch, evaluations: int, tolerance: float) -> Descended:
        """Descend from θˢ, by so many gradients at most."""
        return descend(lambda u: self.gradient(u, point), self.inverse, self.start_P, evaluations, tolerance)

    def vectors(self, flat_P: Tensor) -> Vectors:
        """By layer, [1, O, I]."""
        layers = self._problem.layers
        parts = flat_P.split([layer.parameters for layer in layers])
        return {
            layer.name: part.view(1, layer.outputs, layer.columns) for layer, part in zip(layers, parts, strict=True)
        }

    def flat(self, vectors: Vectors) -> Tensor:
        """[P], the layers one after the other."""
        return torch.cat([vectors[layer.name].flatten() for layer in self._problem.layers])


def responses_to(
    problem: LanguageProblem, numbers: Sequence[int], epsilon: float, evaluations: int, tolerance: float
) -> dict[str, Tensor]:
    """Responses of all queries to some sequences: response_PQ, earlier_PQ, numbers_P, gradient_P, evaluations_P."""
    objective = Objective(problem, epsilon)
    found = [objective.minimise(problem.draw(torch.tensor([number])), evaluations, tolerance) for number in numbers]

    def measure(flat: Sequence[Tensor]) -> Tensor:
        stacked = [objective.vectors(one) for one in flat]
        weights = {name: torch.cat([one[name] for one in stacked]) for name in stacked[0]}
        return measured(problem.network, problem.layers, weights, epsilon, problem.measure)

    return {
        "response_PQ": measure([one.position_P for one in found]),
        "earlier_PQ": measure([one.earlier_P for one in found]),
        "numbers_P": torch.tensor(numbers),
        "gradient_P": torch.tensor([one.error for one in found], dtype=torch.float64),
        "evaluations_P": torch.tensor([one.evaluations for one in found]),
    }


def respond_to(
    config: RunConfig,
    fitted: Mapping[str, Artifact],
    output: Artifact,
    name: str,
    numbers: Sequence[int],
    epsilon: float,
) -> None:
    """Write `NAME`.safetensors: responses of all queries to some sequences, with the `seconds` that they took."""
    begun = time.perf_counter()
    limits = config.validation.pbo_gradients, config.validation.pbo_tolerance
    tensors = responses_to(load_problem(config, fitted), numbers, epsilon, *limits)
    seconds = torch.tensor([time.perf_counter() - begun], dtype=torch.float64)
    output.write_tensors(f"{name}.safetensors", tensors | {"seconds": seconds})


def respond_all(context: StageContext, numbers: Sequence[int], epsilon: float) -> dict[str, Tensor]:
    """The tensors of all tasks, one after the other."""
    output, config = context.artifact, context.config
    fitted = {name: context.inputs[name] for name in FITTED}
    parts = [list(numbers[start : start + AT_A_TIME]) for start in range(0, len(numbers), AT_A_TIME)]
    groups = {f"parts/{epsilon:.9g}/{'-'.join(map(str, part))}": part for part in parts}
    waiting = [name for name in groups if not output.exists(f"{name}.safetensors")]
    progress = context.progress(f"responses at ε = {epsilon:.3g}", len(groups), "tasks")
    progress.resume(len(groups) - len(waiting))
    for _ in context.cluster.map(respond_to, [(config, fitted, output, n, groups[n], epsilon) for n in waiting]):
        progress.advance(1)
    progress.close()
    found = [output.read_tensors(f"{name}.safetensors") for name in groups]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def weights_to_try(score: float, size: int) -> list[float]:
    """The ε among `COPIES` at which |score| · ε is at most `NATS`, descending; always the smallest two.

    Beyond that, what is spent on a minimisation shows no more than that responses are not linear.
    """
    small = [copies / size for copies in COPIES if score * copies / size <= NATS]
    return small if len(small) > 1 else [copies / size for copies in COPIES[-2:]]


def _epsilon(context: StageContext, probed: Sequence[int], weights: Sequence[float]) -> tuple[float, dict[str, Any]]:
    """The weight ε that is used, and how linear responses are at it.

    Without `validation.epsilon` it is the largest of those tried at which they are, or that which comes nearest.
    """
    given = context.config.validation.epsilon
    tried = weights if given is None else [given, given / FACTOR]
    rows: list[dict[str, float]] = []
    for larger, smaller in pairwise(tried):
        before, after = (respond_all(context, probed, epsilon)["response_PQ"] for epsilon in (larger, smaller))
        rows.append({"epsilon": larger, "smaller": smaller} | linearity(before, after))
        if rows[-1]["difference"] <= LINEAR:
            break
    best = min(rows, key=lambda row: row["difference"])
    return best["epsilon"], {
        "epsilons": rows,
        "points": len(probed),
        "chosen_by": "linearity" if given is None else "given",
        "tolerance": LINEAR,
        "linear": best["difference"] <= LINEAR,
    }


def linearity(response_PQ: Tensor, smaller_PQ: Tensor) -> dict[str, float]:
    """How far responses at two weights agree, each already divided by its own.

    Returns:
        `difference`, ‖r − r'‖ / ‖r'‖ over all points and queries, and `worst`, the largest of a point's; `correlation`
        of all pairs, and `slope` of r over r' through the origin.
    """
    off_PQ, x, y = response_PQ - smaller_PQ, smaller_PQ.flatten(), response_PQ.flatten()
    moves = bool(x.any())
    return {
        "difference": _share(off_PQ.norm(), smaller_PQ.norm()),
        "worst": max(_share(*pair) for pair in zip(off_PQ.norm(dim=1), smaller_PQ.norm(dim=1), strict=True)),
        "slope": float(x @ y / (x @ x)) if moves else 1.0,
        "correlation": float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if moves and bool(y.any()) else 0.0,
    }


def _share(off: Tensor, of: Tensor) -> float:
    """A ratio of norms; 1 where there is nothing to be a share of."""
    return float(off / of) if of > 0 else float(off > 0)


def _convergence(
    found: Mapping[str, Tensor], points: int, tolerance: float, query_ids: Sequence[str]
) -> dict[str, Any]:
    """Relative gradients at the end, and how half of the steps compares with all of them, on the random points."""
    earlier_QP, measured_QP = (found[name][:points].numpy().T for name in ("earlier_PQ", "response_PQ"))
    return {
        "tolerance": tolerance,
        "gradients": found["gradient_P"].tolist(),
        "converged": int((found["gradient_P"] <= tolerance).sum()),
        "bound": False,
        "setting": "validation.pbo_gradients",
        "halfway": over_queries(correlations(earlier_QP, measured_QP), query_ids)["mean"],
        "products": found["evaluations_P"].tolist(),
    }


def identity(config: RunConfig) -> dict[str, Any]:
    """What moves the results beside the inputs."""
    fixed = {"probed": PROBED, "copies": list(COPIES), "nats": NATS, "linear": LINEAR}
    names = ("seed", "points", "epsilon", "pbo_gradients", "pbo_tolerance")
    settings = {name: getattr(config.validation, name) for name in names}
    return settings | fixed | {"damping_factor": config.factors.damping_factor}
