"""`cluster.yaml` is what Ray's own `ray up` accepts, has the versions of `constraints.txt`, and room for a replica."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from conf.load import compose_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_no_key_that_ray_would_ignore(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**cluster, "max_worker": 8}))


@pytest.mark.parametrize("package", ["ray", "torch"])
def test_versions_are_those_of_the_constraints(package: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
    named = re.findall(rf"\b{package}(?:\[[\w,]+\])?==([\w.]+)", TEXT)
    if package == "ray":
        named += re.findall(r"rayproject/ray:([\w.]+)-py311", TEXT)
    assert named
    assert set(named) == {pinned}


def test_a_replica_of_the_option_fits_a_worker(cluster: dict[str, Any]) -> None:
    wanted = compose_config(["cluster=autoscaled"], complete=False).cluster
    workers = {
        name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]
    }
    room = [
        kind["resources"]
        for kind in workers.values()
        if kind["resources"].get("GPU", 0) >= wanted.gpus_per_rank and kind["resources"]["CPU"] > wanted.cpus_per_rank
    ]
    assert room, "no worker has the GPUs of a replica, its CPUs, and some to spare for tasks"
    assert cluster["max_workers"] >= wanted.max_replicas
