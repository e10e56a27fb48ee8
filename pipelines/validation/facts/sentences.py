"""Facts with the sentences that state them, from files, and a choice of both that a small model can learn.

The folder holds `facts.jsonl` (subject, relation, object, prompt, evidence_sentence_ids: the layout of LAMA's T-REx
facts with evidence) and `sentences.txt`, a sentence a line, numbered from 0. A prompt ends with the object's sign [Y].
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from actors.errors import BadRecord, ConfigError

FACTS, SENTENCES = "facts.jsonl", "sentences.txt"
OBJECT = re.compile(r"\s*\[Y\]\s*\.?\s*")  # where a prompt's completion stands, which has to be its end
FAMILIAR = 10  # times that a prompt's wording occurs in all sentences, at least
FIELDS = {"subject": str, "relation": str, "object": str, "prompt": str, "evidence_sentence_ids": list}


@dataclass(frozen=True)
class Fact:
    """A fact, how it is asked for, and the sentences that state it.

    Attributes:
        fact_id: unique.
        subject: as sentences name it.
        relation: its name.
        object: as sentences name it.
        template: the prompt with `{}` for the subject, up to the object.
        evidence: numbers of sentences, ascending.
    """

    fact_id: str
    subject: str
    relation: str
    object: str
    template: str
    evidence: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """What is asked."""
        return self.asked_of(self.subject)

    @property
    def completion(self) -> str:
        """What is to be answered."""
        return f" {self.object}"

    def asked_of(self, subject: str) -> str:
        """The prompt with another subject."""
        return self.template.format(subject)


@dataclass(frozen=True)
class Collection:
    """All facts whose prompt ends with the object, and all sentences."""

    facts: tuple[Fact, ...]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Sentences to learn, in a random order, and the facts all of whose evidence is among them.

    Attributes:
        numbers: of the sentences, in the file.
        texts: of the sentences.
        facts: their evidence by position in `texts`.
    """

    numbers: tuple[int, ...]
    texts: tuple[str, ...]
    facts: tuple[Fact, ...]


def read_collection(path: str | None) -> Collection:
    """Read the folder of facts.

    Raises:
        ConfigError: if it is not named, or one of its files is not there.
        BadRecord: for a line that is not a fact, or evidence that is no sentence; names file and line.
    """
    folder = folder_of(path)
    sentences = tuple((folder / SENTENCES).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    facts = [fact for fact in _facts(folder / FACTS, len(sentences)) if fact is not None]
    if not facts:
        raise BadRecord("it holds no fact whose prompt ends with the object", file=str(folder / FACTS))
    return Collection(tuple(facts), sentences)


def collection_digest(path: str | None) -> str:
    """What identifies the content of the folder of facts: the digest of both files.

    Raises:
        ConfigError: as `read_collection`.
    """
    folder = folder_of(path)
    return hashlib.sha256(b"".join(file_hash(folder / name) for name in (FACTS, SENTENCES))).hexdigest()


def file_hash(path: Path) -> bytes:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def folder_of(path: str | None) -> Path:
    """The folder of facts, once both files are there.

    Raises:
        ConfigError: if it is not named, or one of its files is not there.
    """
    if path is None:
        raise ConfigError(
            "validation.path is not set", remedy=f"name a folder with {FACTS} and {SENTENCES}: validation.path=FOLDER"
        )
    folder = Path(path)
    missing = [name for name in (FACTS, SENTENCES) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"validation.path={path}: there is no {' and no '.join(missing)} in it",
            remedy=f"name a folder with {FACTS} (subject, relation, object, prompt, evidence_sentence_ids) and "
            f"{SENTENCES} (a sentence a line)",
        )
    return folder


def _facts(path: Path, sentences: int) -> Iterator[Fact | None]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _fact(_record(line, path, number), f"fact-{number}", path, number, sentences)


def _record(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadRecord(f"it is not JSON ({error})", file=str(path), row=number) from error
    for field, kind in FIELDS.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), kind):
            what = {str: "text", list: "a list of sentence numbers"}[kind]
            raise BadRecord(f"a fact has no {field!r} that is {what}", file=str(path), row=number)
    return record


