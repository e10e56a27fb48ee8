"""The sequences artifact: its format, its resumption, and that the machine moves no bit of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.corpus import CorpusFile, Part, plan_parts
from actors.errors import BadRecord, ConfigError
from actors.packing import PartSummary
from actors.store import Artifact
from actors.tokeniser import load_tokeniser
from conf.schema import BadRecord as OnBadRecord
from conf.schema import CorpusConfig, CorpusFormat, ModelConfig, RunConfig
from pipelines.stages import tokenise
from pipelines.steps import StageContext
from pipelines.streaming import stream
from tests.corpora import BOS, CONTEXT, EOS, byte_model, write_lines

ContextFactory = Callable[..., StageContext]
TEXTS = [f"document {i} says the cat {'sat ' * (i % 7)}" for i in range(60)]
pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(byte_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def config(model: ModelConfig, tmp_path: Path) -> RunConfig:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"text": text} for text in TEXTS[:40]])
    write_lines(folder / "b.jsonl", ["", *({"text": text} for text in TEXTS[40:])])
    corpus = CorpusConfig(path=str(folder), sequence_length=16, part_bytes=300, shard_sequences=10)
    return RunConfig(model=model, corpus=corpus)


def changed(config: RunConfig, **corpus: Any) -> RunConfig:
    return replace(config, corpus=replace(config.corpus, **corpus))


def rows_of(artifact: Artifact) -> list[dict]:
    index = artifact.read_json("index.json")
    return [row for shard in index["shards"] for row in artifact.read_table(shard["name"]).to_pylist()]


def bits(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.read_bytes(name) for name in artifact.list()}


def test_sequences_are_numbered_in_the_order_of_the_corpus(
    config: RunConfig, model: ModelConfig, stage_context: ContextFactory
) -> None:
    context = stage_context(config, "sequences")
    result = tokenise.run(context)
    rows, index = rows_of(context.artifact), context.artifact.read_json("index.json")
    assert [row["sequence_id"] for row in rows] == list(range(len(rows)))
    encoded = load_tokeniser(model).encode(TEXTS)
    assert [t for row in rows for t in row["input_ids"]] == [t for ids in encoded for t in [BOS, *ids, EOS]]
    assert [shard["rows"] for shard in index["shards"][:-1]] == [10] * (len(index["shards"]) - 1)
    assert [shard["first_sequence_id"] for shard in index["shards"]] == list(range(0, len(rows), 10))
    assert index["sequences"] == len(rows) == sum(shard["rows"] for shard in index["shards"])
    assert index["tokens"] == sum(len(ids) + 2 for ids in encoded) == sum(s["tokens"] for s in index["shards"])
    assert (index["documents"], index["skipped"], index["vocabulary"]) == (60, {}, 264)
    assert result.counts["sequences"] == index["sequences"]
    assert context.artifact.list("parts/") == []


def test_documents_are_named_by_file_and_row_whatever_the_parts(
    config: RunConfig, model: ModelConfig, stage_context: ContextFactory
) -> None:
    encoded = load_tokeniser(model).encode(TEXTS)
    tokens = {f"a.jsonl:{i + 1}": [BOS, *encoded[i], EOS] for i in range(40)}
    tokens |= {f"b.jsonl:{i - 38}": [BOS, *encoded[i], EOS] for i in range(40, 60)}  # its first line is blank
    context = stage_context(config, "sequences")
    tokenise.run(context)
    for row in rows_of(context.artifact):
        assert row["input_ids"][0] == tokens[row["document_id"]][row["offset"]]
    schema = context.artifact.read_table("shard-00000.parquet").schema
    assert [(field.name, str(field.type).replace("item", "element")) for field in schema] == [
        ("sequence_id", "int64"),
        ("input_ids", "list<element: int32>"),
        ("document_id", "string"),
        ("offset", "int64"),
    ]


def test_one_cpu_or_two_and_any_blocks_give_the_same_bits(
    config: RunConfig, stage_context: ContextFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage_context(config, "sequences", attempt=0)
    tokenise.run(first)
    monkeypatch.setattr(tokenise, "stream", partial(stream, cpus=2))  # one task at a time
    monkeypatch.setattr("pipelines.streaming._BLOCKS", 3)
    second = stage_context(config, "sequences", attempt=1)
    tokenise.run(second)
    assert bits(first.artifact) == bits(second.artifact)


def test_part_and_shard_sizes_only_cut(config: RunConfig, stage_context: ContextFactory) -> None:
    whole = changed(config, part_bytes=10**6, pack=False)
    first, second = stage_context(whole, "sequences", attempt=0), stage_context(whole, "sequences", attempt=1)
    tokenise.run(first)
    tokenise.run(replace(second, config=changed(whole, part_bytes=200, shard_sequences=7)))
    assert rows_of(first.artifact) == rows_of(second.artifact)


def test_an_attempt_that_was_cut_short_goes_on(
    config: RunConfig, stage_context: ContextFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = stage_context(config, "sequences", attempt=0), stage_context(config, "sequences", attempt=1)
    tokenise.run(whole)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenise, "_write_index", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenise.run(cut)
    monkeypatch.undo()
    parts = [name for name in cut.artifact.list("parts/") if name.endswith(".json")]
    assert len(parts) > 3
    cut.artifact.delete(parts[1])  # that part was not finished
    kept = f"{cut.artifact.uri}/{parts[2]}"
    written = Path(kept).stat().st_mtime_ns
    monkeypatch.setattr(tokenise, "ThreadPoolExecutor", dies)  # dies again, before the parts are removed
    with pytest.raises(KeyboardInterrupt):
        tokenise.run(cut)
    assert Path(kept).stat().st_mtime_ns == written
    monkeypatch.undo()
    tokenise.run(cut)
    assert bits(cut.artifact) == bits(whole.artifact)


def test_a_limit_takes_the_first_documents(config: RunConfig, stage_context: ContextFactory) -> None:
    context = stage_context(changed(config, limit=45, pack=False), "sequences")
    assert tokenise.run(context).counts["documents"] == 45
    names = dict.fromkeys(row["document_id"] for row in rows_of(context.artifact))
    assert list(names) == [f"a.jsonl:{i + 1}" for i in range(40)] + [f"b.jsonl:{i + 2}" for i in range(5)]


def test_records_after_the_limit_are_nobodys_concern(config: RunConfig, stage_context: ContextFactory) -> None:
    path = Path(config.corpus.path) / "b.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    context = stage_context(changed(config, limit=41, pack=False), "sequences")
    assert tokenise.run(context).counts["documents"] == 41
    parts = len(plan_parts(config.corpus).parts)
    assert parts > 8  # so that there are several waves, and the bad record is in the last part


def test_a_bad_record_reaches_the_driver_as_it_was_raised(config: RunConfig, stage_context: ContextFactory) -> None:
    path = Path(config.corpus.path) / "b.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(BadRecord) as caught:
        tokenise.run(stage_context(config, "sequences"))
    assert (caught.value.file, caught.value.row) == ("b.jsonl", 22)
    assert "malformed JSON" in str(caught.value)
    with pytest.raises(BadRecord, match=r"b\.jsonl, row 22: malformed JSON"):
        tokenise.run(stage_context(changed(config, limit=100), "sequences", attempt=1))
    skipping = stage_context(changed(config, on_bad_record=OnBadRecord.skip), "sequences", attempt=2)
    assert tokenise.run(skipping).counts["skipped"] == {"malformed JSON": 1}


def test_a_corpus_without_tokens_is_refused(config: RunConfig, stage_context: ContextFactory) -> None:
    for path in Path(config.corpus.path).iterdir():
        write_lines(path, ["", {"text": ""}])
    with pytest.raises(BadRecord, match=r"the corpus has no tokens; left out: {'empty document': 2}"):
        tokenise.run(stage_context(config, "sequences"))


@pytest.mark.parametrize("length", [1, CONTEXT + 1])
def test_a_length_that_the_model_cannot_take_is_refused(
    length: int, config: RunConfig, stage_context: ContextFactory
) -> None:
    with pytest.raises(ConfigError, match=rf"corpus.sequence_length={length} .*2 to {CONTEXT}, the model's context"):
        tokenise.run(stage_context(changed(config, sequence_length=length), "sequences"))


def test_shards_are_cut_across_chunks_and_parts() -> None:
    files = [CorpusFile("/c/a", "a", 9, CorpusFormat.jsonl), CorpusFile("/c/b", "b", 9, CorpusFormat.jsonl)]
    parts = [Part(i, "/c", file, 0, 9, 9) for i, file in enumerate([files[0], files[0], files[1]])]
    summaries = [
        PartSummary(i, chunks, 0, 0, rows, {}) for i, (chunks, rows) in enumerate([([3, 2], 10), ([], 5), ([4], 7)])
    ]
    shards = tokenise.shard_slices(parts, summaries, 4)
    assert [(s["name"], s["first_sequence_id"], s["rows"]) for s in shards] == [
        ("shard-00000.parquet", 0, 4),
        ("shard-00001.parquet", 4, 4),
        ("shard-00002.parquet", 8, 1),
    ]
    first, second = "parts/000000-00000.parquet", "parts/000000-00001.parquet"
    assert shards[0]["slices"] == [[first, 0, 3, "a", 0], [second, 0, 1, "a", 0]]
    assert shards[1]["slices"] == [[second, 1, 2, "a", 0], ["parts/000002-00000.parquet", 0, 3, "b", 0]]
    assert json.loads(json.dumps(shards)) == shards
