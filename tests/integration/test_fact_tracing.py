"""Fact tracing on made-up files: what is read, chosen, learnt and known, and two whole steps on it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import BadRecord, ConfigError
from actors.store import Artifact, Store
from conf.schema import RunConfig
from conf.validate import build
from pipelines.almanac.train import TrainSpec
from pipelines.runner import Runner
from pipelines.validation import facts
from pipelines.validation.facts import stages
from pipelines.validation.facts.learning import FactsSpec, Knowledge, drawn, examine, words_of
from pipelines.validation.facts.sentences import Collection, Fact, choose, read_collection
from pipelines.validation.language import variants
from tests.integration.world import LocalCluster, write_lines

PEOPLE = ("Orrin Vale", "Tamsin Roe", "Istra Moon", "Calder Finn", "Numa Quill", "Brone Ash", "Velm Stark", "Odo Pell")
TOWNS = ("Kesh", "Marn", "Dovik", "Tull", "Pelz", "Grim", "Stova", "Lorn")
BIRDS = ("tikki", "quilla", "weeta", "chirra", "hoopa", "merla", "dipper", "rail")
WAYS = ("{} lives in {} .", "Everybody knows that {} lives in {} .", "In winter as in summer {} lives in {} .")
GOOD = {"subject": "A", "relation": "r", "object": "b", "prompt": "A is [Y]", "evidence_sentence_ids": [0]}
KEPT = ("{} keeps a {} at home .", "They say {} keeps a {} .", "As a child {} keeps a {} .")


def write_facts(folder: Path) -> Path:
    """Sixteen facts, each stated three times, and some sentences that state none."""
    sentences, records = [], []
    for objects, ways, label in ((TOWNS, WAYS, "residence"), (BIRDS, KEPT, "bird")):
        for person, thing in zip(PEOPLE, objects, strict=True):
            numbers = list(range(len(sentences), len(sentences) + len(ways)))
            sentences += [way.format(person, thing) for way in ways]
            verb = "lives in" if label == "residence" else "keeps a"
            prompt = f"{person} {verb} [Y] ."
            fact = {"subject": person, "relation": "P1", "relation_label": label, "object": thing, "prompt": prompt}
            records.append(fact | {"evidence_sentence_ids": numbers})
    sentences += [f"The {bird} of {town} sings at dawn ." for bird, town in zip(BIRDS, reversed(TOWNS), strict=True)]
    write_lines(folder / "facts.jsonl", records)
    write_lines(folder / "sentences.txt", sentences)
    return folder


def spec_of(seed: int = 0, **changes: Any) -> FactsSpec:
    """A small model that learns them in a second."""
    sizes = {"hidden": 32, "intermediate": 48, "layers": 1, "heads": 2, "context": 16, "batch_size": 8}
    training = TrainSpec(seed=seed, epochs=40, most_epochs=40, learning_rate=1e-2, **sizes)  # type: ignore[arg-type]
    return FactsSpec(**({"seed": seed, "sentences": 56, "queries": 6, "training": training} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def traced(ray_session: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Both steps, finished."""
    config = config_of(folder, tmp_path_factory.mktemp("traced") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactsSpec, "of", classmethod(lambda _cls, _validation: spec_of()))
        patch.setattr(variants, "Cluster", LocalCluster)
        outcomes = Runner(Store(config.store), facts.steps(config), config).run()
        return {name: outcome.artifact for name, outcome in outcomes.items()}


def config_of(folder: Path, store: Path) -> RunConfig:
    settings = {"store": str(store), "factors.groups": 2, "factors.cg_iterations": 3, "validation.path": str(folder)}
    given = {"model.path": "made", "corpus.path": "made", "queries.path": "made", "cluster.num_cpus": 4}
    return build(settings | given, complete=False, cwd=str(folder))


def test_facts_are_read_with_their_sentences(folder: Path):
    found = read_collection(str(folder))
    assert len(found.facts) == 16
    assert len(found.sentences) == 56
    fact = found.facts[0]
    assert (fact.prompt, fact.completion, fact.evidence) == ("Orrin Vale lives in", " Kesh", (0, 1, 2))
    assert fact.asked_of("Odo Pell") == "Odo Pell lives in"
    assert fact.relation == "residence"


def test_prompts_that_go_on_after_the_object_are_left_out(folder: Path, tmp_path: Path):
    fact = {
        "subject": "A{0}",
        "relation": "r",
        "object": "b",
        "prompt": "A{0} is {not} [Y]",
        "evidence_sentence_ids": [0],
    }
    other = fact | {"prompt": "A{0} is a [Y] by profession ."}
    write_lines(tmp_path / "facts.jsonl", [fact, other])
    write_lines(tmp_path / "sentences.txt", ["A{0} is {not} b"])
    (found,) = read_collection(str(tmp_path)).facts
    assert found.prompt == "A{0} is {not}"


