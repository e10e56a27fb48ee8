"""Every quantity of the pipeline against brute force from the paper's equations, with the same pseudo-labels.

Float64 to 1e-8 and float32 to 1e-4 of the largest entry: A and S (Eq. 16), eigenvectors (Eq. 18), Λ (Eq. 20, 26), the
damping, the inverse-Hessian-vector product (Eq. 21) of EK-FAC, K-FAC and the identity, scores (Eq. 25), their shares by
layer (Eq. 30) and by token (Eq. 31), with one block and with blocks of uneven sizes (Appendix A).

Legend: Q queries, B sequences, L layers, T positions, I columns and O outputs of a layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from influence.batch import Batch
from influence.correction import LayerBasis
from influence.eigenbasis import BlockBasis
from influence.labels import SampledLabels
from influence.measurement import MeasuredQuery, completion_log_probability
from influence.scoring import LayerQueries
from influence.solvers import apply
from tests import oracle
from tests.fitted import Fitted, FixedLabels, batches_of, fit, precondition, selection_of, worker_for
from tests.oracle import Oracle, Trace
from tests.tiny import CASES, sequences

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
FACTORS = sequences(18, seed=1, shortest=3)
TRAINING = sequences(5, seed=2, shortest=2)
QUERIES = (([3, 1, 4], [1, 5]), ([9, 2], [6, 5, 3]), ([0], [7, 7, 7, 1]))  # (prompt, completion)
SAMPLED = SampledLabels(seed=11)
DAMPING_FACTOR = 0.1


@dataclass(frozen=True)
class Run:
    """One case computed twice: by the implementation and by brute force."""

    fitted: Fitted
    brute: Oracle
    traces: list[Trace]
    blocks: int
    dtype: torch.dtype
    computed: dict = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.brute.layers]

    def moments(self, name: str) -> oracle.Moments:
        if name not in self.computed:
            self.computed[name] = oracle.moments(self.traces, name)
        return self.computed[name]

    def close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless every entry agrees to the tolerance times the largest expected one."""
        error = float((actual.double() - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE[self.dtype], f"{what}: {error:.1e} of the largest entry"


def run_case(name: str, blocks: int, dtype: torch.dtype) -> Run:
    case = CASES[name]()
    brute = Oracle(case.model, case.layers)
    labels = {number: sampled(brute, number, tokens) for number, tokens in enumerate(FACTORS)}
    traces = [brute.trace(tokens, labels[number]) for number, tokens in enumerate(FACTORS)]
    worker = worker_for(case, dtype)
    source = SAMPLED if dtype == torch.float64 else FixedLabels(labels)  # float32 logits may round to another label
    batches = [*batches_of(FACTORS[:1], 1), *batches_of(FACTORS[1:], 4, first_id=1)]
    return Run(fit(worker, batches, [source], blocks), brute, traces, blocks, dtype)


def sampled(brute: Oracle, number: int, tokens: list[int]) -> list[int]:
    """The labels that `SAMPLED` draws for one sequence on its own."""
    with torch.no_grad():
        logits_BTV = brute.logits(tokens)[None]
    return SAMPLED(Batch.collate([number], [tokens]), logits_BTV)[0, :-1].tolist()


CONFIGURATIONS = [(name, blocks, torch.float64) for name in CASES for blocks in (1, 2)]
CONFIGURATIONS += [("gpt2", 3, torch.float64), ("llama", 4, torch.float64), ("tied", 3, torch.float64)]
CONFIGURATIONS += [(name, 1, torch.float32) for name in CASES]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda p: f"{p[0]}-{p[1]}blocks-{str(p[2])[6:]}")
def run(request: pytest.FixtureRequest) -> Run:
    return run_case(*request.param)


def dense(basis: BlockBasis) -> Tensor:
    """The whole orthogonal matrix of a basis in blocks."""
    return torch.block_diag(*basis.vectors).double()


def bases(run: Run, name: str) -> tuple[Tensor, Tensor]:
    basis: LayerBasis = run.fitted.bases[name]
    return dense(basis.activation), dense(basis.gradient)


def curvature(run: Run, solver: str, name: str) -> Tensor:
    """The dense [P, P] curvature of one layer, in brute force's own eigenbasis for EK-FAC."""
    if (solver, name) not in run.computed:
        run.computed[solver, name] = _curvature(run, solver, name)
    return run.computed[solver, name]


def _curvature(run: Run, solver: str, name: str) -> Tensor:
    moment = run.moments(name)
    if solver == "kfac":
        return oracle.kfac(moment, run.blocks)
    if run.dtype == torch.float32:  # rounding turns eigenvectors of nearby eigenvalues; the basis is checked apart
        return oracle.ekfac(run.traces, name, *bases(run, name))
    Q_A, Q_S = oracle.eigenvectors(moment.A, run.blocks), oracle.eigenvectors(moment.S, run.blocks)
    return oracle.ekfac(run.traces, name, Q_A, Q_S)


def query_traces(run: Run) -> list[Trace]:
    if "queries" not in run.computed:
        run.computed["queries"] = _query_traces(run)
    return run.computed["queries"]


def _query_traces(run: Run) -> list[Trace]:
    return [run.brute.trace(prompt + completion, first=len(prompt) - 1) for prompt, completion in QUERIES]


def brute_ihvp(run: Run, solver: str, name: str, gradient_OI: Tensor) -> Tensor:
    if solver == "identity":
        return gradient_OI
    return oracle.ihvp(curvature(run, solver, name), gradient_OI, DAMPING_FACTOR)


def worker_gradients(run: Run) -> list[dict[str, Tensor]]:
    gradients = []
    for prompt, completion in QUERIES:
        query = MeasuredQuery.of(prompt, completion)
        objective = functools.partial(completion_log_probability, query=query)
        factors = run.fitted.worker.token_factors(query.batch, objective)
        gradients.append({name: factor.gradient() for name, factor in factors.items()})
    return gradients


@pytest.mark.parametrize("name", CASES)
def test_finds_the_layers_that_were_written_out_by_hand(name: str):
    case = CASES[name]()
    found = selection_of(case).layers
    assert [(layer.name, layer.modules, layer.bias) for layer in found] == [
        (layer.name, layer.modules, layer.bias) for layer in case.layers
    ]
    assert [layer.transposed for layer in found] == [layer.transposed for layer in case.layers]


def test_llama_gate_and_up_projections_share_an_input_group():
    groups = {
        layer.name.split(".")[-1]: layer.input_group.split(".")[-1] for layer in selection_of(CASES["llama"]()).layers
    }
    assert groups == {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}


def test_cells_of_brute_force_add_up_to_the_gradient_of_the_weights(run: Run):
    for trace in [*run.traces[:4], *query_traces(run)]:
        for name in run.names:
            scale = trace.gradient[name].abs().max()
            assert (trace.cells[name].sum(0) - trace.gradient[name]).abs().max() <= 1e-12 * scale


def test_covariance_factors(run: Run):
    groups = {layer.name: layer.input_group for layer in run.fitted.worker.selection.layers}
    for name in run.names:
        moment = run.moments(name)
        A = torch.block_diag(*run.fitted.covariance.activation[groups[name]].mean())
        S = torch.block_diag(*run.fitted.covariance.gradient[name].mean())
        run.close(A, oracle.block_diagonal(moment.A, run.blocks), f"A of {name}")
        run.close(S, oracle.block_diagonal(moment.S, run.blocks), f"S of {name}")
        assert run.fitted.curvature(name).tokens_per_sequence == pytest.approx(moment.rows_per_sequence, rel=1e-12)


def test_eigenbasis_is_orthonormal_and_diagonalises(run: Run):
    for name in run.names:
        moment = run.moments(name)
        basis = run.fitted.bases[name]
        for side, factor in ((basis.activation, moment.A), (basis.gradient, moment.S)):
            Q, kept = dense(side), oracle.block_diagonal(factor, run.blocks)
            run.close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64), f"Q^T Q of {name}")
            run.close(Q @ torch.diag(side.all_values.double()) @ Q.T, kept, f"Q diag Q^T of {name}")


