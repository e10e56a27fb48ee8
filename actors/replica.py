"""A replica: one model, and the tasks that the driver deals to it. Runs in a Ray actor or in this process.

A task either finishes and has committed its output, or raises and has committed nothing: it can be dealt again.

Where a model is sharded, each of its ranks has a `Replica`, all of them are given the same task, and they go through
it in step. What one rank finds out alone (memory that ran out, say) ends the task for all: the others are in the
middle of a pass that needs it.
"""

from __future__ import annotations

from actors import pairs, products, querying, scanning, summing
from actors.bench import Bench
from actors.refinement import ProductTask, RefinementTask
from actors.tasks import (
    AgreementTask,
    AttributionTask,
    ConvergenceTask,
    Done,
    FidelityTask,
    GroupTask,
    ProbeTask,
    QueryTask,
    ScanTask,
)


class Replica(Bench):
    """A model with its tracked layers, and what can be asked of it: methods by the names that the pool calls."""

    def covariance(self, task: GroupTask) -> Done:
        """Sum A and S over one group and commit the sums."""
        return summing.covariance(self, task)

    def correction(self, task: GroupTask) -> Done:
        """Sum Λ over one group and commit the sums."""
        return summing.correction(self, task)

    def query_gradients(self, task: QueryTask) -> Done:
        """Write the exact gradient of each query's measurement, as factors over tokens."""
        return querying.query_gradients(self, task)

    def fidelity(self, task: FidelityTask) -> Done:
        """Scores of a sample by compressed and by full-rank queries."""
        return scanning.fidelity(self, task)

    def convergence(self, task: ConvergenceTask) -> Done:
        """Scores of a sample by the full-rank queries of each fit."""
        return scanning.convergence(self, task)

    def products(self, task: ProductTask) -> Done:
        """Sum Jᵀ H J p over one group and commit the sums."""
        return products.products(self, task)

    def refine(self, task: RefinementTask) -> Done:
        """One bundle's part of an iteration of conjugate gradients."""
        return products.refine(self, task)

    def scan(self, task: ScanTask) -> Done:
        """Score one shard of candidates and commit a file of scores."""
        return scanning.scan(self, task)

    def agreement(self, task: AgreementTask) -> Done:
        """Scores of a sample at the run's precision and in float32."""
        return scanning.agreement(self, task)

    def probe(self, task: ProbeTask) -> Done:
        """Score a probe's sequences."""
        return scanning.probe(self, task)

    def cells(self, task: AttributionTask) -> Done:
        """Write the token × layer matrix of every pair."""
        return pairs.cells(self, task)

    def token_steps(self, task: AttributionTask) -> Done:
        """Choose the step of each query on the sequence that it is paired with."""
        return pairs.token_steps(self, task)

    def token_influence(self, task: AttributionTask) -> Done:
        """Write the influence of output and input tokens in every pair."""
        return pairs.token_influence(self, task)
