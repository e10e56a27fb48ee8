"""What runs as Ray tasks, a bundle of layers or a file at a time: merging sums, eigenbases, IHVPs, compression.

Each function reads artifacts and writes artifacts; the driver sees only counts. Partial sums are merged in the order of
their groups, so neither the number of replicas nor their timing moves a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from actors.factors import (
    basis_tensors,
    covariance_moment,
    fit_solver,
    layer_file,
    numbered,
    part_file,
    read_token_factors,
)
from actors.refinement import read_refined
from actors.store import Artifact
from influence.compression import allot_ranks, pack, spectrum
from influence.covariance import block_slices
from influence.eigenbasis import eigenbasis
from influence.layers import TrackedLayer
from influence.solvers import apply_rotated


@dataclass(frozen=True)
class Parts:
    """The committed partial sums of one bundle of layers: the folder of each group, in order, and its ranks.

    Attributes:
        output: where the sums are.
        groups: folder and ranks of each group.
        bundle: number of the bundle.
        into: where what they add up to is written; None is beside the sums.
    """

    output: Artifact
    groups: Sequence[tuple[str, int]]
    bundle: int
    into: Artifact | None = None

    @property
    def target(self) -> Artifact:
        """Where what they add up to is written."""
        return self.into or self.output

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, group by group and rank by rank."""
        for folder, ranks in self.groups:
            for rank in range(ranks):
                yield from self.output.read_tensors(part_file(folder, rank, self.bundle)).items()


def merge_covariance_bytes(layers: Sequence[TrackedLayer], blocks: int) -> int:
    """Memory of `merge_covariance`: strips and means in float64, 12 bytes a number of the factors, and one part."""
    inputs = [layer.columns for layer in layers if layer.name == layer.input_group]
    numbers = sum(block_squares(size, blocks) for size in [*inputs, *(layer.outputs for layer in layers)])
    return 16 * numbers


def merge_correction_bytes(layers: Sequence[TrackedLayer]) -> int:
    """Memory of `merge_correction`: the sum and the mean in float64 and one part, 20 bytes a parameter."""
    return 20 * sum(layer.parameters for layer in layers)


