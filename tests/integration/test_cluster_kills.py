"""SIGKILL for a rank, a replica, a node and the driver, in the middle of three stages, on a cluster of raylets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.schema import FactorsConfig
from pipelines.stages.grouped import sample_groups
from tests.integration.clusters import OPEN, PATIENCE, Node, Nodes, cluster, end, title, wait_until
from tests.integration.processes import command, kill
from tests.integration.test_invariances import same_bits
from tests.integration.world import World, cached, documents, fork, ids, run_locally, write_lines

RANKS = 2
NODES = 3  # each has room for one replica
PARTS = {"covariance": "parts/**/done.json", "correction": "parts/**/done.json", "scores": "shard-*.parquet"}
MARKS = {"covariance": (1, 4, 7, 9), "correction": (1, 4, 7, 9), "scores": (2, 6, 10, 14)}  # parts at each kill
SLOWLY: dict[str, Any] = {
    "corpus__sequence_length": 40,
    "prefilter__kind": "none",
    "unfiltered__kind": "all",
    "scan__batch_size": 1,
    "scan__shard_sequences": 16,
    "cluster__num_cpus": None,
    "cluster__world_size": RANKS,
    "cluster__max_replicas": 2,
    "cluster__min_replicas": 2,
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Nodes of as many CPUs as a replica has ranks, beside a head without any."""
    monkeypatch.setenv("RAY_AUTH_MODE", OPEN["RAY_AUTH_MODE"])
    with cluster(NODES, cpus=RANKS) as found:
        yield found


class Stage:
    """A stage of a run, watched from outside."""

    def __init__(self, store: Path, kind: str, total: int, driver: subprocess.Popen[str], output: Path) -> None:
        self._store, self._kind, self._total, self._driver, self._output = store, kind, total, driver, output

    def parts(self) -> list[Path]:
        """Committed parts of the unfinished artifact."""
        return sorted(self._store.glob(f"{self._kind}/*/{PARTS[self._kind]}"))

    def reaches(self, count: int) -> None:
        """Wait until some parts are committed, while the stage goes on."""

        def reached() -> bool:
            assert self._driver.poll() is None, self._output.read_text()
            return len(self.parts()) >= count

        wait_until(reached, 2 * PATIENCE, pause=0.005)
        self.is_on()

    def is_on(self) -> None:
        """Make sure that it is in its middle."""
        assert 0 < len(self.parts()) < self._total
        assert not list(self._store.glob(f"{self._kind}/*/artifact.json"))

    def said(self, words: str) -> int:
        """How often the driver has said something."""
        return self._output.read_text().count(words)


def replicas(nodes: Nodes) -> list[tuple[Node, list[psutil.Process]]]:
    """Replicas at work: processes that hold models, are connected with one another and are on a task."""
    found = []
    for node in nodes.nodes:
        ranks = node.workers("RankActor")
        if len(ranks) == RANKS and connected(ranks) and all("RankActor.do" in title(rank) for rank in ranks):
            found.append((node, ranks))
    return found


def connected(ranks: list[psutil.Process]) -> bool:
    """Whether each of two processes has a connection to the other."""
    try:
        one, other = ([c for c in rank.net_connections("tcp") if c.raddr] for rank in ranks)
    except psutil.NoSuchProcess:
        return False
    return bool({c.laddr.port for c in one} & {c.raddr.port for c in other})


def a_replica(nodes: Nodes) -> tuple[Node, list[psutil.Process]]:
    return wait_until(lambda: replicas(nodes), pause=0.02)[0]


def suffer(stage: Stage, nodes: Nodes, marks: tuple[int, int, int, int]) -> None:
    """Kill a rank, a replica and a node when so many parts are committed, and wait for the fourth mark."""
    stage.reaches(marks[0])
    _, (_, rank) = a_replica(nodes)
    end([rank])
    stage.reaches(marks[1])
    _, ranks = a_replica(nodes)
    end(ranks)
    stage.reaches(marks[2])
    node, _ = a_replica(nodes)
    node.kill()
    nodes.nodes.remove(node)
    stage.reaches(marks[3])


def parts_of(store: Path) -> dict[str, int]:
    """In how many parts each stage is done."""
    records = {kind: json.loads(next(store.glob(f"{kind}/*/artifact.json")).read_text()) for kind in PARTS}
    groups = len(sample_groups(records["scores"]["counts"]["sequences"], FactorsConfig(samples=None)))
    return {"covariance": groups, "correction": groups, "scores": records["scores"]["counts"]["shards"]}


def trace(world: World, store: Path, run: Path, **changes: Any) -> Any:
    return command("trace", *world.overrides(store, **changes), run_dir=run)


@pytest.mark.heavy
def test_scores_survive_the_death_of_ranks_replicas_nodes_and_drivers(
    world: World, ray_session: None, nodes: Nodes, tmp_path: Path
):
    corpus = write_lines(tmp_path / "corpus.jsonl", ({"text": text} for text in documents(600, seed=11)))
    changes = SLOWLY | {"corpus__path": str(corpus), "cluster__address": nodes.address}
    with trace(world, tmp_path / "undisturbed", tmp_path / "0", **changes) as driver:
        assert driver.wait(2 * PATIENCE) == 0, (tmp_path / "0" / "output.txt").read_text()
    store = fork(tmp_path / "undisturbed", tmp_path / "store", ("layers", "sequences", "candidates"))

    totals = parts_of(tmp_path / "undisturbed")
    for number, (kind, marks) in enumerate(MARKS.items(), start=1):
        folder = tmp_path / str(number)
        with trace(world, store, folder, **changes) as driver:
            stage = Stage(store, kind, totals[kind], driver, folder / "output.txt")
            suffer(stage, nodes, marks)
            kill(driver)
            stage.is_on()
        assert stage.said("a replica died") >= 2  # the third death may come so late that the driver does not see it
        nodes.add()
    with trace(world, store, tmp_path / "last", **changes) as driver:
        assert driver.wait(2 * PATIENCE) == 0, (tmp_path / "last" / "output.txt").read_text()
    assert "scores: goes on from" in (tmp_path / "last" / "output.txt").read_text()

    one, other = (
        run_locally(world.config(place, **changes), tmp_path / f"read-{place.name}")
        for place in (tmp_path / "undisturbed", store)
    )
    assert all(cached(one).values())
    assert all(cached(other).values())
    assert same_bits(other, one)
    sequences = one.artifact("sequences").read_json("index.json")["sequences"]
    assert ids(other.scores_table()) == list(range(sequences))
    for kind in PARTS:
        record = json.loads(next(store.glob(f"{kind}/*/artifact.json")).read_text())
        assert record["extra"]["resumed"] is True
        assert record["counts"]["sequences"] == sequences
