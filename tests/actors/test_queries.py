"""Queries: what is read, where the completion begins, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import BadRecord, ConfigError
from actors.queries import TokenisedQuery, parse_queries, queries_digest, read_queries
from actors.tokeniser import load_tokeniser
from conf.schema import CorpusConfig, Measurement, ModelConfig, QueriesConfig, RunConfig
from tests.corpora import BOS, CONTEXT, byte_model, prefix_space_model, write_lines

GOOD = {"query_id": "a", "prompt": "on the", "completion": " cat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(byte_model(tmp_path_factory.mktemp("model"))))


def run_config(model: ModelConfig, path: Path, measurement: Measurement, **corpus: Any) -> RunConfig:
    return RunConfig(
        model=model,
        queries=QueriesConfig(path=str(path), measurement=measurement),
        corpus=CorpusConfig(path="-", **corpus),
    )


def read(
    model: ModelConfig,
    folder: Path,
    *records: object,
    measurement: Measurement = Measurement.log_probability,
    **corpus: Any,
) -> list[TokenisedQuery]:
    return read_queries(run_config(model, write_lines(folder / "q.jsonl", records), measurement, **corpus))


def complaint(model: ModelConfig, folder: Path, *records: object, **changes: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        read(model, folder, *records, **changes)
    message = str(caught.value)
    assert message.startswith(f"{folder}/q.jsonl")
    return message.removeprefix(f"{folder}/q.jsonl")


def test_the_completion_begins_after_bos_and_prompt(model: ModelConfig, tmp_path: Path) -> None:
    tokeniser = load_tokeniser(model)
    (query,) = read(model, tmp_path, GOOD)
    assert query.input_ids == (BOS, *tokeniser.encode(["on the"])[0], *tokeniser.encode([" cat"])[0])
    assert tokeniser.decode(query.input_ids[query.completion_start :]) == " cat"
    assert query.measured().first_measured == query.completion_start
    (bare,) = read(model, tmp_path, GOOD, add_bos=False)
    assert bare.input_ids == query.input_ids[1:]
    assert bare.completion_start == query.completion_start - 1


@pytest.mark.parametrize(("prompt", "completion"), [("on th", "e cat"), ("on ", "the cat"), ("", "the"), ("é", "é")])
def test_a_token_that_straddles_the_boundary_is_cut(
    prompt: str, completion: str, model: ModelConfig, tmp_path: Path
) -> None:
    tokeniser = load_tokeniser(model)
    (query,) = read(model, tmp_path, GOOD | {"prompt": prompt, "completion": completion})
    assert tokeniser.decode(query.input_ids[1 : query.completion_start]) == prompt
    assert tokeniser.decode(query.input_ids[query.completion_start :]) == completion


@pytest.mark.parametrize(("prompt", "completion"), [("capital is ", "Paris"), ("capital is", " Paris")])
def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_to_the_completion(
    prompt: str, completion: str, tmp_path: Path
) -> None:
    spaced = ModelConfig(path=str(prefix_space_model(tmp_path / "m")))
    tokeniser = load_tokeniser(spaced)
    (query,) = read(spaced, tmp_path, GOOD | {"prompt": prompt, "completion": completion})
    assert tokeniser.decode(query.input_ids[1:]) == f"{prompt}{completion}"


def test_a_contrast_follows_the_same_prompt(model: ModelConfig, tmp_path: Path) -> None:
    record = GOOD | {"contrast": " mat", "prompt": "on th"}
    (query,) = read(model, tmp_path, record, measurement=Measurement.contrast)
    start = query.completion_start
    assert query.contrast_ids is not None
    assert query.contrast_ids[:start] == query.input_ids[:start]
    assert load_tokeniser(model).decode(query.contrast_ids[start:]) == " mat"
    assert query.measured().contrast_input_ids == query.contrast_ids
    (plain,) = read(model, tmp_path, record)
    assert plain.contrast_ids is None


def test_a_whole_sequence_is_measured_from_its_second_token(model: ModelConfig, tmp_path: Path) -> None:
    (query,) = read(model, tmp_path, GOOD, measurement=Measurement.sequence_log_probability)
    assert query.completion_start == 1
    record = GOOD | {"prompt": "ab", "completion": ""}
    (query,) = read(model, tmp_path, record, measurement=Measurement.sequence_log_probability, add_bos=False)
    assert len(query.input_ids) == 2
    record = GOOD | {"prompt": "", "completion": "a"}
    message = complaint(model, tmp_path, record, measurement=Measurement.sequence_log_probability, add_bos=False)
    assert "fewer than two tokens" in message


def test_records_are_plain_data(model: ModelConfig, tmp_path: Path) -> None:
    (query,) = read(model, tmp_path, GOOD | {"query_id": 7, "note": "ignored"})
    assert query.record() == {
        "query_id": "7",
        "prompt": "on the",
        "completion": " cat",
        "contrast": None,
        "tokens": len(query.input_ids),
        "completion_start": query.completion_start,
    }


def test_hostile_text_is_inert(model: ModelConfig, tmp_path: Path) -> None:
    record = {"query_id": "\ud800", "prompt": "\x00\u202e", "completion": "\udfff<b>"}
    (query,) = read(model, tmp_path, record)
    assert query.query_id == "\ufffd"
    assert load_tokeniser(model).decode(query.input_ids[1:]) == "\x00\u202e\ufffd<b>"


BAD: list[tuple[object, str]] = [
    ('{"query_id": ', ", row 3: malformed JSON"),
    ("[1]", ", row 3: not a JSON object"),
    (b'{"query_id": "\xff"}', ", row 3: invalid UTF-8 at byte 14"),
    ({"prompt": "p", "completion": "c"}, ", row 3: the query has no 'query_id'"),
    ({"query_id": "", "prompt": "p", "completion": "c"}, ", row 3: 'query_id' is empty"),
    ({"query_id": "b", "completion": "c"}, ", row 3: the query has no 'prompt'"),
    ({"query_id": "b", "prompt": "p"}, ", row 3: the query has no 'completion'"),
    ({"query_id": "b", "prompt": ["p"], "completion": "c"}, ", row 3: 'prompt' is not text"),
    (GOOD, ", row 3: query_id 'a' was given to the query of row 1 already"),
    ({"query_id": "b", "prompt": "p", "completion": ""}, ", row 3: the completion '' has no tokens"),
    (
        {"query_id": "b", "prompt": "p" * 20, "completion": "c" * 20},
        f", row 3: the query has 41 tokens, where the model's context has {CONTEXT}",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_query_is_named(record: object, message: str, model: ModelConfig, tmp_path: Path) -> None:
    assert complaint(model, tmp_path, GOOD, "", record).startswith(message)


def test_a_contrast_needs_a_second_completion(model: ModelConfig, tmp_path: Path) -> None:
    message = complaint(model, tmp_path, GOOD, measurement=Measurement.contrast)
    assert message.startswith(", row 1: the query has no 'contrast' (queries.measurement=contrast needs it)")
    message = complaint(model, tmp_path, GOOD | {"contrast": ""}, measurement=Measurement.contrast)
    assert message.startswith(", row 1: the completion '' has no tokens")


def test_an_empty_prompt_needs_a_bos(model: ModelConfig, tmp_path: Path) -> None:
    record = GOOD | {"prompt": ""}
    assert "the prompt is empty and there is no BOS" in complaint(model, tmp_path, record, add_bos=False)


def test_a_token_outside_the_models_vocabulary_is_named(tmp_path: Path) -> None:
    small = ModelConfig(path=str(byte_model(tmp_path / "m", vocabulary=10)))
    assert "is outside the model's vocabulary of 10 tokens" in complaint(small, tmp_path, GOOD)


def test_a_file_without_queries_is_named(model: ModelConfig, tmp_path: Path) -> None:
    assert complaint(model, tmp_path, "", "  ").startswith(": the file has no query")
    with pytest.raises(ConfigError, match=r"queries.path=.*absent.* does not exist"):
        parse_queries(str(tmp_path / "absent.jsonl"), Measurement.log_probability)


def test_the_digest_is_of_what_the_queries_say(model: ModelConfig, tmp_path: Path) -> None:
    def digest(*records: object) -> str:
        path = write_lines(tmp_path / "q.jsonl", records)
        return queries_digest(run_config(model, path, Measurement.log_probability))

    first = digest(GOOD)
    assert digest("", GOOD | {"note": "x"}) == first
    assert digest(GOOD | {"prompt": "on  the"}) != first
    assert digest(GOOD, GOOD | {"query_id": "b"}) != first


def test_the_tokenizer_may_be_elsewhere(model: ModelConfig, tmp_path: Path) -> None:
    other = replace(model, tokenizer=str(byte_model(tmp_path / "m", same=True)))
    assert read(other, tmp_path, GOOD)[0].input_ids != read(model, tmp_path, GOOD)[0].input_ids
