"""A model, a corpus and queries of random words, made to measure: times do not depend on what the words say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 1000
QUERY_WORDS = 8


def make(folder: Path, *, hidden: int, inner: int, layers: int, length: int, sequences: int, queries: int) -> list[str]:
    """Write them.

    Args:
        folder: Where.
        hidden: Width of the Llama.
        inner: Width of its MLP.
        layers: Its blocks.
        length: Tokens a sequence.
        sequences: Of the corpus; every document fills one.
        queries: Their number.

    Returns:
        Overrides for `compose_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(folder / "model", hidden, inner, layers, length)
    _write_text(folder, length, sequences, queries)
    return [
        f"model.path='{folder / 'model'}'",
        f"corpus.path='{folder / 'corpus.jsonl'}'",
        f"queries.path='{folder / 'queries.jsonl'}'",
        f"corpus.sequence_length={length}",
        "corpus.add_bos=false",
        "corpus.add_eos=false",
        "prefilter=none",
        "unfiltered=all",
    ]


def _write_model(folder: Path, hidden: int, inner: int, layers: int, length: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=length,
        bos_token_id=WORDS,
        eos_token_id=WORDS + 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<s>": WORDS, "</s>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def _write_text(folder: Path, length: int, sequences: int, queries: int) -> None:
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(count))

    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for _ in range(sequences):
            corpus.write(json.dumps({"text": words(length)}) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for number in range(queries):
            record = {"query_id": f"q{number}", "prompt": words(QUERY_WORDS), "completion": " " + words(QUERY_WORDS)}
            file.write(json.dumps(record) + "\n")