def decompose_bytes(size: int, blocks: int) -> int:
    """Memory of `decompose`: the factor and its basis, and for the block at work a copy and LAPACK's 2·b² numbers."""
    largest = -(-size // blocks)
    return 8 * (2 * block_squares(size, blocks) + 3 * largest**2)


def block_squares(size: int, blocks: int) -> int:
    """Σ b² over the blocks of a factor."""
    return sum((part.stop - part.start) ** 2 for part in block_slices(size, blocks))


def merge_covariance(parts: Parts, layers: Sequence[TrackedLayer], blocks: int, rows: Mapping[str, int]) -> None:
    """Merge one bundle of covariance sums, in float64, and write a file a factor: its mean, with its rows."""
    total: dict[str, Tensor] = {}
    for key, value in parts:
        if key in total:
            total[key] += value
        else:
            total[key] = value.double()
    for layer in layers:
        sizes = {"gradient": layer.outputs}
        if layer.name == layer.input_group:
            sizes["activation"] = layer.columns
        for side, size in sizes.items():
            key = f"{side}/{layer.name}"
            means = covariance_moment(total, key, size, blocks, rows[key]).mean()
            tensors = {f"mean/{index}": block for index, block in enumerate(means)}
            parts.target.write_tensors(f"{key}.safetensors", tensors, {"rows": str(rows[key])})


def decompose(output: Artifact, covariance: Artifact, factor: str, dtype: torch.dtype) -> None:
    """Eigendecompose one factor (`activation/<group>` or `gradient/<layer>`) in float64 and write its basis."""
    tensors = covariance.read_tensors(f"{factor}.safetensors")
    basis = eigenbasis(factor, numbered(tensors, "mean")).to(dtype)
    output.write_tensors(f"{factor}.safetensors", basis_tensors(basis))


def merge_correction(parts: Parts, layers: Sequence[TrackedLayer], sequences: int, dtype: torch.dtype) -> None:
    """Merge one bundle of correction sums, in float64, and write Λ of each layer, the mean over sequences."""
    totals = {layer.name: torch.zeros(layer.outputs, layer.columns, dtype=torch.float64) for layer in layers}
    for key, value in parts:
        name, _, place = key.rpartition("/")
        row, column = map(int, place.split("."))
        totals[name][row : row + value.shape[0], column : column + value.shape[1]] += value
    for layer in layers:
        mean = (totals[layer.name] / sequences).to(dtype)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(f"correction of layer {layer.name} holds values that are not finite")
        parts.target.write_tensors(layer_file(layer.name), {"correction": mean}, {"sequences": str(sequences)})


def precondition(
    output: Artifact,
    gradients: Artifact,
    factors: Mapping[str, Artifact],
    layer: TrackedLayer,
    solver: str,
    damping_factor: float,
    queries: int,
    max_rank: int | None,
    residual: float,
    full: torch.dtype | None,
    refined: Artifact | None = None,
) -> None:
    """IHVPs of all queries in one layer (Equation 21): full matrices, or weighted singular value decompositions.

    Args:
        output: the `ihvp` artifact.
        gradients: the queries' gradients.
        factors: `eigenbasis` and `correction`, where the solver has them.
        layer: the layer.
        solver: name of the solver.
        damping_factor: damping = factor * mean eigenvalue.
        queries: how many there are.
        max_rank: the most singular values that are kept a query.
        residual: share of a query's energy in this layer that may be dropped.
        full: keep full matrices of this type instead.
        refined: IHVPs by conjugate gradients, to be taken instead of the solver's own.
    """
    state, weights = fit_solver(solver, factors, layer, damping_factor)
    tensors: dict[str, Tensor] = {}
    dense = []
    if refined is None:
        given = read_token_factors(gradients, layer.name, range(queries))
        rotated = (apply_rotated(state, factors_of.gradient()) for factors_of in given)
    else:
        rotated = (state.rotate(full_OI.double()) for full_OI in read_refined(refined, layer.name, range(queries)))
    for query, rotated_OI in enumerate(rotated):
        if full is not None:
            dense.append(state.unrotate(rotated_OI).to(full))
            continue
        found = spectrum(rotated_OI, state, weights, max_rank, residual)
        tensors[f"{query}/left"] = found.left_OK.contiguous()
        tensors[f"{query}/right"] = found.right_IK.contiguous()
        tensors[f"{query}/values"] = found.values_K.double().contiguous()
        tensors[f"{query}/energy"] = torch.tensor([found.energy], dtype=torch.float64)
    if full is not None:
        tensors["dense"] = torch.stack(dense)
    output.write_tensors(layer_file(layer.name), tensors, {"damping": repr(state.damping)})


def allot(ihvp: Artifact, layers: Sequence[str], queries: int, rank: int | None, fidelity: float | None) -> list[dict]:
    """Ranks of every query in every layer, and the correlation with full scores that they predict."""
    values: list[dict[str, Tensor]] = [{} for _ in range(queries)]
    energies: list[dict[str, float]] = [{} for _ in range(queries)]
    for name in layers:
        tensors = ihvp.read_tensors(layer_file(name))
        for query in range(queries):
            values[query][name] = tensors[f"{query}/values"]
            energies[query][name] = float(tensors[f"{query}/energy"])
    allotted = [allot_ranks(values[query], energies[query], rank, fidelity) for query in range(queries)]
    return [asdict(entry) for entry in allotted]


def compress(output: Artifact, ihvp: Artifact, layer: str, ranks: Sequence[int]) -> None:
    """Pack one layer's queries at their ranks; full matrices are passed on as they are."""
    tensors = ihvp.read_tensors(layer_file(layer))
    if "dense" in tensors:
        output.write_tensors(layer_file(layer), {"dense": tensors["dense"]})
        return
    factors = [
        (tensors[f"{query}/left"][:, :rank], tensors[f"{query}/right"][:, :rank]) for query, rank in enumerate(ranks)
    ]
    left, right, owner = pack(factors)
    packed = {"left": left.contiguous(), "right": right.contiguous(), "owner": owner.to(torch.int32)}
    output.write_tensors(layer_file(layer), packed)
