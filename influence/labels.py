"""Labels of pseudo-gradients: sampled from the model's own distribution, or the true next tokens.

Legend: B sequences, T positions, V vocabulary, N predicted positions of a chunk, K blocks of the vocabulary, C
tokens a block. labels_BT[b, t] is the label that position t is asked to predict, `IGNORED` where it predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from influence.batch import Batch

IGNORED = -100  # torch's default ignore_index
_BLOCK = 256  # tokens a block of the two-level inverse CDF
_CHUNK = 1 << 22  # probabilities held at once
_WORD = (1 << 64) - 1

Labels = Callable[[Batch, Tensor], Tensor]
"""`labels(batch, logits_BTV) -> labels_BT`, int64, `IGNORED` where nothing is predicted."""


@dataclass(frozen=True)
class TrueLabels:
    """The next tokens of the corpus: the empirical Fisher's labels, or those of a training gradient."""

    def __call__(self, batch: Batch, logits_BTV: Tensor) -> Tensor:
        """`labels[b, t] = input_ids[b, t + 1]`, int64 `[B, T]`; `logits_BTV` is not read."""
        del logits_BTV
        next_BT = torch.roll(batch.input_ids, -1, dims=1)
        return torch.where(batch.predicted_BT, next_BT, IGNORED)


@dataclass(frozen=True)
class SampledLabels:
    """Labels drawn from the model's own softmax distribution at the true inputs (the Fisher's labels, Eq. 18-20).

    Position t of a sequence turns its uniform number u_t into the label `min {v : P(label <= v) > u_t}`. The numbers
    are those of a counter-based generator whose key is (seed, sequence id) and whose counter is (pass, position):
    neither the other sequences of a batch, nor padding, nor how the corpus is dealt to replicas moves a label. (A
    label can still change where a probability rounds differently, about one in 10^6 positions in float32.)

    Attributes:
        seed: The run's seed.
        pass_index: Tells several draws for the same sequence apart.
    """

    seed: int
    pass_index: int = 0

    def __call__(self, batch: Batch, logits_BTV: Tensor) -> Tensor:
        """Sample int64 `[B, T]` labels at predicted positions; `IGNORED` elsewhere.

        Cost: one exponential and one sum over the vocabulary a position. Holds `_CHUNK` probabilities at a time.
        """
        vocabulary = logits_BTV.shape[-1]
        labels_BT = torch.full(batch.input_ids.shape, IGNORED, dtype=torch.long, device=logits_BTV.device)
        with torch.no_grad():
            for row, (sequence_id, length) in enumerate(
                zip(batch.sequence_ids.tolist(), batch.lengths.tolist(), strict=True)
            ):
                uniforms_T = self._uniforms(sequence_id, length - 1).to(logits_BTV.device)
                for start in range(0, length - 1, max(1, _CHUNK // vocabulary)):
                    chunk = slice(start, min(start + max(1, _CHUNK // vocabulary), length - 1))
                    labels_BT[row, chunk] = inverse_cdf(logits_BTV[row, chunk], uniforms_T[chunk])
        return labels_BT

    def _uniforms(self, sequence_id: int, positions: int) -> Tensor:
        """Numbers in [0, 1), float64: a Philox stream a sequence and pass, its number t for position t."""
        key = np.array([self.seed & _WORD, sequence_id & _WORD], dtype=np.uint64)
        counter = np.array([0, 0, 0, self.pass_index & _WORD], dtype=np.uint64)
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key, counter=counter)).random(positions))


def inverse_cdf(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The tokens at which softmax's cumulative distribution first exceeds `uniforms_N`.

    Two levels, so that no cumulative sum over the whole vocabulary is formed: the block of 256 tokens that holds the
    quantile, then the token in it. Sums over blocks are float64. A token of probability zero is never chosen, at any
    u in [0, 1].

    Args:
        logits_NV: Logits in any floating-point type; half precision is computed in float32.
        uniforms_N: float64 in [0, 1].

    Returns:
        int64 `[N]` token ids. Rows of non-finite logits give some valid token: the loss will show them.
    """
    rows, vocabulary = logits_NV.shape
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    probabilities_NV = torch.softmax(logits_NV, dim=1, dtype=dtype)
    whole = vocabulary - vocabulary % _BLOCK
    sums_NK = (
        probabilities_NV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=2) if whole else logits_NV.new_empty(rows, 0)
    )
    rest_N1 = probabilities_NV[:, whole:].sum(dim=1, keepdim=True)
    cumulative_NK = torch.cat([sums_NK.double(), rest_N1.double()], dim=1).cumsum(dim=1)
    quantiles_N = uniforms_N * cumulative_NK[:, -1]
    block_N1 = _first_above(cumulative_NK, quantiles_N)[:, None]
    before_N = F.pad(cumulative_NK, (1, 0)).gather(1, block_N1).squeeze(1)
    token_NC = block_N1 * _BLOCK + torch.arange(_BLOCK, device=logits_NV.device)
    inner_NC = probabilities_NV.gather(1, token_NC.clamp(max=vocabulary - 1)).double() * (token_NC < vocabulary)
    found_N = _first_above(inner_NC.cumsum(dim=1), quantiles_N - before_N)
    return (block_N1.squeeze(1) * _BLOCK + found_N).clamp(max=vocabulary - 1)


def _first_above(sums_NK: Tensor, thresholds_N: Tensor) -> Tensor:
    """First index at which each row of growing sums exceeds its threshold; the last increase if none does."""
    totals_N = sums_NK[:, -1]
    below_total_N = torch.nextafter(totals_N, torch.zeros_like(totals_N))
    found_N = torch.searchsorted(sums_NK, torch.minimum(thresholds_N, below_total_N)[:, None], right=True)
    return found_N.squeeze(1).clamp(max=sums_NK.shape[1] - 1)