def test_eigenvalue_correction(run: Run):
    for name in run.names:
        expected = oracle.eigenvalue_correction(run.traces, name, *bases(run, name))
        actual = run.fitted.correction.mean(name)
        run.close(actual, oracle.unvec(expected, len(actual)), f"Lambda of {name}")


def test_ekfac_curvature_does_not_depend_on_whose_eigenvectors_are_used(run: Run):
    if run.dtype == torch.float32:
        pytest.skip("eigenvectors of nearby eigenvalues turn with rounding")
    for name in run.names:
        run.close(oracle.ekfac(run.traces, name, *bases(run, name)), curvature(run, "ekfac", name), f"G of {name}")


@pytest.mark.parametrize("solver", ["ekfac", "kfac"])
def test_damping_is_a_factor_of_the_mean_eigenvalue(run: Run, solver: str):
    for name, state in run.fitted.solve(solver, DAMPING_FACTOR).items():
        expected = DAMPING_FACTOR * torch.trace(curvature(run, solver, name)) / run.traces[0].gradient[name].numel()
        run.close(torch.tensor(state.damping, dtype=torch.float64), expected, f"damping of {name}")


def test_query_gradients(run: Run):
    for actual, trace in zip(worker_gradients(run), query_traces(run), strict=True):
        for name in run.names:
            run.close(actual[name], trace.gradient[name], f"gradient of {name}")


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "identity"])
def test_inverse_hessian_vector_product(run: Run, solver: str):
    states = run.fitted.solve(solver, DAMPING_FACTOR)
    for actual, trace in zip(worker_gradients(run), query_traces(run), strict=True):
        for name in run.names:
            expected = brute_ihvp(run, solver, name, trace.gradient[name])
            run.close(apply(states[name], actual[name]), expected, f"IHVP of {name}")


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "identity"])
def test_scores_and_their_shares(run: Run, solver: str):
    queries = precondition(run.fitted.solve(solver, DAMPING_FACTOR), worker_gradients(run))
    training = [run.brute.trace(tokens) for tokens in TRAINING]
    batch = Batch.collate(range(len(TRAINING)), TRAINING)
    actual = run.fitted.worker.scores(batch, cast(queries, run.dtype), per_layer=True, per_token=True)
    assert actual.by_layer_BLQ is not None
    assert actual.by_token_BLTQ is not None
    for number, query in enumerate(query_traces(run)):
        vectors = {name: brute_ihvp(run, solver, name, query.gradient[name]) for name in run.names}
        shares = [list(oracle.score(vectors, trace).values()) for trace in training]
        by_layer_BL = torch.tensor(shares, dtype=torch.float64)
        run.close(actual.scores_BQ[:, number], by_layer_BL.sum(1), "scores")
        run.close(actual.by_layer_BLQ[..., number], by_layer_BL, "scores by layer")
        by_token_BLT = torch.zeros(actual.by_token_BLTQ.shape[:3], dtype=torch.float64)
        for row_LT, trace, tokens in zip(by_token_BLT, training, TRAINING, strict=True):
            row_LT[:, : len(tokens)] = oracle.score_cells(vectors, trace)
        run.close(actual.by_token_BLTQ[..., number], by_token_BLT, "scores by token")


