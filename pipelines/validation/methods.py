"""All ways to estimate influences of a small network, behind one interface: fit once, apply to Q vectors together.

V = ∇f_q of Q measurements; each method turns them into its (G + λ)⁻¹ V, and what it scores by them is the same code
for all: ⟨X_q, −∇L(z_m)⟩. λ is one number a layer, the same for all methods: factor · mean(Λ) of the EK-FAC fit.

What a method costs. `fit` is what it needs before it sees a measurement: EK-FAC's statistics are fitted once, in the
step `curvature`, and their seconds count for each method that uses them (K-FAC: without Λ). LiSSA and the exact
solution fit nothing; tuning its scale is part of LiSSA's solve. All Q vectors go through every product together, also
LiSSA's, which is more than the paper grants it: `notes` has what it takes for one vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from actors.reduction import block_squares
from influence.conjugate_gradients import conjugate_gradients
from influence.exact import solve_exactly
from influence.gauss_newton import Vectors
from influence.score_agreement import finite
from influence.supervised import example_scores, fit, sampled_targets
from pipelines.validation.setting import Apply, Setting, Solved, applied, count_of, measurement_gradients, micro_batch
from pipelines.validation.stochastic import run_lissa, time_alone
from pipelines.validation.stopwatch import Stopwatch

STATISTICS = ("labels", "covariance", "eigenbasis", "correction")  # phases of the step `curvature`


@dataclass(frozen=True)
class Method:
    """A way to estimate influences.

    Attributes:
        name: as files and results call it.
        prepare: fits it, and returns what solves for vectors.
        statistics: phases of the step `curvature` that it needs.
        blocks: of block-diagonal factors on each side of a layer; None where there are no factors.
    """

    name: str
    prepare: Callable[[Setting], Apply]
    statistics: tuple[str, ...] = ()
    blocks: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Scores of a method, [Q, P] in float64, and the record of how they came about (`record_of`)."""

    scores_QP: Tensor
    record: dict[str, Any]


# --- the methods ------------------------------------------------------------------------------------------------------


def _refined(setting: Setting) -> Apply:
    """EK-FAC, refined by conjugate gradients on products over all training examples."""
    states, iterations = setting.states("ekfac"), setting.options.cg_iterations

    def solve(vectors: Vectors) -> Solved:
        product = setting.product(count_of(vectors))
        found = conjugate_gradients(product, vectors, setting.damping, states, iterations)
        products = len(found.residuals_NK) - 1
        held = 5 * sum(value.nbytes for value in vectors.values())
        notes = {"iterations": products}
        return Solved(found.vectors, products, products * setting.problem.size, found.residuals_NK[-1], held, notes)

    return solve


def _exact(setting: Setting) -> Apply:
    problem = setting.problem

    def solve(vectors: Vectors) -> Solved:
        batch = micro_batch(problem, 2 * count_of(vectors))  # of numbers twice as long
        found = solve_exactly(problem.network, problem.layers, problem.train, vectors, setting.damping, batch)
        notes = {"way": found.way, "rows": found.rows, "iterations": found.iterations}
        examples = found.products * problem.size
        return Solved(found.vectors, found.products, examples, found.residual_K, found.bytes, notes)

    return solve


def _lissa(setting: Setting) -> Apply:
    def solve(vectors: Vectors) -> Solved:
        found = run_lissa(setting.problem, vectors, setting.damping, *setting.options.lissa)
        held = 3 * sum(value.nbytes for value in vectors.values())
        return Solved(found.vectors, found.products, found.examples, None, held, found.notes)

    return solve


def _blocks(blocks: int) -> Callable[[Setting], Apply]:
    """EK-FAC with block-diagonal factors, fitted here (Appendix A)."""

    def prepare(setting: Setting) -> Apply:
        problem, options = setting.problem, setting.options
        batch = micro_batch(problem, 1)
        targets = sampled_targets(problem.network, problem.train, options.seed, options.label_draws, batch)
        curvature = fit(problem.network, problem.layers, problem.train, targets, blocks, batch)
        return applied(setting.states("ekfac", curvature))

    return prepare


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("identity", lambda setting: applied(setting.states("identity"))),
        Method("kfac", lambda setting: applied(setting.states("kfac")), STATISTICS[:3], 1),
        Method("ekfac", lambda setting: applied(setting.states("ekfac")), STATISTICS, 1),
        Method("lissa", _lissa),
        Method("ekfac_cg", _refined, STATISTICS, 1),
        Method("exact", _exact),
    )
}


def block_methods(largest: int) -> list[Method]:
    """EK-FAC with 2, 4, 8 ... blocks, up to `largest`."""
    found, blocks = [], 2
    while blocks <= largest:
        found.append(Method(f"ekfac_blocks_{blocks}", _blocks(blocks), blocks=blocks))
        blocks *= 2
    return found


def method_named(name: str) -> Method:
    """A method of the registry, or one of `block_methods`."""
    blocks = name.rpartition("_")[2]
    return METHODS[name] if name in METHODS else Method(name, _blocks(int(blocks)), blocks=int(blocks))


# --- estimates --------------------------------------------------------------------------------------------------------


def estimate(name: str, setting: Setting) -> Estimate:
    """Influences of the problem's points on its measurements by one method, timed phase by phase."""
    method, problem, watch = method_named(name), setting.problem, Stopwatch()
    watch.add("fit", *(sum(by[phase] for phase in method.statistics) for by in (setting.seconds, setting.cpu_seconds)))
    with watch.phase("fit"):
        apply = method.prepare(setting)
    with watch.phase("gradients"):
        vectors = measurement_gradients(problem)
    with watch.phase("solve"):
        solved = apply(vectors)
    with watch.phase("score"):
        batch = micro_batch(problem, count_of(vectors))
        scores_QP = example_scores(problem.network, problem.layers, problem.points, solved.vectors, batch)
    record = record_of(method, setting, solved, watch)
    if name == "lissa":
        record["notes"]["alone"] = time_alone(problem, vectors, setting.damping, *setting.options.lissa)
    return Estimate(scores_QP, record)


def record_of(method: Method, setting: Setting, solved: Solved, watch: Stopwatch) -> dict[str, Any]:
    """What `estimates.json` has of a method."""
    residuals = None if solved.residual_Q is None else [finite(value) for value in solved.residual_Q.tolist()]
    return {
        "method": method.name,
        **watch.as_json(),
        "products": solved.products,
        "examples": solved.examples,
        "residuals": residuals,
        "bytes": {**factor_bytes(method, setting), "vectors": solved.bytes},
        "blocks": method.blocks,
        "notes": solved.notes,
    }


def factor_bytes(method: Method, setting: Setting) -> dict[str, int]:
    """Bytes of A and S (as many as those of their eigenvectors) and of Λ, in the type of the network."""
    if method.blocks is None:
        return {"factors": 0, "correction": 0}
    size = setting.problem.train.inputs.element_size()
    layers = setting.problem.layers
    counts = [count for layer in layers for count in (layer.columns, layer.outputs)]
    factors = sum(block_squares(count, min(method.blocks, count)) for count in counts)
    correction = 0 if method.name == "kfac" else sum(layer.parameters for layer in layers)
    return {"factors": size * factors, "correction": size * correction}
