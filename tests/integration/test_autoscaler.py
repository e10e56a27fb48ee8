"""Ray's autoscaler starts nodes for the pending replicas of a trace, from none, and stops them when it has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.clusters import OPEN, PATIENCE, Autoscaled, wait_until
from tests.integration.processes import command, kill
from tests.integration.world import World

MOST = 2  # nodes that the autoscaler may start
WATCH = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while True:
    print(sum(node["Alive"] for node in ray.nodes()) - 1, flush=True)
    time.sleep(0.5)
"""


@pytest.fixture
def autoscaled() -> Iterator[Autoscaled]:
    """A head without CPUs, and an autoscaler that may start nodes of two CPUs."""
    kind = {"resources": {"CPU": 2, "object_store_memory": 10**8}, "node_config": {}}
    found = Autoscaled({"CPU": 0}, {"worker": kind | {"min_workers": 0, "max_workers": MOST}})
    found.start()
    try:
        yield found
    finally:
        found.shutdown()


@contextmanager
def watched(address: str, output: Path) -> Iterator[None]:
    """Write the number of nodes besides the head to a file, again and again, as a driver that asks for nothing."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCH, address],
            env=os.environ | OPEN,
            stdout=file,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            yield
        finally:
            kill(process)


def counts(output: Path) -> list[int]:
    """The numbers of nodes so far."""
    return [int(line) for line in output.read_text().split("\n")[:-1]]


@pytest.mark.slow
def test_nodes_come_for_a_trace_and_go_when_it_ends(
    world: World, autoscaled: Autoscaled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_AUTH_MODE", OPEN["RAY_AUTH_MODE"])
    nodes = tmp_path / "nodes.txt"
    changes = {
        "cluster__address": autoscaled.address,
        "cluster__num_cpus": None,
        "cluster__cpus_per_rank": 2,  # a replica fills a node
        "cluster__max_replicas": MOST,
        "scan__shard_sequences": 8,
        "scan__batch_size": 1,
    }
    with watched(autoscaled.address, nodes):
        wait_until(lambda: counts(nodes))
        assert counts(nodes)[-1] == 0
        run = tmp_path / "run"
        with command("trace", *world.overrides(tmp_path / "store", **changes), run_dir=run) as process:
            assert process.wait(2 * PATIENCE) == 0, (run / "output.txt").read_text()
        assert counts(nodes)[-1] > 0
        wait_until(lambda: counts(nodes)[-1] == 0)
    found = counts(nodes)
    changed = [found[0], *(new for old, new in pairwise(found) if new != old)]
    assert changed[0] == changed[-1] == 0
    assert max(changed) == MOST, changed
    assert (run / "report.html").exists()
