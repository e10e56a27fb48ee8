"""Probes: what is read from YAML, how sequences are tokenised, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from actors.errors import BadRecord, ConfigError
from actors.probes import (
    Probe,
    parse_probes,
    read_probes,
    sequences_digest,
    tokenise_probe_queries,
    tokenise_probes,
)
from actors.queries import read_queries
from actors.tokeniser import load_tokeniser, model_limits
from conf.schema import CorpusConfig, Measurement, ModelConfig, ProbeConfig, QueriesConfig, RunConfig
from tests.corpora import BOS, CONTEXT, EOS, byte_model, write_lines

GOOD: dict[str, Any] = {
    "id": "cat",
    "prompt": "on the",
    "completion": " cat",
    "partitions": {"same order": ["on the cat", "the cat"], "inverted": ["cat on the"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(byte_model(tmp_path_factory.mktemp("model"))))


def written(folder: Path, content: object) -> Path:
    path = folder / "probes.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def config_of(model: ModelConfig, path: Path, **corpus: Any) -> RunConfig:
    return RunConfig(model=model, probe=ProbeConfig(path=str(path)), corpus=CorpusConfig(path="-", **corpus))


def tokens(config: RunConfig) -> list[list[np.ndarray]]:
    return tokenise_probes(read_probes(config), load_tokeniser(config.model), model_limits(config.model), config)


def complaint(folder: Path, content: object, measurement: Measurement = Measurement.log_probability) -> str:
    path = written(folder, content)
    with pytest.raises(BadRecord) as caught:
        parse_probes(str(path), measurement)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_partitions_and_sequences_come_in_the_order_of_the_file(tmp_path: Path):
    (probe,) = parse_probes(str(written(tmp_path, [GOOD])))
    assert isinstance(probe, Probe)
    assert probe.partitions == ("same order", "inverted")
    assert [(s.partition, s.index, s.text) for s in probe.sequences] == [
        ("same order", 1, "on the cat"),
        ("same order", 2, "the cat"),
        ("inverted", 1, "cat on the"),
    ]
    assert probe.reference == "same order"
    assert probe.record() == {"query_id": "cat", "prompt": "on the", "completion": " cat"}


def test_a_reference_and_a_contrast_may_be_given(tmp_path: Path):
    content = GOOD | {"id": 7, "contrast": " mat", "reference": "inverted"}
    (probe,) = parse_probes(str(written(tmp_path, [content])), Measurement.contrast)
    assert (probe.probe_id, probe.reference, probe.record()["contrast"]) == ("7", "inverted", " mat")


def test_text_is_taken_as_it_is(tmp_path: Path):
    text = """\
