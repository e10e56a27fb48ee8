"""How fast work of each kind goes: measured in half a second on this machine, or assumed for GPUs.

The kinds are matrix products in each type (FLOPs), decompositions in float64 (the operations of `influence.cost`),
elementwise passes (numbers of a softmax), weights of attention and text. A rate is that of one replica with its
configured threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from conf.schema import ClusterConfig, cores
from influence.cost import eigenbasis_operations
from pipelines.threads import torch_threads

DECOMPOSITIONS = "decompositions"
ELEMENTWISE = "elementwise"
ATTENTION = "attention"  # weights of attention, beside their products
TEXT = "text"  # bytes of corpus, tokenised
SECONDS = 0.5  # of a calibration, over all kinds
PRODUCT = (1024, 1024, 1024)  # rows, inputs and outputs of a matrix product
LARGEST = 4096  # side of one
DECOMPOSITION_SIZE = 320
ATTENTION_PASSES = 14  # numbers of a softmax that a weight of fused attention costs a CPU, as measured
UTILISATION = 0.4  # of a GPU's peak that a stage is assumed to reach
_BYTES_A_NUMBER = 12  # that a pass over a softmax moves on a GPU

# Dense peaks of published data sheets: FLOP/s by type, then bytes/s of memory.
PEAKS = {
    "H200": ({"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 67e12}, 4.8e12),
    "H100": ({"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 67e12}, 3.35e12),
    "A100": ({"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 19.5e12}, 2.0e12),
}
ASSUMED_GPU = "A100"


@dataclass(frozen=True)
class Rates:
    """Work a second.

    Attributes:
        of: Rate of each kind, for one worker.
        workers: Replicas that truly work side by side.
        tasks: Ray tasks that do (decompositions, reductions).
        how: Where the rates come from, for people.
    """

    of: dict[str, float]
    workers: float
    tasks: float
    how: str


def rates_for(cluster: ClusterConfig, dtypes: Iterable[str], product: tuple[int, int, int] = PRODUCT) -> Rates:
    """Rates of the machines that a config asks for.

    On CPUs this machine is measured and stands for all; on GPUs a share of the peak is assumed, and only what runs on
    CPUs is measured.

    Args:
        cluster: The machines.
        dtypes: Types of matrix products.
        product: Rows, inputs and outputs of the product that is timed: those of a layer of the model.
    """
    names = list(dict.fromkeys(dtypes))
    threads = cluster.cpus_per_rank
    ranks = cluster.max_replicas * cluster.world_size
    available = cores()
    here = cluster.address == "local"
    tasks = max(1.0, (available if here else ranks * threads) / threads)
    if cluster.gpus_per_rank > 0:
        return _on_gpus(cluster, names, tasks)
    workers = float(ranks)
    measured = measure([*names, ELEMENTWISE, DECOMPOSITIONS], threads, product)
    products = ", ".join(f"{name} {measured[name] / 1e9:,.0f} GFLOP/s" for name in names)
    measured[ATTENTION] = measured[ELEMENTWISE] / ATTENTION_PASSES
    sizes = " × ".join(map(str, product))
    how = f"products ({sizes}) timed for {SECONDS} s on this machine with {threads} threads: {products}"
    if here and ranks * threads > available:
        workers = available / threads
        how += f"; {ranks} ranks of {threads} threads share {available} cores"
    return Rates(measured, workers, tasks, how)


def _on_gpus(cluster: ClusterConfig, names: list[str], tasks: float) -> Rates:
    name = _gpu() or ASSUMED_GPU
    peaks, bandwidth = PEAKS[name]
    share = UTILISATION * min(1.0, cluster.gpus_per_rank)
    of = {dtype: share * peaks[dtype] for dtype in names}
    of |= {ELEMENTWISE: share * bandwidth / _BYTES_A_NUMBER, ATTENTION: float("inf")}  # fused with its products
    of |= measure([DECOMPOSITIONS], cluster.cpus_per_rank)
    seen = "the GPU of this machine" if _gpu() else "assumed: no known GPU is seen from here"
    how = f"{UTILISATION:.0%} of the peak of an {name} ({seen}), not measured; decompositions timed on this CPU"
    return Rates(of, float(cluster.max_replicas * cluster.world_size), tasks, how)


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    return next((name for name in PEAKS if name in torch.cuda.get_device_name(0)), None)


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
    rows, inputs, outputs = (min(size, LARGEST) for size in product)
    left = torch.randn(rows, inputs, generator=generator).to(getattr(torch, kind))
    right = torch.randn(inputs, outputs, generator=generator).to(getattr(torch, kind))
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
