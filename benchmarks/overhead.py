"""What Ray costs: the same scan by replicas and as a plain loop in one process; and the driver's memory by corpus size.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [--repeats 5] [--sequences 1600] [--output FILE.md]
    OMP_NUM_THREADS=1 python -m benchmarks.overhead --memory [--sequences 2000] [--output FILE.md]

The scan: every way does the same tasks (shards of candidates, each read, scored and committed to a store), one thread a
process, in processes that are started anew each time, at the priority that Ray gives its workers. The plain loop calls
`Replica.scan` for one task after the other; the others hand the tasks to a pool. Ways take turns, and a ratio is taken
within its turn. Start-up (Ray, then the model) is timed apart. "Between tasks" is what a replica spent without one,
from the first to the last: time that only the pool can have taken.

The memory: a whole trace, with one replica, of a corpus and of one ten times as large: the driver's own peak of
resident memory, and of what Python allocated there after Ray had started (tracemalloc).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.made import make

LOOP = "plain loop"
NICE = 15  # the priority of Ray's workers
STEPS = ("layers", "sequences", "gradients", "ihvp", "queries", "candidates")
SHAPE = {"hidden": 256, "inner": 704, "layers": 4, "length": 256, "queries": 8}
TINY = {"hidden": 64, "inner": 64, "layers": 1, "length": 16, "queries": 2}
PRIORITY = {"RAY_worker_niceness": str(NICE)}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="What Ray costs.")
    parser.add_argument("--sequences", type=int, default=1600)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure the driver's memory instead")
    parser.add_argument("--output", type=Path, default=None, help="a Markdown file; the numbers go beside it as JSON")
    parser.add_argument("--child", type=json.loads, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(words)


# --- in a process of its own ---


def prepare(overrides: list[str]) -> None:
    """Everything that the scan needs."""
    from actors.store import Store
    from conf.load import compose_config
    from pipelines.cluster import Cluster
    from pipelines.graph import build_steps
    from pipelines.runner import Runner

    config = compose_config(overrides)
    steps = [step for step in build_steps(config) if step.name in STEPS]
    Runner(Store(config.store), steps, config, lambda: Cluster(config)).run()


def scan(overrides: list[str], replicas: int, place: str) -> dict[str, float]:
    """The scan by so many replicas, or by none: in this process. Seconds of each part."""
    from actors.store import Store
    from conf.load import compose_config
    from pipelines.cluster import Cluster

    config = compose_config([*overrides, f"cluster.max_replicas={max(1, replicas)}"])
    tasks = scan_tasks(config, Store(place).folder("scores", "5" * 64))
    inside: list[float] = []

    def done(_task: object, report: Any) -> None:
        inside.append(report.seconds)

    if not replicas:
        os.nice(NICE)
        begun = time.perf_counter()
        work = _loop(config)
        loaded = time.perf_counter()
        work(tasks, done)
        ended = time.perf_counter()
        seconds = {"ray": 0.0, "model": loaded - begun, "seconds": ended - loaded}
        return seconds | {"inside": sum(inside), "driver": 0.0}
    begun = time.perf_counter()
    with Cluster(config) as cluster:
        cluster.start()
        started = time.perf_counter()
        pool: Any = cluster.pool
        while sum(gang.is_loaded for gang in pool._gangs) < replicas:
            pool._breathe(replicas)  # which asks for as many as there is work for
            pool._step(None)
        loaded, busy = time.perf_counter(), time.process_time()
        pool.run("scan", tasks, done, lambda _running: None)
        ended, busy = time.perf_counter(), time.process_time() - busy
    seconds = {"ray": started - begun, "model": loaded - started, "seconds": ended - loaded}
    return seconds | {"inside": sum(inside), "driver": busy}


def _loop(config: Any) -> Callable[[list, Callable], None]:
    from actors.replica import Replica
    from actors.tasks import ReplicaSpec

    replica = Replica(ReplicaSpec(config.model, config.scan, config.cluster))

    def work(tasks: list, done: Callable) -> None:
        for task in tasks:
            done(task, replica.scan(task))

    return work


def scan_tasks(config: Any, output: Any) -> list[Any]:
    """The tasks of the stage `scores`."""
    from actors.sequences import candidate_files
    from actors.store import Store
    from actors.tasks import ScanTask
    from pipelines.graph import build_steps
    from pipelines.runner import Runner
    from pipelines.stages.scan import scan_ranges, shard_size

    steps = [step for step in build_steps(config) if step.name in STEPS]
    store = Store(config.store)
    made = {
        item.step.name: store.folder(item.step.kind, item.fingerprint) for item in Runner(store, steps, config).plan()
    }
    sequences, candidates, queries = (made[name] for name in ("sequences", "candidates", "queries"))
    total = sum(file["sequences"] for file in candidate_files(candidates))
    size = shard_size(total, config.scan.shard_sequences)

    def here(function: Callable, arguments: list) -> Any:
        return ((position, function(*argument)) for position, argument in enumerate(arguments))

    return [
        ScanTask(output, shard, first, stop, min(size, total - shard * size), sequences, candidates, queries)
        for shard, (first, stop) in enumerate(scan_ranges(here, candidates, size))
    ]


def driver(overrides: list[str], place: str) -> dict[str, float]:
    """The driver's peaks over a whole trace, in bytes."""
    from conf.load import compose_config
    from pipelines.cluster import Cluster
    from pipelines.tracing import run_trace

    config = compose_config(overrides)
    with Cluster(config) as cluster:
        cluster.start()
        before = _resident()
        tracemalloc.start()
        run_trace(config, place)
        _, peak = tracemalloc.get_traced_memory()
    return {"before": before, "resident": _resident(), "python": peak}


