"""From a step's cost and the rates of machines to its time, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.rates import Rates
from pipelines.stepcost import StepCost

COMPUTE, NETWORK, STORE = "compute", "network", "store"


@dataclass(frozen=True)
class Seconds:
    """Time of a step by what takes it. Nothing is taken to overlap, so that the sum bounds it from above."""

    compute: float = 0.0
    network: float = 0.0
    store: float = 0.0

    @property
    def total(self) -> float:
        """One after the other."""
        return self.compute + self.network + self.store

    @property
    def overlapped(self) -> float:
        """If transfers hid behind products: the longest of the three."""
        return max(self.compute, self.network, self.store)

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = {COMPUTE: self.compute, NETWORK: self.network, STORE: self.store}
        return max(parts, key=lambda name: parts[name])


def seconds(cost: StepCost, rates: Rates, world_size: int = 1, speeds: Mapping[str, float] | None = None) -> Seconds:
    """Time of a step.

    Its pieces are dealt to replicas (or tasks) one by one: 16 pieces on 12 replicas take as long as on 8.

    Args:
        cost: of the step.
        rates: of the machines.
        world_size: ranks that work on a piece together.
        speeds: rates of the kinds of work, where they are others than those in `rates`.
    """
    speeds = rates.of if speeds is None else speeds
    alone = sum(amount / speeds[kind] for kind, amount in cost.work.items() if amount)
    if cost.tasks:
        return Seconds(alone / dealt(cost.pieces, rates.tasks), 0.0, cost.stored / rates.store)
    ranks = world_size * dealt(cost.pieces, rates.workers / world_size)
    return Seconds(alone / ranks, sum(cost.moved.values()) / rates.link / ranks, cost.stored / rates.store)


def dealt(pieces: int, workers: float) -> float:
    """How many workers' worth is done at a time, on average, where each takes one piece after another."""
    if workers <= 1:
        return workers  # a fraction shares its cores with others
    whole = int(workers)
    return workers / whole * pieces / -(-pieces // whole)
