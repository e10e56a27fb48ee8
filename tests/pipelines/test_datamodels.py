"""The stage `datamodels`: real steps on a small table, against networks that are trained again here one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.store import Artifact
from influence.gauss_newton import Examples
from pipelines.validation import curvature, datamodels, learning, retraining, training
from pipelines.validation.datamodeling import halves
from pipelines.validation.dataset import TENSORS
from pipelines.validation.learning import Recipe
from pipelines.validation.loading import load_problem_from
from pipelines.validation.methods import METHODS
from pipelines.validation.networks import build
from pipelines.validation.retraining import Retraining, Scoring
from tests.pipelines.retrained import SIZES, VALIDATION, InProcess, Killed, staged, table

SUBSETS = 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """The steps before."""
    folder = tmp_path_factory.mktemp("before")
    found = {"dataset": table(folder)}
    for name, stage in (("training", training), ("curvature", curvature)):
        context = staged(folder, name, dict(found))
        stage.run(context)
        found[name] = context.artifact
    return found


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    """In float64, so that numbers can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retraining, "DTYPE", torch.float64)
        patch.setattr(retraining, "SIDE_BY_SIDE", 4)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: Mapping[str, Artifact]) -> Artifact:
    """The stage's artifact, of a run that nothing cut short."""
    return found_by(tmp_path_factory.mktemp("whole"), inputs)


def found_by(
    folder: Path, inputs: Mapping[str, Artifact], cluster: InProcess | None = None, **settings: Any
) -> Artifact:
    context = staged(folder, "datamodels", inputs, cluster, **{"subsets": SUBSETS} | settings)
    datamodels.run(context)
    return context.artifact


def test_measured_are_networks_trained_again_on_halves(whole: Artifact, inputs: Mapping[str, Artifact]) -> None:
    measured_SRT = whole.read_tensors(datamodels.TENSORS)["measured_SRT"]
    assert measured_SRT.shape == (SUBSETS, VALIDATION.retrainings, SIZES["test"])
    tensors, chosen = inputs["dataset"].read_tensors(TENSORS), inputs["training"].read_json("training.json")["chosen"]
    train = Examples(tensors["x_train"], tensors["y_train"])
    for subset, repeat in ((0, 0), (3, 1)):
        kept = halves(SIZES["train"], SUBSETS, VALIDATION.seed)[subset]
        recipe = Recipe(chosen["learning_rate"], chosen["l2"], 1 + repeat, kept)
        learnt = learning.learn(
            lambda seed: build(VALIDATION.subject, 8, 1, seed).network, train, [recipe], VALIDATION.epochs
        )
        network = build(VALIDATION.subject, 8, 1, 0).network
        network.model.load_state_dict(learning.one(learnt, 0))
        error_T = (network.model(tensors["x_test"]) - tensors["y_test"])[:, 0]
        torch.testing.assert_close(measured_SRT[subset, repeat], -0.5 * error_T**2, rtol=1e-9, atol=1e-12)


def test_lower_precision_moves_next_to_nothing(
    tmp_path: Path, whole: Artifact, inputs: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "DTYPE", torch.float32)
    context = staged(tmp_path, "datamodels", inputs)
    kept = halves(SIZES["train"], SUBSETS, VALIDATION.seed)
    runs = [Retraining(subset, repeat) for subset in kept for repeat in range(VALIDATION.retrainings)]
    found_RT, _ = retraining.measured(context, "halves", runs, torch.arange(SIZES["test"]))
    expected_RT = whole.read_tensors(datamodels.TENSORS)["measured_SRT"].flatten(0, 1)
    torch.testing.assert_close(found_RT, expected_RT, rtol=1e-4, atol=1e-5)


def test_predictions_are_sums_of_scores(whole: Artifact, inputs: Mapping[str, Artifact]) -> None:
    tensors, document = whole.read_tensors(datamodels.TENSORS), whole.read_json(datamodels.DOCUMENT)
    assert list(document["methods"]) == list(METHODS)
    problem = load_problem_from(inputs["dataset"], inputs["training"], VALIDATION)
    weights = [value.requires_grad_() for value in problem.network.model.parameters()]
    data = inputs["dataset"].read_tensors(TENSORS)

    def gradient(name: str, number: int) -> torch.Tensor:
        loss = 0.5 * (problem.network.model(data[f"x_{name}"][number : number + 1]) - data[f"y_{name}"][number]) ** 2
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss.sum(), weights)])

    identity = tensors["predicted_MTS"][list(METHODS).index("identity")]
    kept = halves(SIZES["train"], SUBSETS, VALIDATION.seed)[2]
    expected = sum(float(gradient("test", 6) @ gradient("train", int(number))) for number in kept)
    assert float(identity[6, 2]) == pytest.approx(expected, rel=1e-9)
    assert document["methods"]["identity"]["lds"] == pytest.approx(float(tensors["lds_MT"][0].mean()))


