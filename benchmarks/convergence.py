"""How honest the extrapolation of `convergence` is: what fits on n/8 say of fits on n/2, against fits on n/2.

    python -m benchmarks.convergence FOLDER [SEEDS] [OVERRIDES ...]

Runs the real steps of `whence trace experiment=tinystories` up to the comparison of fits, for each seed of the samples
(5 by default) once with an eighth and once with half of the sample a fit, in a store in FOLDER. OVERRIDES are settings,
as on the command line. An error share is 1/r - 1, r the mean correlation over queries; a ratio above 1 means that fits
were promised to agree less than they do.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from actors.store import Store
from conf.load import compose_config
from conf.schema import RunConfig
from influence.convergence import error_share
from pipelines.cluster import Cluster
from pipelines.graph import build_steps, steps_up_to
from pipelines.runner import Runner
from pipelines.stages.convergence import beyond

SETTINGS = ["experiment=tinystories", "corpus.sequence_length=128", "factors.samples=1000"]


def compared(config: RunConfig, cluster: Cluster, seed: int, share: float) -> list[dict[str, Any]]:
    """The curve of a run whose fits take a share of the sample."""
    factors = dataclasses.replace(config.factors, seed=seed, convergence_share=share)
    run = dataclasses.replace(config, factors=factors, seed=seed)
    steps = steps_up_to(build_steps(run), ["convergence"])
    outcome = Runner(Store(run.store), steps, run, lambda: nullcontext(cluster)).run()["convergence"]
    return outcome.artifact.read_json("convergence.json")["sizes"]


def main(folder: Path, seeds: int, overrides: list[str]) -> None:
    """Print a table, a row a seed."""
    config = compose_config([*SETTINGS, f"store={folder / 'store'}", *overrides])
    with Cluster(config) as cluster:
        compare(config, cluster, seeds)


def compare(config: RunConfig, cluster: Cluster, seeds: int) -> None:
    """The table of a run."""
    ratios: dict[str, list[float]] = {"as seen": [], "as 1/n": []}
    for seed in range(seeds):
        small, large = (compared(config, cluster, seed, share) for share in (0.125, 0.5))
        outlook = beyond(small, large[-1]["sequences"])
        assert outlook is not None
        truth = error_share(large[-1]["mean"])
        found = {"as seen": error_share(outlook["mean"]), "as 1/n": error_share(outlook["at_best"])}
        for name, share in found.items():
            ratios[name].append(share / truth)
        curve = ", ".join(f"{entry['sequences']}: {entry['mean']:.5f}" for entry in [*small, *large[1:]])
        told = ", ".join(f"{name} {ratios[name][-1]:.2f}" for name in found)
        sys.stdout.write(f"seed {seed}: {curve}; rate {outlook['rate']:.2f}; error share over that measured: {told}\n")
        sys.stdout.flush()
    for name, values in ratios.items():
        middle = statistics.median(values)
        sys.stdout.write(f"{name}: median {middle:.2f}, {min(values):.2f} to {max(values):.2f}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    given = sys.argv[1:]
    main(Path(given[0]).absolute(), int(given[1]) if len(given) > 1 else 5, given[2:])
