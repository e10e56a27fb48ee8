"""Fit factors, precondition queries and score in one process, as the stages do, for the tests of the mathematics.

Legend: B sequences, T positions, I columns and O outputs of a layer, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.batch import Batch
from influence.correction import CorrectionSums, LayerBasis
from influence.covariance import CovarianceSums
from influence.eigenbasis import eigenbasis
from influence.labels import IGNORED, Labels
from influence.layers import LayerSelection, group_inputs, select_layers
from influence.scoring import LayerQueries
from influence.solvers import SOLVERS, LayerCurvature, SolverState, apply
from influence.worker import Precision, Worker
from tests.tiny import Case


@dataclass(frozen=True)
class FixedLabels:
    """Labels looked up by sequence id, so that two computations use the very same ones."""

    table: dict[int, Sequence[int]]

    def __call__(self, batch: Batch, logits_BTV: Tensor) -> Tensor:
        labels_BT = torch.full(batch.input_ids.shape, IGNORED)
        for row_T, sequence_id in zip(labels_BT, batch.sequence_ids.tolist(), strict=True):
            row_T[: len(self.table[sequence_id])] = torch.tensor(list(self.table[sequence_id]))
        return labels_BT.to(logits_BTV.device)


@dataclass(frozen=True)
class Fitted:
    """A worker and what was fitted with it."""

    worker: Worker
    covariance: CovarianceSums
    bases: dict[str, LayerBasis]
    correction: CorrectionSums

    def curvature(self, name: str) -> LayerCurvature:
        """The eigenbasis and eigenvalues of one layer."""
        basis = self.bases[name]
        rows = self.covariance.gradient[name].rows / self.covariance.sequences
        return LayerCurvature(basis.activation, basis.gradient, self.correction.mean(name), rows)

    def solve(self, solver: str, damping_factor: float = 0.1) -> dict[str, SolverState]:
        """The named solver, fitted to every layer."""
        names = [layer.name for layer in self.worker.selection.layers]
        return {name: SOLVERS[solver].fit(self.curvature(name), damping_factor) for name in names}


def selection_of(case: Case) -> LayerSelection:
    """The layers that the implementation finds, with their input groups probed."""
    probe = torch.tensor([[1, 2, 3, 4]])
    return group_inputs(case.model, select_layers(case.model, case.selection), probe)


def worker_for(case: Case, dtype: torch.dtype = torch.float64) -> Worker:
    """A worker that computes everything in `dtype`; it takes the case's model over."""
    selection = selection_of(case)
    return Worker(case.model.to(dtype), selection, Precision(product=dtype, sums=dtype))


def batches_of(rows: Sequence[Sequence[int]], size: int, first_id: int = 0) -> list[Batch]:
    """Micro-batches of `size` sequences in order, numbered from `first_id`."""
    numbers = range(first_id, first_id + len(rows))
    return [Batch.collate(numbers[at : at + size], rows[at : at + size]) for at in range(0, len(rows), size)]


def fit_covariance(
    worker: Worker, batches: Iterable[Batch], passes: Sequence[Labels], blocks: int = 1
) -> CovarianceSums:
    """A and S over every batch with each of the labels."""
    sums = CovarianceSums.empty(worker.selection, blocks, worker.precision.sums)
    for batch in batches:
        for labels in passes:
            worker.accumulate_covariance(batch, labels, sums)
    return sums


def bases_of(worker: Worker, sums: CovarianceSums) -> dict[str, LayerBasis]:
    """The eigenbases of every layer, in the type of the products."""
    dtype, bases = worker.precision.product, {}
    for layer in worker.selection.layers:
        activation = eigenbasis(f"A of {layer.input_group}", sums.activation[layer.input_group].mean())
        gradient = eigenbasis(f"S of {layer.name}", sums.gradient[layer.name].mean())
        bases[layer.name] = LayerBasis(activation.to(dtype), gradient.to(dtype))
    return bases


def fit_correction(
    worker: Worker, batches: Iterable[Batch], passes: Sequence[Labels], bases: dict[str, LayerBasis]
) -> CorrectionSums:
    """Λ over every batch with each of the labels."""
    sums = CorrectionSums.empty(worker.selection, worker.precision.sums)
    for batch in batches:
        for labels in passes:
            worker.accumulate_correction(batch, labels, bases, sums)
    return sums


def fit(worker: Worker, batches: Sequence[Batch], passes: Sequence[Labels], blocks: int = 1) -> Fitted:
    """Covariance, eigenbasis and correction, one after the other."""
    covariance = fit_covariance(worker, batches, passes, blocks)
    bases = bases_of(worker, covariance)
    return Fitted(worker, covariance, bases, fit_correction(worker, batches, passes, bases))


def precondition(states: dict[str, SolverState], gradients: Sequence[dict[str, Tensor]]) -> dict[str, LayerQueries]:
    """(G + λ)⁻¹ ∇f of every query and layer, uncompressed."""
    stacked = {name: torch.stack([apply(state, g[name]) for g in gradients]) for name, state in states.items()}
    return {name: LayerQueries(len(gradients), dense_QOI=full_QOI) for name, full_QOI in stacked.items()}
