"""What runs as tasks between the stages: merging parts, eigenbases, preconditioning, ranks, packing.

Legend: I columns and O outputs of a layer, Q queries, R ranks, N tokens of a query.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.factors import (
    basis_tensors,
    correction_tensors,
    covariance_tensors,
    gradient_file,
    layer_file,
    part_file,
    read_basis,
    read_layer_queries,
)
from actors.reduction import (
    Parts,
    allot,
    compress,
    decompose,
    merge_correction,
    merge_covariance,
    precondition,
)
from actors.store import Artifact, Store
from influence.correction import CorrectionSums, owned_part
from influence.covariance import CovarianceSums, block_slices
from influence.eigenbasis import eigenbasis
from influence.layers import LayerSelection, TrackedLayer

OUTPUTS, COLUMNS = 5, 7
LAYER = TrackedLayer("mlp.up", ("mlp.up",), COLUMNS - 1, OUTPUTS, True, False, "mlp.up")
FOLLOWER = TrackedLayer("mlp.gate", ("mlp.gate",), COLUMNS - 1, OUTPUTS, True, False, "mlp.up")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def folder(store: Store, kind: str) -> Artifact:
    return store.folder(kind, f"{kind:0<64}"[:64])


def parts(output: Artifact, *ranks: int) -> Parts:
    return Parts(output, [(f"parts/group-{group}", count) for group, count in enumerate(ranks)], 0)


def test_parts_are_added_in_float64_in_the_order_of_groups(store: Store):
    output = folder(store, "covariance")
    for group, value in enumerate((1e8, 1.0, -1e8, 3.0)):
        tensors = {f"{key}/0.0": torch.full((size, size), value) for key, size in FACTORS.items()}
        output.write_tensors(part_file(f"parts/group-{group}", 0, 0), tensors)
    merge_covariance(parts(output, 1, 1, 1, 1), [LAYER], 1, dict.fromkeys(FACTORS, 1))
    mean = output.read_tensors("gradient/mlp.up.safetensors")["mean/0"]
    assert mean.dtype == torch.float64
    assert bool((mean == 4.0).all())  # float32 would have lost the 1


FACTORS = {"activation/mlp.up": COLUMNS, "gradient/mlp.up": OUTPUTS}


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3)])
def test_covariance_is_the_mean_over_rows_and_stored_once_for_a_shared_input(store: Store, ranks: tuple[int, ...]):
    output = folder(store, "covariance")
    rows_NI, rows_NO = noise(11, COLUMNS), noise(11, OUTPUTS, seed=1)
    selection = LayerSelection((LAYER, FOLLOWER), (), 1)
    for group, rows in enumerate((slice(0, 4), slice(4, 11))):
        a_NI, s_NO = rows_NI[rows], rows_NO[rows]
        for rank in range(ranks[group]):
            sums = CovarianceSums.empty(selection, 2, torch.float64, "cpu", rank, ranks[group])
            sums.activation["mlp.up"].add(a_NI, len(a_NI), torch.float64)
            sums.gradient["mlp.up"].add(s_NO, len(s_NO), torch.float64)
            sums.gradient["mlp.gate"].add(2 * s_NO, len(s_NO), torch.float64)
            tensors, _ = covariance_tensors(sums, selection.layers)
            output.write_tensors(part_file(f"parts/group-{group}", rank, 0), tensors)
    rows = {"activation/mlp.up": 11, "gradient/mlp.up": 11, "gradient/mlp.gate": 11}
    merge_covariance(parts(output, *ranks), [LAYER, FOLLOWER], 2, rows)
    found = [name for name in output.list() if not name.startswith("parts/")]
    assert found == ["activation/mlp.up.safetensors", "gradient/mlp.gate.safetensors", "gradient/mlp.up.safetensors"]
    expected = {"activation/mlp.up": rows_NI.T @ rows_NI / 11, "gradient/mlp.gate": 4 * rows_NO.T @ rows_NO / 11}
    for name, matrix in expected.items():
        written = output.read_tensors(f"{name}.safetensors")
        for index, block in enumerate(block_slices(len(matrix), 2)):
            torch.testing.assert_close(written[f"mean/{index}"], matrix[block, block])
        assert output.read_metadata(f"{name}.safetensors") == {"rows": "11"}


def test_blocks_are_decomposed_each_for_itself(store: Store):
    covariance, output = folder(store, "covariance"), folder(store, "eigenbasis")
    blocks = [noise(9, size) for size in (4, 3)]
    blocks = [block.T @ block for block in blocks]
    tensors = {f"mean/{number}": block for number, block in enumerate(blocks)}
    covariance.write_tensors("activation/mlp.up.safetensors", tensors)
    decompose(output, covariance, "activation/mlp.up", torch.float64)
    basis = read_basis(output, "activation", "mlp.up")
    for vectors, values, block in zip(basis.vectors, basis.values, blocks, strict=True):
        torch.testing.assert_close(vectors @ values.diag() @ vectors.T, block)


def test_a_factor_that_is_not_finite_is_named(store: Store):
    covariance = folder(store, "covariance")
    covariance.write_tensors("gradient/mlp.up.safetensors", {"mean/0": torch.full((3, 3), float("nan"))})
    with pytest.raises(ValueError, match=r"gradient/mlp\.up, block 0: holds values that are not finite"):
        decompose(folder(store, "eigenbasis"), covariance, "gradient/mlp.up", torch.float32)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correction_is_the_mean_over_sequences(store: Store, dtype: torch.dtype, ranks: tuple[int, ...]):
    output = folder(store, "correction")
    sums = [noise(OUTPUTS, COLUMNS, seed=seed).square() for seed in range(3)]
    for group, whole in enumerate(sums):
        for rank in range(ranks[group]):
            mine = CorrectionSums({LAYER.name: whole[owned_part(LAYER, rank, ranks[group])].to(dtype).contiguous()})
            tensors = correction_tensors(mine, [LAYER], rank, ranks[group])
            output.write_tensors(part_file(f"parts/group-{group}", rank, 0), tensors)
    merge_correction(parts(output, *ranks), [LAYER], 20, dtype)
    mean = output.read_tensors(layer_file(LAYER.name))["correction"]
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), sum(sums) / 20, rtol=1e-6, atol=0)


def test_a_correction_that_is_not_finite_is_named(store: Store):
    output = folder(store, "correction")
    broken = torch.full((OUTPUTS, COLUMNS), float("inf"))
    output.write_tensors(part_file("parts/group-0", 0, 0), {f"{LAYER.name}/0.0": broken})
    with pytest.raises(ValueError, match=r"correction of layer mlp\.up holds values that are not finite"):
        merge_correction(parts(output, 1), [LAYER], 2, torch.float32)


@pytest.fixture
def gradients(store: Store) -> Artifact:
    """Three queries of 4, 2 and no tokens that reach the layer."""
    found = folder(store, "gradients")
    tensors = {}
    for query, tokens in enumerate((4, 2, 0)):
        tensors[f"{query}/grad"] = noise(tokens, OUTPUTS, seed=query)
        tensors[f"{query}/act"] = noise(tokens, COLUMNS, seed=10 + query)
    found.write_tensors(gradient_file(LAYER.name, 0), tensors)
    return found


@pytest.fixture
def factors(store: Store) -> dict[str, Artifact]:
    """A fitted layer."""
    found = {name: folder(store, name) for name in ("eigenbasis", "correction")}
    for side, size in (("activation", COLUMNS), ("gradient", OUTPUTS)):
        rows = noise(30, size, seed=size)
        basis = basis_tensors(eigenbasis(side, [rows.T @ rows / 30]))
        found["eigenbasis"].write_tensors(f"{side}/{LAYER.name}.safetensors", basis)
    found["eigenbasis"].write_json("tokens.json", {LAYER.name: 6.0})
    found["correction"].write_tensors(layer_file(LAYER.name), {"correction": noise(OUTPUTS, COLUMNS).square()})
    return found


def gradient_of(gradients: Artifact, query: int) -> Tensor:
    tensors = gradients.read_tensors(gradient_file(LAYER.name, 0))
    return tensors[f"{query}/grad"].T @ tensors[f"{query}/act"]


def inverse_times(factors: dict[str, Artifact], gradient_OI: Tensor, damping_factor: float) -> Tensor:
    """(G + λ)⁻¹ ∇f, entry by entry of the eigenbasis."""
    Q_A = factors["eigenbasis"].read_tensors(f"activation/{LAYER.name}.safetensors")["vectors/0"]
    Q_S = factors["eigenbasis"].read_tensors(f"gradient/{LAYER.name}.safetensors")["vectors/0"]
    correction_OI = factors["correction"].read_tensors(layer_file(LAYER.name))["correction"]
    damping = damping_factor * correction_OI.mean()
    return Q_S @ ((Q_S.T @ gradient_OI @ Q_A) / (correction_OI + damping)) @ Q_A.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_queries_are_preconditioned_in_the_type_asked_for(
    store: Store, gradients: Artifact, factors: dict, dtype: torch.dtype
):
    output = folder(store, "ihvp")
    precondition(output, gradients, factors, LAYER, "ekfac", 0.3, 3, None, 0.0, dtype)
    dense_QOI = output.read_tensors(layer_file(LAYER.name))["dense"]
    assert dense_QOI.dtype == dtype
    for query in range(3):
        expected = inverse_times(factors, gradient_of(gradients, query), 0.3)
        torch.testing.assert_close(dense_QOI[query].double(), expected, rtol=1e-5, atol=1e-6)
    assert not dense_QOI[2].any()
    compressed = folder(store, "queries")
    compress(compressed, output, LAYER.name, [0, 0, 0])
    assert torch.equal(compressed.read_tensors(layer_file(LAYER.name))["dense"], dense_QOI)


def test_spectra_are_cut_packed_and_expanded_again(store: Store, gradients: Artifact, factors: dict):
    output, queries = folder(store, "ihvp"), folder(store, "queries")
    precondition(output, gradients, factors, LAYER, "ekfac", 0.3, 3, None, 0.0, None)
    (first, second, third) = allot(output, [LAYER.name], 3, rank=OUTPUTS, fidelity=None)
    ranks = [entry["ranks"][LAYER.name] for entry in (first, second, third)]
    assert ranks == [OUTPUTS, OUTPUTS, 0]
    assert first["predicted_fidelity"] == pytest.approx(1.0)
    compress(queries, output, LAYER.name, ranks)
    held = read_layer_queries(queries, LAYER.name, 3)
    assert held.total_rank == 2 * OUTPUTS
    dense_QOI = held.densified().dense_QOI
    assert dense_QOI is not None
    for query in range(3):
        expected = inverse_times(factors, gradient_of(gradients, query), 0.3)
        torch.testing.assert_close(dense_QOI[query].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_rank_is_spread_by_what_it_is_worth(store: Store):
    ihvp = folder(store, "ihvp")
    spectra = {"strong": [9.0, 8.0, 7.0], "weak": [1.0, 0.5, 0.1]}
    for name, values in spectra.items():
        found = {"0/values": torch.tensor(values, dtype=torch.float64)}
        found["0/energy"] = torch.tensor([sum(value**2 for value in values)], dtype=torch.float64)
        ihvp.write_tensors(layer_file(name), found)
    total = sum(value**2 for values in spectra.values() for value in values)
    (by_rank,) = allot(ihvp, list(spectra), 1, rank=2, fidelity=None)
    assert by_rank["ranks"] == {"strong": 3, "weak": 1}
    assert by_rank["predicted_fidelity"] == pytest.approx(((81 + 64 + 49 + 1) / total) ** 0.5)
    (by_fidelity,) = allot(ihvp, list(spectra), 1, rank=None, fidelity=0.85)
    assert by_fidelity["ranks"] == {"strong": 2, "weak": 0}
    assert by_fidelity["predicted_fidelity"] >= 0.85


def test_a_curvature_of_zero_is_refused_with_the_layer(store: Store, gradients: Artifact, factors: dict):
    flat = store.folder("correction", "9" * 64)
    flat.write_tensors(layer_file(LAYER.name), {"correction": torch.zeros(OUTPUTS, COLUMNS)})
    with pytest.raises(ValueError, match=r"layer mlp\.up: damping 0\.0: the layer's curvature is zero"):
        precondition(
            folder(store, "ihvp"), gradients, factors | {"correction": flat}, LAYER, "ekfac", 0.1, 3, 4, 0.0, None
        )
