"""What `whence plan` says a trace takes, and what it takes: step by step, on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.plan [--ranks 1 2] [--sequences 400] [--output FILE.md]

The plan is made by the very function of the command, right before the run, with rates that it times itself; what ranks
receive from one another a second is timed here before and given as `plan.link_bytes`. The run is a whole trace by one
replica of one thread a rank. The steps that plan to take a second or more are compared, and their sum; start-up, which
a plan leaves out, is in the step `layers`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from actors.sharding import free_address, join, leave
from benchmarks.made import make
from conf.load import compose_config
from pipelines.plan import make_plan
from pipelines.tracing import run_trace

SHAPE = {"hidden": 320, "inner": 1024, "layers": 4, "length": 256, "queries": 16}
GATHERED = 1 << 20  # float32 numbers of a rank, about the rows of a layer in a micro-batch
ROUNDS = 20
LEAST = 1.0  # seconds of a step that is compared
ALLOWED = 1.5  # either way


@dataclass(frozen=True)
class Compared:
    """A step: seconds planned and taken."""

    name: str
    planned: float
    took: float

    @property
    def ratio(self) -> float:
        """Of what it took to what was planned."""
        return self.took / self.planned


def link_bytes(ranks: int) -> float:
    """Bytes a second that a rank receives in gathers between processes of this machine: the median of some rounds."""
    context = get_context("spawn")
    found, address = context.Queue(), free_address()
    processes = [context.Process(target=_gather, args=(rank, ranks, address, found)) for rank in range(ranks)]
    for process in processes:
        process.start()
    seconds = [found.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return (ranks - 1) * GATHERED * 4 / statistics.median(seconds)


def _gather(rank: int, ranks: int, address: str, found: Any) -> None:
    torch.set_num_threads(1)
    exchange, taken = join(rank, ranks, address, 300, gpu=False), []
    rows = torch.ones(GATHERED)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        exchange.gather(rows)
        taken.append(time.perf_counter() - started)
    found.put(statistics.median(taken))
    exchange.barrier()
    leave()


def compare(root: Path, sequences: int, ranks: int) -> tuple[list[Compared], float]:
    """Plan and run; the steps that count, and the seconds of `layers`, in which replicas start."""
    overrides = make(root / "made", sequences=sequences, **SHAPE)
    overrides += [
        f"store='{root / 'store'}'",
        "factors.samples=null",
        "queries.rank=16",
        "queries.fidelity_sample=16",
        "attribution.top=20",
        "cluster.cpus_per_rank=1",
        f"cluster.world_size={ranks}",
    ]
    if ranks > 1:
        overrides.append(f"plan.link_bytes={link_bytes(ranks):.0f}")
    config = compose_config(overrides)
    made = make_plan(config)
    sys.stderr.write(f"{made.text()}\n")
    result = run_trace(config, root / "run")
    took = {name: outcome.seconds for name, outcome in result.outcomes.items()}
    steps = [Compared(step.name, step.seconds, took[step.name]) for step in made.steps if step.seconds >= LEAST]
    return steps, took["layers"]


def table(steps: list[Compared], ranks: int) -> list[str]:
    """Markdown."""
    total = Compared("sum", sum(step.planned for step in steps), sum(step.took for step in steps))
    rows = [
        f"| {step.name} | {step.planned:.1f} | {step.took:.1f} | {step.ratio:.2f} | {_verdict(step)} |"
        for step in (*steps, total)
    ]
    head = f"| {ranks} rank{'s' * (ranks > 1)} | planned, s | took, s | took / planned | within {ALLOWED} |"
    return [head, "| --- | --- | --- | --- | --- |", *rows]


def _verdict(step: Compared) -> str:
    return "yes" if 1 / ALLOWED <= step.ratio <= ALLOWED else "no"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Planned and measured times.")
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--output", type=Path, default=None, help="a Markdown file")
    given = parser.parse_args()
    lines: list[str] = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            steps, start = compare(Path(folder), given.sequences, ranks)
        lines += [*table(steps, ranks), "", f"start-up, in `layers`: {start:.1f} s", ""]
    text = "\n".join(lines)
    sys.stdout.write(text)
    if given.output is not None:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
