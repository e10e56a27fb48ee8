"""A small table of the shape of Energy as `dataset` leaves it, and stages run in this process, whole or cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.store import Artifact, Store
from conf.schema import RunConfig, Subject, ValidationConfig
from pipelines.progress import Progress
from pipelines.steps import StageContext
from pipelines.validation.dataset import RECORD, TENSORS

SIZES = {"train": 40, "valid": 12, "test": 7}
VALIDATION = ValidationConfig(subject=Subject.energy, epochs=4, measurements=3, points=10, retrainings=2, lissa_depth=4)


class Killed(Exception):
    """Somebody stopped the run."""


class InProcess:
    """Tasks run here, the last first; after `fatal` of them the run is killed."""

    def __init__(self, fatal: int | None = None) -> None:
        self.fatal, self.done = fatal, 0

    def map(self, function: Callable[..., Any], arguments: list[tuple]) -> Iterator[tuple[int, Any]]:
        for position, given in reversed(list(enumerate(arguments))):
            if self.done == self.fatal:
                raise Killed
            self.done += 1
            yield position, function(*given)


def table(folder: Path) -> Artifact:
    """Eight features of which three matter, and a little noise."""
    generator = torch.Generator().manual_seed(11)
    dataset = Store(str(folder / "store")).folder("dataset", "0" * 64)
    tensors = {}
    for name, size in SIZES.items():
        x = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
        tensors |= {f"x_{name}": x, f"y_{name}": (x[:, 0] + x[:, 1].tanh() * x[:, 2] + noise)[:, None]}
    dataset.write_tensors(TENSORS, tensors)
    dataset.write_json(RECORD, {"subject": "energy", **SIZES, "inputs": 8, "outputs": 1, "regression": True})
    return dataset


def staged(
    folder: Path,
    name: str,
    inputs: Mapping[str, Artifact],
    cluster: InProcess | None = None,
    attempt: str = "0",
    **settings: Any,
) -> StageContext:
    """The context of a stage of the validation."""
    return StageContext(
        replace(RunConfig(), validation=replace(VALIDATION, **settings)),
        cluster or InProcess(),
        Store(str(folder / "store")).folder(name, f"{attempt:0<64}"),
        inputs,
        partial(Progress, every=1e9, terminal=False),
    )
