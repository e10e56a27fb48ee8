"""A whole validation of a tiny data set by the command: what it leaves, what a second run repeats, how it resumes."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr

from actors.errors import BadRecord
from actors.store import Artifact, Store
from conf.keys import validation_paths
from conf.load import compose_config
from pipelines.command import main
from pipelines.validation import estimates
from pipelines.validation import run as job
from pipelines.validation.run import ValidationResult, run_validation
from tests.integration.world import LocalCluster
from tests.pages import Markup

ROWS, FEATURES = 60, 8
STEPS = ("dataset", "training", "curvature", "estimates", "responses", "datamodels", "removal")
EXACT = ("identity", "kfac", "ekfac", "lissa", "ekfac_cg", "exact", "ekfac_blocks_2")
SETTINGS = {
    "validation.epochs": 3,
    "validation.points": 6,
    "validation.measurements": 2,
    "validation.lissa_depth": 20,
    "validation.subsets": 4,
    "validation.retrainings": 2,
    "validation.removal": 0.05,
    "validation.largest_blocks": 2,
    "cluster.num_cpus": 4,
    "cluster.cpus_per_rank": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of made-up numbers in the layout of Concrete."""
    generator = np.random.default_rng(4)
    features = generator.normal(size=(ROWS, FEATURES))
    target = np.tanh(features[:, 0]) + features[:, 1] * features[:, 2] + 0.1 * generator.normal(size=ROWS)
    path = tmp_path_factory.mktemp("data") / "made_up.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"x{number}" for number in range(FEATURES)), "y"])
        writer.writerows([*(f"{x:.6f}" for x in row), f"{y:.6f}"] for row, y in zip(features, target, strict=True))
    return path


def words(data: Path, store: Path, **changes: Any) -> list[str]:
    """The run on a command line."""
    given = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    paths = {"store": store, "validation.path": data}
    return ["experiment=concrete", *(f"{name}={value}" for name, value in (paths | given).items())]


@pytest.fixture(scope="module")
def folder(ray_session: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run by the command, on Ray; the store lies beside it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    base = tmp_path_factory.mktemp("validate")
    assert main(["validate", *words(data, base / "store"), f"hydra.run.dir={base / 'run'}"]) == 0
    yield base / "run"
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def validated(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ValidationResult]:
    """`validated(store, **changes)`: a run in this process, without Ray."""
    monkeypatch.setattr(job, "Cluster", LocalCluster)
    monkeypatch.setattr(job, "write_folder", lambda folder, document: None)

    def run(store: Path, **changes: Any) -> ValidationResult:
        config = compose_config(words(data, store, **changes), needs=validation_paths)
        return run_validation(config, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")

    return run


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "validation.json").read_text(encoding="utf-8"))


