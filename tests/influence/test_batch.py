"""Padding and which positions predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.batch import Batch


def test_rows_are_padded_on_the_right_and_masks_follow_lengths():
    batch = Batch.collate([7, 2**40, 9], [[5, 6, 7, 8], [5], np.array([1, 2], dtype=np.int32)])
    assert batch.sequence_ids.tolist() == [7, 2**40, 9]
    assert batch.lengths.tolist() == [4, 1, 2]
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 0, 0, 0], [1, 2, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.predicted_BT.tolist() == [[True, True, True, False], [False] * 4, [True, False, False, False]]
    assert batch.input_ids.dtype == batch.lengths.dtype == batch.sequence_ids.dtype == torch.int64
    assert len(batch) == 3


def test_moving_a_batch_moves_all_of_it():
    moved = Batch.collate([1], [[1, 2]]).to("meta")
    assert {moved.sequence_ids.device.type, moved.input_ids.device.type, moved.lengths.device.type} == {"meta"}
    assert moved.predicted_BT.device.type == moved.attention_mask_BT.device.type == "meta"


def test_what_cannot_be_a_batch_is_refused():
    with pytest.raises(ValueError, match="sequence 4 holds no token"):
        Batch.collate([3, 4], [[1], []])
    with pytest.raises(ValueError, match="at least one sequence"):
        Batch.collate([], [])
    with pytest.raises(ValueError, match="1 sequence ids for 2 rows"):
        Batch.collate([3], [[1], [2]])
