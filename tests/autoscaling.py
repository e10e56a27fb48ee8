"""What Ray's own autoscaler would start for placement groups that wait, asked without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from conf.schema import ClusterConfig


def launched(
    node_types: Mapping[str, Mapping[str, Any]],
    most: int,
    wanted: ClusterConfig,
    failed: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Nodes that would be started for all replicas of an option, by type; from no nodes at all.

    Args:
        node_types: By name: `resources`, `min_workers`, `max_workers`, `priority`.
        most: Nodes in all.
        wanted: `max_replicas` replicas of `world_size` ranks wait, each a placement group of a bundle a rank.
        failed: Types whose nodes did not come up, with 0 for just now and 1 for long ago.

    Raises:
        AssertionError: If some would wait in vain.
    """
    bundle = {"CPU": wanted.cpus_per_rank, "GPU": wanted.gpus_per_rank}
    rank = ResourceRequestUtil.make({name: amount for name, amount in bundle.items() if amount})
    gang = GangResourceRequest(requests=[rank] * wanted.world_size)
    kinds = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=kind.get("min_workers", 0),
            max_worker_nodes=kind.get("max_workers", 0),
            priority=kind.get("priority", 0),
            resources={key: float(value) for key, value in kind["resources"].items()},
            launch_config_hash=name,
        )
        for name, kind in node_types.items()
    }
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=kinds,
            max_num_nodes=most,
            gang_resource_requests=[gang] * wanted.max_replicas,
            recoverable_resource_availabilities=dict(failed or {}),
        )
    )
    assert not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}
