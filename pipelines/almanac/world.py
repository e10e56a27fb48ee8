"""A fictional world whose facts are stated in known documents: ground truth for training-data attribution.

A *fact* is (relation, subject, object): the capital of a realm, the inventor of a device. Each main fact is stated by
exactly `WorldSpec.statements` documents, so that a perfect ranking of documents has recall@10 = 1 with the default of
ten. Around them lie documents that a bag of words confuses with them:

- *near misses* state the same relation of a neighbour (an outer realm or device) and mostly name the subject or the
  object too;
- *distractors* name the subject, the object and the relation, but do not state the fact;
- *filler* names nothing of this world.

Facts of order `forward` are never stated object first; facts of order `both` are. All names come from a seeded syllable
generator; all documents are a pure function of `WorldSpec`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.almanac import wording
from pipelines.almanac.wording import RELATIONS, Relation

STATING = ("forward", "inverted", "paraphrase")
CONFUSING = ("near_miss", "distractor")

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "qu",
    "r",
    "s",
    "sk",
    "t",
    "th",
    "v",
    "vr",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "oi", "y")
_ENDINGS = {
    "realm": ("mundra", "vath", "lorn", "queth"),
    "city": ("dunek", "pelz", "grimmel", "stovar"),
    "river": ("wesh", "luun", "ssil", "oothe"),
    "bird": ("tikki", "quill", "weet", "chirr"),
    "founder": ("ax", "emir", "olf", "und"),
    "device": ("oscope", "ulator", "ograph", "ometron"),
    "inventor": ("ina", "ebel", "isk", "ette"),
}


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """The parameters that determine the world to the last byte."""

    version: int = 1
    seed: int = 0
    entities: int = 12  # main subjects a pool (realms, devices), each with a fact a relation; as many outer neighbours
    statements: int = 10  # documents that state a main fact
    near_misses: int = 8  # a main fact
    distractors: int = 6  # a main fact
    filler: int = 1800
    forward_only_every: int = 3  # one fact in so many is stated in forward order only
    queries: int = 12


@dataclass(frozen=True)
class Fact:
    """One thing that is true in this world; `order` is `forward` or `both`, `outer` facts serve as near misses only."""

    fact_id: str
    relation: str
    subject: str
    object: str
    order: str
    outer: bool


@dataclass(frozen=True)
class Document:
    """One short document: the facts that it `states`, and the main facts that it was written to be confused with."""

    id: str
    text: str
    kind: str
    states: tuple[str, ...]
    confuses: tuple[str, ...]


@dataclass(frozen=True)
class Query:
    """A main fact asked for in a wording that no document has."""

    query_id: str
    fact_id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class World:
    """All facts, documents and queries."""

    facts: tuple[Fact, ...]
    documents: tuple[Document, ...]
    queries: tuple[Query, ...]


def generate(spec: WorldSpec) -> World:
    """Generate the world of a specification.

    Args:
        spec: The parameters; equal parameters give equal worlds.

    Returns:
        The world, its documents in a seeded random order.

    Raises:
        ValueError: If the parameters ask for more than the wordings or facts can give.
    """
    rng = random.Random(spec.seed)
    facts = _facts(spec, _names(spec, rng))
    traced = _traced(spec, facts)
    dress = _Dress(rng)
    drafts = [draft for fact in facts if not fact.outer for draft in _about(fact, facts, fact in traced, spec, dress)]
    drafts += _filler(spec.filler, dress)
    rng.shuffle(drafts)
    documents = tuple(
        Document(f"doc-{number:05d}", text, kind, states, confuses)
        for number, (text, kind, states, confuses) in enumerate(drafts)
    )
    return World(tuple(facts), documents, tuple(_query(fact) for fact in traced))


def write(world: World, folder: Path) -> None:
    """Write `almanac.jsonl` (the corpus), `queries.jsonl` and `truth.json` (what is known) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "almanac.jsonl", world.documents)
    rows = ({"query_id": q.query_id, "prompt": q.prompt, "completion": q.completion} for q in world.queries)
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    truth = {
        "facts": [dataclasses.asdict(fact) for fact in world.facts],
        "queries": {query.query_id: {"fact": query.fact_id, **judgements(world, query)} for query in world.queries},
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")


def judgements(world: World, query: Query) -> dict[str, list[str]]:
    """List by kind the documents that state a query's fact, and those that were written to be confused with it."""
    found: dict[str, list[str]] = {kind: [] for kind in STATING + CONFUSING}
    for document in world.documents:
        if query.fact_id in document.states or query.fact_id in document.confuses:
            found[document.kind].append(document.id)
    return found


def _write_lines(path: Path, documents: tuple[Document, ...]) -> None:
    lines = (json.dumps(dataclasses.asdict(document)) + "\n" for document in documents)
    path.write_text("".join(lines), encoding="utf-8")


def _names(spec: WorldSpec, rng: random.Random) -> dict[str, list[str]]:
    """Twice `entities` names a pool: the first half for main facts, the second for outer ones."""
    taken: set[str] = set()

    def single(pool: str) -> str:
        while True:
            body = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
            name = body + rng.choice(_ENDINGS[pool])
            if name not in taken:
                taken.add(name)
                return name

    def full(pool: str) -> str:
        if pool in ("founder", "inventor"):
            return f"{single(pool).capitalize()} {single(pool).capitalize()}"
        return single(pool) if pool in ("bird", "device") else single(pool).capitalize()

    return {pool: [full(pool) for _ in range(2 * spec.entities)] for pool in _ENDINGS}


def _facts(spec: WorldSpec, names: dict[str, list[str]]) -> list[Fact]:
    facts = []
    for offset, relation in enumerate(RELATIONS):
        pairs = zip(names[relation.subjects], names[relation.objects], strict=True)
        for number, (subject, object_) in enumerate(pairs):
            forward_only = (number + offset) % spec.forward_only_every == 0
            facts.append(
                Fact(
                    fact_id=f"{relation.name}:{subject}",
                    relation=relation.name,
                    subject=subject,
                    object=object_,
                    order="forward" if forward_only else "both",
                    outer=number >= spec.entities,
                )
            )
    return facts


def _traced(spec: WorldSpec, facts: list[Fact]) -> list[Fact]:
    """Main facts to ask for: relations in turn, alternately stated in both orders and in forward order only."""
    pools = {
        (relation.name, order): [f for f in facts if f.relation == relation.name and f.order == order and not f.outer]
        for relation in RELATIONS
        for order in ("both", "forward")
    }
    chosen = []
    for number in range(spec.queries):
        pool = pools[RELATIONS[number % len(RELATIONS)].name, ("both", "forward")[number % 2]]
        if not pool:
            raise ValueError(f"queries={spec.queries} asks for more facts than entities={spec.entities} gives")
        chosen.append(pool.pop(0))
    return chosen


def _query(fact: Fact) -> Query:
    prompt = sentence(wording.QUERY_FRAME, relation_of(fact).cue.format(s=fact.subject), end="")
    return Query(fact.fact_id, fact.fact_id, prompt, f" {fact.object}")


Draft = tuple[str, str, tuple[str, ...], tuple[str, ...]]  # text, kind, states, confuses


class _Dress:
    """Dresses core sentences in a frame and perhaps a second sentence, never twice into the same text."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._used: set[str] = set()

    def __call__(self, core: str, frames: tuple[str, ...] = wording.FRAMES) -> str:
        for _ in range(1000):
            text = sentence(self.rng.choice(frames), core)
            if self.rng.random() < 0.5:
                text += " " + sentence("", self.words(wording.WEATHER, wording.FILLER_TIMES))
            if text not in self._used:
                self._used.add(text)
                return text
        raise ValueError(f"too many documents asked for of one wording: {core!r}")

    def words(self, *lists: tuple[str, ...]) -> str:
        return " ".join(self.rng.choice(words) for words in lists)


def _about(fact: Fact, facts: list[Fact], traced: bool, spec: WorldSpec, dress: _Dress) -> Iterator[Draft]:
    """Yield all documents that exist because of one main fact."""
    relation = relation_of(fact)
    frames = wording.FRAMES if traced else (*wording.FRAMES, wording.QUERY_FRAME)
    wordings = {"forward": relation.forward, "inverted": relation.inverted, "paraphrase": relation.paraphrases}
    for kind, count in _quota(fact, spec).items():
        for number in range(count):
            core = wordings[kind][number % len(wordings[kind])].format(s=fact.subject, o=fact.object)
            yield dress(core, frames), kind, (fact.fact_id,), ()
    neighbours = [f for f in facts if f.outer and f.relation == fact.relation]
    bystanders = (bystander_name(relation.subjects, fact.subject), bystander_name(relation.objects, fact.object))
    for number in range(spec.near_misses):
        other, bystander = dress.rng.choice(neighbours), dress.rng.choice(bystanders)
        template = relation.near_misses[number % len(relation.near_misses)]
        text = dress(template.format(s=other.subject, o=other.object, b=bystander), wording.CONFUSING_FRAMES)
        yield text, "near_miss", (other.fact_id,), (fact.fact_id,)
    for number in range(spec.distractors):
        core = relation.distractors[number % len(relation.distractors)].format(s=fact.subject, o=fact.object)
        yield dress(core, wording.CONFUSING_FRAMES), "distractor", (), (fact.fact_id,)


def _quota(fact: Fact, spec: WorldSpec) -> dict[str, int]:
    """Share a fact's statements out over kinds, 4 : 3 : 3 of ten; inverted ones become forward if its order says so."""
    paraphrases = round(0.3 * spec.statements)
    inverted = paraphrases if fact.order == "both" else 0
    return {"forward": spec.statements - paraphrases - inverted, "inverted": inverted, "paraphrase": paraphrases}


def _filler(count: int, dress: _Dress) -> Iterator[Draft]:
    lists = (wording.FILLER_SUBJECTS, wording.FILLER_VERBS, wording.FILLER_OBJECTS, wording.FILLER_PLACES)
    for _ in range(count):
        yield dress(dress.words(*lists)), "filler", (), ()


def sentence(frame: str, core: str, end: str = ".") -> str:
    """A frame and a core as a sentence: spaces before commas closed, the first letter large."""
    text = f"{frame} {core}".strip().replace(" ,", ",")
    return text[0].upper() + text[1:] + end


def relation_of(fact: Fact) -> Relation:
    """The relation of a fact, with its wordings."""
    return next(relation for relation in RELATIONS if relation.name == fact.relation)


def bystander_name(pool: str, name: str) -> str:
    """A name as it stands in a sentence: with an article where its pool wants one."""
    return f"the {name}" if pool in ("river", "bird", "device") else name
