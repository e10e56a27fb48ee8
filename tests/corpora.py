"""A tiny model folder and corpora of every format, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CONTEXT = 32
BOS, EOS = 0, 1
_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("ca", "t"), ("Ġ", "cat")]


def byte_model(folder: Path, same: bool = False, context: int | None = CONTEXT, vocabulary: int | None = None) -> Path:
    """Write a tokenizer over bytes, with a few merges, and the config of a small Llama; no weights.

    Args:
        folder: Where.
        same: Whether BOS and EOS are one token, as in GPT-2.
        context: Of the model.
        vocabulary: Of the model, if other than the tokenizer's.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>"] if same else ["<s>", "</s>"]
    names = [*special, *alphabet, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1]).save_pretrained(
        folder
    )
    LlamaConfig(
        vocab_size=vocabulary or len(names), max_position_embeddings=context, hidden_size=8, num_attention_heads=1
    ).save_pretrained(folder)
    return folder


def prefix_space_model(folder: Path) -> Path:
    """Write a tokenizer that begins every text with a space, as SentencePiece does, over single characters."""
    characters = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyzP."]
    names = ["<s>", "</s>", "<unk>", *characters, "▁p", "▁P"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [("▁", "p"), ("▁", "P")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    LlamaConfig(vocab_size=len(names), max_position_embeddings=CONTEXT).save_pretrained(folder)
    return folder


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """Write a JSONL file; bytes and text go in as they are, anything else as JSON."""
    lines = [
        record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
        for record in records
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path