def test_missing_files_are_said(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"validation\.path is not set.*validation\.path=FOLDER"):
        read_collection(None)
    with pytest.raises(ConfigError, match=r"there is no facts\.jsonl and no sentences\.txt in it"):
        facts.steps(config_of(tmp_path, tmp_path / "store"))
    write_lines(tmp_path / "facts.jsonl", [])
    with pytest.raises(ConfigError, match=r"there is no sentences\.txt in it.*a sentence a line"):
        read_collection(str(tmp_path))
    write_lines(tmp_path / "sentences.txt", ["One ."])
    with pytest.raises(BadRecord, match="no fact whose prompt ends"):
        read_collection(str(tmp_path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "row 2: it is not JSON"),
        (GOOD | {"object": 3}, "row 2: a fact has no 'object' that is text"),
        (GOOD | {"evidence_sentence_ids": 0}, "row 2: a fact has no 'evidence_sentence_ids' that is a list"),
        (
            GOOD | {"evidence_sentence_ids": [0, 9]},
            "row 2: evidence_sentence_ids names sentence 9",
        ),
    ],
)
def test_bad_lines_are_named(record: object, message: str, tmp_path: Path):
    write_lines(tmp_path / "facts.jsonl", [GOOD, record])
    write_lines(tmp_path / "sentences.txt", ["A is b"])
    with pytest.raises(BadRecord, match=message):
        read_collection(str(tmp_path))


def test_choice_has_all_evidence_of_its_facts(folder: Path):
    collection = read_collection(str(folder))
    found = choose(collection, sentences=30, context=16, filler=0.2, seed=1)
    assert len(found.texts) == len(set(found.numbers)) == 30
    assert found.texts == tuple(collection.sentences[number] for number in found.numbers)
    assert found == choose(collection, sentences=30, context=16, filler=0.2, seed=1)
    assert found.numbers != choose(collection, sentences=30, context=16, filler=0.2, seed=2).numbers
    by_id = {fact.fact_id: fact for fact in collection.facts}
    assert len(found.facts) >= 8  # 24 sentences of three a fact
    for fact in found.facts:
        assert {found.numbers[place] for place in fact.evidence} == set(by_id[fact.fact_id].evidence)


def test_facts_that_are_not_fair_are_not_chosen():
    rows = [
        ("A", "b", "{} is", ("A is b .", "Now A is b .")),
        ("A", "c", "{} is", ("A is c .", "Now A is c .")),  # the same question
        ("Aye", "ay", "{} is", ("Aye is ay .", "Now Aye is ay .")),  # the subject names it
        ("C", "d", "{} is", ("C is d and " + "x " * 20, "C is d .")),  # too long
        ("E", "other", "{} is", ("E is f .", "Now E is f .")),  # nobody says so
        ("I", "j", "the hue of {} is", ("I is j .", "Now I is j .")),  # in words of its own
        ("K", "l", "{} is", ("K is l .", "Now , K is l .")),
    ]
    sentences = [text for *_, texts in rows for text in texts]
    known = []
    for number, (subject, object_, template, texts) in enumerate(rows):
        evidence = tuple(map(sentences.index, texts))
        known.append(Fact(str(number), subject, "r", object_, template, evidence))
    collection = Collection(tuple(known), tuple(sentences))
    found = choose(collection, sentences=9, context=12, filler=0.0, seed=0, familiar=4)
    assert [fact.subject for fact in found.facts] == ["K"]
    assert len(found.texts) == 9  # the rest is filler
    assert not any("x x" in text for text in found.texts)
    with pytest.raises(ConfigError, match=r"no fact has all of its sentences.*raise validation\.points"):
        choose(collection, sentences=1, context=12, filler=0.0, seed=0, familiar=4)


def test_facts_are_known_if_it_is_for_their_subject(traced: Mapping[str, Artifact], folder: Path):
    truth, model = traced["facts"].read_json("facts.json"), stages.local_folder(traced["facts"], folder) / "model"
    facts = read_collection(str(folder)).facts
    found = examine(model, [*facts, Fact("x", "Orrin Vale", "residence", "Nowhere", "{} lives in", (0,))], spec_of())
    assert len(found) == truth["facts"] == truth["answerable"] == 16  # nobody wrote Nowhere
    assert truth["training"]["accuracy"] == sum(each.completed for each in found) / len(found)
    known = [each for each in found if each.known]
    assert len(known) == truth["known"] > 10
    for each in known:
        assert each.without_subject is not None
        assert each.log_probability - each.without_subject > np.log(2)


def test_guesses_are_not_knowledge():
    fact = Fact("1", "A", "r", "b", "{} is", (0,))
    assert Knowledge(fact, True, -0.1, -3.0).known
    assert not Knowledge(fact, False, -0.1, -3.0).known
    assert not Knowledge(fact, True, -0.1, -0.2).known
    assert not Knowledge(fact, True, -0.1, None).known


