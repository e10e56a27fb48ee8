"""Reading, tokenising and packing a corpus, part by part, without Ray."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.corpus import Part, corpus_digest, list_files, plan_parts, with_limits
from actors.documents import Document, PartLog, read_documents, rows_before
from actors.errors import BadRecord, ConfigError
from actors.packing import count_documents, tokenise_part
from actors.tokeniser import Limits, Tokeniser, load_tokeniser, model_limits, well_formed
from conf.schema import BadRecord as OnBadRecord
from conf.schema import CorpusConfig, CorpusFormat, ModelConfig
from tests.corpora import BOS, CONTEXT, EOS, byte_model, write_lines

LIMITS = Limits(1000, CONTEXT)
TEXTS = ["the cat", " sat on the mat.\n\nIt", "naïve café", "x" * 50, "end"]


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    return load_tokeniser(ModelConfig(path=str(byte_model(tmp_path_factory.mktemp("model")))))


def config(path: Path | str, **changes: Any) -> CorpusConfig:
    return CorpusConfig(path=str(path), **{"sequence_length": 8, **changes})


def documents(settings: CorpusConfig) -> list[Document]:
    parts = plan_parts(settings).parts
    return [d for part in parts for d in read_documents(part, settings, PartLog(part, settings.on_bad_record))]


def contents(settings: CorpusConfig) -> list[object]:
    return [d.content if isinstance(d.content, str) else d.content.tolist() for d in documents(settings)]


def tokenised(
    settings: CorpusConfig, tokeniser: Tokeniser, limits: Limits = LIMITS
) -> tuple[list[dict], dict[str, int], int]:
    rows: list[dict] = []
    skipped: dict[str, int] = {}
    count = 0
    for part in plan_parts(settings).parts:
        summary = tokenise_part(part, settings, tokeniser, limits, lambda _, table: rows.extend(table.to_pylist()))
        skipped |= summary.skipped
        count += summary.documents
    return rows, skipped, count


def complaint(settings: CorpusConfig, tokeniser: Tokeniser, limits: Limits = LIMITS) -> str:
    with pytest.raises(BadRecord) as caught:
        tokenised(settings, tokeniser, limits)
    return str(caught.value)


# Formats


def write_jsonl(folder: Path) -> Path:
    return write_lines(folder / "c.jsonl", [{"text": text} for text in TEXTS])


def write_crlf_with_mark(folder: Path) -> Path:
    path = folder / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps({"text": text}).encode() for text in TEXTS))
    return path


def write_gzip(folder: Path) -> Path:
    path = folder / "c.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(folder).read_bytes()))
    return path


def write_bz2(folder: Path) -> Path:
    path = folder / "c.jsonl.bz2"
    path.write_bytes(bz2.compress(write_jsonl(folder).read_bytes()))
    return path


def write_zstd(folder: Path) -> Path:
    path = folder / "c.jsonl.zst"
    with pa.output_stream(path, compression="zstd") as stream:
        stream.write(write_jsonl(folder).read_bytes())
    return path


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"other": range(5), "text": TEXTS}), folder / "c.parquet", row_group_size=2)
    return folder / "c.parquet"


def write_dictionary_parquet(folder: Path) -> Path:
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(table, folder / "c.parquet")
    return folder / "c.parquet"


def write_string_view_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string_view())}), folder / "c.parquet")
    return folder / "c.parquet"


def write_arrow_file(folder: Path) -> Path:
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder / "c.arrow"


def write_datasets(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": list(range(5)), "text": TEXTS}).save_to_disk(str(folder / "c"), num_shards=2)
    return folder / "c"


def write_folder(folder: Path) -> Path:
    nested = folder / "c" / "deep"
    nested.mkdir(parents=True)
    write_lines(folder / "c" / "a.jsonl", [{"text": text} for text in TEXTS[:2]])
    pq.write_table(pa.table({"text": TEXTS[2:4]}), nested / "b.parquet")
    (nested / "c.txt").write_text(TEXTS[4])
    (nested / ".hidden.jsonl").write_text("nonsense")
    (folder / "c" / "LICENSE").write_text("not a document")
    return folder / "c"


WRITERS = [
    write_jsonl,
    write_crlf_with_mark,
    write_gzip,
    write_bz2,
    write_zstd,
    write_parquet,
    write_dictionary_parquet,
    write_string_view_parquet,
    write_arrow_file,
    write_datasets,
    write_folder,
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_documents_in_order(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path)
    assert contents(config(path)) == TEXTS
    assert contents(config(f"file://{path}")) == TEXTS


@pytest.mark.parametrize("part_bytes", [1, 7, 20, 64, 10_000])
def test_byte_ranges_lose_and_double_no_line(part_bytes: int, tmp_path: Path) -> None:
    for write in (write_jsonl, write_crlf_with_mark, write_parquet):
        assert contents(config(write(tmp_path), part_bytes=part_bytes)) == TEXTS


def test_a_text_file_is_one_document_cut_only_between_parts(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("one\n\ntwo\nthree\n")
    assert contents(config(path)) == ["one\n\ntwo\nthree\n"]
    cut = documents(config(path, part_bytes=6))
    assert "".join(str(d.content) for d in cut) == "one\n\ntwo\nthree\n"
    assert [d.name for d in cut] == ["c.txt", "c.txt@6"]


def test_already_tokenised_rows_are_found_by_type(tmp_path: Path) -> None:
    rows = [[3, 4, 5], [6], list(range(9))]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "c.parquet")
    assert contents(config(tmp_path / "c.parquet")) == rows
    write_lines(tmp_path / "c.jsonl", [{"tokens": row} for row in rows])
    assert contents(config(tmp_path / "c.jsonl", text_field="tokens")) == rows
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.uint16(), 2))
    pq.write_table(pa.table({"input_ids": fixed}), tmp_path / "fixed.parquet")
    assert contents(config(tmp_path / "fixed.parquet")) == [[1, 2], [3, 4]]


def test_ids_of_documents_come_from_the_corpus_if_it_has_them(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a", "id": "first"}, {"text": "b", "id": 7}])
    assert [d.name for d in documents(config(path, id_field="id"))] == ["first", "7"]
    pq.write_table(pa.table({"text": ["a", "b"], "id": [1, 2]}), tmp_path / "c.parquet")
    assert [d.name for d in documents(config(tmp_path / "c.parquet", id_field="id"))] == ["1", "2"]
    assert [d.name for d in documents(config(path))] == [None, None]


def test_globs_stay_in_a_folder_unless_doubled(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "a.jsonl.bak").write_text("nonsense")
    assert [file.name for file in list_files(config(f"{folder}/*.jsonl"))] == ["a.jsonl"]
    assert [file.name for file in list_files(config(f"{folder}/**/[bc].*"))] == ["deep/b.parquet", "deep/c.txt"]
    assert [file.name for file in list_files(config(f"file://{folder}/d*/*.txt"))] == ["deep/c.txt"]


def test_a_name_with_brackets_is_a_file_if_it_exists(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path).rename(tmp_path / "c[1].jsonl")
    assert contents(config(path)) == TEXTS


def test_a_format_can_be_given(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path).rename(tmp_path / "c.data")
    assert contents(config(path, format=CorpusFormat.jsonl)) == TEXTS
    assert contents(config(f"{tmp_path}/*.data", format=CorpusFormat.jsonl)) == TEXTS
    with pytest.raises(ConfigError, match=r"corpus.path=.*c.data.*corpus.format"):
        list_files(config(path))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* does not exist"):
        list_files(config(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no file with a known extension"):
        list_files(config(tmp_path))
    with pytest.raises(ConfigError, match="no file with a known extension"):
        list_files(config(f"{tmp_path}/*.jsonl"))


def test_a_datasets_folder_of_splits_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"several splits: train, test.*/train"):
        list_files(config(tmp_path))


# Identity


def test_the_digest_is_of_names_and_content(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    first = corpus_digest(config(folder))
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert corpus_digest(config(moved)) == first
    (moved / "LICENSE").write_text("something else")
    assert corpus_digest(config(moved)) == first
    (moved / "deep" / "c.txt").write_text("End")
    changed = corpus_digest(config(moved))
    assert changed != first
    (moved / "a.jsonl").rename(moved / "b.jsonl")
    assert corpus_digest(config(moved)) != changed


def test_a_damaged_compressed_file_has_a_digest_too(tmp_path: Path) -> None:
    path = write_gzip(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert len(corpus_digest(config(path))) == 64


# Packing


def test_packing_follows_documents_with_bos_and_eos(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": text} for text in TEXTS])
    rows, _, count = tokenised(config(path), tokeniser)
    stream = [t for text in TEXTS for t in [BOS, *tokeniser.encode([text])[0], EOS]]
    assert [t for row in rows for t in row["input_ids"]] == stream
    assert {len(row["input_ids"]) for row in rows[:-1]} == {8}
    assert count == 5
    for row in rows:  # each sequence says where it begins
        document = [BOS, *tokeniser.encode([TEXTS[row["row"]]])[0], EOS]
        assert document[row["offset"]] == row["input_ids"][0]
    assert rows[0]["offset"] == 0


def test_without_packing_documents_start_sequences(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "the cat"}, {"text": "x" * 12}])
    rows, _, _ = tokenised(config(path, pack=False, add_eos=False), tokeniser)
    assert [len(row["input_ids"]) for row in rows] == [3, 8, 5]
    assert [(row["row"], row["offset"]) for row in rows] == [(0, 0), (1, 0), (1, 8)]


def test_one_token_for_bos_and_eos_is_not_doubled(tmp_path: Path) -> None:
    shared = load_tokeniser(ModelConfig(path=str(byte_model(tmp_path / "m", same=True))))
    path = write_lines(tmp_path / "c.jsonl", [{"text": "ab"}, {"text": "cd"}])
    a, b, c, d = shared.encode(["abcd"])[0]
    rows, _, _ = tokenised(config(path, sequence_length=20), shared)
    assert rows[0]["input_ids"] == [0, a, b, 0, c, d, 0]
    rows, _, _ = tokenised(config(path, sequence_length=20, pack=False), shared)
    assert [row["input_ids"] for row in rows] == [[0, a, b, 0], [0, c, d, 0]]


def test_tokenised_rows_are_packed_or_taken_as_they_are(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"input_ids": [BOS, 5, 6]}, {"input_ids": [7] * 10}])
    rows, _, _ = tokenised(config(path), tokeniser)
    assert [t for row in rows for t in row["input_ids"]] == [BOS, 5, 6, EOS, BOS, *[7] * 10, EOS]
    rows, _, _ = tokenised(config(path, pack=False), tokeniser)
    assert [row["input_ids"] for row in rows] == [[BOS, 5, 6], [7] * 10]


def test_runs_of_newlines_collapse_on_request(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a\n\n\nb\r\n\r\nc\nd"}])
    rows, _, _ = tokenised(config(path, sequence_length=32, collapse_newlines=True), tokeniser)
    assert tokeniser.decode(rows[0]["input_ids"]) == "<s>a\nb\nc\nd</s>"


@pytest.mark.parametrize("shard_sequences", [1, 3, 1000])
def test_chunks_hold_at_most_a_shard(shard_sequences: int, tmp_path: Path, tokeniser: Tokeniser) -> None:
    settings = config(write_jsonl(tmp_path), shard_sequences=shard_sequences)
    (part,) = plan_parts(settings).parts
    chunks: list[int] = []
    numbers: list[int] = []

    def emit(number: int, table: pa.Table) -> None:
        numbers.append(number)
        chunks.append(len(table))

    summary = tokenise_part(part, settings, tokeniser, Limits(1000, None), emit)
    assert summary.chunks == chunks
    assert numbers == list(range(len(chunks)))
    assert max(chunks) <= shard_sequences
    assert sum(chunks) == len(tokenised(settings, tokeniser)[0])


def test_a_limit_takes_the_first_documents_whatever_the_parts(tmp_path: Path, tokeniser: Tokeniser) -> None:
    for part_bytes in (10, 40, 10_000):
        settings = config(write_jsonl(tmp_path), part_bytes=part_bytes)
        parts = plan_parts(settings).parts
        limited = with_limits(parts, count_documents(parts, settings, 3), 3)
        found = [d for p in limited for d in read_documents(p, settings, PartLog(p, settings.on_bad_record))]
        assert [d.content for d in found] == TEXTS[:3]


# Hostile text


def test_hostile_text_is_inert(tmp_path: Path, tokeniser: Tokeniser) -> None:
    hostile = ["\x00nul\x00", "\ud800 alone", "\u202eright to left\u202c", "<script>alert(1)</script>", "😀" * 5]
    path = write_lines(tmp_path / "c.jsonl", [{"text": text, "id": text} for text in hostile])
    rows, skipped, count = tokenised(config(path, pack=False, sequence_length=64, id_field="id"), tokeniser)
    assert (count, skipped) == (5, {})
    decoded = [tokeniser.decode(row["input_ids"]) for row in rows]
    assert decoded == [f"<s>{well_formed(text)}</s>" for text in hostile]
    assert rows[1]["document"] == "\ufffd alone"


def test_lone_surrogates_become_the_replacement_character_and_pairs_stay() -> None:
    assert well_formed("a\ud800b\udc00") == "a\ufffdb\ufffd"
    assert well_formed("plain\x00 \u202e😀") == "plain\x00 \u202e😀"


# Bad records: the message has the file, the row counted from 1 and the reason, and skipping counts them

BAD_LINES: list[tuple[object, str]] = [
    ('{"text": "cut', "malformed JSON"),
    ("[" * 100_000, "malformed JSON"),
    ('["a", "list"]', "not a JSON object"),
    ({"body": "x"}, "missing text: no field 'text', the record has 'body'"),
    ({"text": 3}, "not text: field 'text' is a number"),
    ({"text": None}, "not text: field 'text' is null"),
    ({"text": [1, "two"]}, "not text: field 'text' is a list"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    ({"text": [5, 1000]}, "token id outside the vocabulary: 1000"),
    ({"text": [-1]}, "token id outside the vocabulary: -1"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
@pytest.mark.parametrize("part_bytes", [12, 10_000])
def test_a_bad_line_is_named(line: object, reason: str, part_bytes: int, tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "good"}, "", {"text": "good"}, line, {"text": "good"}])
    settings = config(path, part_bytes=part_bytes)
    message = complaint(settings, tokeniser)
    assert message.startswith("c.jsonl, row 4: ")
    assert reason in message
    assert "corpus.on_bad_record=skip" in message
    _, skipped, count = tokenised(replace(settings, on_bad_record=OnBadRecord.skip), tokeniser)
    assert (skipped, count) == ({reason.partition(":")[0].partition(" at byte")[0]: 1}, 3)


def parquet_rows() -> Iterator[tuple[pa.Array, str]]:
    yield pa.array(["good", "good", None, "good"]), "missing text: column 'text' is null"
    yield pa.array([b"good", b"good", b"\xff", b"good"]), "invalid UTF-8 at byte 0"
    yield pa.array([[1], [2], [3, 1000], [4]]), "token id outside the vocabulary: 1000"
    yield pa.array([[1], [2], [3, None], [4]]), "missing text: column 'text' is null, or holds a null"
    yield pa.array([[1], [2], [3] * 33, [4]]), "sequence longer than the context: 33 tokens"


@pytest.mark.parametrize(("column", "reason"), list(parquet_rows()))
@pytest.mark.parametrize("part_bytes", [1, 10_000])
def test_a_bad_row_of_parquet_is_named(
    column: pa.Array, reason: str, part_bytes: int, tmp_path: Path, tokeniser: Tokeniser
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet", row_group_size=1)
    settings = config(tmp_path / "c.parquet", part_bytes=part_bytes, pack=False)
    message = complaint(settings, tokeniser)
    assert message.startswith("c.parquet, row 3: ")
    assert reason in message
    _, skipped, count = tokenised(replace(settings, on_bad_record=OnBadRecord.skip), tokeniser)
    assert (list(skipped.values()), count) == ([1], 3)


def test_invalid_utf8_of_a_text_file_is_named_by_line(tmp_path: Path, tokeniser: Tokeniser) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    for part_bytes in (6, 10_000):
        assert complaint(config(tmp_path / "c.txt", part_bytes=part_bytes), tokeniser).startswith("c.txt, row 3: inv")


def test_a_missing_id_is_named(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a", "id": 1}, {"text": "b"}])
    assert complaint(config(path, id_field="id"), tokeniser).startswith("c.jsonl, row 2: missing id: no field 'id'")
    pq.write_table(pa.table({"text": ["a", "b"], "id": [1, None]}), tmp_path / "c.parquet")
    assert "c.parquet, row 2: missing id" in complaint(config(tmp_path / "c.parquet", id_field="id"), tokeniser)


def test_empty_documents_are_counted_and_no_error(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": ""}, {"text": "a"}, {"text": []}])
    rows, skipped, count = tokenised(config(path), tokeniser)
    assert (len(rows), skipped, count) == (1, {"empty document": 2}, 1)


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    yield "c.jsonl", b"", "the file is empty"
    yield "c.parquet", b"", "the file is empty"
    yield "c.parquet", b"PAR1 this is not Parquet PAR1", "the file cannot be read as Parquet"
    yield "c.arrow", b"neither stream nor file of Arrow", "unreadable file"
    yield "c.jsonl.gz", b"not gzip at all", "the file cannot be decompressed"
    yield "c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-9], "the file cannot be decompressed"


@pytest.mark.parametrize(("name", "data", "reason"), list(bad_files()))
def test_a_bad_file_is_named(name: str, data: bytes, reason: str, tmp_path: Path, tokeniser: Tokeniser) -> None:
    (tmp_path / name).write_bytes(data)
    message = complaint(config(tmp_path / name), tokeniser)
    assert message.startswith(f"{name}: ")
    assert reason in message


def test_bad_files_are_skipped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    plan = plan_parts(config(tmp_path, on_bad_record=OnBadRecord.skip))
    assert plan.skipped == {"empty file": 1, "unreadable file": 2}
    assert [part.file.name for part in plan.parts] == ["c.jsonl"]


def test_a_file_without_the_column_names_those_it_has(tmp_path: Path, tokeniser: Tokeniser) -> None:
    pq.write_table(pa.table({"body": ["a"], "label": [1.5]}), tmp_path / "c.parquet")
    assert "no column 'text', the file has 'body', 'label'" in complaint(config(tmp_path / "c.parquet"), tokeniser)
    message = complaint(config(tmp_path / "c.parquet", text_field="label"), tokeniser)
    assert "the column is of type double, neither text nor a list of token ids" in message


def test_rows_are_counted_before_any_part(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"a\nbb\n\ncccc\nd")
    lines = path.read_bytes().split(b"\n")
    starts = np.cumsum([0] + [len(line) + 1 for line in lines])
    settings = config(path, part_bytes=1)
    for part in plan_parts(settings).parts:
        assert rows_before(part) == min(int(np.searchsorted(starts, part.start)), len(lines))


def test_a_special_token_outside_the_models_vocabulary_is_refused(tmp_path: Path, tokeniser: Tokeniser) -> None:
    with pytest.raises(ConfigError, match="special token 1 is outside the model's vocabulary of 1"):
        tokenised(config(write_jsonl(tmp_path)), tokeniser, Limits(1, None))


# Values that cross processes


def test_limits_are_read_from_the_model_config(tmp_path: Path) -> None:
    path = byte_model(tmp_path, vocabulary=300)
    assert model_limits(ModelConfig(path=str(path))) == Limits(300, CONTEXT)


def test_the_tokenisers_digest_follows_its_content(tmp_path: Path) -> None:
    first = load_tokeniser(ModelConfig(path=str(byte_model(tmp_path / "a"))))
    again = load_tokeniser(ModelConfig(path=str(byte_model(tmp_path / "b"))))
    other = load_tokeniser(ModelConfig(path=str(byte_model(tmp_path / "c", same=True))))
    assert first.digest() == again.digest() != other.digest()


def test_parts_pickle(tmp_path: Path) -> None:
    (part,) = plan_parts(config(write_jsonl(tmp_path))).parts
    assert pickle.loads(pickle.dumps(part)) == part  # noqa: S301
    assert isinstance(part, Part)