def test_every_contraction_gives_the_same_scores(run: Run):
    full = precondition(run.fitted.solve("ekfac", DAMPING_FACTOR), worker_gradients(run))
    factored = {name: factorise(queries) for name, queries in full.items()}
    batch = Batch.collate(range(len(TRAINING)), TRAINING)
    expected = run.fitted.worker.scores(batch, cast(full, run.dtype)).scores_BQ.double()
    for queries in (full, factored, {name: layer.densified() for name, layer in factored.items()}):
        for options in ({}, {"per_layer": True}, {"per_token": True}):
            block = run.fitted.worker.scores(batch, cast(queries, run.dtype), **options)
            run.close(block.scores_BQ, expected, "scores")


def test_a_positive_score_means_that_a_step_on_the_sequence_raises_the_measurement(run: Run):
    """With the identity, the derivative of f along the gradient of log p(z), by a finite difference of the weights."""
    if run.dtype == torch.float32 or run.blocks > 1:
        pytest.skip("once a model is enough")
    (prompt, completion), train, step = QUERIES[0], run.brute.trace(TRAINING[-1]), 1e-6
    before = run.brute.trace(prompt + completion, first=len(prompt) - 1)
    run.brute.move(train.gradient, step)
    after = run.brute.trace(prompt + completion, first=len(prompt) - 1)
    run.brute.move(train.gradient, -step)
    expected = sum(oracle.score(before.gradient, train).values())
    assert (after.value - before.value) / step == pytest.approx(expected, rel=1e-3)


def cast(queries: dict[str, LayerQueries], dtype: torch.dtype) -> dict[str, LayerQueries]:
    return {name: layer.to(dtype, dtype) for name, layer in queries.items()}


def factorise(queries: LayerQueries) -> LayerQueries:
    """Full-rank factors of every query, by SVD."""
    assert queries.dense_QOI is not None
    left, right, owner = [], [], []
    for number, full_OI in enumerate(queries.dense_QOI):
        U, values, V_t = torch.linalg.svd(full_OI, full_matrices=False)
        left.append(U * values)
        right.append(V_t.T)
        owner += [number] * len(values)
    return LayerQueries(queries.queries, torch.cat(left, 1), torch.cat(right, 1), torch.tensor(owner))