def _resident() -> int:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(what: dict[str, Any]) -> None:
    """Run one function and write what it returns to a file."""
    functions: dict[str, Callable[..., Any]] = {"prepare": prepare, "scan": scan, "driver": driver}
    result = functions[what["function"]](*what["arguments"])
    Path(what["result"]).write_text(json.dumps(result), encoding="utf-8")


# --- in the first process ---


def apart(function: str, *arguments: Any) -> Any:
    """Call a function of this module in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        what = json.dumps({"function": function, "arguments": arguments, "result": str(result)})
        command = [sys.executable, "-m", "benchmarks.overhead", "--child", what]
        done = subprocess.run(command, env={**os.environ, **PRIORITY}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{function}{arguments} failed:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def measure_scan(given: argparse.Namespace, root: Path) -> dict[str, list[dict[str, float]]]:
    """Every way, `repeats` times, in alternating order."""
    overrides = make(root / "made", sequences=given.sequences, **SHAPE)
    overrides += [f"store='{root / 'store'}'", "factors=identity", "cluster.cpus_per_rank=1"]
    apart("prepare", overrides)
    ways = {LOOP: 0} | {f"{count} replicas" if count > 1 else "1 replica": count for count in given.replicas}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(given.repeats):
        for name, replicas in ways.items() if repeat % 2 == 0 else reversed(ways.items()):
            with tempfile.TemporaryDirectory(dir=root) as place:
                found[name].append(apart("scan", overrides, replicas, place))
            sys.stderr.write(f"{repeat + 1}/{given.repeats} {name}: {found[name][-1]}\n")
    return found


def scan_table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians with extremes; ratios to the loop of the same turn."""
    lines = [
        "| way | seconds, median (min–max) | of the loop's time | between tasks | driver CPU | Ray starts | loads |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / loop["seconds"] for run, loop in zip(runs, found[LOOP], strict=True)]
        replicas = 1 if name == LOOP else int(name.split()[0])
        idle = [1 - run["inside"] / (replicas * run["seconds"]) for run in runs]
        starts = [f"{statistics.median(run[part] for run in runs):.1f} s" for part in ("driver", "ray", "model")]
        lines.append(
            f"| {name} | {_spread(seconds, '.1f')} | {_spread(ratios, '.3f')} | {_spread(idle, '.2%')} "
            f"| {' | '.join(starts)} |"
        )
    return lines


def measure_memory(given: argparse.Namespace, root: Path) -> dict[str, dict[str, float]]:
    """A corpus, and ten times as much."""
    found = {}
    for size in (given.sequences, 10 * given.sequences):
        place = root / str(size)
        overrides = make(place / "made", sequences=size, **TINY)
        overrides += [f"store='{place / 'store'}'", "factors.samples=null", "cluster.cpus_per_rank=1"]
        found[f"{size:,}"] = apart("driver", overrides, str(place / "run"))
        sys.stderr.write(f"{size} sequences: {found[f'{size:,}']}\n")
    return found


def memory_table(found: dict[str, dict[str, float]]) -> list[str]:
    """MiB."""
    lines = [
        "| sequences | resident, after the start of Ray | peak | of Python's objects |",
        "| --- | --- | --- | --- |",
    ]
    for size, run in found.items():
        parts = " | ".join(f"{run[name] / 2**20:,.1f} MiB" for name in ("before", "resident", "python"))
        lines.append(f"| {size} | {parts} |")
    return lines


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    given = parse()
    if given.child is not None:
        child(given.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            found: Any = measure_memory(given, Path(folder))
            lines = memory_table(found)
        else:
            found = measure_scan(given, Path(folder))
            lines = scan_table(found)
    text = "\n".join(lines)
    sys.stdout.write(f"{text}\n")
    if given.output is not None:
        given.output.write_text(f"{text}\n", encoding="utf-8")
        given.output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
