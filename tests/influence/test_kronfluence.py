"""Agreement with kronfluence 1.0.1, an independent implementation, on the same tiny models and pseudo-labels.

To 1e-6 of the largest entry (float64 on both sides): A, S, eigenvalues, Λ, and scores in total, by layer and by token.
The conventions that differ, and how each is aligned here (also in docs/method-conventions.md):

- Positions. kronfluence averages A and S over all attended positions, the last one among them (its gradient is zero);
  we average over the positions that predict. Aligned by giving it the predicted positions as its attention mask, which
  it uses for nothing else. `test_positions_that_enter_the_covariances` shows its own convention.
- Labels. It leaves the sampling to the task, unseeded; ours are keyed by (seed, sequence id, pass). Aligned by a task
  that samples with `SampledLabels`.
- Damping. Its default is the number 1e-8; `damping_factor=None` means 0.1 * mean eigenvalue, which is ours at
  `factors.damping_factor=0.1`. Aligned by None.
- Sign. Its score is the product with the gradient of the *loss*, so its sign follows the measurement that the task
  returns. Aligned by the measurement -log p: both minus signs cancel and positive raises log p (Eq. 25).
- K-FAC's scale. Its eigenvalues are those of A kron S, a token's; ours are times T, the mean predicted pairs of a
  sequence, the scale of Λ. With relative damping its K-FAC scores are T times ours, layer by layer.
- GPT-2. It tracks `nn.Linear` only: Conv1D is rewritten as Linear here.
- Default precision. float32 for sums and products there and here; float64 is asked for on both sides.
- Modules that are called twice. Its factors add up the uses (`has_shared_parameters`), its pairwise scores are
  overwritten by each use (67 % of the largest score away from brute force on the looped model here). So its factors are
  compared on that model, and the scores of weight sharing are left to the brute force of `test_oracle.py`.

Legend: Q queries, B sequences, T positions, O and I the outputs and columns of a layer.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peer import with_linears
from influence.batch import Batch
from influence.labels import IGNORED, SampledLabels, TrueLabels
from tests.fitted import Fitted, batches_of, fit, precondition, worker_for
from tests.tiny import CASES, Case, sequences

pytest.importorskip("kronfluence")
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

MODELS = ("gpt2", "llama", "neox")
FACTORS = sequences(16, seed=1, shortest=4)
TRAINING = sequences(6, seed=2, shortest=4)
QUERIES = sequences(3, seed=4, shortest=6)
PROMPT = 3  # tokens of each query that are its prompt
SAMPLED = SampledLabels(seed=11)
DOUBLE = torch.float64


class LanguageModelling(Task):
    """Sum of cross-entropies over predicted positions, with our labels and (by choice) our positions."""

    def __init__(self, names: list[str], predicted_positions: bool) -> None:
        self.names, self.predicted_positions = names, predicted_positions

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        ours = as_batch(batch)
        logits_BTV = model(input_ids=ours.input_ids, attention_mask=ours.attention_mask_BT).logits
        labels_BT = (SAMPLED if sample else TrueLabels())(ours, logits_BTV.detach())
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        ours = as_batch(batch)
        logits_BTV = model(input_ids=ours.input_ids, attention_mask=ours.attention_mask_BT).logits
        labels_BT = TrueLabels()(ours, logits_BTV)
        labels_BT[:, : PROMPT - 1] = IGNORED
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        ours = as_batch(batch)
        return ours.predicted_BT.long() if self.predicted_positions else ours.attention_mask_BT


class Theirs:
    """kronfluence, run on one case."""

    def __init__(self, case: Case, folder: Path, strategy: str = "ekfac", **options: bool) -> None:
        names = [layer.name for layer in case.layers]
        task = LanguageModelling(names, options.pop("predicted_positions", True))
        model = prepare_model(with_linears(copy.deepcopy(case.model)), task)
        self.analyzer = Analyzer("tiny", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        arguments = FactorArguments(
            strategy=strategy,
            activation_covariance_dtype=DOUBLE,
            gradient_covariance_dtype=DOUBLE,
            per_sample_gradient_dtype=DOUBLE,
            lambda_dtype=DOUBLE,
            **options,
        )
        self.analyzer.fit_all_factors("factors", dataset(FACTORS), per_device_batch_size=8, factor_args=arguments)

    def covariances(self) -> dict[str, dict[str, Tensor]]:
        return self.analyzer.load_covariance_matrices("factors")

    def eigenvalues(self) -> dict[str, dict[str, Tensor]]:
        return self.analyzer.load_eigendecomposition("factors")

    def correction(self, name: str) -> Tensor:
        found = self.analyzer.load_lambda_matrices("factors")
        return found["lambda_matrix"][name] / found["num_lambda_processed"][name]

    def scores(self, by_module: bool = False, by_token: bool = False) -> dict[str, Tensor]:
        name = f"scores-{by_module}-{by_token}"
        arguments = ScoreArguments(
            damping_factor=None,
            compute_per_module_scores=by_module,
            compute_per_token_scores=by_token,
            per_sample_gradient_dtype=DOUBLE,
            precondition_dtype=DOUBLE,
            score_dtype=DOUBLE,
        )
        self.analyzer.compute_pairwise_scores(
            name, "factors", dataset(QUERIES), dataset(TRAINING), 3, 6, score_args=arguments
        )
        return self.analyzer.load_pairwise_scores(name)


def dataset(rows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Rows padded to one length, as the default collation wants them."""
    batch = Batch.collate(range(len(rows)), rows)
    fields = zip(batch.sequence_ids, batch.input_ids, batch.lengths, strict=True)
    return [{"sequence_ids": number, "input_ids": row, "lengths": length} for number, row, length in fields]