def test_the_folder_has_everything(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tables = ("agreement", "differences", "time", "response", "datamodels", "removal", "blocks", "sizes")
    plots = ("agreement", "response", "time", "convergence", "linearity", "lds", "removal", "blocks", "sizes")
    wanted = {"validation.json", "validation.md", "validation.html", "validate.log", "pairs.parquet"}
    wanted |= {f"tables/{name}.csv" for name in tables}
    wanted |= {f"plots/{name}.{ending}" for name in plots for ending in ("svg", "png")}
    assert wanted <= names
    found = document(folder)
    assert (found["name"], found["subject"]) == ("validate_concrete", "concrete")
    assert tuple(found["stages"]) == STEPS
    page = Markup((folder / "validation.html").read_text(encoding="utf-8"))
    assert "EK-FAC + CG" in page.text
    assert "script" not in page.tags


def test_correlations_are_those_of_the_pairs(folder: Path) -> None:
    table, studies = pq.read_table(folder / "pairs.parquet"), document(folder)["studies"]
    assert table.column_names == ["measurement", "test", "point", "response", *EXACT]
    assert len(table) == 2 * 6
    measurement = table["measurement"].to_numpy()
    for name in EXACT:
        values = [
            pearsonr(table[name].to_numpy()[measurement == q], table["response"].to_numpy()[measurement == q])[0]
            for q in range(2)
        ]
        found = studies["agreement"]["methods"][name]
        assert found["pearson"]["values"] == pytest.approx(values, abs=1e-9)
        assert found["pearson"]["mean"] == pytest.approx(np.mean(values), abs=1e-9)
    x, y = table["exact"].to_numpy(), table["response"].to_numpy()
    slopes = [x[measurement == q] @ y[measurement == q] / (x[measurement == q] @ x[measurement == q]) for q in range(2)]
    assert studies["agreement"]["methods"]["exact"]["slope"]["values"] == pytest.approx(slopes, abs=1e-9)
    assert studies["agreement"]["methods"]["identity"]["slope"] is None


def test_the_response_is_that_of_exact_solves(folder: Path) -> None:
    found = document(folder)["studies"]
    assert found["agreement"]["methods"]["exact"]["pearson"]["mean"] > 0.99
    assert found["agreement"]["methods"]["exact"]["slope"]["mean"] == pytest.approx(1.0, abs=0.1)
    assert found["response"]["converged"] == len(found["response"]["gradients"]) == 6
    assert not found["response"]["warnings"]


def test_every_method_is_timed_with_its_fit(folder: Path) -> None:
    methods = document(folder)["studies"]["cost"]["methods"]
    assert tuple(methods) == EXACT
    for name, record in methods.items():
        parts = [record["seconds"][key] for key in ("fit", "gradients", "solve", "score")]
        assert record["seconds"]["total"] == pytest.approx(sum(parts)), name
    assert methods["ekfac"]["seconds"]["fit"] > methods["identity"]["seconds"]["fit"]


def test_a_second_run_computes_nothing(folder: Path, validated: Callable[..., ValidationResult]) -> None:
    again = validated(folder.parent / "store")
    assert all(outcome.cached for outcome in again.outcomes.values())
    assert again.document["studies"] == document(folder)["studies"]
    assert "EK-FAC + CG" in again.table()


def test_only_what_changed_is_computed_again(folder: Path, validated: Callable[..., ValidationResult], tmp_path: Path):
    store = shutil.copytree(folder.parent / "store", tmp_path / "store")
    for changes, expected in (
        ({"validation__removal": 0.1}, {"removal"}),
        (
            {"validation__subsets": 0, "validation__removal": 0, "validation__measurements": 3},
            {"estimates", "responses"},
        ),
        ({"validation__subsets": 0, "validation__removal": 0, "validation__pbo_steps": 0}, set()),
    ):
        found = validated(store, **changes)
        assert {name for name, outcome in found.outcomes.items() if not outcome.cached} == expected
    assert tuple(found.outcomes) == ("dataset", "training", "curvature", "estimates")
    assert not (found.run_dir / "pairs.parquet").exists()
    assert "agreement" not in found.document["studies"]
    solved = found.document["studies"]["solved"]["methods"]
    assert set(solved) == set(EXACT) - {"exact"}
    scores = {name: found.artifact("estimates").read_tensors(f"{name}.safetensors")["scores_QP"] for name in EXACT}
    pairs = zip(scores["ekfac_cg"].double(), scores["exact"].double(), strict=True)
    expected = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    assert solved["ekfac_cg"]["pearson"]["values"] == pytest.approx(expected)


def test_a_run_that_was_cut_short_goes_on_to_the_same_results(
    folder: Path, validated: Callable[..., ValidationResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = estimates.estimate_and_write, []

    def failing(output: Artifact, name: str, *given: Any) -> None:
        if name == "lissa" and "lissa" not in done:
            done.append(name)
            raise KeyboardInterrupt
        done.append(name)
        real(output, name, *given)

    monkeypatch.setattr(estimates, "estimate_and_write", failing)
    few = {"validation__subsets": 0, "validation__removal": 0, "validation__convergence": "false"}
    with pytest.raises(KeyboardInterrupt):
        validated(tmp_path / "store", **few)
    found = validated(tmp_path / "store", **few)
    assert done == ["identity", "kfac", "ekfac", "lissa", "lissa", "ekfac_cg", "exact", "ekfac_blocks_2"]
    assert found.outcomes["estimates"].extra["resumed"]
    first, again = (pq.read_table(each / "pairs.parquet") for each in (folder, found.run_dir))
    for name in first.column_names:  # which Ray computed, and this process
        scale = np.abs(first[name].to_numpy()).max()
        np.testing.assert_allclose(again[name].to_numpy(), first[name].to_numpy(), rtol=1e-5, atol=1e-6 * scale)


def test_data_that_cannot_be_used_is_named(validated: Callable[..., ValidationResult], tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadRecord, match=r"bad\.csv"):
        validated(tmp_path / "store", validation__path=tmp_path / "bad.csv")
    assert not Store(str(tmp_path / "store")).folder("validation-dataset", "0" * 64).committed
