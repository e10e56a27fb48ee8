"""Ray clusters of several nodes on this machine, in processes of their own, of which nothing is left afterwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray.util
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import AutoscalingCluster

from tests.integration.processes import ROOT

RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
OPEN = {"RAY_AUTH_MODE": "disabled"}  # in the environment of all nodes, and of the drivers that join them
PATIENCE = 300.0  # seconds that anything may take on a machine under load
PATIENT = {"RAY_raylet_start_wait_time_s": str(int(PATIENCE))}


class Node:
    """A node as `ray start` makes it: a raylet, and the workers that it starts."""

    def __init__(self, *words: str, output: Path, **environment: str) -> None:
        self.output = output
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [*RAY, "start", "--block", *words],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | OPEN | PATIENT | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it has started."""

        def started() -> bool:
            said = self.output.read_text()
            assert self._process.poll() is None, said
            return "Ray runtime started" in said

        wait_until(started)

    def workers(self, name: str) -> list[psutil.Process]:
        """Its processes that have a word in what they call themselves."""
        return [process for process in self._family() if name in title(process)]

    def kill(self) -> None:
        """SIGKILL for the raylet and all processes of the node."""
        end(self._family())
        self._process.wait(PATIENCE)

    def _family(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        process = psutil.Process(self._process.pid)
        return [*process.children(recursive=True), process]


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL for processes, and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=PATIENCE)


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class Nodes:
    """A cluster of a head that has no CPUs, and nodes that come and go."""

    def __init__(self, folder: Path, cpus: int) -> None:
        """Start the head.

        Args:
            folder: for what Ray writes; a short path, since it holds sockets.
            cpus: of each node to come.
        """
        self._folder, self._cpus = folder, cpus
        self.address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        words = ["--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", f"--temp-dir={folder}"]
        words += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        self._head = Node(*words, output=folder / "head.txt")
        self.nodes: list[Node] = []
        self._started = 0
        self._head.wait()

    def add(self) -> None:
        """Start a node, one at a time: two that start at once on one machine take the same names for their sockets."""
        words = [f"--address={self.address}", f"--num-cpus={self._cpus}"]
        self._started += 1
        node = Node(*words, output=self._folder / f"node-{self._started}.txt")
        self.nodes.append(node)
        node.wait()

    def shutdown(self) -> None:
        """End all nodes."""
        for node in [*self.nodes, self._head]:
            node.kill()


@contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[Nodes]:
    """A cluster on this machine; whatever it holds at the end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    found = Nodes(folder, cpus)
    try:
        for _ in range(nodes):
            found.add()
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Autoscaled(AutoscalingCluster):
    """Ray's autoscaling cluster on one machine, beside others: its own start and stop end every Ray on the machine."""

    def _generate_config(
        self, head_resources: dict, worker_node_types: dict, autoscaler_v2: bool = False, **changes: Any
    ) -> dict:
        """The base is Ray's own `fake_multi_node/example.yaml`, which its wheel leaves out."""
        self.port = free_port()
        self.address = f"{ray.util.get_node_ip_address()}:{self.port}"
        provider = {"type": "fake_multinode", "gcs_address": self.address, "head_node_id": FAKE_HEAD_NODE_ID}
        switches = ("launch_multiple", "use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
        head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
        lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "on-one-machine",
            "max_workers": sum(kind["max_workers"] for kind in worker_node_types.values()),
            "provider": provider | dict.fromkeys(switches, True),
            "available_node_types": {"ray.head.default": head, **worker_node_types},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.1,
            **{f"{name}_commands": [] for name in lists},
            **{name: {} for name in ("docker", "auth", "file_mounts")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts_sync_continuously": False,
            **changes,
        }

    def start(self, _system_config: Any = None, override_env: dict | None = None) -> None:
        """Start the first node, and with it the autoscaler."""
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        config = self.folder / "autoscaler.json"
        config.write_text(json.dumps(self._config))
        words = ["--head", f"--port={self.port}", f"--autoscaling-config={config}", "--num-cpus=0"]
        words += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}"]
        settings = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        settings |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        self._node = Node(*words, output=self.folder / "head.txt", **settings, **(override_env or {}))
        self._node.wait()

    def shutdown(self) -> None:
        """End all nodes, which are children of the autoscaler."""
        self._node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE, pause: float = 0.1) -> Any:
    """Wait until something holds, and return it."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(pause)
    return found
