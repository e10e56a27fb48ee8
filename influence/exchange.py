"""What the ranks of one replica tell each other: rows of tensors, flags, small objects.

A replica whose model is sharded runs on several processes in lockstep. Each works on its own part of a micro-batch and
owns its own part of every sum; the rows of all ranks reach every rank by `gather`. The double of one process is
`Alone`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor


def shares(size: int, ranks: int) -> list[slice]:
    """Cut `size` coordinates into one run a rank, all of ⌈size / ranks⌉ but the last ones, which may be empty."""
    width = -(-size // ranks)
    return [slice(min(rank * width, size), min((rank + 1) * width, size)) for rank in range(ranks)]


def gather_rows(exchange: Exchange, local: Tensor) -> Tensor:
    """Rows of all ranks, of equal shape, one rank's after the other's: [ranks · B, ...]."""
    return exchange.gather(local).flatten(0, 1)


def gather_columns(exchange: Exchange, local: Tensor, size: int) -> Tensor:
    """The last dimension put together from the `shares` of all ranks: [..., size]."""
    width = -(-size // exchange.size)
    parts = exchange.gather(functional.pad(local, (0, width - local.shape[-1])))
    return parts.movedim(0, -2).flatten(-2)[..., :size]


class Exchange(Protocol):
    """One rank's end of the connection between the ranks of a replica; every call is made by all of them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        moved_bytes: bytes of tensors that this rank received from the others so far.
    """

    rank: int
    size: int
    moved_bytes: int

    def gather(self, local: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shape, stacked in the order of ranks: [size, ...].

        Moves (size − 1) times the bytes of `local` to each rank.
        """
        ...

    def agree(self, value: Any) -> list[Any]:
        """Small objects of all ranks, in the order of ranks."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Objects of all ranks on rank 0, in the order of ranks; an empty list on the others."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...


class Alone:
    """One process that is the whole replica."""

    rank = 0
    size = 1
    moved_bytes = 0

    def gather(self, local: Tensor) -> Tensor:
        """The tensor itself, [1, ...]."""
        return local.unsqueeze(0)

    def agree(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def collect(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def barrier(self) -> None:
        """Nothing to wait for."""


class TorchExchange:
    """Ranks connected by a process group of torch.distributed: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Take a group over.

        Args:
            group: its ranks are those of the replica; None is the default group.
            device: where tensors are when they are exchanged.
        """
        self._group, self._device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.moved_bytes = 0

    def gather(self, local: Tensor) -> Tensor:
        """See `Exchange.gather`."""
        local = local.to(self._device).contiguous()
        parts = local.new_empty(self.size, *local.shape)
        dist.all_gather(list(parts.unbind(0)), local, group=self._group)
        self.moved_bytes += (self.size - 1) * local.numel() * local.element_size()
        return parts

    def agree(self, value: Any) -> list[Any]:
        """See `Exchange.agree`."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def collect(self, value: Any) -> list[Any]:
        """See `Exchange.collect`."""
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, found if self.rank == 0 else None, group=self._group, group_dst=0)
        return found

    def barrier(self) -> None:
        """See `Exchange.barrier`."""
        self.agree(None)
