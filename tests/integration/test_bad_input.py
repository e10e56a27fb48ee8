"""What goes wrong in a run, each by what its user reads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.errors import BadRecord, ChecksumError, ConfigError, NonFiniteShare, WhenceError
from influence import eigenbasis
from influence.worker import Worker
from pipelines import tracing
from pipelines.tracing import TraceResult, run_trace
from tests.integration.brute import tokens_of
from tests.integration.world import QUERIES, World, documents, fork, ids, matrix, relative, run_locally, write_lines
from tests.pages import Markup, record, sequences

STRANGE = "@"  # a byte that the corpus does not hold otherwise


@pytest.fixture(scope="module")
def broken(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose embedding of one token is not a number, and a corpus that has this token in one document."""
    folder = tmp_path_factory.mktemp("broken")
    model = AutoModelForCausalLM.from_pretrained(world.root / "llama")
    vocabulary = json.loads((world.root / "llama" / "tokenizer.json").read_text())["model"]["vocab"]
    with torch.no_grad():
        model.model.embed_tokens.weight[vocabulary[STRANGE]] = float("nan")
    model.save_pretrained(folder / "model")
    texts = documents(60, seed=4)
    texts[20] += f" {STRANGE} is not a word."
    corpus = write_lines(folder / "corpus.jsonl", ({"text": text} for text in texts))
    return {
        "model__path": str(folder / "model"),
        "model__tokenizer": str(world.root / "llama"),
        "corpus__path": str(corpus),
        "unfiltered__kind": "all",
    }


def strange_sequences(world: World, result: TraceResult) -> list[int]:
    vocabulary = json.loads((world.root / "llama" / "tokenizer.json").read_text())["model"]["vocab"]
    rows = tokens_of(result.artifact("sequences"))
    return [number for number, row in enumerate(rows) if vocabulary[STRANGE] in row]


