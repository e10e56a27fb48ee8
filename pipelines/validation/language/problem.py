"""A language model under validation, in one process: network, training sequences, queries, damping, fitted curvature.

Legend: N training sequences, Q queries. f_q(θ) = log p(completion | prompt); influence of sequence m on it is
∇f_qᵀ (G + λ)⁻¹ ∇log p(z_m), G the mean over the N sequences, λ one number a layer: that of the fitted EK-FAC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from actors.factors import fit_solver, load_selection, read_token_factors
from actors.model import load_model
from actors.queries import TokenisedQuery, read_queries
from actors.sequences import StoredSequences
from actors.store import Artifact
from conf.schema import RunConfig
from influence.batch import Batch
from influence.gauss_newton import LanguageNetwork, Network, Vectors
from influence.layers import LayerSelection, TrackedLayer
from influence.measurement import MEASUREMENTS
from influence.solvers import SolverState

FITTED = ("layers", "sequences", "gradients", "eigenbasis", "correction")
"""Steps of a trace whose artifacts make a problem."""


@dataclass(frozen=True)
class LanguageProblem:
    """A trained language model with its training sequences and queries.

    Attributes:
        network: the model, frozen, in evaluation mode.
        selection: its tracked layers, all that moves.
        rows: token ids of the N training sequences.
        queries: the Q queries.
        measurement: what they measure, as in the config.
        states: EK-FAC fitted to every layer; its damping is everybody's.
    """

    network: LanguageNetwork
    selection: LayerSelection
    rows: Sequence[Sequence[int] | np.ndarray]
    queries: Sequence[TokenisedQuery]
    measurement: str
    states: Mapping[str, SolverState]

    @property
    def size(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def layers(self) -> tuple[TrackedLayer, ...]:
        """The tracked layers."""
        return self.selection.layers

    @property
    def damping(self) -> dict[str, float]:
        """λ by layer."""
        return {name: state.damping for name, state in self.states.items()}

    @property
    def query_ids(self) -> list[str]:
        """Names of the queries."""
        return [query.query_id for query in self.queries]

    def draw(self, numbers: Tensor) -> Batch:
        """The training sequences of these numbers as a micro-batch, in this order."""
        ids = numbers.tolist()
        return Batch.collate(ids, [self.rows[number] for number in ids])

    def batches(self, size: int) -> Iterator[Batch]:
        """All training sequences in micro-batches; neighbours in length share one, so that little is padding."""
        order = torch.tensor([len(row) for row in self.rows]).argsort(stable=True)
        return (self.draw(numbers) for numbers in order.split(size))

    def measure(self, network: Network[Batch]) -> Tensor:
        """The measurement f of every query by a model, [Q], float64."""
        return measure(network, self.queries, self.measurement)


def load_problem(config: RunConfig, fitted: Mapping[str, Artifact]) -> LanguageProblem:
    """Read a problem from the artifacts of a trace.

    Args:
        config: of the trace; `factors.damping_factor` decides λ.
        fitted: artifacts of the steps `FITTED`, by name.
    """
    disable_progress_bar()  # those of files would garble the driver's log: this runs in tasks
    selection = load_selection(fitted["layers"])
    sequences = StoredSequences(fitted["sequences"])
    factors = {name: fitted[name] for name in ("eigenbasis", "correction")}
    states = {
        layer.name: fit_solver("ekfac", factors, layer, config.factors.damping_factor)[0] for layer in selection.layers
    }
    return LanguageProblem(
        LanguageNetwork(load_model(config.model)),
        selection,
        sequences.read(range(sequences.count)),
        read_queries(config),
        config.queries.measurement.name,
        states,
    )


@torch.no_grad()
def measure(network: Network[Batch], queries: Sequence[TokenisedQuery], measurement: str) -> Tensor:
    """The measurement f of every query by a model, [Q], float64."""
    found = []
    for query in queries:
        measured = query.measured()
        found.append(MEASUREMENTS[measurement](network.outputs(measured.batch), measured).sum())
    return torch.stack(found).double()


def query_gradients(
    gradients: Artifact, layers: Sequence[TrackedLayer], queries: Sequence[int], dtype: torch.dtype
) -> Vectors:
    """∇f of some queries, [Q, O, I] by layer; they ascend."""
    return {
        layer.name: torch.stack([each.gradient() for each in read_token_factors(gradients, layer.name, queries)]).to(
            dtype
        )
        for layer in layers
    }


def documents_of(sequences: Artifact) -> list[str]:
    """The document of each sequence, by its id; of several, the one that it begins in."""
    names: list[str] = []
    for shard in sequences.read_json("index.json")["shards"]:
        names += sequences.read_table(shard["name"], columns=["document_id"]).column("document_id").to_pylist()
    return names
