"""The linear datamodeling score against scipy, on ridge regression whose influences are exact, and its intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipelines.validation import datamodeling
from pipelines.validation.datamodeling import ceiling, datamodel, halves, predicted


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_halves_are_random_halves() -> None:
    drawn = halves(21, 40, seed=3)
    assert drawn.shape == (40, 10)
    assert bool((drawn.diff(dim=1) > 0).all())
    assert torch.equal(drawn, halves(21, 40, seed=3))
    assert torch.equal(drawn[:7], halves(21, 7, seed=3))
    assert not torch.equal(drawn, halves(21, 40, seed=4))
    counts = torch.bincount(drawn.flatten(), minlength=21)
    assert int(counts.min()) > 8  # of 40, each in 19 on average
    assert int(counts.max()) < 31


def test_sums_over_subsets() -> None:
    scores_TN = noise(3, 9)
    subsets = [torch.tensor([0, 4]), torch.tensor([8])]
    expected = torch.stack([scores_TN[:, 0] + scores_TN[:, 4], scores_TN[:, 8]], dim=1)
    torch.testing.assert_close(predicted(scores_TN, subsets), expected)


def test_as_scipy() -> None:
    measured_TS = noise(5, 20)
    predicted_TS = (measured_TS + noise(5, 20, seed=1)).round(decimals=1)  # some of them tie
    found = datamodel(predicted_TS, measured_TS)
    expected = [float(spearmanr(*pair).statistic) for pair in zip(predicted_TS, measured_TS, strict=True)]
    assert found.lds_T.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.lds == pytest.approx(np.mean(expected))


def test_resampled_subsets_as_scipy() -> None:
    """A subset that is drawn c times is there c times."""
    first, second = noise(3, 8).round(decimals=1), noise(3, 8, seed=1).round(decimals=1)
    counts_BS = np.array([[1.0] * 8, [0, 2, 1, 0, 3, 1, 1, 0], [4, 4, 0, 0, 0, 0, 0, 0]])
    found = datamodeling._resampled(first.numpy(), second.numpy(), counts_BS)
    for counts_S, mean in zip(counts_BS, found, strict=True):
        times = counts_S.astype(int)
        pairs = zip(first.numpy(), second.numpy(), strict=True)
        assert mean == pytest.approx(np.mean([spearmanr(a.repeat(times), b.repeat(times)).statistic for a, b in pairs]))


def test_intervals_hold_what_they_say() -> None:
    """Ten test examples as one: resampling them shows nothing, resampling subsets does."""
    measured_TS = noise(1, 30).repeat(10, 1)
    found = datamodel((noise(1, 30) + noise(1, 30, seed=1)).repeat(10, 1), measured_TS)
    record = found.as_json()
    low, high = record["interval"]  # type: ignore[misc]
    assert low == pytest.approx(high) == pytest.approx(found.lds)
    low, high = record["interval_subsets"]  # type: ignore[misc]
    assert low < found.lds - 0.05
    assert high > found.lds + 0.05
    other = datamodel(-measured_TS, measured_TS)
    assert other.lds == pytest.approx(-1)
    beyond = found.beyond(other)
    assert beyond["mean"] == pytest.approx(found.lds + 1)
    assert found.beyond(found) == {"mean": 0.0, "interval": [0.0, 0.0], "interval_subsets": [0.0, 0.0]}


def test_constant_predictions_are_left_out() -> None:
    measured_TS, predicted_TS = noise(4, 12), noise(4, 12, seed=1)
    predicted_TS[2] = 1.0
    found = datamodel(predicted_TS, measured_TS)
    assert math.isnan(found.lds_T[2])
    assert found.lds == pytest.approx(float(found.lds_T[[0, 1, 3]].mean()))
    assert datamodel(torch.zeros(4, 12), measured_TS).as_json() == {
        "lds": None,
        "interval": [None, None],
        "interval_subsets": [None, None],
    }


# --- ridge regression: the datamodel is known -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ridge() -> dict[str, Tensor]:
    """Scores of exact influence and of the dot product, and f = −½(xᵀw − y)² after training on halves exactly.

    w(S) = (X_SᵀX_S/|S| + λ)⁻¹ X_Sᵀy_S/|S|. To first order in the weights of examples, f goes along Σ_{i ∈ S} score_i,
    score_i = ∇fᵀ (G + λ)⁻¹ (x_i (y_i − x_iᵀw) − λw); −λw, the same for all i, ranks nothing in halves of one size.
    """
    N, D, T, damping = 400, 4, 30, 0.1
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    x, test = noise(N, D) * scales, noise(T, D, seed=1) * scales
    truth = noise(D, seed=2) / scales
    y, wanted = x @ truth + noise(N, seed=3), test @ truth + noise(T, seed=4)

    def solved(rows: Tensor) -> Tensor:
        X, target = x[rows], y[rows]
        G = X.T @ X / len(X) + damping * torch.eye(D, dtype=torch.float64)
        return torch.linalg.solve(G, X.T @ target / len(X))

    w = solved(torch.arange(N))
    G = x.T @ x / N + damping * torch.eye(D, dtype=torch.float64)
    ascent_ND, query_TD = x * (y - x @ w)[:, None], test * (wanted - test @ w)[:, None]
    subsets = halves(N, 60, seed=0)
    measured_TS = torch.stack([-0.5 * (test @ solved(rows) - wanted) ** 2 for rows in subsets], dim=1)
    exact_TN, dot_TN = query_TD @ torch.linalg.solve(G, ascent_ND.T), query_TD @ ascent_ND.T
    return {
        "measured": measured_TS,
        "exact": predicted(exact_TN, list(subsets)),
        "dot": predicted(dot_TN, list(subsets)),
    }


def test_exact_influences_predict_ridge_regressions(ridge: dict[str, Tensor]) -> None:
    exact, dot = (datamodel(ridge[name], ridge["measured"]) for name in ("exact", "dot"))
    assert exact.lds > 0.9
    assert dot.lds < exact.lds - 0.2
    low, _ = exact.beyond(dot)["interval_subsets"]  # type: ignore[misc]
    assert low > 0.1


# --- the ceiling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_ceiling_is_what_the_truth_reaches(spread: float) -> None:
    S, R, T = 80, 6, 40
    truth_ST = noise(S, T)
    measured_SRT = truth_ST[:, None] + spread * noise(S, R, T, seed=1)
    found = ceiling(measured_SRT)
    assert found is not None
    record = found.as_json()
    reached = datamodel(truth_ST.T, measured_SRT.mean(1).T).lds
    assert record["ceiling"] == pytest.approx(reached, abs=0.03)
    assert record["reliability"] == pytest.approx(1 / (1 + spread**2 / R), abs=0.05)
    low, high = record["interval"]  # type: ignore[misc]
    assert low < record["ceiling"] < high
    assert record["seeds_each"] == 3


def test_ceiling_of_five_trainings_splits_them_in_twos() -> None:
    splits = datamodeling._splits(5, 2, np.random.default_rng(0))
    assert len(splits) == len(set(splits)) == 15
    assert all(len({*first, *second}) == 4 for first, second in splits)
    many = datamodeling._splits(12, 6, np.random.default_rng(0))
    assert len(many) == datamodeling.SPLITS
    assert all(len({*first, *second}) == 12 for first, second in many)


def test_no_ceiling() -> None:
    assert ceiling(noise(10, 1, 3)) is None
    unrelated = ceiling(torch.stack([noise(9, 4), -noise(9, 4)], dim=1))
    assert unrelated is not None
    assert unrelated.as_json()["ceiling"] is None
