"""Eigenbases of the covariance factors (Equation 18), in float64, block by block.

x_NI: rows to rotate, I coordinates over all blocks; vectors_bb: columns are eigenvectors of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from influence.covariance import block_slices

ALIGNMENT = 16  # numbers
LARGEST_OF_TORCH = 32_766  # coordinates: LAPACK's syevd asks for 1 + 6n + 2n² numbers, which torch counts in 32 bits


def aligned_size(size: int) -> int:
    """The next multiple of `ALIGNMENT`, where that adds at most a sixteenth; else the size itself."""
    extra = -size % ALIGNMENT
    return size + extra if extra * 16 <= size else size


@dataclass(frozen=True)
class BlockBasis:
    """An orthonormal basis Q with eigenvalues, block-diagonal with one or more blocks (Appendix A)."""

    vectors: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Number of coordinates over all blocks."""
        return sum(block.shape[0] for block in self.vectors)

    @property
    def all_values(self) -> Tensor:
        """Eigenvalues of all blocks, in the order of the rotated coordinates; [I]."""
        return torch.cat(list(self.values))

    def rotate(self, x_NI: Tensor) -> Tensor:
        """Coordinates in the basis, x Q; N·Σ b² multiply-adds."""
        return self._apply(x_NI, self.vectors)

    def unrotate(self, x_NI: Tensor) -> Tensor:
        """Back from the basis, x Qᵀ."""
        return self._apply(x_NI, [vectors.T for vectors in self.vectors])

    def aligned(self) -> BlockBasis:
        """The same basis with coordinates of zero added, up to `aligned_size`; only for a single block.

        A bias makes 1024 inputs 1025 columns, and products of such widths run well below the speed of their neighbours
        on CPUs.
        """
        extra = aligned_size(self.size) - self.size
        if len(self.vectors) > 1 or extra == 0:
            return self
        return BlockBasis(
            tuple(functional.pad(vectors, (0, extra, 0, extra)) for vectors in self.vectors),
            tuple(functional.pad(values, (0, extra)) for values in self.values),
        )

    def share(self, part: slice) -> BasisShare:
        """Some of the basis vectors: those of the coordinates in `part`, over all blocks."""
        pieces = []
        for coordinates, vectors in zip(block_slices(self.size, len(self.vectors)), self.vectors, strict=True):
            start = max(part.start, coordinates.start) - coordinates.start
            stop = min(part.stop, coordinates.stop) - coordinates.start
            if start < stop:
                pieces.append((coordinates, vectors[:, start:stop].contiguous()))
        return BasisShare(tuple(pieces))

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> BlockBasis:
        """The same basis in another type or on another device."""
        return BlockBasis(
            tuple(vectors.to(device=device, dtype=dtype) for vectors in self.vectors),
            tuple(values.to(device=device, dtype=dtype) for values in self.values),
        )

    def _apply(self, x_NI: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        if len(matrices) == 1:
            return x_NI @ matrices[0].to(x_NI.dtype)
        parts = block_slices(self.size, len(matrices))
        return torch.cat(
            [x_NI[..., part] @ matrix.to(x_NI.dtype) for part, matrix in zip(parts, matrices, strict=True)], dim=-1
        )


@dataclass(frozen=True)
class BasisShare:
    """Some columns of a block-diagonal Q: for each block that has any, its coordinates and its columns."""

    pieces: tuple[tuple[slice, Tensor], ...]

    def rotate(self, x_NI: Tensor) -> Tensor:
        """The coordinates of x that belong to this share, in their order; [N, share]."""
        rotated = [x_NI[..., part] @ vectors.to(x_NI.dtype) for part, vectors in self.pieces]
        return torch.cat(rotated, dim=-1) if rotated else x_NI[..., :0]

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> BasisShare:
        """The same share in another type or on another device."""
        return BasisShare(tuple((part, vectors.to(device=device, dtype=dtype)) for part, vectors in self.pieces))


def check_decomposable(name: str, size: int, blocks: int) -> None:
    """Refuse a factor that nothing here decomposes, before time is spent on it.

    Raises:
        ValueError: naming the factor and the number of blocks that would do.
    """
    largest = block_slices(size, blocks)[0].stop
    if largest > LARGEST_OF_TORCH and not _numpy_counts_in_64_bits():
        raise ValueError(
            f"the factor {name} has blocks of {largest:,} coordinates; LAPACK with 32-bit integers decomposes "
            f"{LARGEST_OF_TORCH:,} at most. Set factors.blocks={-(-size // LARGEST_OF_TORCH)} or more, or install a "
            "numpy whose LAPACK has 64-bit integers (its wheels for 64-bit machines do)"
        )


def _numpy_counts_in_64_bits() -> bool:
    """Whether numpy was built with the 64-bit interface of LAPACK, as its own wheels are."""
    built = np.show_config(mode="dicts")  # type: ignore[call-overload]
    return "USE64BITINT" in str(built["Build Dependencies"]["lapack"])


def _eigh(block: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, by divide and conquer: numpy's where torch's workspace does not hold it."""
    if block.shape[0] <= LARGEST_OF_TORCH or not _numpy_counts_in_64_bits():
        return torch.linalg.eigh(block)
    found = np.linalg.eigh(block.cpu().numpy())
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def eigenbasis(name: str, blocks: Sequence[Tensor]) -> BlockBasis:
    """Eigendecompose a covariance factor, A = Q_A Λ_A Q_Aᵀ or S = Q_S Λ_S Q_Sᵀ (Equation 18).

    Args:
        name: what the factor is of, for error messages.
        blocks: its symmetric diagonal blocks.

    Returns:
        The basis in float64, eigenvalues ascending in each block and clamped at zero (a covariance has none below).

    Raises:
        ValueError: naming the factor, if it holds a NaN or an infinity or if the decomposition does not converge.
    """
    vectors, values = [], []
    for index, block in enumerate(blocks):
        if not bool(torch.isfinite(block).all()):
            raise ValueError(f"covariance factor {name}, block {index}: holds values that are not finite")
        try:
            eigenvalues, eigenvectors = _eigh(block.to(torch.float64))
        except (RuntimeError, np.linalg.LinAlgError) as error:
            raise ValueError(f"covariance factor {name}, block {index}: no eigendecomposition ({error})") from error
        vectors.append(eigenvectors)
        values.append(eigenvalues.clamp_min(0))
    return BlockBasis(tuple(vectors), tuple(values))
