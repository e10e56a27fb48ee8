"""A micro-batch of token sequences, padded on the right.

Legend: B sequences, T positions (the longest sequence of the batch).
input_ids_BT: [sequences, positions]; predicted_BT, attention_mask_BT: the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DUMMY = -1  # sequence id of what only fills a batch up
PADDING_ID = 0  # any token id will do: masked positions are seen by no other position and enter no statistic


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together.

    Attributes:
        sequence_ids: int64 `[B]`, the corpus-wide number of each sequence; keys its sampled labels.
        input_ids: int64 `[B, T]`, right-padded.
        lengths: int64 `[B]`, the tokens of each sequence that are not padding.
    """

    sequence_ids: Tensor
    input_ids: Tensor
    lengths: Tensor

    @classmethod
    def collate(cls, sequence_ids: Sequence[int], rows: Sequence[Sequence[int] | np.ndarray]) -> Batch:
        """Pad `rows` of token ids on the right to the longest of them.

        Raises:
            ValueError: If there is no row, a row is empty, or the numbers of ids and rows differ.
        """
        if len(sequence_ids) != len(rows):
            raise ValueError(f"{len(sequence_ids)} sequence ids for {len(rows)} rows of tokens")
        if not rows:
            raise ValueError("a batch needs at least one sequence")
        lengths = [len(row) for row in rows]
        if min(lengths) == 0:
            raise ValueError(f"sequence {sequence_ids[lengths.index(0)]} holds no token")
        input_ids_BT = torch.full((len(rows), max(lengths)), PADDING_ID, dtype=torch.long)
        for padded_T, row, length in zip(input_ids_BT, rows, lengths, strict=True):
            padded_T[:length] = torch.as_tensor(row, dtype=torch.long)
        return cls(torch.tensor(list(sequence_ids), dtype=torch.long), input_ids_BT, torch.tensor(lengths))

    def __len__(self) -> int:
        """The number of sequences, B."""
        return self.input_ids.shape[0]

    @property
    def attention_mask_BT(self) -> Tensor:
        """An int64 `[B, T]`: 1 at tokens, 0 at padding, as Hugging Face models take it."""
        return (self._positions_T < self.lengths[:, None]).long()

    @property
    def predicted_BT(self) -> Tensor:
        """A bool `[B, T]`: True where position t predicts token t + 1, so never at a last position or in padding."""
        return self._positions_T < (self.lengths[:, None] - 1)

    def filled(self, multiple: int) -> Batch:
        """The batch with sequences of one token added, which predict nothing, up to a multiple of a number of ranks.

        It has two positions at least, so that there are rows to exchange.
        """
        extra = -len(self) % multiple
        wider = max(0, 2 - self.input_ids.shape[1])
        if extra == 0 and wider == 0:
            return self
        return Batch(
            F.pad(self.sequence_ids, (0, extra), value=DUMMY),
            F.pad(self.input_ids, (0, wider, 0, extra), value=PADDING_ID),
            F.pad(self.lengths, (0, extra), value=1),
        )

    def part(self, rank: int, ranks: int) -> Batch:
        """A rank's sequences of a batch whose length is a multiple of `ranks`, padded as the whole is."""
        size = len(self) // ranks
        return self.rows(rank * size, (rank + 1) * size)

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences, padded as the whole is."""
        part = slice(start, stop)
        return Batch(self.sequence_ids[part], self.input_ids[part], self.lengths[part])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(self.sequence_ids.to(device), self.input_ids.to(device), self.lengths.to(device))

    @property
    def _positions_T(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device)