def _fact(record: Mapping[str, Any], fact_id: str, path: Path, row: int, sentences: int) -> Fact | None:
    """None where the prompt goes on after the object, or does not name the subject."""
    evidence = record["evidence_sentence_ids"]
    wrong = [number for number in evidence if not isinstance(number, int) or not 0 <= number < sentences]
    if wrong:
        raise BadRecord(
            f"evidence_sentence_ids names sentence {wrong[0]}; {SENTENCES} holds {sentences:,}, numbered from 0",
            file=str(path),
            row=row,
        )
    subject, prompt = record["subject"], record["prompt"]
    place = OBJECT.search(prompt)
    if place is None or place.end() != len(prompt) or subject not in prompt[: place.start()] or not evidence:
        return None
    before, _, after = prompt[: place.start()].partition(subject)
    template = "{}".join(part.replace("{", "{{").replace("}", "}}") for part in (before, after))
    name = record.get("relation_label", record["relation"])
    return Fact(fact_id, subject, name, record["object"], template, tuple(sorted(set(evidence))))


def choose(
    collection: Collection, sentences: int, context: int, filler: float, seed: int, familiar: int = FAMILIAR
) -> Choice:
    """Choose facts at random, with all their evidence, and other sentences beside it.

    A fact is taken if a small model may learn it and cannot guess it: one of its sentences names its subject and its
    object, none is longer than the context; its question has no other answer, is put in words that sentences use, and
    its subject does not name its object.

    Args:
        collection: what there is.
        sentences: how many to choose, at most.
        context: tokens of a sequence, with one before and one after the sentence.
        filler: share of the sentences that is chosen without their facts.
        seed: of the choice.
        familiar: times that the words of a prompt before and after its subject occur in all sentences, at least.

    Raises:
        ConfigError: if no fact fits.
    """
    generator = random.Random(seed)
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    short = {number for number, text in enumerate(collection.sentences) if len(split(text)) <= context - 2}
    suited = [fact for fact in _fair(collection, familiar) if short.issuperset(fact.evidence)]
    chosen: list[int] = []
    taken: set[int] = set()
    for fact in generator.sample(suited, len(suited)):
        new = [number for number in fact.evidence if number not in taken]
        if len(chosen) + len(new) <= round((1 - filler) * sentences):
            chosen += new
            taken.update(new)
    others = sorted(short - taken)
    chosen += generator.sample(others, min(sentences - len(chosen), len(others)))
    generator.shuffle(chosen)
    places = {number: place for place, number in enumerate(chosen)}
    facts = [_placed(fact, places) for fact in suited if places.keys() >= set(fact.evidence)]
    if not facts:
        raise ConfigError(
            f"no fact has all of its sentences among validation.points={sentences} of at most {context - 2} words",
            remedy="raise validation.points",
        )
    return Choice(tuple(chosen), tuple(collection.sentences[number] for number in chosen), tuple(facts))


def _fair(collection: Collection, familiar: int) -> list[Fact]:
    """Facts that sentences state, with one answer that the question does not give away, asked in familiar words."""
    asked = Counter(fact.prompt for fact in collection.facts)
    facts = [fact for fact in collection.facts if asked[fact.prompt] == 1 and _is_stated(fact, collection.sentences)]
    facts = [fact for fact in facts if fact.object.casefold() not in fact.subject.casefold()]
    text = "\n".join(f" {sentence} " for sentence in collection.sentences)
    wordings = {words for fact in facts for words in _wording(fact)}
    known = {words for words in wordings if text.count(f" {words} ") >= familiar}
    return [fact for fact in facts if known.issuperset(_wording(fact))]


def _wording(fact: Fact) -> list[str]:
    """The words of a prompt before and after its subject."""
    return [words for words in map(str.strip, fact.template.split("{}")) if words]


def _is_stated(fact: Fact, sentences: Sequence[str]) -> bool:
    texts = [sentences[number] for number in fact.evidence]
    return any(fact.subject in text and fact.object in text for text in texts)


def _placed(fact: Fact, places: Mapping[int, int]) -> Fact:
    evidence = tuple(sorted(places[number] for number in fact.evidence))
    return Fact(fact.fact_id, fact.subject, fact.relation, fact.object, fact.template, evidence)
