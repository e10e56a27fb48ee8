"""Several ranks of one replica as threads of this process: a double of the process group, for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class _Board:
    """What the ranks have put down in the current round."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class ThreadExchange:
    """`influence.exchange.Exchange` between threads."""

    def __init__(self, board: _Board, rank: int, size: int) -> None:
        self._board, self.rank, self.size, self.moved_bytes = board, rank, size, 0

    def gather(self, local: Tensor) -> Tensor:
        parts = self.agree(local.clone())
        self.moved_bytes += (self.size - 1) * local.numel() * local.element_size()
        return torch.stack(parts)

    def agree(self, value: Any) -> list[Any]:
        self._board.values[self.rank] = value
        self._board.barrier.wait()
        found = list(self._board.values)
        self._board.barrier.wait()
        return found

    def collect(self, value: Any) -> list[Any]:
        found = self.agree(value)
        return found if self.rank == 0 else []

    def barrier(self) -> None:
        self.agree(None)


def on_ranks(size: int, function: Callable[[ThreadExchange], Any]) -> list[Any]:
    """What each rank returns; the first error of any rank is raised."""
    board = _Board(size)

    def rank(number: int) -> Any:
        try:
            return function(ThreadExchange(board, number, size))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank, number) for number in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
