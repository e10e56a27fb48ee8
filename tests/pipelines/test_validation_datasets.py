"""Data sets of Appendix C: splits, normalisation, files that cannot be used, the stage; and the networks on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.errors import BadRecord, ConfigError
from actors.store import Store
from conf.schema import Subject, ValidationConfig
from influence.output_losses import SoftmaxCrossEntropy, SquaredError
from pipelines.validation import dataset
from pipelines.validation.datasets import SETS, data_digest, load
from pipelines.validation.loading import MODEL, fresh, load_problem_from
from pipelines.validation.networks import build
from tests.pipelines.retrained import staged

FEATURES = [f"x{number}" for number in range(8)]


def write_table(path: Path, rows: int = 50, targets: int = 1, seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    values = generator.normal(3, 5, size=(rows, 8 + targets)).round(6)
    names = FEATURES + [f"y{number}" for number in range(targets)]
    lines = [",".join(names)] + [",".join(map(str, row)) for row in values]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_images(path: Path, count: int = 40, shape: tuple[int, ...] = (28, 28), **changes: np.ndarray) -> str:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (count, *shape), dtype=np.uint8),
        "y_train": generator.integers(0, 10, count),
        "x_test": generator.integers(0, 256, (5, *shape), dtype=np.uint8),
        "y_test": generator.integers(0, 10, 5),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if len(value)})
    return str(path)


# --- splits and normalisation ---------------------------------------------------------------------------------------


def test_a_split_is_70_20_10_and_every_row_is_in_one_part(tmp_path: Path):
    path = write_table(tmp_path / "concrete.csv", rows=50)
    found = load(Subject.concrete, path, seed=0)
    assert {name: len(part.inputs) for name, part in found.parts.items()} == {"train": 35, "valid": 10, "test": 5}
    raw = torch.tensor(np.loadtxt(path, delimiter=",", skiprows=1))
    mean, deviation = (torch.tensor(found.statistics[name]) for name in ("mean", "deviation"))
    seen = torch.cat([part.inputs for part in found.parts.values()]) * deviation.double() + mean.double()
    order = seen[:, 0].argsort()
    torch.testing.assert_close(seen[order], raw[raw[:, 0].argsort(), :8], rtol=1e-5, atol=1e-5)


def test_the_training_part_has_zero_mean_and_unit_variance_and_the_others_are_scaled_by_it(tmp_path: Path):
    path = write_table(tmp_path / "concrete.csv")
    found = load(Subject.concrete, path, seed=0)
    train = found.parts["train"]
    for values in (train.inputs, train.targets):
        assert values.dtype == torch.float64
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1], dtype=torch.float64))
        torch.testing.assert_close(values.var(0, correction=0), torch.ones(values.shape[1], dtype=torch.float64))
    raw_y = np.loadtxt(path, delimiter=",", skiprows=1)[:, 8]
    test = found.parts["test"].targets * found.statistics["target_deviation"][0] + found.statistics["target_mean"][0]
    for value in test.flatten().tolist():
        assert np.abs(raw_y - value).min() < 1e-9


def test_a_column_that_does_not_vary_is_only_shifted(tmp_path: Path):
    path = tmp_path / "concrete.csv"
    lines = Path(write_table(path)).read_text().splitlines()
    path.write_text("\n".join([lines[0], *(f"7,{line.partition(',')[2]}" for line in lines[1:])]))
    assert bool((load(Subject.concrete, str(path), 0).parts["test"].inputs[:, 0] == 0).all())


def test_another_seed_splits_otherwise_and_the_same_one_alike(tmp_path: Path):
    path = write_table(tmp_path / "concrete.csv")
    first, again, other = (load(Subject.concrete, path, seed).parts["test"].inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_limit_takes_so_many_examples_of_those_that_there_are(tmp_path: Path):
    path = write_table(tmp_path / "concrete.csv", rows=50)
    parts = load(Subject.concrete, path, 0, limit=20).parts
    assert {name: len(part.inputs) for name, part in parts.items()} == {"train": 14, "valid": 4, "test": 2}
    assert len(load(Subject.concrete, path, 0, limit=70).parts["train"].inputs) == 35


def test_the_target_of_energy_is_the_first_of_two(tmp_path: Path):
    path = write_table(tmp_path / "energy.csv", targets=2)
    found = load(Subject.energy, path, 0)
    raw = np.loadtxt(path, delimiter=",", skiprows=1)
    assert (found.inputs, found.outputs) == (8, 1)
    assert raw[:, 8].min() < found.statistics["target_mean"][0] < raw[:, 8].max()
    train = found.parts["train"].targets.flatten() * found.statistics["target_deviation"][0]
    assert min(abs(raw[:, 8] - float(train[0]) - found.statistics["target_mean"][0])) < 1e-9


def test_digits_are_rows_of_pixels_normalised_by_one_mean(tmp_path: Path):
    found = load(Subject.mnist, write_images(tmp_path / "mnist.npz"), 0)
    train = found.parts["train"]
    assert train.inputs.shape == (28, 784)
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert abs(float(train.inputs.mean())) < 1e-5
    assert float(train.inputs.std()) == pytest.approx(1, abs=1e-4)
    assert (found.inputs, found.outputs) == (784, 10)


def test_colour_images_keep_their_shape_and_are_normalised_by_channel(tmp_path: Path):
    labels = np.arange(40)[:, None] % 10  # as CIFAR-10 is often stored
    found = load(Subject.cifar10, write_images(tmp_path / "cifar10.npz", shape=(32, 32, 3), y_train=labels), 0)
    train = found.parts["train"].inputs
    assert train.shape == (28, 3, 32, 32)
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    assert found.inputs == 3


# --- files that cannot be used ----------------------------------------------------------------------------------------


def test_a_missing_file_is_said_with_what_it_should_hold(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"validation\.path=.*none\.csv: there is no such file.*8 columns of features"
    ):
        load(Subject.concrete, str(tmp_path / "none.csv"), 0)
    with pytest.raises(ConfigError, match=r"validation\.path=null.*an \.npz file with x_train, uint8 \[N, 28, 28\]"):
        load(Subject.mnist, None, 0)
    with pytest.raises(ConfigError, match="there is no such file"):
        data_digest(Subject.mnist, str(tmp_path))
    with pytest.raises(ConfigError, match="subject=almanac has no data set"):
        data_digest(Subject.almanac, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [], r"row 1: the header has 0 columns; there should be 9"),
        (lambda lines: [line + ",1" for line in lines], r"row 1: the header has 10 columns"),
        (lambda lines: lines[1:], r"row 1: the first line holds numbers"),
        (lambda lines: [*lines[:3], lines[3] + ",4", *lines[4:]], r"row 4: 10 columns, where the header has 9"),
        (lambda lines: [*lines[:2], "a" + lines[2], *lines[3:]], r"row 3: column 'x0': 'a.*' is not a finite number"),
        (lambda lines: [*lines[:2], "nan," + lines[2].partition(",")[2]], r"row 3: column 'x0': 'nan'"),
        (lambda lines: lines[:10], r"9 examples are too few to be split"),
    ],
)
def test_a_table_that_cannot_be_used_names_the_row(tmp_path: Path, edit, message: str):
    path = tmp_path / "concrete.csv"
    lines = Path(write_table(path)).read_text().splitlines()
    path.write_text("\n".join(edit(lines)))
    with pytest.raises(BadRecord, match=message) as caught:
        load(Subject.concrete, str(path), 0)
    assert caught.value.file == str(path)


def test_bytes_that_are_no_table_are_said_to_be_none(tmp_path: Path):
    path = tmp_path / "concrete.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadRecord, match="no text in UTF-8"):
        load(Subject.concrete, str(path), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.zeros(0)}, r"there is no array y_train.*Remedy: give an \.npz file"),
        ({"x_train": np.zeros((40, 28, 28))}, r"x_train is float64 \[40, 28, 28\]"),
        ({"x_train": np.zeros((40, 32, 32, 3), np.uint8)}, r"x_train is uint8 \[40, 32, 32, 3\]"),
        ({"y_train": np.zeros(7, np.int64)}, r"y_train is int64 \[7, 1\], for 40 images"),
        ({"y_train": np.full(40, 11)}, r"row 0: label 11; labels are 0 to 9"),
        ({"x_train": np.zeros((3, 28, 28), np.uint8), "y_train": np.zeros(3, np.int64)}, r"3 examples are too few"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, changes: dict[str, np.ndarray], message: str):
    path = write_images(tmp_path / "mnist.npz", **changes)
    with pytest.raises(BadRecord, match=message):
        load(Subject.mnist, path, 0)


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04rubbish"])
def test_a_file_that_is_no_npz(tmp_path: Path, data: bytes):
    path = tmp_path / "mnist.npz"
    path.write_bytes(data)
    with pytest.raises(BadRecord, match=r"no \.npz file that can be read"):
        load(Subject.mnist, str(path), 0)


def test_the_digest_is_of_the_content(tmp_path: Path):
    first = write_table(tmp_path / "a.csv")
    same = write_table(tmp_path / "b.csv")
    other = write_table(tmp_path / "c.csv", seed=1)
    digests = [data_digest(Subject.concrete, path) for path in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]


# --- the stage, networks and problems -----------------------------------------------------------------------------


def test_what_the_stage_writes_is_read_as_a_problem(tmp_path: Path):
    path = write_table(tmp_path / "concrete.csv", rows=60)
    settings = {"subject": Subject.concrete, "path": path, "points": 9, "measurements": 3, "seed": 2}
    context = staged(tmp_path, "dataset", {}, **settings)
    result = dataset.run(context)
    assert result.counts == {"train": 42, "valid": 12, "test": 6}
    validation = ValidationConfig(**settings)
    built = fresh(context.artifact, validation, seed=7)
    training = Store(str(tmp_path / "store")).folder("training", "1" * 64)
    training.write_tensors(MODEL, built.network.model.state_dict())
    problem = load_problem_from(context.artifact, training, validation)
    whole = load(Subject.concrete, path, 2)
    assert problem.size == 42
    assert torch.equal(problem.train.inputs, whole.parts["train"].inputs)
    assert problem.points_P.tolist() == sorted(set(problem.points_P.tolist()))
    assert len(problem.points.inputs) == 9
    assert all(any(torch.equal(x, y) for y in whole.parts["test"].inputs) for x in problem.test.inputs)
    assert torch.equal(problem.network.outputs(problem.test), built.network.outputs(problem.test))
    assert not problem.network.model.training
    record = context.artifact.read_json(dataset.RECORD)
    assert (record["inputs"], record["outputs"], record["regression"]) == (8, 1, True)


@pytest.mark.parametrize("subject", list(SETS))
def test_all_linear_layers_and_convolutions_are_tracked_and_nothing_else(subject: Subject):
    inputs = {Subject.mnist: 784, Subject.fashion_mnist: 784, Subject.cifar10: 3}.get(subject, 8)
    regression = inputs == 8
    built = build(subject, inputs, 1 if regression else 10, seed=3)
    model, layers = built.network.model, built.layers
    tracked = {f"{layer.name}.{part}" for layer in layers for part in ("weight", "bias")[: 1 + layer.bias]}
    rest = {name for name, _ in model.named_parameters()} - tracked
    assert all("norm" in name for name in rest)
    for layer in layers:
        assert model.get_submodule(layer.name).weight.flatten(1).shape == (layer.outputs, layer.inputs)
    assert isinstance(built.network.loss, SquaredError if regression else SoftmaxCrossEntropy)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).dtype == (torch.float64 if regression else torch.float32)
    again, other = (build(subject, inputs, 1 if regression else 10, seed).network.model for seed in (3, 4))
    name = f"{layers[0].name}.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])


def test_resnet_20_has_twenty_layers_of_weights_and_their_usual_number():
    built = build(Subject.cifar10, 3, 10, seed=0)
    assert len(built.layers) == 20
    assert sum(layer.parameters for layer in built.layers) == 268_346  # 0.27 M in Table 6 of He et al.
    outputs = built.network.model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert outputs.shape == (2, 10)
    assert [layer.outputs for layer in built.layers[1::6]] == [16, 32, 64, 10]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("subject", "name", "train"),
    [
        (Subject.concrete, "tabular/concrete.csv", 721),
        (Subject.energy, "tabular/energy.csv", 538),
        (Subject.mnist, "images/mnist_10k_2k.npz", 7000),
    ],
)
def test_real_files(shared_data: Path, subject: Subject, name: str, train: int):
    found = load(subject, str(shared_data / name), 0)
    assert len(found.parts["train"].inputs) == train
