"""What each choice of docs/scaling.md costs and what its alternative would: bytes by formulas, of planned experiments.

    python -m benchmarks.choices [--ranks 8] [paper_52b gpt2_1b]

Bytes that a rank receives in one micro-batch unless said otherwise. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from conf.load import compose_config
from influence import cost, traffic
from pipelines.estimate import held_queries
from pipelines.plan import make_plan
from pipelines.stepcost import StepCost
from pipelines.tables import size
from pipelines.workload import Workload, bytes_of


def rows(load: Workload, costs: dict[str, StepCost]) -> Iterator[tuple[str, float, float]]:
    """A choice, its bytes, and those of its alternative."""
    config, ranks, blocks, each = load.config, load.ranks, load.config.factors.blocks, load.config.scan.batch_size
    model, product = bytes_of(config.model.dtype), bytes_of(config.scan.product_dtype)
    sums, calls, layers = bytes_of(config.scan.sum_dtype), load.shape.calls, load.layers
    weights = traffic.weights_received(load.shape, ranks) * model
    yield "weights gathered twice; held whole", weights, 0
    yield "the same, held", load.parameters / ranks * model, load.parameters * model
    covariance = each * traffic.covariance_received(layers, load.tokens, calls, ranks) * product
    yield "covariance: rows; products", covariance, traffic.products_received(layers, ranks, blocks) * sums
    held = cost.strip_numbers(layers, blocks) * sums
    yield "the same, sums held", held / ranks, held
    correction = each * traffic.correction_received(layers, load.tokens, calls, ranks) * product
    bases = covariance + traffic.bases_received(layers, ranks, blocks) * product
    yield "correction: shares of the bases; bases gathered", correction, bases
    held = cost.basis_numbers(layers, blocks) * product
    yield "the same, bases held", held / ranks, held / ranks
    scores = each * load.queries * (ranks - 1) * sums
    shared = each * traffic.rows_received(layers, load.tokens, calls, ranks) * product
    shared += each * traffic.scores_received(load.queries, ranks, True) * sums
    yield "scan: queries whole; in shares", scores, shared
    queries = sum(held_queries(load).values())
    yield "the same, queries held", queries, queries / ranks
    written = costs["covariance"].temporary + costs["correction"].temporary
    yield "parts, once a group; once a replica (in the store)", written, written / load.groups * load.replicas


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description="What choices cost in bytes.")
    parser.add_argument("experiments", nargs="*", default=["paper_52b", "gpt2_1b"])
    parser.add_argument("--ranks", type=int, default=8)
    given = parser.parse_args()
    for name in given.experiments:
        config = compose_config([f"experiment={name}", f"cluster.world_size={given.ranks}"], planned=True)
        made = make_plan(config)
        lines = [f"{name}: {given.ranks} ranks, {config.scan.batch_size} sequences of {made.load.tokens} each"]
        for choice, taken, other in rows(made.load, {step.name: step.cost for step in made.steps}):
            lines.append(f"| {choice} | {size(taken)} | {size(other)} |")
        sys.stdout.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