def as_batch(fields: dict[str, Tensor]) -> Batch:
    return Batch(fields["sequence_ids"], fields["input_ids"], fields["lengths"])


@functools.cache
def ours(name: str) -> Fitted:
    return fit(worker_for(CASES[name]()), batches_of(FACTORS, 5), [SAMPLED])


def our_scores(fitted: Fitted, solver: str = "ekfac"):
    gradients = [query_gradient(fitted, tokens) for tokens in QUERIES]
    batch = Batch.collate(range(len(TRAINING)), TRAINING)
    return fitted.worker.scores(batch, precondition(fitted.solve(solver), gradients), per_layer=True, per_token=True)


def query_gradient(fitted: Fitted, tokens: list[int]) -> dict[str, Tensor]:
    def objective(logits_BTV: Tensor) -> Tensor:
        log_p_TV = logits_BTV[0, PROMPT - 1 : -1].log_softmax(-1)
        return log_p_TV.gather(1, torch.tensor(tokens[PROMPT:])[:, None]).sum()[None]

    factors = fitted.worker.token_factors(Batch.collate([0], [tokens]), objective)
    return {name: factor.gradient() for name, factor in factors.items()}


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-6) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{what}: {error:.1e} of the largest entry"


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fitted, Theirs]:
    return ours(request.param), Theirs(CASES[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fitted, Theirs]:
    """A module that is called twice."""
    return ours("looped"), Theirs(CASES["looped"](), tmp_path_factory.mktemp("looped"), has_shared_parameters=True)


def test_covariances_and_eigenvalues(pair: tuple[Fitted, Theirs]):
    compare_covariances(*pair)


def test_correction(pair: tuple[Fitted, Theirs]):
    compare_corrections(*pair)


def test_factors_of_a_module_that_is_called_twice(shared: tuple[Fitted, Theirs]):
    compare_covariances(*shared)
    compare_corrections(*shared)


def compare_covariances(fitted: Fitted, theirs: Theirs) -> None:
    moments, eigen = theirs.covariances(), theirs.eigenvalues()
    for layer in fitted.worker.selection.layers:
        name, basis = layer.name, fitted.bases[layer.name]
        A = moments["activation_covariance"][name] / moments["num_activation_covariance_processed"][name]
        S = moments["gradient_covariance"][name] / moments["num_gradient_covariance_processed"][name]
        close(torch.block_diag(*fitted.covariance.activation[layer.input_group].mean()), A, f"A of {name}")
        close(torch.block_diag(*fitted.covariance.gradient[name].mean()), S, f"S of {name}")
        close(basis.activation.all_values, eigen["activation_eigenvalues"][name], f"eigenvalues of A of {name}")
        close(basis.gradient.all_values, eigen["gradient_eigenvalues"][name], f"eigenvalues of S of {name}")


def compare_corrections(fitted: Fitted, theirs: Theirs) -> None:
    for layer in fitted.worker.selection.layers:
        close(fitted.correction.mean(layer.name), theirs.correction(layer.name), f"Lambda of {layer.name}")


def test_scores(pair: tuple[Fitted, Theirs]):
    fitted, theirs = pair
    found = our_scores(fitted)
    close(found.scores_BQ.T, theirs.scores()["all_modules"], "scores")
    by_module = theirs.scores(by_module=True)
    for number, name in enumerate(layer.name for layer in fitted.worker.selection.layers):
        close(found.by_layer_BLQ[:, number].T, by_module[name], f"scores of {name}")
    by_token_QBT = found.by_token_BLTQ.sum(1).permute(2, 0, 1)
    close(by_token_QBT, theirs.scores(by_token=True)["all_modules"], "scores by token")


def test_positions_that_enter_the_covariances(tmp_path: Path):
    """Its own convention: last positions count in A and in both divisors; the scores hardly move."""
    fitted, theirs = ours("llama"), Theirs(CASES["llama"](), tmp_path, predicted_positions=False)
    moments = theirs.covariances()
    attended, predicted = sum(map(len, FACTORS)), sum(len(row) - 1 for row in FACTORS)
    for layer in fitted.worker.selection.layers:
        assert int(moments["num_gradient_covariance_processed"][layer.name]) == attended
        S = moments["gradient_covariance"][layer.name] / predicted
        close(torch.block_diag(*fitted.covariance.gradient[layer.name].mean()), S, f"S of {layer.name}")
        ours_A = torch.block_diag(*fitted.covariance.activation[layer.input_group].mean()) * predicted
        last_A = moments["activation_covariance"][layer.name] - ours_A
        values = torch.linalg.eigvalsh(last_A)
        assert values[0] >= -1e-9 * values[-1]  # what is left is a second moment: that of the last positions
        assert values[-1] > 0
    ours_N, theirs_N = our_scores(fitted).scores_BQ.T.flatten(), theirs.scores()["all_modules"].flatten()
    assert torch.corrcoef(torch.stack([ours_N, theirs_N]))[0, 1] > 0.95  # one position in seven is a last one
    assert not torch.allclose(ours_N, theirs_N, rtol=1e-4)


def test_kfac_scores_are_ours_on_the_scale_of_a_token(tmp_path: Path):
    fitted, theirs = ours("gpt2"), Theirs(CASES["gpt2"](), tmp_path, strategy="kfac")
    found, expected = our_scores(fitted, "kfac"), theirs.scores(by_module=True)
    for number, name in enumerate(layer.name for layer in fitted.worker.selection.layers):
        scale = fitted.curvature(name).tokens_per_sequence
        close(found.by_layer_BLQ[:, number].T * scale, expected[name], f"K-FAC scores of {name}")
