"""`cluster.yaml` is what Ray's own `ray up` accepts, has the versions of `constraints.txt`, and room for replicas."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from conf.load import compose_config
from conf.schema import ClusterConfig
from tests.autoscaling import launched

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
SPOT = {"gpu_spot": "gpu_on_demand", "gpus_spot": "gpus_on_demand"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture(scope="module")
def workers(cluster: dict[str, Any]) -> dict[str, Any]:
    types = dict(cluster["available_node_types"])
    del types[cluster["head_node_type"]]
    return types


def option(name: str, *overrides: str) -> ClusterConfig:
    return compose_config([f"cluster={name}", *overrides], complete=False).cluster


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_no_key_that_ray_would_ignore(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**cluster, "max_worker": 8}))
    given = {key for kind in cluster["available_node_types"].values() for key in kind}
    assert given <= {"resources", "node_config", "min_workers", "max_workers", "priority", "docker"}


@pytest.mark.parametrize("package", ["ray", "torch"])
def test_versions_are_those_of_the_constraints(package: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
    named = re.findall(rf"\b{package}(?:\[[\w,]+\])?==([\w.]+)", TEXT)
    if package == "ray":
        named += re.findall(r"rayproject/ray:([\w.]+)-py311", TEXT)
    assert named
    assert set(named) == {pinned}


def test_everything_is_installed_under_the_constraints(cluster: dict[str, Any]) -> None:
    (place,) = cluster["file_mounts"]
    installs = [line for line in cluster["setup_commands"] if line.startswith("pip install")]
    assert len(installs) == 2
    assert all(f"--constraint {place}/constraints.txt" in line for line in installs)


def test_only_the_head_is_there_before_it_is_needed(cluster: dict[str, Any], workers: dict[str, Any]) -> None:
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}
    for name in ("autoscaled", "sharded"):
        assert option(name).min_replicas == 0, "a replica that stays keeps its node"


@pytest.mark.parametrize("name", ["autoscaled", "sharded"])
def test_a_replica_of_the_option_leaves_cpus_for_tasks(name: str, workers: dict[str, Any]) -> None:
    wanted = option(name)
    started = launched(workers, 16, wanted)
    cpus = sum(workers[kind]["resources"]["CPU"] * count for kind, count in started.items())
    assert cpus > wanted.max_replicas * wanted.world_size * wanted.cpus_per_rank


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("autoscaled", (), {"gpu_spot": 8}),
        ("autoscaled", ("cluster.max_replicas=2",), {"gpu_spot": 2}),
        ("sharded", (), {"gpus_spot": 2}),
        ("sharded", ("cluster.world_size=2", "cluster.max_replicas=1"), {"gpu_spot": 2}),
        ("sharded", ("cluster.world_size=8", "cluster.max_replicas=1"), {"gpus_spot": 2}),
    ],
)
def test_ray_would_start_spot_workers_for_replicas_that_wait(
    name: str, overrides: tuple[str, ...], expected: dict[str, int], cluster: dict[str, Any], workers: dict[str, Any]
) -> None:
    assert launched(workers, cluster["max_workers"], option(name, *overrides)) == expected


@pytest.mark.parametrize(("name", "spot"), [("autoscaled", "gpu_spot"), ("sharded", "gpus_spot")])
def test_on_demand_workers_where_spot_ones_do_not_come_up(
    name: str, spot: str, cluster: dict[str, Any], workers: dict[str, Any]
) -> None:
    assert set(launched(workers, cluster["max_workers"], option(name), failed={spot: 0.0})) == {SPOT[spot]}
    off = {**workers, spot: {**workers[spot], "max_workers": 0}}
    assert set(launched(off, cluster["max_workers"], option(name))) == {SPOT[spot]}


def test_a_pair_differs_in_its_market_alone(workers: dict[str, Any]) -> None:
    for spot, on_demand in SPOT.items():
        ours, other = dict(workers[spot]["node_config"]), workers[on_demand]["node_config"]
        assert ours.pop("InstanceMarketOptions") == {"MarketType": "spot"}
        assert ours == other
        assert workers[spot]["resources"] == workers[on_demand]["resources"]
        assert workers[spot]["priority"] > workers[on_demand].get("priority", 0)


def test_what_must_be_edited_is_marked() -> None:
    assert all("# EDIT" in line for line in TEXT.splitlines() if "ACCOUNT" in line or "region:" in line)


def test_the_code_on_the_nodes_is_what_git_would_keep(cluster: dict[str, Any]) -> None:
    assert ".gitignore" in cluster["rsync_filter"]
    assert {".git", ".venv", ".whence"} <= set(cluster["rsync_exclude"])
    assert os.path.samefile(ROOT / cluster["file_mounts"]["/home/ray/whence"], ROOT)
