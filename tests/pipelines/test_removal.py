"""The stage `removal`: the points that are left out, and what is said of losses that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.steps import StageContext
from pipelines.validation import curvature, removal, training
from pipelines.validation.methods import METHODS
from pipelines.validation.removal import DRAWS, Removed, dropped_points, summary, without_random, without_top
from pipelines.validation.retraining import Retraining
from tests.pipelines.retrained import SIZES, InProcess, Killed, staged, table

N, Q, SHARE = SIZES["train"], 3, 0.1


def test_top_points_are_left_out() -> None:
    scores_QN = torch.tensor([[0.1, 5.0, -9.0, 3.0, 4.0], [1.0, 1.0, 2.0, 1.0, -1.0]])
    assert without_top(scores_QN, 2).tolist() == [[0, 2, 3], [1, 3, 4]]  # of equal scores the first goes
    assert [dropped_points(721, 0.01), dropped_points(40, 0.01), dropped_points(40, 0.1)] == [7, 1, 4]


def test_random_points_are_left_out() -> None:
    drawn = without_random(20, 3, 5, seed=1)
    assert [len(kept) for kept in drawn] == [17] * 5
    assert all(bool((kept.diff() > 0).all()) for kept in drawn)
    assert len({tuple(kept.tolist()) for kept in drawn}) == 5
    assert all(map(torch.equal, drawn, without_random(20, 3, 5, seed=1)))


def test_summary_of_known_losses() -> None:
    base_RQ = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    random_DRQ = base_RQ + torch.tensor([0.1, 0.3, 0.2])[:, None, None]
    good_QR = base_RQ.T + torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    found = Removed(base_RQ, random_DRQ, torch.stack([good_QR, base_RQ.T - 1]), ("good", "bad"), (7, 9))
    document = summary(found, {"good": 1.0, "bad": 2.0})
    assert document["base"] == pytest.approx(2.5)
    assert document["random"]["change"] == pytest.approx(0.2)
    good, bad = document["methods"]["good"], document["methods"]["bad"]
    assert [good["change"], good["over_random"], good["relative"]] == pytest.approx([0.75, 0.55, 0.3])
    assert [good["wins"], bad["wins"], bad["change"]] == pytest.approx([0.5, 0.0, -1.0])
    half = 12.7062 * 0.75  # Student, 1 degree of freedom
    assert good["interval"] == pytest.approx([0.75 - half, 0.75 + half], rel=1e-4)
    assert bad["over_random_interval"] == pytest.approx([-1.2, -1.2])
    first = document["measurements"][0]
    assert first["test"] == 7
    assert first["base"] == pytest.approx(2.0)
    assert first["methods"]["good"]["change"] == pytest.approx(1.5)
    half = 4.30265 * 0.1 / 3**0.5  # Student, 2
    assert first["random"]["interval"] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-4)


def test_every_loss_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is the sum of what was left out, by tests, and a little for each seed: all changes are known."""
    cost_NQ = torch.rand(N, Q, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = {"identity": cost_NQ.T, "ekfac": -cost_NQ.T}

    def losses(context: StageContext, name: str, runs: Sequence[Retraining], tests_T: Tensor) -> tuple[Tensor, float]:
        kept = [torch.arange(N) if run.kept is None else run.kept for run in runs]
        lost = torch.stack([cost_NQ.sum(0) - cost_NQ[each].sum(0) for each in kept])
        return -(lost + torch.tensor([[0.1 * run.repeat] for run in runs], dtype=torch.float64)), 1.0

    monkeypatch.setattr(removal, "measured", losses)
    monkeypatch.setattr(removal, "scored", lambda context, tests_T: (scores, dict.fromkeys(scores, 1.0)))
    context = staged(tmp_path, "removal", {"dataset": table(tmp_path)}, removal=SHARE, retrainings=2)
    removal.run(context)
    document, tensors = context.artifact.read_json(removal.DOCUMENT), context.artifact.read_tensors(removal.TENSORS)
    torch.testing.assert_close(tensors["base_RQ"], torch.tensor([[0.0] * Q, [0.1] * Q], dtype=torch.float64))
    sorted_NQ = cost_NQ.sort(dim=0).values
    most, least = sorted_NQ[-4:].sum(0), sorted_NQ[:4].sum(0)
    for q, record in enumerate(document["measurements"]):
        assert record["methods"]["identity"]["change"] == pytest.approx(float(most[q]))
        assert record["methods"]["ekfac"]["change"] == pytest.approx(float(least[q]))
    assert document["dropped"] == 4
    assert document["methods"]["identity"]["wins"] == 1
    assert document["random"]["change"] == pytest.approx(float(tensors["random_DRQ"].mean()) - 0.05)
    assert tensors["dropped_MQR"].shape == (2, Q, 2)


def test_real_steps_and_a_run_that_is_cut_short(tmp_path: Path) -> None:
    inputs = {"dataset": table(tmp_path)}
    for name, stage in (("training", training), ("curvature", curvature)):
        context = staged(tmp_path, name, dict(inputs), epochs=1)
        stage.run(context)
        inputs[name] = context.artifact
    settings = {"removal": SHARE, "epochs": 1, "retrainings": 1}
    trainings = 1 + DRAWS + len(METHODS) * Q
    fatal = len(METHODS) + 1
    with pytest.raises(Killed):
        removal.run(staged(tmp_path, "removal", inputs, InProcess(fatal), **settings))
    last = InProcess()
    context = staged(tmp_path, "removal", inputs, last, **settings)
    result = removal.run(context)
    assert result.counts == {"dropped": 4, "trainings": trainings}
    assert last.done == -(-trainings // 20) - 1
    document = context.artifact.read_json(removal.DOCUMENT)
    assert set(document["methods"]) == set(METHODS)
    assert len(document["measurements"]) == Q
    assert document["measurements"][0]["methods"]["ekfac"]["interval"] == [None, None]  # one seed has none


def test_nothing_to_do(tmp_path: Path) -> None:
    context = staged(tmp_path, "removal", {}, InProcess(fatal=0))
    removal.run(context)
    assert context.artifact.read_json(removal.DOCUMENT) == {"removal": 0.0}
