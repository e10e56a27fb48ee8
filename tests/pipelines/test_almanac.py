"""The almanac: its ground truth is true, its figures are what one computes by hand, its model learns a small world."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.almanac import evaluate
from pipelines.almanac.demo import prepare
from pipelines.almanac.evaluate import Judgement
from pipelines.almanac.results import render_markdown
from pipelines.almanac.train import TrainSpec, encode, train, train_tokenizer
from pipelines.almanac.world import CONFUSING, STATING, Fact, World, WorldSpec, generate, judgements, write

SMALL = WorldSpec(entities=3, statements=10, near_misses=2, distractors=2, filler=20, queries=4)


@pytest.fixture(scope="module")
def world() -> World:
    return generate(WorldSpec())


def test_world_depends_on_its_parameters_only(world: World) -> None:
    assert generate(WorldSpec()) == world
    assert generate(WorldSpec(seed=1)).documents != world.documents


def test_every_main_fact_is_stated_ten_times_and_in_its_order(world: World) -> None:
    stated = Counter((fact, doc.kind) for doc in world.documents for fact in doc.states if doc.kind in STATING)
    main = [fact for fact in world.facts if not fact.outer]
    assert len(main) == 60
    assert 3000 <= len(world.documents) <= 5000
    for fact in main:
        counts = [stated[fact.fact_id, kind] for kind in STATING]
        assert counts == ([7, 0, 3] if fact.order == "forward" else [4, 3, 3])


def test_documents_state_what_they_are_said_to(world: World) -> None:
    facts = {fact.fact_id: fact for fact in world.facts}
    names = [name for fact in world.facts for name in (fact.subject, fact.object)]
    for doc in world.documents:
        if doc.kind in STATING:
            assert_order(facts[doc.states[0]], doc.text, inverted=doc.kind == "inverted")
        elif doc.kind == "near_miss":
            assert facts[doc.states[0]].outer
            missed = facts[doc.confuses[0]]
            assert facts[doc.states[0]].relation == missed.relation
            assert not (missed.subject in doc.text and missed.object in doc.text)
        elif doc.kind == "distractor":
            assert doc.states == ()
            assert facts[doc.confuses[0]].subject in doc.text
            assert facts[doc.confuses[0]].object in doc.text
        else:
            assert not any(name in doc.text for name in names)


def assert_order(fact: Fact, text: str, inverted: bool) -> None:
    places = [text.index(fact.subject), text.index(fact.object)]
    assert places == sorted(places, reverse=inverted)


def test_texts_are_unique_and_short_and_no_name_is_used_twice(world: World) -> None:
    texts = [doc.text for doc in world.documents]
    assert len(set(texts)) == len(texts)
    assert max(len(text.split()) for text in texts) < 50
    for pair in ("subject", "object"):
        assert max(Counter((fact.relation, getattr(fact, pair)) for fact in world.facts).values()) == 1


def test_queries_are_stated_by_no_document_in_their_own_words(world: World) -> None:
    assert len(world.queries) == 12
    for query in world.queries:
        assert not any(query.prompt + query.completion in doc.text for doc in world.documents)
        known = judgements(world, query)
        assert sum(len(known[kind]) for kind in STATING) == 10
        assert [len(known[kind]) for kind in CONFUSING] == [8, 6]
    orders = Counter(fact.order for fact in world.facts for query in world.queries if fact.fact_id == query.fact_id)
    assert orders == {"both": 6, "forward": 6}


def test_files_say_the_same(world: World, tmp_path: Path) -> None:
    write(world, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "almanac.jsonl").read_text().splitlines()]
    truth = json.loads((tmp_path / "truth.json").read_text())
    query = world.queries[0]
    forward = [row["id"] for row in rows if query.fact_id in row["states"] and row["kind"] == "forward"]
    assert forward == truth["queries"][query.query_id]["forward"]
    assert json.loads((tmp_path / "queries.jsonl").read_text().splitlines()[0])["completion"] == query.completion


def test_more_queries_than_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="queries=99 asks for more facts than entities=3 gives"):
        generate(WorldSpec(entities=3, queries=99))


def test_tokenizer_is_word_level_and_knows_every_word(world: World) -> None:
    tokenizer = train_tokenizer([doc.text for doc in world.documents])
    assert len(tokenizer) < 1500
    prompt, completion = world.queries[0].prompt, world.queries[0].completion
    apart = tokenizer.encode(prompt) + tokenizer.encode(completion)
    assert tokenizer.encode(prompt + completion) == apart
    assert tokenizer.unk_token_id not in apart
    with pytest.raises(ValueError, match="longer than context=4"):
        encode(tokenizer, world.documents[0].text, 4)


def test_training_is_deterministic_and_its_folder_loads(tmp_path: Path) -> None:
    small = generate(SMALL)
    spec = TrainSpec(hidden=32, intermediate=48, layers=1, heads=2, epochs=2, most_epochs=2, threads=1)
    results = [train(small, spec, tmp_path / name) for name in ("one", "two")]
    assert results[0].loss == results[1].loss
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert models[0].config.eos_token_id == 2


def test_prepared_almanac_is_kept(tmp_path: Path) -> None:
    spec = TrainSpec(hidden=16, intermediate=16, layers=1, heads=2, epochs=1, most_epochs=1, threads=1)
    first = prepare(tmp_path, SMALL, spec)
    assert prepare(tmp_path, SMALL, spec).training == first.training
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]
    assert f"model.path='{first.folder}/model'" in first.overrides()


SCORES_N = np.array([0.9, 0.1, 0.8, 0.7, 0.2, 0.6])  # ranks 1 6 2 3 5 4


def test_ranks_put_ties_in_order_and_nan_last() -> None:
    assert evaluate.ranks(SCORES_N).tolist() == [1, 6, 2, 3, 5, 4]
    assert evaluate.ranks(np.array([np.nan, 1.0, 1.0, -3.0])).tolist() == [4, 1, 2, 3]


def test_recall_and_reciprocal_rank_by_hand() -> None:
    ranks_N = evaluate.ranks(SCORES_N)
    relevant = np.array([2, 3, 4])
    assert evaluate.recall_at(ranks_N, relevant, 2) == 0.5  # of two places, one relevant
    assert evaluate.recall_at(ranks_N, relevant, 4) == pytest.approx(2 / 3)
    assert evaluate.reciprocal_rank(ranks_N, relevant) == 0.5
    with pytest.raises(ValueError, match="relevant"):
        evaluate.recall_at(ranks_N, np.array([], dtype=int))


def test_outranking_by_hand() -> None:
    # 0.9 beats both of (0.8, 0.1); 0.1 beats neither and ties with one
    assert evaluate.outranked_share(SCORES_N, np.array([0, 1]), np.array([2, 1])) == pytest.approx(2.5 / 4)


def test_evaluation_leaves_out_kinds_that_a_query_lacks() -> None:
    none = np.array([], dtype=int)
    one = Judgement("a", {"forward": np.array([0]), "inverted": none}, {"near_miss": np.array([2])})
    two = Judgement("b", {"forward": np.array([1]), "inverted": np.array([2])}, {"near_miss": none})
    result = evaluate.evaluate_all(np.stack([SCORES_N, SCORES_N]), [one, two], k=2)
    assert result.recall == pytest.approx((1 + 0.5) / 2)
    assert result.reciprocal_rank == pytest.approx((1 + 1 / 2) / 2)
    assert result.recall_by_kind == {"forward": 0.5, "inverted": 1.0}
    assert result.rank_by_kind == {"forward": 3.5, "inverted": 2.0}
    assert result.outranked == {"near_miss": 0.0}


def test_chance_is_what_random_orders_average_to() -> None:
    judgement = Judgement("a", {"forward": np.array([0, 1]), "paraphrase": np.array([2])}, {"near_miss": np.array([3])})
    expected = evaluate.expected_by_chance(6, [judgement], k=2)
    rng = np.random.default_rng(0)
    orders = [evaluate.evaluate(rng.random(6), judgement, k=2) for _ in range(4000)]
    seen = evaluate.mean(orders)
    assert expected.recall == pytest.approx(0.5)
    assert expected.reciprocal_rank == pytest.approx(seen.reciprocal_rank, abs=0.02)
    assert expected.recall_by_kind["paraphrase"] == pytest.approx(1 / 3)
    assert seen.outranked["near_miss"] == pytest.approx(0.5, abs=0.03)


def test_document_takes_the_best_of_its_sequences() -> None:
    scores_SQ = np.array([[1.0, 5.0], [3.0, 2.0], [0.5, 0.5]])
    scores_QN = evaluate.document_scores(np.array([3, 0, 1]), scores_SQ, np.array([0, 1, 2, 0]), 3)
    np.testing.assert_array_equal(scores_QN, [[3.0, 0.5, np.nan], [5.0, 0.5, np.nan]])


def test_page_shows_a_row_for_each_method() -> None:
    mean = {"recall": 0.5, "reciprocal_rank": 1.0, "recall_by_kind": {"forward": 0.25}, "outranked": {"near_miss": 0.1}}
    results = {
        "k": 10,
        "documents": 3240,
        "queries": {"q": {"order": "forward"}},
        "training": {"parameters": 1000, "epochs": 2, "seconds": 3.0, "accuracy": 1.0},
        "methods": {"EK-FAC": {"mean": mean}},
    }
    page = render_markdown(results)
    assert "| EK-FAC |      0.50 | 1.00 |    0.25 |        – |          – |       10% |          – |" in page
    assert "1 of the facts are never stated object first" in page