def test_document(whole: Artifact) -> None:
    document = whole.read_json(datamodels.DOCUMENT)
    assert document["subsets"] == SUBSETS
    assert document["share"] == 0.5
    assert document["tests"] == SIZES["test"]
    assert set(document["differences"]) == set(METHODS) - {"ekfac"}
    assert document["ceiling"]["seeds_each"] == 1
    for record in document["methods"].values():
        assert set(record) == {"lds", "interval", "interval_subsets", "lds_measurements", "seconds"}
        assert -1 <= record["interval"][0] <= record["lds"] <= record["interval"][1] <= 1
    dampings = document["dampings"]
    assert [record["multiple"] for record in dampings] == [1, 10, 100, 1000, None]
    assert dampings[0]["methods"]["exact"]["lds"] == document["methods"]["exact"]["lds"]
    assert [set(record["differences"]) for record in dampings] == [{"exact"}] * 4 + [{"exact", "ekfac_cg"}]
    stopped = dampings[-1]
    gain = stopped["methods"]["exact"]["lds"] - stopped["methods"]["ekfac"]["lds"]
    assert stopped["differences"]["exact"]["mean"] == pytest.approx(gain)
    assert len({record["methods"]["ekfac"]["lds"] for record in dampings}) > 1
    assert set(document["seconds"]) == {"retraining", "scores"}


def test_where_there_are_many_test_examples_only_measurements_count(
    tmp_path: Path, inputs: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodels, "LARGEST_TEST", 5)
    document = found_by(tmp_path, inputs, retrainings=1).read_json(datamodels.DOCUMENT)
    assert document["tests"] == VALIDATION.measurements
    assert document["ceiling"] is None
    for record in document["methods"].values():
        assert record["lds"] == pytest.approx(record["lds_measurements"])


def test_goes_on_where_it_was_cut_short(tmp_path: Path, whole: Artifact, inputs: Mapping[str, Artifact]) -> None:
    """Three tasks of trainings (4, 4 and 2), then one a method, and more with other dampings."""
    total = 3 + len(METHODS) + len(datamodels._damped(1.0))
    for fatal in (2, 3):
        with pytest.raises(Killed):
            found_by(tmp_path, inputs, InProcess(fatal))
    last = InProcess()
    artifact = found_by(tmp_path, inputs, last)
    assert last.done == total - 2 - 3
    for name, value in whole.read_tensors(datamodels.TENSORS).items():
        assert torch.equal(value, artifact.read_tensors(datamodels.TENSORS)[name])


def test_early_stopping_is_a_damping() -> None:
    """A direction of curvature g has learnt 1 − (1 − ηg)ᴷ, about g / (g + λ) for small and for large g."""
    training = {"epochs": 10, "batch": 128, "chosen": {"learning_rate": 0.1, "l2": 0.01}}
    damping = datamodels.early_stopping(training, 200) - 0.01
    assert damping == pytest.approx(1 / (0.1 * 20))
    for g in (1e-3, 1e-2, 5.0):
        assert 1 - (1 - 0.1 * g) ** 20 == pytest.approx(g / (g + damping), rel=0.1)


def test_dampings_by_layer() -> None:
    house = {"first": 0.1, "second": 0.3}
    assert Scoring("ekfac").name == "ekfac"
    assert Scoring("ekfac", 10.0).dampings(house) == pytest.approx({"first": 1.0, "second": 3.0})
    assert Scoring("ekfac", None, 0.7).dampings(house) == {"first": 0.7, "second": 0.7}
    assert len({each.name for each in (Scoring("ekfac"), Scoring("ekfac", 10.0), Scoring("ekfac", None, 0.7))}) == 3


def test_nothing_to_do(tmp_path: Path, inputs: Mapping[str, Artifact]) -> None:
    cluster = InProcess(fatal=0)
    assert found_by(tmp_path, inputs, cluster, subsets=0).read_json(datamodels.DOCUMENT) == {"subsets": 0}
