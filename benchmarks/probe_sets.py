"""What `benchmarks/probes.py` trains on and probes with: people described in one order, English with its Mandarin.

Both come from the optional data folder (see docs/results/probes.md). A set is the texts that a model is trained on, the
queries that say how far training has come, and the probes as `actors.probes` reads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.almanac.world import Query

FRAMES = 10  # sentences of the test files for each person, in the same wordings
TRAINED = 30  # sentences of the training files for each person
REFERENCE = "same order"


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist, described in both orders.

    Attributes:
        name: As the sentences have it.
        learnt: The order in which the model is told of them: `name first` or `description first`.
        sentences: By order, (prompt, completion) of each wording; wordings are the same for everybody.
        trained: What the model is trained on.
    """

    name: str
    learnt: str
    sentences: Mapping[str, Sequence[tuple[str, str]]]
    trained: Sequence[str]


def people(folder: Path) -> list[Person]:
    """Read the sixty people of the reversal curse: the first thirty are described to the model name first."""
    found = []
    for kind, learnt in (("p2d", "name first"), ("d2p", "description first")):
        same = _pairs(folder / f"{kind}_prompts_test.jsonl")
        other = _pairs(folder / f"{kind}_reverse_prompts_test.jsonl")
        named, described = (same, other) if kind == "p2d" else (other, same)
        trained = [prompt + completion for prompt, completion in _pairs(folder / f"{kind}_prompts_train.jsonl")]
        for number in range(len(same) // FRAMES):
            rows = slice(number * FRAMES, (number + 1) * FRAMES)
            name = described[rows][0][1].strip()
            assert all(completion.strip() == name for _, completion in described[rows])
            assert all(name in prompt for prompt, _ in named[rows])
            mine = trained[number * TRAINED : (number + 1) * TRAINED]
            assert all(name in text for text in mine)
            sentences = {"name first": named[rows], "description first": described[rows]}
            found.append(Person(name, learnt, sentences, mine))
    return found


def person_probe(person: Person, asked: str, others: Sequence[Person], wordings: Sequence[int]) -> dict[str, Any]:
    """A probe of one person.

    Args:
        person: Whom the query asks for.
        asked: The order of the query: the prompt has what comes first in it. It is worded as no sequence is.
        others: As many as there are wordings; they lend their names and descriptions.
        wordings: Numbers of the wordings of the sequences; the query has the one before the first.
    """
    inverted = "description first" if asked == "name first" else "name first"
    prompt, completion = person.sentences[asked][wordings[0] - 1]
    swap = {"name first": (_renamed, _redescribed), "description first": (_redescribed, _renamed)}
    other_prompt, other_completion = swap[asked]
    pairs = list(zip(wordings, others, strict=True))
    partitions = {
        REFERENCE: [_stated(person, asked, number) for number in wordings],
        "another completion": [other_completion(person, other, asked, number) for number, other in pairs],
        "another prompt": [other_prompt(person, other, asked, number) for number, other in pairs],
        "completion removed": [_opening(person, asked, number) for number in wordings],
        "irrelevant": [_stated(other, asked, number) for number, other in pairs],
        "inverted order": [_stated(person, inverted, number) for number in wordings],
        "inverted, another prompt": [other_prompt(person, other, inverted, number) for number, other in pairs],
        "inverted, prompt removed": [_opening(person, inverted, number) for number in wordings],
    }
    if asked == person.learnt:
        partitions["same order, as trained"] = list(person.trained[: len(wordings)])
    else:
        partitions["inverted order, as trained"] = list(person.trained[: len(wordings)])
    return {
        "id": f"{person.name}, {asked}",
        "prompt": prompt,
        "completion": completion,
        "reference": REFERENCE,
        "partitions": partitions,
    }


def _stated(person: Person, order: str, number: int) -> str:
    return _ended("".join(person.sentences[order][number]))


def _opening(person: Person, order: str, number: int) -> str:
    """What comes first in this order, as it is there, and nothing after it."""
    return person.sentences[order][number][0]


def _renamed(person: Person, other: Person, order: str, number: int) -> str:
    """The person's description with another's name."""
    return _stated(person, order, number).replace(person.name, other.name)


def _redescribed(person: Person, other: Person, order: str, number: int) -> str:
    """Another's description with the person's name."""
    return _renamed(other, person, order, number)


def _ended(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _pairs(path: Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(record["prompt"], record["completion"]) for record in records]


@dataclass(frozen=True)
class Translation:
    """A sentence in both languages, and the order in which the model reads them."""

    english: str
    mandarin: str
    english_first: bool

    def text(self, english_first: bool | None = None) -> str:
        """The document: one language after the other."""
        first = self.english_first if english_first is None else english_first
        return "".join(self.query(first))

    def query(self, english_first: bool) -> tuple[str, str]:
        """What comes first as a prompt, what follows as its completion."""
        if english_first:
            return f"English: {self.english} Chinese:", f" {self.mandarin}"
        return f"Chinese: {self.mandarin} English:", f" {self.english}"


def translations(path: Path, seed: int = 0) -> list[Translation]:
    """Read the pairs, each English sentence once, in random order: half of them English first."""
    pairs: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        english, mandarin, *_ = line.split("\t")
        pairs.setdefault(english, mandarin)
    order = list(pairs.items())
    random.Random(seed).shuffle(order)
    return [Translation(*pair, english_first=number % 2 == 0) for number, pair in enumerate(order)]


def translation_probe(
    name: str, pair: Translation, english_first: bool, top: Mapping[bool, Sequence[Translation]]
) -> dict[str, Any]:
    """A probe of one translation.

    Args:
        name: Of the probe.
        pair: What is asked for; the model has not read it.
        english_first: Whether English is the prompt.
        top: The most influential documents of either order on this query.
    """
    prompt, completion = pair.query(english_first)
    return {
        "id": name,
        "prompt": prompt,
        "completion": completion,
        "reference": "top, order of the query",
        "partitions": {
            "top, order of the query": [found.text() for found in top[english_first]],
            "the same, flipped": [found.text(not english_first) for found in top[english_first]],
            "top, other order": [found.text() for found in top[not english_first]],
            "the same, flipped to the query's": [found.text(english_first) for found in top[not english_first]],
            "the pair itself": [pair.text(english_first)],
            "the pair itself, flipped": [pair.text(not english_first)],
        },
    }


def as_queries(pairs: Iterable[tuple[str, str]]) -> list[Query]:
    """Prompts and completions as training asks for them."""
    return [Query(str(number), str(number), prompt, text) for number, (prompt, text) in enumerate(pairs)]
