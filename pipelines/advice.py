"""What a plan warns of: memory that does not suffice, replicas without work, factors that no LAPACK decomposes.

Pure policy over a workload and its costs; each warning names the keys that help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from influence.cost import factor_sizes
from influence.eigenbasis import check_decomposable
from influence.passes import correction_bytes, covariance_bytes
from pipelines.rates import Rates
from pipelines.stepcost import StepCost
from pipelines.workload import Workload, bytes_of, correction_passes, covariance_passes

MOST_RANKS = 4096


def advice(load: Workload, costs: Mapping[str, StepCost], rates: Rates) -> Iterator[str]:
    """Warnings, for people."""
    yield from _large_factors(load)
    yield from _device_memory(load, costs, rates)
    yield from _idle_replicas(load)


def too_large(load: Workload) -> str:
    """The remedy where a layer's factors alone exceed `cluster.memory_per_rank`: the first world size that holds it."""
    ranks = load.ranks
    while ranks < MOST_RANKS:
        ranks *= 2
        wider = replace(load.config, cluster=replace(load.config.cluster, world_size=ranks))
        if _fits(replace(load, config=wider)):
            return f"for example, set cluster.world_size={ranks}"
    return "for example, raise factors.blocks"


def _fits(load: Workload) -> bool:
    try:
        covariance_passes(load)
        correction_passes(load)
    except ValueError:
        return False
    return True


def _large_factors(load: Workload) -> Iterator[str]:
    for name, size in factor_sizes(load.layers).items():
        try:
            check_decomposable(name, size, load.config.factors.blocks)
        except ValueError as error:
            yield str(error)
            return


def _device_memory(load: Workload, costs: Mapping[str, StepCost], rates: Rates) -> Iterator[str]:
    """Steps of which a rank holds more than its device has, or all but a tenth of it."""
    if rates.memory is None:
        return
    for name, cost in costs.items():
        held = sum(cost.memory.values())
        if cost.tasks or held <= rates.memory:
            continue
        largest = max(cost.memory, key=lambda part: cost.memory[part])
        yield (
            f"{name}: a rank would hold {held / 1e9:,.1f} GB of a device's {rates.memory / 1e9:,.1f} GB, most of it "
            f"{largest}. {_remedy(load, largest)}"
        )


def _remedy(load: Workload, largest: str) -> str:
    if largest in ("captured", "autograd", "logits", "rows"):
        return f"Lower scan.batch_size (now {load.config.scan.batch_size}) or raise cluster.world_size"
    if largest in ("sums", "bases", "factored queries", "dense queries"):
        each = max(_factors_of_a_layer(load))
        return (
            "Set cluster.memory_per_rank below what is free beside weights and activations (the largest layer takes "
            f"{each / 1e9:,.2f} GB), or raise cluster.world_size"
        )
    return f"Raise cluster.world_size (now {load.ranks})"


def _factors_of_a_layer(load: Workload) -> Iterator[int]:
    blocks, itemsize = load.config.factors.blocks, bytes_of(load.config.scan.sum_dtype)
    for layer in load.layers:
        yield max(bytes_for(layer, load.ranks, blocks, itemsize) for bytes_for in (covariance_bytes, correction_bytes))


def _idle_replicas(load: Workload) -> Iterator[str]:
    units = load.groups * len(covariance_passes(load))
    if load.replicas > units:
        yield (
            f"the covariance has {units} units of work for {load.replicas} replicas. Raise factors.groups (now "
            f"{load.config.factors.groups}), which is part of the factors' identity"
        )
