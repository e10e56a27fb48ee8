"""One tiny world and one finished run of it for all tests of whole runs, on the one Ray of `ray_session`."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from pipelines.tracing import TraceResult
from tests.integration.world import World, run_locally

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models, corpus and queries."""
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `traced`: add artifacts to it or fork it, and damage nothing in it."""
    return tmp_path_factory.mktemp("base") / "store"


@pytest.fixture(scope="session")
def traced(ray_session: None, world: World, store: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceResult:
    """A finished run with the settings of `World.settings`, by a replica in this process."""
    return run_locally(world.config(store), tmp_path_factory.mktemp("traced"))
