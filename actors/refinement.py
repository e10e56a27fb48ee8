"""Conjugate gradients on IHVPs, spread over replicas: what lies in the store between iterations, and each one's work.

A batch of K queries is `queries-<start>-<stop>`. Below `parts/<batch>/`, layers in bundles:

    iteration-0003/bundle-00.safetensors    x, r, z after three iterations, and the last direction p
    product-0003/group-0000/rank-000/...    Σ Jᵀ H J p over a group of sequences
    direction-0003/bundle-00.safetensors    p and q = (G + λ) p of the fourth iteration

The direction is z + β p; whoever needs it makes it of these two. Files of an iteration go when the next is committed.
vectors_KOI: K queries in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.factors import bundles, fit_solver, part_file, read_token_factors
from actors.store import Artifact
from influence.conjugate_gradients import advance, conjugate, inner_of, precondition
from influence.gauss_newton import ProductSums, Vectors
from influence.layers import LayerSelection, TrackedLayer
from influence.solvers import SolverState


@dataclass(frozen=True)
class Systems:
    """The linear systems of one batch of queries: everything that stays the same from iteration to iteration.

    Attributes:
        output: the `refinement` artifact.
        gradients: the queries' gradients, the right-hand sides.
        factors: `eigenbasis` and `correction`, for the preconditioner and the damping.
        solver: its name.
        damping_factor: damping = factor · mean(Λ), layer by layer.
        start: the first query.
        stop: the one after the last.
        dtype: type of the vectors.
    """

    output: Artifact
    gradients: Artifact
    factors: Mapping[str, Artifact]
    solver: str
    damping_factor: float
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The batch, as files call it."""
        return f"queries-{self.start:04d}-{self.stop:04d}"

    @property
    def queries(self) -> range:
        """Their numbers."""
        return range(self.start, self.stop)

    def folder(self, what: str, iteration: int) -> str:
        """`parts/<batch>/<what>-<iteration>`."""
        return f"parts/{self.name}/{what}-{iteration:04d}"

    def bundles(self, layers: Sequence[TrackedLayer]) -> list[tuple[TrackedLayer, ...]]:
        """The layers that share a file."""
        size = len(self.queries) * self.dtype.itemsize
        return bundles(layers, {layer.name: size * layer.parameters for layer in layers})

    def state_of(self, layer: TrackedLayer) -> SolverState:
        """The fitted solver of a layer."""
        return fit_solver(self.solver, self.factors, layer, self.damping_factor)[0]


@dataclass(frozen=True)
class Direction:
    """Which directions the vectors of an iteration take.

    Attributes:
        iteration: iterations that are finished.
        chosen: vectors of the batch that have not stopped, ascending.
        beta: β of each of these; 0 before the first iteration.
    """

    iteration: int
    chosen: tuple[int, ...]
    beta: tuple[float, ...]

    def of(self, tensors: Mapping[str, Tensor], layer: str) -> Tensor:
        """P of one layer, from the state after the iteration."""
        rows = torch.tensor(self.chosen)
        beta = torch.tensor(self.beta, dtype=torch.float64)
        return conjugate(tensors[f"{layer}/z"][rows], tensors[f"{layer}/p"][rows], beta)


def refined_file(layer: str, start: int, stop: int) -> str:
    """The file of a batch of refined IHVPs in one layer."""
    return f"layers/{layer}/queries-{start:04d}-{stop:04d}.safetensors"


def read_refined(refined: Artifact, layer: str, queries: Sequence[int]) -> Iterator[Tensor]:
    """The refined IHVPs of some queries in one layer, [O, I]; a file is read once if the queries ascend."""
    batches = [tuple(batch) for batch in refined.read_json("residuals.json")["batches"]]
    held, dense_QOI = (0, 0), torch.empty(0)
    for query in queries:
        if not held[0] <= query < held[1]:
            held = next(batch for batch in batches if batch[0] <= query < batch[1])
            dense_QOI = refined.read_tensors(refined_file(layer, *held))["dense"]
        yield dense_QOI[query - held[0]]


