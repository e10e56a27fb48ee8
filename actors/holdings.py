"""What a replica holds of the store while it works: queries with their contractions planned, and eigenbases.

Each is read once for as long as the tasks name the same artifact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.factors import read_basis, read_layer_queries
from actors.store import Artifact
from conf.schema import Contraction, ScanConfig
from influence.correction import Bases, LayerBasis
from influence.layers import LayerSelection
from influence.scoring import LayerQueries, plan_contractions
from influence.worker import Precision

Queries = dict[str, LayerQueries]


class HeldQueries:
    """The queries of a `queries` artifact, ready for a worker."""

    def __init__(self, selection: LayerSelection, scan: ScanConfig, precision: Precision, device: torch.device) -> None:
        self._layers, self._scan = selection.layers, scan
        self._precision, self._device = precision, device
        self._uri: str | None = None
        self._stored: Queries = {}
        self._planned: tuple[int, Queries] | None = None

    def stored(self, artifact: Artifact) -> Queries:
        """The queries as they lie in the store."""
        if self._uri != artifact.uri:
            count = len(artifact.read_json("queries.json"))
            self._stored = {layer.name: read_layer_queries(artifact, layer.name, count) for layer in self._layers}
            self._uri, self._planned = artifact.uri, None
        return self._stored

    def planned(self, artifact: Artifact, tokens: int) -> Queries:
        """The queries with every layer's contraction chosen for sequences of so many tokens."""
        stored = self.stored(artifact)
        if self._planned is None or self._planned[0] != tokens:
            choice = self._contractions(stored, tokens)
            chosen = {name: held.densified() if choice[name] == "dense" else held for name, held in stored.items()}
            self._planned = (tokens, {name: self._placed(held) for name, held in chosen.items()})
        return self._planned[1]

    def some(self, artifact: Artifact, queries: Sequence[int]) -> Queries:
        """A few of the queries, as full matrices."""
        return {name: self._placed(held.densified(queries)) for name, held in self.stored(artifact).items()}

    def _placed(self, held: LayerQueries) -> LayerQueries:
        return held.to(self._precision.product, self._precision.sums, self._device)

    def _contractions(self, stored: Queries, tokens: int) -> dict[str, str]:
        if self._scan.contraction is not Contraction.auto:
            return dict.fromkeys(stored, self._scan.contraction.name)
        ranks = [stored[layer.name].total_rank for layer in self._layers]
        count = next(iter(stored.values())).queries
        size = self._precision.sums.itemsize
        return plan_contractions(self._layers, ranks, count, tokens, self._scan.dense_memory, size)


class HeldBases:
    """The eigenbases of an `eigenbasis` artifact; layers with the same input share theirs."""

    def __init__(self, selection: LayerSelection, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._dtype, self._device = selection.layers, dtype, device
        self._uri: str | None = None
        self._bases: Bases = {}

    def release(self) -> None:
        """Let the bases go: what comes after the correction needs their memory."""
        self._uri, self._bases = None, {}

    def of(self, artifact: Artifact) -> Bases:
        """The basis of every layer, in the type of the products."""
        if self._uri != artifact.uri:
            inputs = {
                group: read_basis(artifact, "activation", group).aligned().to(self._dtype, self._device)
                for group in dict.fromkeys(layer.input_group for layer in self._layers)
            }
            self._bases = {
                layer.name: LayerBasis(
                    inputs[layer.input_group],
                    read_basis(artifact, "gradient", layer.name).to(self._dtype, self._device),
                )
                for layer in self._layers
            }
            self._uri = artifact.uri
        return self._bases
