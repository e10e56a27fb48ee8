"""A model's tokenizer as the rest of the code needs it: batches of text in, token ids out, and the model's limits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from actors.model import context_length, load_model_config, load_tokenizer, vocabulary_size
from conf.schema import ModelConfig


@dataclass(frozen=True)
class Limits:
    """What the model can take.

    Attributes:
        vocabulary: Token ids are below this.
        context: The most tokens a sequence may have; None where the model states no limit.
    """

    vocabulary: int
    context: int | None


class Tokeniser:
    """A Hugging Face tokenizer that never adds special tokens by itself and never crashes on hostile text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def bos(self) -> int | None:
        """The id of the beginning-of-sequence token, if there is one."""
        return self._tokenizer.bos_token_id

    @property
    def eos(self) -> int | None:
        """The id of the end-of-sequence token, if there is one."""
        return self._tokenizer.eos_token_id

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of BOS, EOS and padding, which BM25 leaves out."""
        ids = (self.bos, self.eos, self._tokenizer.pad_token_id)
        return frozenset(token for token in ids if token is not None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise each text on its own. Lone surrogates, which no UTF-8 can hold, become U+FFFD first."""
        if not texts:
            return []
        encoded = self._tokenizer(
            [well_formed(text) for text in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of token ids, special tokens included, without cleaning up spaces."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def digest(self) -> str:
        """Give a SHA-256 of all that determines token ids: part of the identity of the tokenised corpus."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        special = (self.bos, self.eos, self._tokenizer.pad_token_id)
        return hashlib.sha256(f"{type(self._tokenizer).__name__}\n{special}\n{content}".encode()).hexdigest()


def well_formed(text: str) -> str:
    """Replace lone surrogates by U+FFFD; any other text, NULs and control characters included, is left alone."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@lru_cache(maxsize=4)
def load_tokeniser(model: ModelConfig) -> Tokeniser:
    """Load the tokenizer of a model, from `model.tokenizer` or from beside the weights; kept for the process.

    Raises:
        ConfigError: There is no tokenizer there.
    """
    # many single-threaded tasks share the machine, and threads of the tokenizer do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokeniser(load_tokenizer(model))


def model_limits(model: ModelConfig) -> Limits:
    """Read the vocabulary and the context of a model from its config, without its weights.

    Raises:
        ConfigError: There is no model config there.
    """
    config = load_model_config(model)
    return Limits(vocabulary_size(config), context_length(config))


def outside_vocabulary(ids: np.ndarray, vocabulary: int) -> int | None:
    """Give the first id that the model has no embedding for, or None."""
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    return int(ids[wrong[0]]) if len(wrong) else None