def test_few_queries_have_the_same_answer():
    facts = [Fact(str(n), f"S{n}", "r", "b" if n < 9 else "c", "{} is", (0,)) for n in range(12)]
    knowledge = [Knowledge(fact, True, -0.1, -3.0 if fact.subject != "S11" else -0.1) for fact in facts]
    found = drawn(knowledge, spec_of(queries=99))
    assert Counter(each.fact.object for each in found) == {"b": 4, "c": 2}
    assert found == drawn(knowledge, spec_of(queries=99)) != drawn(knowledge, spec_of(seed=1, queries=99))
    assert drawn(knowledge, spec_of(queries=3)) == found[:3]


def test_words_of_questions_are_known():
    facts = [Fact("1", "Ann", "r", "b", "{} is", (0,))]
    tokenizer = words_of(["Ann is b", "Joe is c", "he is not"], facts)
    assert set(tokenizer.get_vocab()) == {"<pad>", "<bos>", "<eos>", "<unk>", "Ann", "is", "b"}


def test_settings_say_what_is_learnt(folder: Path, tmp_path: Path):
    validation = dataclasses.replace(
        config_of(folder, tmp_path).validation, points=77, measurements=5, epochs=3, seed=4
    )
    spec = FactsSpec.of(validation)
    assert (spec.sentences, spec.queries, spec.seed) == (77, 5, 4)
    assert (spec.training.epochs, spec.training.most_epochs, spec.training.seed) == (3, 3, 4)


def test_traced_facts_are_found(traced: Mapping[str, Artifact]):
    found = traced["fact_tracing"].read_json("fact_tracing.json")
    assert (found["documents"], found["queries"], found["k"]) == (56, 6, 10)
    assert list(found["methods"]) == ["identity", "ekfac", "ekfac_cg", "bm25", "bm25_ekfac", "random"]
    recalls = {name: method["recall"]["mean"] for name, method in found["methods"].items()}
    assert recalls["random"] == pytest.approx(10 / 56)
    assert min(recalls["ekfac"], recalls["bm25"]) > 2 * recalls["random"]
    assert set(found["differences"]) == {"identity", "ekfac_cg", "bm25", "bm25_ekfac"}
    assert set(found["methods"]["ekfac"]["outranked"]) == {"subject", "object"}
    assert set(found["seconds"]) == {"identity", "ekfac", "ekfac_cg"}
    json.dumps(found, allow_nan=False)


def test_evidence_is_where_it_is_said_to_be(traced: Mapping[str, Artifact]):
    artifact = traced["facts"]
    texts = [json.loads(line)["text"] for line in artifact.read_bytes("corpus.jsonl").decode().splitlines()]
    queries = [json.loads(line) for line in artifact.read_bytes("queries.jsonl").decode().splitlines()]
    truth = artifact.read_json("facts.json")
    assert [query["query_id"] for query in queries] == list(truth["queries"])
    for about in truth["queries"].values():
        assert len(about["evidence"]) == 3
        assert all(about["subject"] in texts[n] and about["object"] in texts[n] for n in about["evidence"])
    assert truth["known"] >= 6
    assert truth["sentences"] == 56


def test_others_that_name_subject_or_object_are_told_apart():
    about = {"subject": "A", "object": "b", "evidence": [2]}
    found = stages.judgement("q", about, ["A c", "d b", "A b", "x", "b A"])
    assert found.relevant.tolist() == [2]
    assert {kind: each.tolist() for kind, each in found.confusing.items()} == {"subject": [0, 4], "object": [1]}


@dataclasses.dataclass
class Elsewhere:
    """An artifact whose files are on no disk of this machine."""

    there: Artifact
    uri: str = "s3://bucket/facts"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.there, name)


def test_files_of_a_store_elsewhere_are_copied(traced: Mapping[str, Artifact], tmp_path: Path):
    artifact: Any = traced["facts"]
    assert stages.local_folder(artifact, tmp_path) == Path(artifact.uri.removeprefix("file://"))
    copied: Any = Elsewhere(artifact)
    assert stages.local_folder(copied, tmp_path) == tmp_path
    assert (tmp_path / "model/config.json").read_bytes() == artifact.read_bytes("model/config.json")


@pytest.mark.shared
def test_real_facts_are_read_and_chosen(shared_data: Path):
    collection = read_collection(str(shared_data / "facts/lama_trex_evidence"))
    assert len(collection.sentences) == 53_995
    assert len(collection.facts) > 15_000
    found = choose(collection, sentences=400, context=32, filler=0.25, seed=0)
    assert len(found.texts) == 400
    assert len(found.facts) > 90
    for fact in found.facts:
        assert any(fact.subject in found.texts[place] and fact.object in found.texts[place] for place in fact.evidence)
