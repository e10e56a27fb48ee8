"""`deploy/`: the RayJob has the fields of KubeRay's CRD, the versions of the constraints, and room for replicas.

`FIELDS` names fields of `ray.io/v1` that KubeRay 1.7 knows, as far as they concern us; of the pods' own, those that the
manifest uses. The whole CRD was asked once, by hand: this keeps the manifest from growing anything else unseen.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conf.load import check_command, compose_config
from tests.autoscaling import launched

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "deploy/rayjob.yaml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")


def fields(*required: str, **known: Any) -> dict[str, Any]:
    return {"type": "object", "properties": known, "additionalProperties": False, "required": list(required)}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
NAME, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
CONTAINER = fields(
    *("name", "image", "resources"),
    name=NAME,
    image=NAME,
    resources=fields(requests=TEXTS, limits=TEXTS),
    volumeMounts=many(fields("name", "mountPath", name=NAME, mountPath=NAME)),
)
POD = fields(
    "containers",
    serviceAccountName=NAME,
    nodeSelector=TEXTS,
    tolerations=many(fields(key=NAME, operator={"enum": ["Exists", "Equal"]}, value=NAME, effect=NAME)),
    containers=many(CONTAINER),
    volumes=many(fields("name", name=NAME, persistentVolumeClaim=fields("claimName", claimName=NAME))),
)
GROUP = {"rayStartParams": TEXTS, "template": fields("spec", metadata={"type": "object"}, spec=POD), "labels": TEXTS}
FIELDS = fields(
    *("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}),
    spec=fields(
        *("entrypoint", "rayClusterSpec"),
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        entrypoint=NAME,
        runtimeEnvYAML=NAME,
        shutdownAfterJobFinishes=FLAG,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=fields(
            *("rayVersion", "headGroupSpec", "workerGroupSpecs"),
            rayVersion=NAME,
            authOptions=fields(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=fields(
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=COUNT,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            headGroupSpec=fields("template", **GROUP),
            workerGroupSpecs=many(
                fields(
                    *("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName=NAME,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    priority={"type": "integer"},
                    idleTimeoutSeconds=COUNT,
                    **GROUP,
                )
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture(scope="module")
def cluster(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]


@pytest.fixture(scope="module")
def node_types(cluster: dict[str, Any]) -> dict[str, Any]:
    """The worker groups as the autoscaler sees them: a pod's limits are its resources."""
    return {
        group["groupName"]: {
            "resources": {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])},
            "min_workers": group["minReplicas"],
            "max_workers": group["maxReplicas"],
            "priority": group["priority"],
        }
        for group in cluster["workerGroupSpecs"]
        for limits in [container(group)["resources"]["limits"]]
    }


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return found


def groups(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def pinned(package: str) -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
    return version


def test_fields_are_those_of_the_crd(job: dict[str, Any]) -> None:
    jsonschema.validate(job, FIELDS)
    wrong = yaml.safe_load(TEXT.replace("minReplicas", "minReplica"))
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(wrong, FIELDS)


def test_the_entrypoint_is_a_command_of_ours(job: dict[str, Any]) -> None:
    python, flag, module, verb, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module, verb) == ("python", "-m", "pipelines", "trace")
    (config,) = check_command([word for word in overrides if not word.startswith("hydra.")])
    assert config.cluster == compose_config(["cluster=autoscaled"], complete=False).cluster
    assert config.store.startswith("s3://")


def test_the_report_is_on_a_volume_that_stays(job: dict[str, Any], cluster: dict[str, Any]) -> None:
    (folder,) = re.findall(r"hydra\.run\.dir=(\S+)", job["spec"]["entrypoint"])
    head = cluster["headGroupSpec"]
    (mount,) = [mount for mount in container(head)["volumeMounts"] if folder.startswith(f"{mount['mountPath']}/")]
    (volume,) = [volume for volume in head["template"]["spec"]["volumes"] if volume["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"]["claimName"]
    assert job["spec"]["shutdownAfterJobFinishes"], "the cluster would stay, and cost money"


def test_versions_are_those_of_the_constraints(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == pinned("ray")
    (base,) = re.findall(r"^FROM rayproject/ray:(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base == f"{pinned('ray')}-py311-gpu"
    assert re.findall(r"\btorch==(\S+)", DOCKERFILE) == [pinned("torch")]
    assert re.findall(r"ray\[\S+\]==([\d.]+)", DOCKERFILE) == [pinned("ray")]
    assert DOCKERFILE.count("pip install") == DOCKERFILE.count("--constraint constraints.txt") == 2


def test_all_pods_have_the_image_of_this_version(cluster: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {container(group)["image"] for group in groups(cluster)} == {f"REGISTRY/whence:{version}"}
    assert f"--tag REGISTRY/whence:{version}" in DOCKERFILE


def test_workers_start_from_none_and_the_head_holds_no_replica(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2", "priorities are v2's"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in cluster["workerGroupSpecs"])


def test_a_pod_gets_what_it_asks_for(cluster: dict[str, Any]) -> None:
    for group in groups(cluster):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]


def test_the_autoscaler_would_start_spot_pods_then_others(node_types: dict[str, Any]) -> None:
    wanted = compose_config(["cluster=autoscaled"], complete=False).cluster
    assert launched(node_types, 16, wanted) == {"gpu-spot": wanted.max_replicas}
    assert launched(node_types, 16, wanted, failed={"gpu-spot": 0.0}) == {"gpu-on-demand": wanted.max_replicas}
    assert all(kind["resources"]["CPU"] > wanted.cpus_per_rank for kind in node_types.values()), "none left for tasks"


def test_a_sharded_replica_finds_room_over_several_pods(node_types: dict[str, Any]) -> None:
    wanted = compose_config(["cluster=sharded"], complete=False).cluster
    assert launched(node_types, 16, wanted) == {"gpu-spot": wanted.max_replicas * wanted.world_size}


def test_a_job_that_is_stopped_has_time_to_say_so(job: dict[str, Any]) -> None:
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 3


def test_what_must_be_edited_is_marked() -> None:
    given = ("serviceAccountName", "nodeSelector", "image:", "claimName")
    lines = [line for line in TEXT.splitlines() if any(word in line for word in given) and "*image" not in line]
    assert len(lines) == 8
    assert all("# EDIT" in line for line in lines)


def test_the_image_holds_no_store_and_no_runs() -> None:
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", ".whence", "runs", "multirun"} <= set(ignored)
