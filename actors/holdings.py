"""What a replica holds of the store while it works: queries with their contractions planned, and eigenbases.

Each is read once for as long as the tasks name the same artifact. A rank of a sharded replica holds its share of the
bases; and of the queries, where all of them are more than `cluster.memory_per_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.factors import read_basis, read_layer_queries
from actors.store import Artifact
from conf.schema import Contraction, ScanConfig
from influence.correction import Bases, BasisShares, LayerBasis, LayerBasisShare
from influence.eigenbasis import BasisShare
from influence.exchange import Exchange, shares
from influence.layers import LayerSelection, TrackedLayer
from influence.scoring import LayerQueries, plan_contractions
from influence.worker import Precision

Queries = dict[str, LayerQueries]


class HeldQueries:
    """The queries of a `queries` artifact, ready for a worker."""

    def __init__(
        self,
        selection: LayerSelection,
        scan: ScanConfig,
        precision: Precision,
        device: torch.device,
        exchange: Exchange,
        memory: int | None,
    ) -> None:
        self._layers, self._scan = selection.layers, scan
        self._precision, self._device = precision, device
        self._exchange, self._memory = exchange, memory
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

    @property
    def shared(self) -> bool:
        """Whether each rank holds a share of the queries that are in the store, rather than all of them."""
        if self._exchange.size == 1 or self._memory is None:
            return False
        factors = sum(
            held.left_OR.numel() + held.right_IR.numel()
            for held in self._stored.values()
            if held.left_OR is not None and held.right_IR is not None
        )
        full = sum(held.dense_QOI.numel() for held in self._stored.values() if held.dense_QOI is not None)
        return factors * self._precision.product.itemsize + full * self._precision.sums.itemsize > self._memory

    def planned(self, artifact: Artifact, tokens: int) -> Queries:
        """The queries with every layer's contraction chosen for sequences of so many tokens."""
        stored = self.stored(artifact)
        if self._planned is None or self._planned[0] != tokens:
            choice, sums = self._contractions(stored, tokens), self._precision.sums
            chosen = {
                name: held.densified(dtype=sums) if choice[name] == "dense" else held for name, held in stored.items()
            }
            self._planned = (tokens, {name: self.placed(held, self.shared) for name, held in chosen.items()})
        return self._planned[1]

    def some(self, artifact: Artifact, queries: Sequence[int]) -> Queries:
        """A few of the queries, as full matrices; with several ranks, this one's share of them."""
        sums = self._precision.sums
        return {name: self.placed(held.densified(queries, sums), True) for name, held in self.stored(artifact).items()}

    def chosen(self, artifact: Artifact, queries: Sequence[int]) -> Queries:
        """A few of the queries, as they lie in the store; with several ranks, shared as all of them are."""
        stored = self.stored(artifact)
        return {name: self.placed(held.only(queries), self.shared) for name, held in stored.items()}

    def whole(self, artifact: Artifact) -> Queries:
        """All queries as they lie in the store, in host memory, where one of a layer is taken from as it is needed.

        What was prepared for the scan goes.
        """
        self._planned = None
        return self.stored(artifact)

    def placed(self, held: LayerQueries, shared: bool) -> LayerQueries:
        """Queries of a layer, or a rank's share of them, where and in the type in which they are used."""
        if shared and self._exchange.size > 1:
            held = held.share(self._exchange.rank, self._exchange.size)
        return held.to(self._precision.product, self._precision.sums, self._device)

    def _contractions(self, stored: Queries, tokens: int) -> dict[str, str]:
        if self._scan.contraction is not Contraction.auto:
            return dict.fromkeys(stored, self._scan.contraction.name)
        ranks = [stored[layer.name].total_rank for layer in self._layers]
        count = next(iter(stored.values())).queries
        size = self._precision.sums.itemsize
        return plan_contractions(self._layers, ranks, count, tokens, self._scan.dense_memory, size)


class HeldBases:
    """The eigenbases of some layers of an `eigenbasis` artifact; layers with the same input share theirs."""

    def __init__(self, dtype: torch.dtype, device: torch.device, exchange: Exchange) -> None:
        self._dtype, self._device, self._exchange = dtype, device, exchange
        self._held: tuple[str, tuple[str, ...]] | None = None
        self._bases: Bases | BasisShares = {}

    def release(self) -> None:
        """Let the bases go: what comes after the correction needs their memory."""
        self._held, self._bases = None, {}

    def of(self, artifact: Artifact, layers: Sequence[TrackedLayer]) -> Bases | BasisShares:
        """The basis of every layer, or this rank's share of it, in the type of the products."""
        wanted = (artifact.uri, tuple(layer.name for layer in layers))
        if self._held != wanted:
            self.release()  # before the next ones are read: both may not fit
            self._bases = self._whole(artifact, layers) if self._exchange.size == 1 else self._share(artifact, layers)
            self._held = wanted
        return self._bases

    def _whole(self, artifact: Artifact, layers: Sequence[TrackedLayer]) -> Bases:
        inputs = {
            group: read_basis(artifact, "activation", group).aligned().to(self._dtype, self._device)
            for group in dict.fromkeys(layer.input_group for layer in layers)
        }
        return {
            layer.name: LayerBasis(
                inputs[layer.input_group],
                read_basis(artifact, "gradient", layer.name).to(self._dtype, self._device),
            )
            for layer in layers
        }

    def _share(self, artifact: Artifact, layers: Sequence[TrackedLayer]) -> BasisShares:
        inputs = {
            layer.input_group: self._part(artifact, "activation", layer.input_group, layer.columns) for layer in layers
        }
        return {
            layer.name: LayerBasisShare(
                inputs[layer.input_group], self._part(artifact, "gradient", layer.name, layer.outputs)
            )
            for layer in layers
        }

    def _part(self, artifact: Artifact, side: str, name: str, size: int) -> BasisShare:
        part = shares(size, self._exchange.size)[self._exchange.rank]
        return read_basis(artifact, side, name).share(part).to(self._dtype, self._device)