def bundle_file(folder: str, number: int) -> str:
    """The file of a bundle of layers."""
    return f"{folder}/bundle-{number:02d}.safetensors"


def read_direction(systems: Systems, direction: Direction, selection: LayerSelection, device: torch.device) -> Vectors:
    """P of all layers."""
    folder, found = systems.folder("iteration", direction.iteration), {}
    for number, layers in enumerate(systems.bundles(selection.layers)):
        tensors = systems.output.read_tensors(bundle_file(folder, number))
        found |= {layer.name: direction.of(tensors, layer.name).to(device) for layer in layers}
    return found


def product_tensors(sums: ProductSums, layers: Sequence[TrackedLayer]) -> dict[str, Tensor]:
    """A rank's sums of some layers."""
    return {layer.name: sums.sums[layer.name] for layer in layers}


Scalars = dict[str, list[float]]


def begin(systems: Systems, layers: Sequence[TrackedLayer], number: int) -> Scalars:
    """Write the state before the first iteration: x = 0, r = b, z = M⁻¹ r, and no direction.

    Returns:
        ⟨r, z⟩ and ⟨r, r⟩ of each vector over the bundle's layers.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        factors = read_token_factors(systems.gradients, layer.name, systems.queries)
        r = torch.stack([factor.gradient().to(systems.dtype) for factor in factors])
        zeros = torch.zeros_like(r)
        z = precondition(systems.state_of(layer), r)
        tensors |= {f"{layer.name}/{key}": value for key, value in zip("xrzp", (zeros, r, z, zeros), strict=True)}
    systems.output.write_tensors(bundle_file(systems.folder("iteration", 0), number), tensors)
    return _scalars(tensors, layers)


def curve(
    systems: Systems,
    layers: Sequence[TrackedLayer],
    number: int,
    direction: Direction,
    parts: Sequence[tuple[str, int]],
    sequences: int,
) -> Scalars:
    """Write p and q = G p + λ p of a bundle, from the sums of all groups, added in their order.

    Args:
        systems: of the batch.
        layers: of the bundle.
        number: of the bundle.
        direction: p.
        parts: folder and ranks of each group, in order.
        sequences: behind all sums.

    Returns:
        ⟨p, q⟩ of each vector that has not stopped.
    """
    output = systems.output
    state = output.read_tensors(bundle_file(systems.folder("iteration", direction.iteration), number))
    total: dict[str, Tensor] = {}
    for folder, ranks in parts:
        for rank in range(ranks):
            for name, value in output.read_tensors(part_file(folder, rank, number)).items():
                total[name] = total[name].add_(value) if name in total else value.double()
    tensors, pq = {}, torch.zeros(len(direction.chosen), dtype=torch.float64)
    for layer in layers:
        p = direction.of(state, layer.name)
        q = (total.pop(layer.name) / sequences + systems.state_of(layer).damping * p.double()).to(p.dtype)
        pq += inner_of(p, q)
        tensors |= {f"{layer.name}/p": p, f"{layer.name}/q": q}
    output.write_tensors(bundle_file(systems.folder("direction", direction.iteration), number), tensors)
    return {"pq": pq.tolist()}


def step(
    systems: Systems, layers: Sequence[TrackedLayer], number: int, direction: Direction, alpha: Sequence[float]
) -> Scalars:
    """Write the state of a bundle after the iteration: x + α p, r − α q, z = M⁻¹ r, and p.

    Args:
        systems: of the batch.
        layers: of the bundle.
        number: of the bundle.
        direction: p.
        alpha: step lengths of the vectors that have not stopped.

    Returns:
        ⟨r, z⟩ and ⟨r, r⟩ of all vectors.
    """
    output, chosen = systems.output, torch.tensor(direction.chosen)
    tensors = output.read_tensors(bundle_file(systems.folder("iteration", direction.iteration), number))
    moves = output.read_tensors(bundle_file(systems.folder("direction", direction.iteration), number))
    lengths = torch.tensor(alpha, dtype=torch.float64)
    for layer in layers:
        x, r, z, old = (tensors[f"{layer.name}/{key}"] for key in "xrzp")
        p, q = moves[f"{layer.name}/p"], moves[f"{layer.name}/q"]
        advance(x, r, chosen, lengths, p, q)
        z[chosen] = precondition(systems.state_of(layer), r[chosen])
        old[chosen] = p
    output.write_tensors(bundle_file(systems.folder("iteration", direction.iteration + 1), number), tensors)
    return _scalars(tensors, layers)


def keep(systems: Systems, layers: Sequence[TrackedLayer], number: int, iteration: int) -> Scalars:
    """Write x of a bundle after its last iteration, a file a layer."""
    tensors = systems.output.read_tensors(bundle_file(systems.folder("iteration", iteration), number))
    for layer in layers:
        name = refined_file(layer.name, systems.start, systems.stop)
        systems.output.write_tensors(name, {"dense": tensors[f"{layer.name}/x"]})
    return {}


def _scalars(tensors: Mapping[str, Tensor], layers: Sequence[TrackedLayer]) -> Scalars:
    found = {"rz": 0, "rr": 0}
    for layer in layers:
        r, z = tensors[f"{layer.name}/r"], tensors[f"{layer.name}/z"]
        found = {"rz": found["rz"] + inner_of(r, z), "rr": found["rr"] + inner_of(r, r)}
    return {key: value.tolist() for key, value in found.items()}  # type: ignore[attr-defined]


# --- tasks ------------------------------------------------------------------------------------------------------------

WORK: Mapping[str, Callable[..., Scalars]] = {"begin": begin, "curve": curve, "step": step, "keep": keep}


@dataclass(frozen=True)
class RefinementTask:
    """One bundle's part of an iteration.

    Attributes:
        work: which of `WORK`.
        systems: of the batch.
        layers: of the bundle.
        number: of the bundle.
        more: further arguments of the work.
    """

    work: str
    systems: Systems
    layers: tuple[TrackedLayer, ...]
    number: int
    more: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"conjugate gradients of {self.systems.name}, {self.work} in {self.layers[0].name} and those after it"

    def run(self) -> Scalars:
        """Do the work."""
        return WORK[self.work](self.systems, self.layers, self.number, *self.more)


@dataclass(frozen=True)
class ProductTask:
    """Sum Jᵀ H J p over one fixed group of sequences and commit the sums as one part.

    Attributes:
        systems: of the batch.
        direction: p.
        group: number of the group.
        sequence_ids: its sequences, ascending.
        sequences: the tokenised corpus.
        excluded: sequences that the curvature set aside.
        memory: bytes that rows of vectors may take in a replica.
    """

    systems: Systems
    direction: Direction
    group: int
    sequence_ids: Sequence[int]
    sequences: Artifact
    excluded: Mapping[int, str]
    memory: int

    @property
    def output(self) -> Artifact:
        """The artifact that the part belongs to."""
        return self.systems.output

    @property
    def folder(self) -> str:
        """Where in it."""
        return f"{self.systems.folder('product', self.direction.iteration)}/group-{self.group:04d}"

    def __str__(self) -> str:
        return f"group {self.group}"


def row_numbers(layers: Sequence[TrackedLayer], tokens: int, vocabulary: int) -> int:
    """Numbers that a product holds for one vector and sequence: T·(3·V + 2·ΣO).

    Tangents of logits, what H makes of them and one copy; gradients at the outputs of all layers, and one more of one.
    """
    return tokens * (3 * vocabulary + 2 * sum(layer.outputs for layer in layers))


def at_a_time(vectors: int, most: int, rows: int) -> tuple[int, int]:
    """Vectors and sequences that go through the model together.

    Args:
        vectors: K.
        most: sequences at most.
        rows: products of both that memory holds.

    Returns:
        As many vectors as there are, then as many sequences: what vectors share is worth more than what sequences do.
    """
    width = max(1, min(vectors, rows))
    return width, max(1, min(most, rows // width))