def test_sequences_that_are_not_finite_are_set_aside_named_and_counted(
    world: World, ray_session: None, broken: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = world.config(tmp_path / "store", **broken, scan__nonfinite_share=0.1, queries__rank=4)
    with caplog.at_level("WARNING"):
        result = run_locally(config, tmp_path / "run")
    strange = strange_sequences(world, result)
    assert strange
    excluded = result.summary["excluded"]
    assert excluded.keys() == {"covariance", "correction", "scores"}
    assert all(sorted(map(int, named)) == strange for named in excluded.values())
    assert f"sequence {strange[0]}: the loss is not finite" in caplog.text
    table = result.scores_table()
    assert ids(table) == [n for n in range(result.summary["corpus"]["sequences"]) if n not in strange]
    assert np.isfinite(matrix(table)).all()
    counts = result.summary["stages"]["covariance"]["counts"]
    assert counts["sequences"] == result.summary["corpus"]["sequences"] - len(strange)
    assert counts["excluded"] == len(strange)
    assert f"scores: {len(strange)}" in facts(result)["set aside"]
    assert result.summary["fidelity"]["minimum"] > 0.8


def test_too_many_sequences_that_are_not_finite_fail_the_stage(
    world: World, ray_session: None, broken: dict, tmp_path: Path
):
    with pytest.raises(NonFiniteShare) as caught:
        run_locally(world.config(tmp_path / "store", **broken), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("covariance: ")
    assert "more than scan.nonfinite_share=0.001 allows" in message
    assert "(the loss is not finite)" in message
    assert "raise scan.nonfinite_share" in message
    solver = {"factors__solver": "identity"}
    with pytest.raises(NonFiniteShare, match=r"scores: .*sequences are not finite"):
        run_locally(world.config(tmp_path / "store", **broken, **solver), tmp_path / "run")
    run_locally(world.config(tmp_path / "store", **broken, **solver, scan__nonfinite_share=0.1), tmp_path / "run")


def test_a_query_that_is_not_finite_is_named(world: World, ray_session: None, broken: dict, tmp_path: Path):
    path = write_lines(tmp_path / "queries.jsonl", [{"query_id": "odd", "prompt": f"{STRANGE}", "completion": " is"}])
    with pytest.raises(BadRecord, match=r"gradients: query 'odd' cannot be traced: the measurement is not finite"):
        run_locally(world.config(tmp_path / "store", **broken | {"queries__path": str(path)}), tmp_path / "run")


def exhausted(given: Callable, limit: int, error: Exception) -> Callable:
    """A method of `Worker` that runs out of memory for larger micro-batches."""

    def method(worker: Worker, batch: Any, *rest: Any, **more: Any) -> Any:
        if len(batch) > limit:
            raise error
        return given(worker, batch, *rest, **more)

    return method


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_micro_batch_for_which_memory_runs_out_is_halved(
    world: World,
    traced: TraceResult,
    store: Path,
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("accumulate_covariance", "accumulate_correction", "scores"):
        monkeypatch.setattr(Worker, name, exhausted(getattr(Worker, name), 2, error))
    fresh = fork(store, tmp_path / "store", ("layers", "sequences", "candidates"))
    with caplog.at_level(logging.WARNING):
        result = run_locally(world.config(fresh), tmp_path / "run")
    assert relative(matrix(result.scores_table()), matrix(traced.scores_table())) < 1e-5
    assert "next time set scan.batch_size=2" in caplog.text


def test_memory_that_runs_out_for_one_sequence_is_an_error_with_a_remedy(
    world: World, traced: TraceResult, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Worker, "accumulate_covariance", exhausted(Worker.accumulate_covariance, 0, ERRORS[0]))
    fresh = fork(store, tmp_path / "store", ("layers", "sequences", "candidates"))
    with pytest.raises(WhenceError, match=r"covariance: memory ran out .* one sequence\. Remedy: shorten corpus"):
        run_locally(world.config(fresh), tmp_path / "run")


def test_other_errors_of_the_runtime_are_not_taken_for_memory(
    world: World, traced: TraceResult, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(Worker, "scores", exhausted(Worker.scores, 0, error))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        run_locally(world.config(store, scan__shard_sequences=31), tmp_path / "run")
    assert "in stage 'scores'" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("step", ["eigenbasis", "correction", "ihvp", "sequences"])
def test_a_flipped_bit_is_named_and_never_scored(
    world: World, traced: TraceResult, store: Path, tmp_path: Path, step: str
):
    fresh = fork(store, tmp_path / "store", [folder.name for folder in store.iterdir() if folder.name != "claims"])
    kind = fresh / traced.artifact(step).uri.removeprefix(f"{store}/")
    victim = max((path for path in kind.rglob("*") if path.suffix in (".safetensors", ".parquet")), key=str)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    changes = {"queries__rank": 3}
    if step == "ihvp":  # what reads it is to be computed anew
        changes = {}
        shutil.rmtree(fresh / "queries")
    with pytest.raises(ChecksumError) as caught:
        run_locally(world.config(fresh, **changes, scan__shard_sequences=30), tmp_path / "run")
    assert str(victim) in str(caught.value)
    assert f"delete the folder {kind} and run again" in str(caught.value)


def test_a_flipped_bit_is_named_across_processes(world: World, traced: TraceResult, store: Path, tmp_path: Path):
    fresh = fork(store, tmp_path / "store", [folder.name for folder in store.iterdir() if folder.name != "claims"])
    victim = max((fresh / traced.artifact("eigenbasis").uri.removeprefix(f"{store}/")).rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ChecksumError) as caught:
        run_trace(world.config(fresh, factors__damping_factor=0.2), tmp_path / "run")
    assert str(victim) in str(caught.value)
    assert str(caught.value).startswith("ihvp: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"query_id": "two", "prompt": "The', "malformed JSON"),
        ('{"query_id": "two", "prompt": "The"}', "the query has no 'completion'"),
        ('{"query_id": "two", "prompt": "The", "completion": ""}', "the completion '' has no tokens"),
        ('{"query_id": "lantern", "prompt": "The", "completion": " mill"}', "was given to the query of row 1 already"),
        ('{"query_id": "two", "prompt": "The", "completion": "%s"}' % (" mill" * 60), "the model's context has 48"),
    ],
)
def test_a_malformed_query_is_named_by_file_and_row(
    world: World, traced: TraceResult, store: Path, tmp_path: Path, line: str, reason: str
):
    path = write_lines(tmp_path / "queries.jsonl", [QUERIES[0], line])
    with pytest.raises(BadRecord) as caught:
        run_locally(world.config(store, queries__path=str(path)), tmp_path / "run")
    assert f"{path}, row 2: " in str(caught.value)
    assert reason in str(caught.value)


def test_sequences_longer_than_the_context_are_refused(world: World, ray_session: None, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"corpus\.sequence_length=49 is not allowed\. Remedy: give 2 to 48, the mod"):
        run_locally(world.config(tmp_path / "store", corpus__sequence_length=49), tmp_path / "run")


def test_a_bad_row_of_the_corpus_stops_the_run_or_is_skipped_and_counted(
    world: World, ray_session: None, tmp_path: Path
):
    lines = [{"text": text} for text in documents(40)]
    corpus = write_lines(tmp_path / "corpus.jsonl", [*lines[:30], '{"text": "cut', *lines[30:], {"words": "none"}])
    changes = {"corpus__path": str(corpus), "factors__solver": "identity"}
    with pytest.raises(BadRecord) as caught:
        run_locally(world.config(tmp_path / "store", **changes), tmp_path / "run")
    assert "sequences: corpus.jsonl, row 31: malformed JSON" in str(caught.value)
    config = world.config(tmp_path / "store", **changes, corpus__on_bad_record="skip")
    result = run_locally(config, tmp_path / "run")
    assert sum(result.summary["corpus"]["skipped"].values()) == 2
    assert result.summary["corpus"]["documents"] == 40
    assert "2 records skipped" in facts(result)["corpus"]


def test_a_token_outside_the_vocabulary_is_refused(world: World, ray_session: None, tmp_path: Path):
    table = pa.table({"input_ids": pa.array([[1, 2, 3], [4, 400, 5]], pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "tokens.parquet")
    with pytest.raises(BadRecord, match=r"tokens\.parquet, row 2: token id outside the vocabulary: 400"):
        run_locally(world.config(tmp_path / "store", corpus__path=str(tmp_path / "tokens.parquet")), tmp_path / "run")


HOSTILE = (
    "<script>alert('corpus')</script> The lantern of Velm",
    "\u202eeht fo nretnal\u202c \u0000\u0007\u001b[31m The lantern",
    "</td></table><img src=x onerror=alert(1)> \ud800 The lantern of",
    "&lt;b&gt; <!-- The lantern of Velm is violet. --> ]]> <style>*{display:none}</style>",
    '" onmouseover="alert(2) \' {{7*7}} ${7*7} The lantern',
)


def facts(result: TraceResult) -> dict[str, str]:
    """What the report says of the run."""
    return dict(record(result.report_path.read_text(encoding="utf-8"))["facts"])


def test_hostile_text_is_inert_in_the_report_and_in_the_terminal(world: World, ray_session: None, tmp_path: Path):
    corpus = write_lines(tmp_path / "corpus.jsonl", ({"text": text, "name": text} for text in HOSTILE * 3))
    short = ("<script>1</script>", "\u202eeht\u0000", "</table><img src=x>", "\u001b[31m\ud800", '\' onload="x"')
    queries = [{"query_id": text, "prompt": text, "completion": text, "contrast": "<u>"} for text in short]
    config = world.config(
        tmp_path / "store",
        name="hostile",
        corpus__path=str(corpus),
        corpus__id_field="name",
        corpus__pack=False,
        corpus__sequence_length=48,
        queries__path=str(write_lines(tmp_path / "queries.jsonl", queries)),
        queries__measurement="contrast",
        report__title="<script>title</script>",
        unfiltered__kind="all",
        factors__solver="identity",
    )
    result = run_locally(config, tmp_path / "run")
    page = result.report_path.read_text(encoding="utf-8")
    markup = Markup(page)
    assert markup.tags.count("script") == 2 + 2 * len(queries)  # the record, the code, two blobs a query
    assert not {"img", "u", "iframe", "object", "link", "table"} & set(markup.tags)
    assert not [name for name, _ in markup.attributes if name.startswith("on")]
    assert "<script>title</script>" in markup.text
    assert not any(char < " " and char not in "\n\t" for char in page)
    assert [query["id"] for query in record(page)["queries"]] == list(result.query_ids)
    texts = [sequence["text"] for sequence in sequences(page, 0)]
    assert any("<script>alert('corpus')</script>" in text for text in texts)
    assert any("<img src=x onerror=alert(1)>" in text for text in texts)
    terminal = result.table()
    assert not any(char in terminal for char in "\x00\x07\x1b\u202e")


def test_both_feeds_off_leave_nothing_to_scan(world: World, ray_session: None, tmp_path: Path):
    with pytest.raises(ValueError, match="there is nothing to scan"):
        world.config(tmp_path, prefilter__kind="none", unfiltered__kind="none")


def test_an_error_starts_no_cluster_before_the_input_is_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_lines(tmp_path / "queries.jsonl", ["not json"])
    monkeypatch.setattr(tracing, "Cluster", lambda _: pytest.fail("a cluster was asked for"))
    with pytest.raises(BadRecord, match="row 1: malformed JSON"):
        run_trace(world.config(tmp_path / "store", queries__path=str(path)), tmp_path / "run")


def test_a_factor_that_no_lapack_here_decomposes_is_refused_before_the_sample_is_read(
    world: World, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(eigenbasis, "LARGEST_OF_TORCH", 20)
    monkeypatch.setattr(eigenbasis, "_numpy_counts_in_64_bits", lambda: False)
    with pytest.raises(ConfigError, match=r"^covariance: the factor activation/\S+ has blocks of 24 .*blocks=2"):
        run_locally(world.config(tmp_path / "store"), tmp_path / "run")
    assert not list((tmp_path / "store").glob("covariance/*/parts"))
