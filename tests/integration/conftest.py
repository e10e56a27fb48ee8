"""One tiny world and one finished run of it for all tests of whole runs, on the one Ray of `ray_session`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from pipelines.tracing import TraceResult
from tests.integration.world import World, run_locally

transformers.utils.logging.disable_progress_bar()

UNTOUCHED = "untouched"


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
    result = run_locally(world.config(store), tmp_path_factory.mktemp("traced"))
    shutil.copytree(store, store.parent / UNTOUCHED)
    return result


@pytest.fixture
def own_store(traced: TraceResult, store: Path, tmp_path: Path) -> Path:
    """A store of the test's own with what `traced` left in it, and nothing of what other tests added since."""
    return shutil.copytree(store.parent / UNTOUCHED, tmp_path / "store")