- {id: "no", prompt: "\\0 \\u202e", completion: "\\ud83d x", partitions: {"<b>": ["<script>", "a\\n\\nb", "引力 🐱"]}}
"""
    (probe,) = parse_probes(str(written(tmp_path, text)))
    assert (probe.query.prompt, probe.query.completion) == ("\0 \u202e", "\ufffd x")
    assert [s.text for s in probe.sequences] == ["<script>", "a\n\nb", "引力 🐱"]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ("", "", "the file has no probe"),
        ("[]", ", row 1", "the file is no list of probes"),
        ("id: cat", ", row 1", "the file is no list of probes"),
        ("- cat", ", row 1", "probe 1: the probe is no mapping of names to values"),
        ("- {id: cat", ", row 1", "malformed YAML"),
        ("- id: 'cat\n  prompt: x", ", row 2", "malformed YAML"),
        ("- id: a\n  prompt: \x01", ", row 2", "malformed YAML: special characters are not allowed; write it as an"),
        ("- id: a\n--- \n- id: b", ", row 2", "malformed YAML"),
        ("- id: a\n  id: b", ", row 2", "probe 1: 'id' is given twice"),
        ("- id: a\n  <<: {prompt: x}", ", row 2", "probe 1: a name in the probe is not text"),
        ("- &x\n  id: *x", ", row 1", "probe 1: 'id' is not text"),
        ("- id: !!python/object/apply:os.system [ls]", ", row 1", "probe 1: 'id' is not text"),
        ([GOOD | {"id": ""}], ", row 1", "probe '': 'id' is empty"),
        ([GOOD | {"prmpt": "x"}], ", row 10", "probe 'cat': there is no field 'prmpt'. Did you mean prompt?"),
        ([GOOD | {"completion": 1912}], ", row 3", "probe 'cat': 'completion' is not text: put '1912' in quotes"),
        ([GOOD | {"completion": None}], ", row 3", "probe 'cat': 'completion' is not text: put 'null' in quotes"),
        ([GOOD | {"prompt": True}], ", row 2", "probe 'cat': 'prompt' is not text: put 'true' in quotes"),
        ([{"id": "b", "prompt": "x"}], ", row 1", "probe 'b': 'completion' is missing"),
        ([GOOD | {"partitions": {}}], ", row 4", "probe 'cat': 'partitions' is empty"),
        ([GOOD | {"partitions": ["x"]}], ", row 5", "probe 'cat': 'partitions' is no mapping"),
        ([GOOD | {"partitions": {"a": "x"}}], ", row 5", "probe 'cat': partition 'a' is no list of sequences"),
        ([GOOD | {"partitions": {"a": []}}], ", row 5", "probe 'cat': partition 'a' is no list of sequences, or an"),
        ([GOOD | {"partitions": {"a": ["x", " "]}}], ", row 7", "probe 'cat': partition 'a', sequence 2 is empty"),
        ([GOOD | {"partitions": {"a": ["x", 3]}}], ", row 7", "'cat': partition 'a', sequence 2 is not text: put '3'"),
        ([GOOD | {"reference": "invert"}], ", row 10", "which is no partition. Partitions: 'same order', 'inverted'."),
        ([GOOD, dict(GOOD)], ", row 10", "probe 'cat': 'id' was given to the probe of row 1 already"),
    ],
)  # fmt: skip
def test_refusals_name_file_line_probe_and_field(content: object, place: str, reason: str, tmp_path: Path):
    message = complaint(tmp_path, content)
    assert message.startswith(f"{place}: ")
    assert reason in message
    assert "Remedy: " in message


def test_a_contrast_must_be_there_where_it_is_measured(tmp_path: Path):
    message = complaint(tmp_path, [GOOD], Measurement.contrast)
    assert "probe 'cat': 'contrast' is missing (queries.measurement=contrast needs it)" in message


def test_deep_nesting_and_bytes_that_are_no_utf8_are_refused(tmp_path: Path):
    assert "malformed YAML" in complaint(tmp_path, "[" * 5000)
    path = tmp_path / "probes.yaml"
    path.write_bytes(b"- id: a\n  prompt: \xff")
    with pytest.raises(BadRecord, match="row 2: invalid UTF-8 at byte 18"):
        parse_probes(str(path))


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"probe\.path='.*none\.yaml' is no file"):
        parse_probes(str(tmp_path / "none.yaml"))


def test_the_digest_is_of_texts_and_queries_and_not_of_names(tmp_path: Path):
    def digest(content: list[dict[str, Any]]) -> str:
        return sequences_digest(parse_probes(str(written(tmp_path, content))))

    other = GOOD | {"id": "mat"}
    base = digest([GOOD, other])
    renamed = GOOD | {"partitions": {"one": GOOD["partitions"]["same order"], "two": ["cat on the"]}}
    assert digest([renamed, other]) == base
    assert digest([GOOD, other | {"partitions": {"a": ["on the cat", "the cat", "cat on thE"]}}]) != base
    moved = [GOOD | {"partitions": {"a": ["on the cat"]}}, other | {"partitions": {"a": ["the cat"]}}]
    assert digest(moved) != digest([moved[0] | {"partitions": {"a": ["on the cat", "the cat"]}}])


def test_sequences_are_tokenised_as_documents_are(model: ModelConfig, tmp_path: Path):
    config = config_of(model, written(tmp_path, [GOOD]))
    encode = load_tokeniser(model).encode
    ((first, second, third),) = tokens(config)
    assert first.tolist() == [BOS, *encode(["on the cat"])[0], EOS]
    assert (second.tolist()[1:-1], third.tolist()[1:-1]) == tuple(encode(["the cat", "cat on the"]))
    ((bare, *_),) = tokens(config_of(model, written(tmp_path, [GOOD]), add_bos=False, add_eos=False))
    assert bare.tolist() == first.tolist()[1:-1]
    spaced = written(tmp_path, [GOOD | {"partitions": {"a": ["on\n\n\nthe cat"]}}])
    ((collapsed,),) = tokens(config_of(model, spaced, collapse_newlines=True))
    assert collapsed.tolist()[1:-1] == encode(["on\nthe cat"])[0]


def test_queries_are_tokenised_as_those_of_a_queries_file(model: ModelConfig, tmp_path: Path):
    config = config_of(model, written(tmp_path, [GOOD]))
    (found,) = tokenise_probe_queries(read_probes(config), load_tokeniser(model), model_limits(model), config)
    lines = write_lines(tmp_path / "q.jsonl", [read_probes(config)[0].record()])
    (expected,) = read_queries(replace(config, queries=QueriesConfig(path=str(lines))))
    assert (found.input_ids, found.completion_start) == (expected.input_ids, expected.completion_start)


@pytest.mark.parametrize(
    ("text", "corpus", "reason"),
    [
        ("x" * (CONTEXT - 1), {}, f"the sequence has {CONTEXT + 1} tokens, where the model's context has {CONTEXT}"),
        ("x", {"add_bos": False, "add_eos": False}, "the sequence has fewer than two tokens"),
    ],
)
def test_a_sequence_that_cannot_be_scored_is_named(
    text: str, corpus: dict[str, bool], reason: str, model: ModelConfig, tmp_path: Path
):
    path = written(tmp_path, [GOOD | {"partitions": {"a": ["on the cat", text]}}])
    with pytest.raises(BadRecord) as caught:
        tokens(config_of(model, path, **corpus))
    assert str(caught.value).startswith(f"{path}, row 7: probe 'cat', partition 'a', sequence 2: {reason}")


def test_a_sequence_as_long_as_the_context_is_taken_whole(model: ModelConfig, tmp_path: Path):
    path = written(tmp_path, [GOOD | {"partitions": {"a": ["x" * (CONTEXT - 2)]}}])
    ((ids,),) = tokens(config_of(model, path))
    assert len(ids) == CONTEXT


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path):
    small = ModelConfig(path=str(byte_model(tmp_path / "small", vocabulary=100)))
    path = written(tmp_path, [GOOD | {"partitions": {"a": ["é"]}}])
    with pytest.raises(BadRecord, match=r"partition 'a', sequence 1: token id .* is outside the model's vocabulary"):
        tokens(config_of(small, path, add_bos=False, add_eos=False))


def test_a_query_that_measures_nothing_is_named(model: ModelConfig, tmp_path: Path):
    path = written(tmp_path, [GOOD, GOOD | {"id": "b", "completion": ""}])
    config = config_of(model, path)
    with pytest.raises(BadRecord, match=r"probes\.yaml, row 10: probe 'b': the completion '' has no tokens"):
        tokenise_probe_queries(read_probes(config), load_tokeniser(model), model_limits(model), config)
