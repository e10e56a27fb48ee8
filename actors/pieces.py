"""The text of a sequence, token by token, and what stands around it.

A piece is what a token adds to the text. Pieces put together are the decoded sequence, character for character,
whatever the tokenizer: a character whose bytes are spread over several tokens belongs to the last of them, and a token
that adds nothing visible has an empty piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from actors.sequences import StoredSequences
from actors.tokeniser import Tokeniser, well_formed

WINDOW = 24  # tokens that are decoded together: decoding each prefix of T tokens would decode T² / 2
OVERLAP = 8  # of them, that were in the window before


def token_pieces(tokeniser: Tokeniser, ids: Sequence[int]) -> list[str]:
    """The piece of each token.

    The text up to a token is what the decoded prefix has in common with the decoded whole: of a character that is not
    complete yet, a prefix shows a replacement character, which the whole does not have there.

    Returns:
        As many as tokens; together they are `tokeniser.decode(ids)`, lone surrogates replaced.
    """
    text = well_formed(tokeniser.decode(ids))
    ends, window = [0], _Window(0, 0)
    for count in range(1, len(ids) + 1):
        ends.append(max(ends[-1], window.shown(tokeniser, ids, count, text)))
        if count - window.first >= WINDOW:
            window = window.moved(tokeniser, ids, count, text, ends[-1])
    ends[-1] = len(text)
    return [text[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True)
class _Window:
    """Where decoding begins instead of at the first token.

    Attributes:
        first: The token.
        place: Where in the text what is decoded from there begins.
    """

    first: int
    place: int

    def shown(self, tokeniser: Tokeniser, ids: Sequence[int], count: int, text: str) -> int:
        """How much of the text the first `count` tokens show."""
        decoded = well_formed(tokeniser.decode(ids[self.first : count]))
        if text.startswith(decoded, self.place):
            return self.place + len(decoded)
        pairs = enumerate(zip(decoded, text[self.place :], strict=False))
        common = next((at for at, (one, other) in pairs if one != other), min(len(decoded), len(text) - self.place))
        return self.place + common

    def moved(self, tokeniser: Tokeniser, ids: Sequence[int], count: int, text: str, end: int) -> _Window:
        """A window that begins later, at a token from which on the text is what was decoded; else this one.

        Tokenizers drop a space before the first token, and begin in the middle of a character if they are told to.

        Args:
            tokeniser: The tokenizer.
            ids: All tokens.
            count: Those that are behind.
            text: The decoded whole.
            end: How much of it they show.
        """
        first = count - OVERLAP
        decoded = well_formed(tokeniser.decode(ids[first:count]))
        place = end - len(decoded)
        whole = bool(decoded) and place > self.place and text.startswith(decoded, place)
        return _Window(first, place) if whole else self


def neighbouring_text(
    source: StoredSequences, sequence_id: int, tokeniser: Tokeniser, full: int, packed: bool, characters: int
) -> tuple[str, str]:
    """What stands before and after a sequence in the corpus.

    A packed sequence has the sequences beside it in its part of the corpus for neighbours; one that holds a document of
    its own, other sequences of the same document.

    Args:
        source: The tokenised corpus.
        sequence_id: The sequence.
        tokeniser: Its tokenizer.
        full: Tokens of a full sequence; a shorter one is the last of its part.
        packed: Whether sequences are packed.
        characters: At most so many on each side.
    """
    if characters == 0:
        return "", ""
    reach = -(-characters // full)  # a token is mostly more than a character
    wanted = range(max(0, sequence_id - reach), min(source.count, sequence_id + reach + 1))
    rows = source.rows(wanted, ["input_ids", "document_id"])
    here = sequence_id - wanted.start
    first = last = here
    while first > 0 and _together(rows[first - 1], rows[first], full, packed):
        first -= 1
    while last + 1 < len(rows) and _together(rows[last], rows[last + 1], full, packed):
        last += 1
    before, own, after = (_joined(part) for part in (rows[first:here], [rows[here]], rows[here + 1 : last + 1]))
    return _left_of(before, own, tokeniser)[-characters:], _right_of(own, after, tokeniser)[:characters]


def _together(row: dict, following: dict, full: int, packed: bool) -> bool:
    if packed:
        return len(row["input_ids"]) == full
    return row["document_id"] == following["document_id"]


def _joined(rows: Sequence[dict]) -> list[int]:
    return np.concatenate([row["input_ids"] for row in rows]).tolist() if rows else []


def _left_of(before: list[int], own: list[int], tokeniser: Tokeniser) -> str:
    """Decoded with what follows it where that shows: a character may be spread over both."""
    both, text = well_formed(tokeniser.decode(before + own)), well_formed(tokeniser.decode(own))
    return both[: len(both) - len(text)] if both.endswith(text) else well_formed(tokeniser.decode(before))


def _right_of(own: list[int], after: list[int], tokeniser: Tokeniser) -> str:
    both, text = well_formed(tokeniser.decode(own + after)), well_formed(tokeniser.decode(own))
    return both[len(text) :] if both.startswith(text) else well_formed(tokeniser.decode(after))
