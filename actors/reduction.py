"""What runs as Ray tasks, a bundle of layers or a file at a time: merging sums, eigenbases, IHVPs, compression.

Each function reads artifacts and writes artifacts; the driver sees only counts. Partial sums are merged in the order of
their groups, so neither the number of replicas nor their timing moves a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from actors.factors import (
    basis_tensors,
    fit_solver,
    layer_file,
    numbered,
    part_folder,
    read_token_factors,
)
from actors.store import Artifact
from influence.compression import allot_ranks, pack, weighted_spectrum
from influence.covariance import SecondMoment
from influence.eigenbasis import eigenbasis
from influence.layers import TrackedLayer
from influence.solvers import apply


def merged_parts(output: Artifact, groups: int, bundle: int) -> dict[str, Tensor]:
    """The sum over groups of one bundle's partial sums, group by group, in float64."""
    total: dict[str, Tensor] = {}
    for group in range(groups):
        for key, value in output.read_tensors(f"{part_folder(group)}/bundle-{bundle:02d}.safetensors").items():
            total[key] = total[key] + value.double() if key in total else value.double()
    return total


def merge_covariance(
    output: Artifact, groups: int, bundle: int, layers: Sequence[TrackedLayer], rows: Mapping[str, int]
) -> None:
    """Merge one bundle of covariance sums and write a file a factor: its mean, block by block, with its rows."""
    total = merged_parts(output, groups, bundle)
    for layer in layers:
        sides = ["gradient"] + (["activation"] if layer.name == layer.input_group else [])
        for side in sides:
            key = f"{side}/{layer.name}"
            blocks = SecondMoment(numbered(total, key), rows[key]).mean()
            tensors = {f"mean/{index}": block.contiguous() for index, block in enumerate(blocks)}
            output.write_tensors(f"{key}.safetensors", tensors, {"rows": str(rows[key])})


def decompose(output: Artifact, covariance: Artifact, factor: str, dtype: torch.dtype) -> None:
    """Eigendecompose one factor (`activation/<group>` or `gradient/<layer>`) in float64 and write its basis."""
    tensors = covariance.read_tensors(f"{factor}.safetensors")
    basis = eigenbasis(factor, numbered(tensors, "mean")).to(dtype)
    output.write_tensors(f"{factor}.safetensors", basis_tensors(basis))


def merge_correction(
    output: Artifact, groups: int, bundle: int, layers: Sequence[TrackedLayer], sequences: int, dtype: torch.dtype
) -> None:
    """Merge one bundle of correction sums and write Λ of each layer, the mean over sequences."""
    total = merged_parts(output, groups, bundle)
    for layer in layers:
        mean = (total[layer.name] / sequences).to(dtype)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(f"correction of layer {layer.name} holds values that are not finite")
        output.write_tensors(layer_file(layer.name), {"correction": mean}, {"sequences": str(sequences)})


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
    """
    state, weights = fit_solver(solver, factors, layer, damping_factor)
    tensors: dict[str, Tensor] = {}
    dense = []
    for query, factors_of in enumerate(read_token_factors(gradients, layer.name, range(queries))):
        gradient_OI = factors_of.gradient()
        if full is not None:
            dense.append(apply(state, gradient_OI).to(full))
            continue
        spectrum = weighted_spectrum(gradient_OI, state, weights, max_rank, residual)
        tensors[f"{query}/left"] = spectrum.left_OK.contiguous()
        tensors[f"{query}/right"] = spectrum.right_IK.contiguous()
        tensors[f"{query}/values"] = spectrum.values_K.double().contiguous()
        tensors[f"{query}/energy"] = torch.tensor([spectrum.energy], dtype=torch.float64)
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
