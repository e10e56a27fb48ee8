"""A Ray of two CPUs for a module's tests, and the context that a stage is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import ray

from actors.store import Artifact, Store
from conf.schema import RunConfig
from pipelines.progress import Progress
from pipelines.steps import StageContext

ContextFactory = Callable[..., StageContext]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Ray with two CPUs, for as long as the module's tests run."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def stage_context(tmp_path: Path) -> ContextFactory:
    """`stage_context(config, kind, inputs={}, attempt=0)`: a context over an artifact in a store of the test."""
    store = Store(str(tmp_path / "store"))

    def make(
        config: RunConfig, kind: str, inputs: Mapping[str, Artifact] | None = None, attempt: int = 0
    ) -> StageContext:
        artifact = store.folder(kind, f"{attempt:016x}".ljust(64, "0"))
        return StageContext(config, None, artifact, inputs or {}, partial(Progress, every=1e9, terminal=False))

    return make
