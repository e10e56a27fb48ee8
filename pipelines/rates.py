"""How fast work of each kind goes: measured in half a second on this machine, or assumed for GPUs and networks.

The kinds are matrix products in each type (FLOPs), products and decompositions in float64 on CPUs (the operations of
`influence.cost`), elementwise passes (numbers of a softmax), weights of attention and text. A rate is that of one rank
with its configured threads, or of one task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from conf.schema import ClusterConfig, Gpu, PlanConfig, cores
from influence.cost import eigenbasis_operations
from pipelines.threads import torch_threads

DECOMPOSITIONS = "decompositions"
DOUBLES = "products of tasks"  # float64, on CPUs
ELEMENTWISE = "elementwise"
ATTENTION = "attention"  # weights of attention, beside their products
TEXT = "text"  # bytes of corpus, tokenised
SECONDS = 0.5  # of a calibration, over all kinds
PRODUCT = (1024, 1024, 1024)  # rows, inputs and outputs of a matrix product
LARGEST = 4096  # side of one
DECOMPOSITION_SIZE = 320
DECOMPOSITION_SHARE = 0.33  # of the speed of products; 0.31 to 0.40 seen for sides of 512 to 3072, one thread
ATTENTION_PASSES = 14  # numbers of a softmax that a weight of fused attention costs a CPU, as measured
LOOPBACK_BYTES = 0.5e9  # a second that a rank receives through gloo between processes of a machine, as measured
_BYTES_A_NUMBER = 12  # that a pass over a softmax moves on a GPU


@dataclass(frozen=True)
class DataSheet:
    """What the maker says of a GPU: dense peaks, without sparsity.

    Attributes:
        flops: FLOP/s by type; float64 by its tensor cores.
        bandwidth: Bytes/s of its memory.
        memory: Bytes, of 10⁹ a GB.
        link: Bytes/s that it receives by NVLink, half of what is said for both directions.
    """

    flops: dict[str, float]
    bandwidth: float
    memory: int
    link: float


_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 67e12}
_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 19.5e12}

# NVIDIA's data sheets: H200 Tensor Core GPU (SXM), H100 Tensor Core GPU (SXM), A100 80GB (SXM).
DATA_SHEETS = {
    Gpu.h200: DataSheet(_HOPPER, 4.8e12, 141 * 10**9, 450e9),
    Gpu.h100: DataSheet(_HOPPER, 3.35e12, 80 * 10**9, 450e9),
    Gpu.a100: DataSheet(_AMPERE, 2.04e12, 80 * 10**9, 300e9),
}
ASSUMED_GPU = Gpu.a100


@dataclass(frozen=True)
class Rates:
    """Work a second.

    Attributes:
        of: Rate of each kind, for one worker.
        workers: Ranks that truly work side by side.
        tasks: Ray tasks that do (decompositions, reductions).
        how: Where the rates come from, for people.
        link: Bytes that a rank receives from the others of its replica.
        store: Bytes that all nodes together read from or write to the store.
        memory: Bytes of a rank's device; None where it is not known.
    """

    of: dict[str, float]
    workers: float
    tasks: float
    how: str
    link: float = LOOPBACK_BYTES
    store: float = 1e9
    memory: int | None = None


def rates_for(
    cluster: ClusterConfig,
    dtypes: Iterable[str],
    product: tuple[int, int, int] = PRODUCT,
    assumed: PlanConfig | None = None,
) -> Rates:
    """Rates of the machines that a config asks for.

    On CPUs this machine is measured and stands for all; on GPUs a share of the peak is assumed, and only what runs on
    CPUs is measured, unless `plan.cpu_flops` says it.

    Args:
        cluster: The machines.
        dtypes: Types of matrix products.
        product: Rows, inputs and outputs of the product that is timed: those of a layer of the model.
        assumed: What is known of them otherwise.
    """
    assumed, names = assumed or PlanConfig(), list(dict.fromkeys(dtypes))
    threads, ranks = cluster.cpus_per_rank, cluster.max_replicas * cluster.world_size
    here = cluster.address == "local"
    cpus = assumed.cpus or (cores() if here else ranks * threads)
    nodes = 1 if here else -(-ranks // assumed.ranks_per_node)
    tasks, store = max(1.0, cpus / threads), nodes * assumed.store_bytes
    if cluster.gpus_per_rank > 0:
        return _on_gpus(cluster, names, assumed, tasks, store)
    workers, kinds = float(ranks), [*names, ELEMENTWISE]
    measured = measure([*kinds, *([] if assumed.cpu_flops else [DECOMPOSITIONS, DOUBLES])], threads, product)
    measured[ATTENTION] = measured[ELEMENTWISE] / ATTENTION_PASSES
    measured |= _stated(assumed, threads)
    products = ", ".join(f"{name} {measured[name] / 1e9:,.0f} GFLOP/s" for name in names)
    sizes = " × ".join(map(str, product))
    how = f"products ({sizes}) timed for {SECONDS} s on this machine with {threads} threads: {products}"
    if here and ranks * threads > cores():
        workers = cores() / threads
        how += f"; {ranks} ranks of {threads} threads share {cores()} cores"
    link = _link(cluster, assumed, assumed.link_bytes or LOOPBACK_BYTES)
    return Rates(measured, workers, tasks, how, link, store, assumed.memory_per_rank)


def _on_gpus(cluster: ClusterConfig, names: list[str], assumed: PlanConfig, tasks: float, store: float) -> Rates:
    gpu = assumed.gpu or _gpu() or ASSUMED_GPU
    sheet, share = DATA_SHEETS[gpu], assumed.utilisation * min(1.0, cluster.gpus_per_rank)
    of = {dtype: share * sheet.flops[dtype] for dtype in names}
    of |= {ELEMENTWISE: share * sheet.bandwidth / _BYTES_A_NUMBER, ATTENTION: float("inf")}  # fused with its products
    of |= _stated(assumed, cluster.cpus_per_rank) or measure([DECOMPOSITIONS, DOUBLES], cluster.cpus_per_rank)
    if assumed.gpu:
        seen = "plan.gpu"
    else:
        seen = "the GPU of this machine" if _gpu() else "assumed: no known GPU is seen from here"
    cpus = "plan.cpu_flops" if assumed.cpu_flops else "timed on this CPU"
    how = (
        f"{assumed.utilisation:.0%} of the peak of an {gpu.value} ({seen}), not measured; "
        f"decompositions and products in float64 on CPUs: {cpus}"
    )
    link = _link(cluster, assumed, assumed.link_bytes or assumed.link_utilisation * sheet.link)
    memory = assumed.memory_per_rank or int(sheet.memory * min(1.0, cluster.gpus_per_rank))
    return Rates(of, float(cluster.max_replicas * cluster.world_size), tasks, how, link, store, memory)


def _stated(assumed: PlanConfig, threads: int) -> dict[str, float]:
    """Rates of a task's CPUs, where they are given."""
    if assumed.cpu_flops is None:
        return {}
    return {
        DOUBLES: assumed.cpu_flops * threads,
        DECOMPOSITIONS: DECOMPOSITION_SHARE * assumed.cpu_flops * threads,
    }


