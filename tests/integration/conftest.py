"""One Ray session, one tiny world and one finished run for all tests of whole runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.integration.world import World, run_locally
from pipelines.tracing import TraceResult


@pytest.fixture(scope="session")
def session() -> Iterator[None]:
    """Ray, for as long as the tests of whole runs last; runs find it started and leave it alone."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models, corpus and queries."""
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `traced`, to fork or to add artifacts to."""
    return tmp_path_factory.mktemp("base") / "store"


@pytest.fixture(scope="session")
def traced(session: None, world: World, store: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceResult:
    """A finished run at full rank with the settings of `World.settings`, in this process."""
    return run_locally(world.config(store), tmp_path_factory.mktemp("traced"))
