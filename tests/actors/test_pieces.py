"""The text of each token: together the decoded sequence, whatever the tokenizer; and what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actors import pieces as module
from actors.pieces import neighbouring_text, token_pieces
from actors.sequences import StoredSequences
from actors.store import Artifact, Store
from actors.tokeniser import Tokeniser, load_tokeniser
from conf.schema import ModelConfig
from tests.corpora import byte_model, prefix_space_model
from tests.integration.world import write_sequences

HOSTILE = (
    "The cat.",
    "naïve café 猫は the 🐱\u200d👩 cat",
    "</script><script>alert(1)</script> <!-- --> &amp;",
    "\u202eright to left\u202c and NUL \x00 and \ufffd itself",
    "\n\n\ttabs   and    spaces ",
    "ﷺ" * 30 + " the cat" * 40,
)


@pytest.fixture
def bytes_(tmp_path: Path) -> Tokeniser:
    return load_tokeniser(ModelConfig(path=str(byte_model(tmp_path / "bytes"))))


@pytest.fixture
def metaspace(tmp_path: Path) -> Tokeniser:
    return load_tokeniser(ModelConfig(path=str(prefix_space_model(tmp_path / "metaspace"))))


@pytest.fixture
def fallback() -> Tokeniser:
    """As Llama's: a space before the text is dropped, and characters without a token are spelt in bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehkst", "▁the"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


@pytest.fixture(params=["bytes_", "metaspace", "fallback"])
def tokeniser(request: pytest.FixtureRequest) -> Tokeniser:
    return request.getfixturevalue(request.param)


def test_pieces_of_random_tokens_are_the_decoded_text(tokeniser: Tokeniser):
    """Bytes that are no UTF-8, special tokens, spaces at any place; more tokens than a window has."""
    random = np.random.default_rng(0)
    vocabulary = len(tokeniser._tokenizer)
    for length in (1, 2, module.WINDOW, module.WINDOW + 1, 200):
        for _ in range(20):
            ids = random.integers(0, vocabulary, length).tolist()
            found = token_pieces(tokeniser, ids)
            assert len(found) == length
            assert "".join(found) == tokeniser.decode(ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_pieces_of_hostile_text_are_the_decoded_text(tokeniser: Tokeniser, text: str):
    ids = [tokeniser.bos, *tokeniser.encode([text])[0], tokeniser.eos]
    found = token_pieces(tokeniser, ids)  # type: ignore[arg-type]
    assert "".join(found) == tokeniser.decode(ids)  # type: ignore[arg-type]
    assert (found[0], found[-1]) == ("<s>", "</s>")


def test_windows_show_what_whole_prefixes_show(tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch):
    ids = [token for text in HOSTILE for token in tokeniser.encode([text])[0]]
    found = token_pieces(tokeniser, ids)
    monkeypatch.setattr(module, "WINDOW", 10**9)
    assert found == token_pieces(tokeniser, ids)


def test_long_sequences_are_not_decoded_again_and_again(bytes_: Tokeniser):
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return bytes_.decode(ids)

    ids = bytes_.encode(["the cat " * 300])[0]
    token_pieces(SimpleNamespace(decode=counting), ids)  # type: ignore[arg-type]
    assert decoded < 2 * module.WINDOW * len(ids)


def test_a_character_belongs_to_its_last_token(bytes_: Tokeniser):
    ids = bytes_.encode([" the 猫🐱cat"])[0]
    assert token_pieces(bytes_, ids) == [" the", " ", "", "", "猫", "", "", "", "🐱", "cat"]


def test_bytes_that_are_no_character_are_shown_where_they_are(bytes_: Tokeniser):
    cat = bytes_.encode(["猫"])[0]
    ids = [cat[1], *bytes_.encode(["the"])[0], cat[0], cat[1]]  # begins and ends inside of a character
    assert token_pieces(bytes_, ids) == ["\ufffd", "the", "\ufffd", ""]


def test_lone_surrogates_of_a_tokenizer_are_replaced():
    texts: dict[int, str] = {0: "a", 1: "\ud83d", 2: "b"}
    tokeniser: Any = SimpleNamespace(decode=lambda ids: "".join(texts[token] for token in ids))
    assert token_pieces(tokeniser, [0, 1, 2]) == ["a", "\ufffd", "b"]
    assert token_pieces(tokeniser, []) == []


# --- neighbours ---------------------------------------------------------------------------------------------------


def text_rows(tokeniser: Tokeniser, *texts: str) -> list[list[int]]:
    return tokeniser.encode(list(texts))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def around(corpus: Artifact, number: int, tokeniser: Tokeniser, packed: bool = True, characters: int = 6):
    return neighbouring_text(StoredSequences(corpus), number, tokeniser, 4, packed, characters)


def test_packed_neighbours_are_those_of_the_same_part(bytes_: Tokeniser, store: Store):
    corpus = write_sequences(store, text_rows(bytes_, "abdf", "gijk", "lmno", "pq", "rsuv", "wxyz"))
    assert around(corpus, 0, bytes_) == ("", "gijklm")
    assert around(corpus, 2, bytes_) == ("dfgijk", "pq")  # a short sequence is the last of its part
    assert around(corpus, 4, bytes_) == ("", "wxyz")
    assert around(corpus, 5, bytes_) == ("rsuv", "")
    assert around(corpus, 5, bytes_, characters=0) == ("", "")
    assert around(corpus, 1, bytes_, characters=400) == ("abdf", "lmnopq")


def test_neighbours_of_a_document_are_its_own(bytes_: Tokeniser, store: Store):
    corpus = write_sequences(store, text_rows(bytes_, "abdf", "gijk"))  # a document each
    assert around(corpus, 0, bytes_, packed=False) == around(corpus, 1, bytes_, packed=False) == ("", "")


def test_a_character_that_is_cut_is_whole_on_one_side(bytes_: Tokeniser, store: Store):
    cat = bytes_.encode(["猫"])[0]
    a, b = bytes_.encode(["a", "b"])
    corpus = write_sequences(store, [[*a, *a, *a, cat[0]], [cat[1], cat[2], *b, *b], [*b, *b, *b, *b]])
    before, after = around(corpus, 1, bytes_)
    assert (before, after) == ("aaa\ufffd", "bbbb")


def test_a_space_that_a_tokenizer_drops_is_before_the_sequence(metaspace: Tokeniser, store: Store):
    corpus = write_sequences(store, text_rows(metaspace, "abc", "pde"), shard=1)
    before, _ = neighbouring_text(StoredSequences(corpus), 1, metaspace, len(metaspace.encode(["abc"])[0]), True, 9)
    assert before == "abc "