def _link(cluster: ClusterConfig, assumed: PlanConfig, inside: float) -> float:
    """Bytes a second that a rank receives.

    Between nodes, what a ring moves passes each node's own connection once, and all of its ranks hear it.
    """
    return inside if cluster.world_size <= assumed.ranks_per_node else min(inside, assumed.network_bytes)


def _gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    return next((gpu for gpu in DATA_SHEETS if gpu.value in torch.cuda.get_device_name(0)), None)


def measure(kinds: Iterable[str], threads: int, product: tuple[int, int, int] = PRODUCT) -> dict[str, float]:
    """Time each kind of work with a number of threads, `SECONDS` in all."""
    names = list(kinds)
    found: dict[str, float] = {}
    with torch_threads(threads), torch.no_grad():
        for name in names:
            work, run = _work(name, product)
            found[name] = _rate(work, run, SECONDS / len(names))
    return found


def _work(kind: str, product: tuple[int, int, int]) -> tuple[int, Callable[[], object]]:
    """One piece of work and its size."""
    generator = torch.Generator().manual_seed(0)
    if kind == DECOMPOSITIONS:
        rows = torch.randn(DECOMPOSITION_SIZE, DECOMPOSITION_SIZE, generator=generator, dtype=torch.float64)
        return eigenbasis_operations(DECOMPOSITION_SIZE), lambda: torch.linalg.eigh(rows @ rows.T)
    if kind == ELEMENTWISE:
        logits = torch.randn(256, 4096, generator=generator)
        return logits.numel(), lambda: torch.softmax(logits, dim=1)
    dtype = torch.float64 if kind == DOUBLES else getattr(torch, kind)
    rows, inputs, outputs = (min(size, LARGEST) for size in product)
    left = torch.randn(rows, inputs, generator=generator).to(dtype)
    right = torch.randn(inputs, outputs, generator=generator).to(dtype)
    return 2 * rows * inputs * outputs, lambda: left @ right


def _rate(work: int, run: Callable[[], object], seconds: float) -> float:
    """The best of the runs that fit in a time: what the machine does when nothing else disturbs it."""
    run()
    stop, best = time.perf_counter() + seconds, float("inf")
    while True:
        started = time.perf_counter()
        run()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended >= stop:
            return work / max(best, 1e-9)
