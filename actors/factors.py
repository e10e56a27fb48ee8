"""How sums, bases, gradients and queries lie in artifacts: names of files, names of tensors, and their way back.

A layer's file is `layers/<name>.safetensors`; a factor of an input that several layers share is stored under the
first. Partial sums lie in `parts/<pass>/group-0000/rank-000/bundle-00.safetensors`, layers bundled in order, and count
once the group's `done.json` is there. Their tensors are named by what they are part of, so that replicas with different
numbers of ranks add to the same sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from actors.store import Artifact
from influence.compression import ScoreWeights
from influence.correction import CorrectionSums, LayerBasis, owned_part
from influence.covariance import CovarianceSums, SecondMoment, all_strips
from influence.eigenbasis import BlockBasis
from influence.layers import LayerSelection, TrackedLayer, Untracked
from influence.scoring import LayerQueries
from influence.solvers import SOLVERS, LayerCurvature, NoCurvature, SolverState
from influence.worker import TokenFactors

BUNDLE_BYTES = 1 << 27  # of partial sums in one file
QUERY_BATCH = 16  # queries whose gradients share a file


def layer_file(name: str) -> str:
    """The file of one layer."""
    return f"layers/{name}.safetensors"


def part_folder(layers: Sequence[str], group: int) -> str:
    """The folder of one group's partial sums in the pass over these layers."""
    digest = hashlib.sha256("\n".join(layers).encode()).hexdigest()
    return f"parts/{digest[:12]}/group-{group:04d}"


def part_file(folder: str, rank: int, bundle: int) -> str:
    """The file of one rank's share of a bundle of layers."""
    return f"{folder}/rank-{rank:03d}/bundle-{bundle:02d}.safetensors"


def save_selection(artifact: Artifact, selection: LayerSelection) -> None:
    """Write which layers are tracked."""
    artifact.write_json("selection.json", asdict(selection))


def load_selection(artifact: Artifact) -> LayerSelection:
    """Read which layers are tracked."""
    data = artifact.read_json("selection.json")
    layers = tuple(TrackedLayer(**{**layer, "modules": tuple(layer["modules"])}) for layer in data["layers"])
    return LayerSelection(layers, tuple(Untracked(**entry) for entry in data["untracked"]), data["total_parameters"])


def bundles(layers: Sequence[TrackedLayer], bytes_of: Mapping[str, int]) -> list[tuple[TrackedLayer, ...]]:
    """Layers in order, cut into runs of about `BUNDLE_BYTES`; the same for every group."""
    found: list[list[TrackedLayer]] = [[]]
    size = 0
    for layer in layers:
        if found[-1] and size + bytes_of[layer.name] > BUNDLE_BYTES:
            found.append([])
            size = 0
        found[-1].append(layer)
        size += bytes_of[layer.name]
    return [tuple(run) for run in found]


def covariance_bundles(layers: Sequence[TrackedLayer]) -> list[tuple[TrackedLayer, ...]]:
    """Bundles of covariance sums, I² + O² numbers a layer."""
    return bundles(layers, {layer.name: 4 * (layer.columns**2 + layer.outputs**2) for layer in layers})


def correction_bundles(layers: Sequence[TrackedLayer]) -> list[tuple[TrackedLayer, ...]]:
    """Bundles of correction sums, I·O numbers a layer."""
    return bundles(layers, {layer.name: 4 * layer.columns * layer.outputs for layer in layers})


