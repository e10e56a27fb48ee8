"""Stage `language_solves`: LiSSA, and conjugate gradients from one iteration to a small residual, with their scores.

Legend: Q queries, N training sequences, K iterations. All of it in one process a batch of queries, on the very same
Gauss-Newton matrix, the mean over all N sequences, with the damping of the fitted EK-FAC.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.store import Artifact
from conf.schema import RunConfig
from influence.conjugate_gradients import Product, Solution, conjugate_gradients
from influence.gauss_newton import GaussNewton, Vectors
from influence.lissa import largest_eigenvalue, lissa
from influence.scoring import LayerQueries
from influence.solvers import SolverState
from influence.worker import Precision, Worker
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.intervals import correlations, over_queries
from pipelines.validation.language.problem import FITTED, LanguageProblem, load_problem, query_gradients
from pipelines.validation.language.scores import read_methods

ITERATIONS = 100  # of conjugate gradients, at most
RESIDUAL = 0.02  # relative, at which conjugate gradients count as exact
PARTS = 2  # batches of queries, side by side
MICRO = 64  # sequences that go through the model together
POWER = 20  # products of the power iteration that LiSSA's first scale comes from


class Remembered:
    """A product that computes each call of a recursion once; `restart` begins the same recursion anew.

    For a recursion that is run again and goes one step further, so that all its iterates cost the products of the last.
    """

    def __init__(self, product: Product) -> None:
        self._product = product
        self._found: list[Vectors] = []
        self._calls = 0

    def __call__(self, vectors: Vectors) -> Vectors:
        """The product with the vectors of this call."""
        if self._calls == len(self._found):
            self._found.append(self._product(vectors))
        self._calls += 1
        return self._found[self._calls - 1]

    def restart(self) -> None:
        """The next call is the first one."""
        self._calls = 0


def iterates(
    product: Product,
    right: Vectors,
    damping: Mapping[str, float],
    states: Mapping[str, SolverState],
    iterations: int,
    residual: float,
) -> list[Solution]:
    """Conjugate gradients after one, two, ... iterations, until every relative residual is below a bound.

    Args:
        product: G V.
        right: B.
        damping: λ by layer.
        states: the preconditioner.
        iterations: at most.
        residual: the bound.
    """
    remembered, found = Remembered(product), list[Solution]()
    for count in range(1, iterations + 1):
        remembered.restart()
        found.append(conjugate_gradients(remembered, right, damping, states, count))
        if float(found[-1].residuals_NK[-1].max()) < residual:
            break
    return found


def gauss_newton_product(problem: LanguageProblem, micro: int = MICRO) -> Product:
    """G V over all training sequences."""
    curvature = GaussNewton(problem.network, problem.layers)
    batches = list(problem.batches(micro))
    return lambda vectors: curvature(batches, vectors)


def scores_of(problem: LanguageProblem, vectors: Vectors, micro: int = MICRO) -> np.ndarray:
    """Influence ⟨V_q, ∇log p(z_m)⟩ of every training sequence, float64 [Q, N]."""
    precision = next(iter(vectors.values())).dtype
    worker = Worker(problem.network.model, problem.selection, Precision(precision, precision))
    queries = {name: LayerQueries(len(value), dense_QOI=value) for name, value in vectors.items()}
    count = len(next(iter(vectors.values())))
    found_QN = np.full((count, problem.size), np.nan)
    for batch in problem.batches(micro):
        found_QN[:, batch.sequence_ids.numpy()] = worker.scores(batch, queries).scores_BQ.double().numpy().T
    return found_QN


def run(context: StageContext) -> StageResult:
    """Write `exact.safetensors` {scores_KQN}, `lissa.safetensors` {scores_QN} and `solves.json`.

    The JSON: `exact` (`iterations` K, `residuals` by iteration and query, `seconds`), `lissa` (`depth`, `batch`,
    `scale`, `attempts`, `products`, `change`, the last relative change of its iterate, `seconds`), all batches of
    queries together; `agreement`: correlation of the real step's `ekfac_cg` with the same iteration here, by query.
    Reads of the config: `validation.seed`, `.lissa_depth`, `.lissa_batch`, `factors.damping_factor`.
    """
    config, output = context.config, context.artifact
    fitted = {name: context.inputs[name] for name in FITTED}
    ids = [query["query_id"] for query in fitted["gradients"].read_json("queries.json")]
    parts = [part.tolist() for part in np.array_split(np.arange(len(ids)), min(PARTS, len(ids)))]
    tasks = [(kind, config, fitted, output, number, part) for kind in WORK for number, part in enumerate(parts)]
    waiting = [task for task in tasks if not output.exists(f"{_name(task[0], task[4])}.json")]
    progress = context.progress("solves", len(tasks), "batches of queries")
    progress.resume(len(tasks) - len(waiting))
    for _ in context.cluster.map(solve, waiting):
        progress.advance(1)
    progress.close()
    exact = _exact(output, len(parts))
    lissa_QN = torch.cat(
        [output.read_tensors(f"{_name('lissa', n)}.safetensors")["scores_QN"] for n in range(len(parts))]
    )
    output.write_tensors("exact.safetensors", {"scores_KQN": exact})
    output.write_tensors("lissa.safetensors", {"scores_QN": lissa_QN})
    output.write_json("solves.json", _record(context, exact, len(parts), ids))
    return StageResult({"queries": len(ids), "iterations": len(exact)})


def solve(
    kind: str, config: RunConfig, fitted: Mapping[str, Artifact], output: Artifact, number: int, queries: Sequence[int]
) -> None:
    """Write the scores of some queries by conjugate gradients or by LiSSA, and what is known of the recursion."""
    begun = time.perf_counter()
    problem = load_problem(config, fitted)
    dtype = next(problem.network.model.parameters()).dtype
    right = query_gradients(fitted["gradients"], problem.layers, queries, dtype)
    tensors, record = WORK[kind](problem, right, config)
    output.write_tensors(f"{_name(kind, number)}.safetensors", tensors)
    output.write_json(f"{_name(kind, number)}.json", record | {"seconds": time.perf_counter() - begun})


def _by_conjugate_gradients(
    problem: LanguageProblem, right: Vectors, config: RunConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    del config
    found = iterates(gauss_newton_product(problem), right, problem.damping, problem.states, ITERATIONS, RESIDUAL)
    stacked = {name: torch.cat([each.vectors[name] for each in found]) for name in right}
    scores = torch.from_numpy(scores_of(problem, stacked)).unflatten(0, (len(found), -1))
    return {"scores_KQN": scores}, {"residuals": found[-1].residuals_NK[1:].tolist()}


def _by_lissa(problem: LanguageProblem, right: Vectors, config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = config.validation
    depth, curvature = settings.lissa_depth or problem.size, GaussNewton(problem.network, problem.layers)
    generator = torch.Generator().manual_seed(settings.seed)
    one = {name: value[:1] for name, value in right.items()}
    scale = 1 / largest_eigenvalue(gauss_newton_product(problem), problem.damping, one, POWER, generator)

    def product(step: int, vectors: Vectors) -> Vectors:
        drawn = torch.Generator().manual_seed(1_000_003 * settings.seed + step)
        numbers = torch.randint(problem.size, (settings.lissa_batch,), generator=drawn)
        return curvature([problem.draw(numbers)], vectors)

    found = lissa(product, right, problem.damping, depth, scale)
    record = {
        "depth": depth,
        "batch": settings.lissa_batch,
        "scale": found.scale,
        "attempts": found.attempts,
        "products": found.products,
        "change": found.change_N[-1],
    }
    return {"scores_QN": torch.from_numpy(scores_of(problem, found.vectors))}, record


def identity(config: RunConfig) -> dict[str, Any]:
    """What moves the results beside the inputs."""
    settings = config.validation
    lissa = {"depth": settings.lissa_depth, "batch": settings.lissa_batch, "seed": settings.seed, "power": POWER}
    return {"lissa": lissa, "exact": {"iterations": ITERATIONS, "residual": RESIDUAL}}


WORK = {"exact": _by_conjugate_gradients, "lissa": _by_lissa}


def _name(kind: str, number: int) -> str:
    return f"parts/{kind}-{number:02d}"


def _exact(output: Artifact, parts: int) -> Tensor:
    """scores_KQN; batches of queries that needed fewer iterations stay where they ended."""
    found = [output.read_tensors(f"{_name('exact', number)}.safetensors")["scores_KQN"] for number in range(parts)]
    longest = max(map(len, found))
    return torch.cat([torch.cat([one, one[-1:].expand(longest - len(one), -1, -1)]) for one in found], dim=1)


def _record(context: StageContext, exact: Tensor, parts: int, ids: Sequence[str]) -> dict[str, Any]:
    output = context.artifact
    records = {kind: [output.read_json(f"{_name(kind, number)}.json") for number in range(parts)] for kind in WORK}
    iteration = min(context.config.factors.cg_iterations, len(exact)) - 1
    refined_QN = read_methods(context.inputs["language_scores"])["ekfac_cg"]
    residuals, longest = [record["residuals"] for record in records["exact"]], len(exact)
    lissa = {key: [record[key] for record in records["lissa"]] for key in records["lissa"][0]}
    return {
        "exact": {
            "iterations": longest,
            "residuals": [[value for one in residuals for value in one[min(k, len(one) - 1)]] for k in range(longest)],
            "seconds": sum(record["seconds"] for record in records["exact"]),
        },
        "lissa": {
            "depth": lissa["depth"][0],
            "batch": lissa["batch"][0],
            "scale": min(lissa["scale"]),
            "attempts": max(lissa["attempts"]),
            "products": sum(lissa["products"]),
            "change": max(lissa["change"]),
            "seconds": sum(lissa["seconds"]),
        },
        "agreement": over_queries(correlations(exact[iteration].numpy(), refined_QN), ids),
    }