def covariance_tensors(
    sums: CovarianceSums, layers: Sequence[TrackedLayer]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The strips of some layers' sums as named tensors, and the rows behind each factor."""
    tensors, rows = {}, {}
    for layer in layers:
        moments = {f"gradient/{layer.name}": sums.gradient[layer.name]}
        if layer.name == layer.input_group:
            moments[f"activation/{layer.name}"] = sums.activation[layer.name]
        for key, moment in moments.items():
            rows[key] = moment.rows
            tensors |= {f"{key}/{strip.name}": value for strip, value in moment.strips.items()}
    return tensors, rows


def covariance_moment(tensors: Mapping[str, Tensor], key: str, size: int, blocks: int, rows: int) -> SecondMoment:
    """A factor's sum from its strips."""
    strips = {strip: tensors[f"{key}/{strip.name}"] for strip in all_strips(size, blocks)}
    return SecondMoment(size, blocks, strips, rows)


def correction_tensors(
    sums: CorrectionSums, layers: Sequence[TrackedLayer], rank: int, ranks: int
) -> dict[str, Tensor]:
    """A rank's part of some layers' Λ, named by the row and the column where it starts."""
    found = {}
    for layer in layers:
        rows, columns = owned_part(layer, rank, ranks)
        found[f"{layer.name}/{rows.start}.{columns.start}"] = sums.sums[layer.name]
    return found


def numbered(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    """The tensors `prefix/0`, `prefix/1`, ... in order."""
    found = []
    while f"{prefix}/{len(found)}" in tensors:
        found.append(tensors[f"{prefix}/{len(found)}"])
    return tuple(found)


def basis_tensors(basis: BlockBasis) -> dict[str, Tensor]:
    """A basis as named tensors."""
    vectors = {f"vectors/{index}": block.contiguous() for index, block in enumerate(basis.vectors)}
    return vectors | {f"values/{index}": block.contiguous() for index, block in enumerate(basis.values)}


def read_basis(bases: Artifact, side: str, name: str) -> BlockBasis:
    """One side's basis: `activation` of an input group or `gradient` of a layer."""
    tensors = bases.read_tensors(f"{side}/{name}.safetensors")
    return BlockBasis(numbered(tensors, "vectors"), numbered(tensors, "values"))


def read_layer_basis(bases: Artifact, layer: TrackedLayer) -> LayerBasis:
    """Both sides' bases of one layer."""
    return LayerBasis(read_basis(bases, "activation", layer.input_group), read_basis(bases, "gradient", layer.name))


def read_curvature(factors: Mapping[str, Artifact], layer: TrackedLayer) -> LayerCurvature | None:
    """What was fitted for one layer: `eigenbasis`, and `correction` where there is one; None without factors."""
    if "eigenbasis" not in factors:
        return None
    basis = read_layer_basis(factors["eigenbasis"], layer)
    tokens = factors["eigenbasis"].read_json("tokens.json")[layer.name]
    correction = None
    if "correction" in factors:
        correction = factors["correction"].read_tensors(layer_file(layer.name))["correction"]
    return LayerCurvature(basis.activation, basis.gradient, correction, tokens)


def fit_solver(
    solver: str, factors: Mapping[str, Artifact], layer: TrackedLayer, damping_factor: float
) -> tuple[SolverState, ScoreWeights]:
    """The fitted solver of one layer and the weights of its score norm.

    Raises:
        NoCurvature: a `ValueError` that names the layer, if its curvature cannot be inverted.
    """
    curvature = read_curvature(factors, layer)
    try:
        state = SOLVERS[solver].fit(curvature, damping_factor)
    except NoCurvature as error:
        raise NoCurvature(f"layer {layer.name}: {error}") from error
    return state, ScoreWeights.of(curvature, layer.outputs, layer.columns)


def gradient_file(layer: str, batch: int) -> str:
    """The file of one batch of queries' gradients in one layer."""
    return f"layers/{layer}/queries-{batch:04d}.safetensors"


def read_token_factors(gradients: Artifact, layer: str, queries: Sequence[int]) -> Iterator[TokenFactors]:
    """The gradients of some queries in one layer; a file is read once if the queries ascend."""
    batch, tensors = -1, {}
    for query in queries:
        if query // QUERY_BATCH != batch:
            batch = query // QUERY_BATCH
            tensors = gradients.read_tensors(gradient_file(layer, batch))
        yield TokenFactors(tensors[f"{query}/grad"], tensors[f"{query}/act"])


def read_layer_queries(queries: Artifact, name: str, count: int) -> LayerQueries:
    """All compressed (or full-rank) queries of one layer."""
    tensors = queries.read_tensors(layer_file(name))
    if "dense" in tensors:
        return LayerQueries(count, dense_QOI=tensors["dense"])
    return LayerQueries(count, tensors["left"], tensors["right"], tensors["owner"].to(torch.long))
