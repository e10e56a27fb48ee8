"""Whole runs of `whence probe`: scores by brute force and by the scan, what is cached, what is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.errors import BadRecord
from actors.probe_files import probe_file, read_probe
from actors.queries import read_queries
from actors.replica import Replica
from actors.store import Store
from actors.tasks import ProbeTask, ReplicaSpec
from actors.tokeniser import load_tokeniser
from pipelines.probing import ProbeResult
from pipelines.probing import run as probing
from pipelines.tracing import TraceResult
from tests.integration.brute import Brute, tokens_of
from tests.integration.world import QUERIES, LocalCluster, World, cached, documents, matrix, relative, run_locally
from tests.oracle import Trace
from tests.ranks import ThreadExchange, on_ranks

TEXTS = {"same order": ["The lantern of Velm is violet."], "inverted": ["Violet is the lantern of Velm.", "Violet."]}
Probe = Callable[..., ProbeResult]


def write_probes(path: Path, partitions: Sequence[dict[str, list[str]]]) -> Path:
    """Probes that ask what the queries of the world ask."""
    probes = [
        {"id": query["query_id"], **{key: query[key] for key in ("prompt", "completion", "contrast")}, "partitions": p}
        for query, p in zip(QUERIES, partitions, strict=True)
    ]
    path.write_text(yaml.safe_dump(probes, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def probe(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Probe:
    """`probe(store, partitions, **changes)`: a run by a replica in this process."""
    monkeypatch.setattr(probing, "Cluster", LocalCluster)

    def run(store: Path, partitions: Sequence[dict[str, list[str]]] = (TEXTS,) * 3, **changes: Any) -> ProbeResult:
        path = write_probes(tmp_path / "probes.yaml", partitions)
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return probing.run_probe(world.config(store, probe__path=str(path), **changes), folder)

    return run


def scores_of(result: ProbeResult) -> np.ndarray:
    """[sequences, probes]."""
    return np.asarray(result.rows.column("scores").to_pylist())


class ProbeBrute(Brute):
    """The curvature of a corpus, and scores of sequences that are not in it."""

    probes: list[list[int]]

    @cached_property
    def _training(self) -> list[Trace]:
        return [self._machine.trace(tokens) for tokens in self.probes]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_scores_of_unseen_sequences_by_brute_force(model: str, world: World, traced: TraceResult, probe: Probe):
    store = Path(traced.artifact("layers").uri).parents[1]
    changes = {
        "model__path": str(world.root / model),
        "model__dtype": "float64",
        "scan__product_dtype": "float64",
        "scan__sum_dtype": "float64",
    }
    result = probe(store, **changes)
    config = world.config(store, **changes)
    brute = ProbeBrute(world.root / model, tokens_of(result.artifact("sequences")))
    encode = load_tokeniser(config.model).encode
    texts = [text for _ in QUERIES for texts in TEXTS.values() for text in texts]
    brute.probes = [[0, *ids, 1] for ids in encode(texts)]
    expected = brute.scores(read_queries(config))
    assert relative(scores_of(result), expected) < 1e-6


def test_a_probe_after_a_trace_refits_nothing(traced: TraceResult, own_store: Path, probe: Probe):
    result = probe(own_store)
    assert {name for name, is_cached in cached(result).items() if not is_cached} == {"probe"}
    assert {"covariance", "eigenbasis", "correction", "gradients", "ihvp", "queries"} <= cached(result).keys()
    assert not {"candidates", "scores", "top"} & cached(result).keys()
    for name in cached(result).keys() - {"probe"}:
        assert result.artifact(name).uri.split("/")[-2:] == traced.artifact(name).uri.split("/")[-2:]
    assert all(cached(probe(own_store)).values())


def test_only_what_changed_is_computed_again(traced: TraceResult, own_store: Path, probe: Probe):
    first = probe(own_store)
    renamed = dict(zip(("one", "two"), TEXTS.values(), strict=True))
    again = probe(own_store, (renamed, TEXTS, TEXTS))
    assert all(cached(again).values())
    assert again.rows.column("partition").to_pylist()[:3] == ["one", "two", "two"]
    assert again.rows.column("score") == first.rows.column("score")
    more = probe(own_store, (TEXTS | {"more": ["Velm."]}, TEXTS, TEXTS))
    assert {name for name, is_cached in cached(more).items() if not is_cached} == {"probe"}


@pytest.mark.parametrize("rank", ["full", "6"])
def test_scores_equal_the_scans_where_the_corpus_has_the_sequence(
    rank: str, world: World, traced: TraceResult, own_store: Path, probe: Probe, tmp_path: Path
):
    alone = {"corpus__pack": False, "corpus__sequence_length": 48, "queries__rank": rank}
    feeds = {"unfiltered__kind": "all", "prefilter__kind": "none"}
    trace = run_locally(world.config(own_store, **alone, **feeds), tmp_path / "trace")
    rows = tokens_of(trace.artifact("sequences"))
    whole = [number for number, row in enumerate(rows) if row[0] == 0 and row[-1] == 1]
    decode = load_tokeniser(world.config(own_store).model).decode
    texts = {number: decode(rows[number][1:-1]) for number in whole}
    assert set(texts.values()) <= set(documents(120))
    chosen = whole[:30]
    partitions = [{"documents": [texts[number] for number in chosen[start::3]]} for start in range(3)]
    result = probe(own_store, partitions, **alone)
    order = [number for start in range(3) for number in chosen[start::3]]
    scanned = matrix(trace.scores_table())[order]
    assert relative(scores_of(result), scanned) < 1e-5
    assert {name for name, is_cached in cached(result).items() if not is_cached} == {"probe"}
    for row in result.rows.to_pylist():
        scale = max(abs(row["score"]), np.abs(row["tokens"]).max())
        assert sum(row["tokens"]) == pytest.approx(row["score"], abs=1e-4 * scale)
        assert sum(row["layers"]) == pytest.approx(row["score"], abs=1e-4 * scale)
        assert len(row["tokens"]) == len(row["pieces"]) == row["length"]
        assert row["tokens"][-1] == 0  # the last token predicts nothing
        assert "".join(row["pieces"]) == f"<s>{row['text']}</s>"


def test_a_run_that_was_cut_short_goes_on(
    traced: TraceResult, own_store: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
):
    expected = scores_of(probe(own_store))
    shutil.rmtree(own_store / "probe")
    real, calls = Replica.probe, []

    def failing(self: Replica, task: ProbeTask) -> Any:
        calls.append(task.probe)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(Replica, "probe", failing)
    with pytest.raises(KeyboardInterrupt):
        probe(own_store)
    assert calls == [0, 1]
    result = probe(own_store)
    assert calls == [0, 1, 1, 2]
    assert result.outcomes["probe"].extra["resumed"]
    np.testing.assert_array_equal(scores_of(result), expected)


def test_the_folder_holds_tables_page_plots_and_summary(traced: TraceResult, own_store: Path, probe: Probe):
    result = probe(own_store)
    names = {path.relative_to(result.run_dir).as_posix() for path in result.run_dir.rglob("*") if path.is_file()}
    files = {"probe.parquet", "probe.csv", "probe.html", "summary.json", "queries.jsonl", "plots/probes.svg"}
    assert files | {"plots/probe-mill.svg", "plots/probe-mill.png"} <= names
    summary = json.loads((result.run_dir / "summary.json").read_text(encoding="utf-8"))
    assert [found["probe_id"] for found in summary["probes"]] == [query["query_id"] for query in QUERIES]
    measured = {query["query_id"]: query["measured"] for query in traced.summary["queries"]}
    assert {found["probe_id"]: found["measured"] for found in summary["probes"]} == measured
    rows = result.rows.to_pylist()
    own = {(row["probe_id"], row["partition"], row["index"]): row for row in rows}
    for number, found in enumerate(summary["probes"]):
        inverted = [own[found["probe_id"], "inverted", index]["score"] for index in (1, 2)]
        assert found["partitions"]["inverted"]["mean"] == pytest.approx(np.mean(inverted))
        first = own[found["probe_id"], "same order", 1]
        assert first["scores"][number] == first["score"]
    assert "same order" in result.table()
    records = [json.loads(line) for line in (result.run_dir / "queries.jsonl").read_text().splitlines()]
    assert records == [dict(query) for query in QUERIES]


def test_what_is_wrong_is_said_before_anything_is_computed(world: World, probe: Probe, tmp_path: Path):
    store = tmp_path / "empty"
    with pytest.raises(BadRecord, match=r"probes\.yaml, row \d+: probe 'lantern', partition 'long', sequence 1: .* 48"):
        probe(store, (TEXTS | {"long": ["The lantern of Velm. " * 20]}, TEXTS, TEXTS))
    assert not store.exists()


@pytest.mark.parametrize(("size", "memory"), [(2, None), (3, 1)])
def test_ranks_of_a_sharded_replica_score_what_one_process_scores(
    size: int, memory: int | None, world: World, traced: TraceResult, tmp_path: Path
):
    config = world.config(tmp_path / "store", cluster__memory_per_rank=memory)
    spec = ReplicaSpec(config.model, config.scan, config.cluster)
    rows = tuple(tuple(range(2, 2 + length)) for length in (5, 9, 2, 7))
    store = Store(str(tmp_path / "store"))
    alone, together = (
        ProbeTask(store.folder("probe", digit * 64), 1, rows, traced.artifact("queries"), 6) for digit in "ab"
    )
    Replica(spec).probe(alone)
    replicas = [Replica(spec) for _ in range(size)]  # each with a whole model: what is sharded here is the work

    def run(exchange: ThreadExchange) -> None:
        replica = replicas[exchange.rank]
        replica.exchange = replica.worker.exchange = exchange
        replica.queries._exchange = exchange
        replica.probe(together)

    on_ranks(size, run)
    assert together.output.list() == [probe_file(1)]
    for found, expected in zip(read_probe(together.output, 1), read_probe(alone.output, 1), strict=True):
        assert found["input_ids"] == expected["input_ids"]
        for name in ("scores", "layers", "tokens"):
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * scale)


def test_memory_that_runs_out_halves_the_batch(
    world: World, traced: TraceResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = world.config(tmp_path / "store")
    rows = tuple(tuple(range(2, 2 + length)) for length in (5, 9, 2, 7, 4))
    store = Store(str(tmp_path / "store"))
    tasks = [ProbeTask(store.folder("probe", d * 64), 0, rows, traced.artifact("queries"), 6) for d in "ab"]
    replica = Replica(ReplicaSpec(config.model, config.scan, config.cluster))
    replica.probe(tasks[0])
    real = replica.worker.scores

    def scores(batch: Any, *args: Any, **options: Any) -> Any:
        if len(batch) > 2 and options.get("per_token"):
            raise torch.OutOfMemoryError("too much")
        return real(batch, *args, **options)

    monkeypatch.setattr(replica.worker, "scores", scores)
    replica.probe(tasks[1])
    assert replica.batch_size == 2
    for found, expected in zip(read_probe(tasks[1].output, 0), read_probe(tasks[0].output, 0), strict=True):
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4, atol=1e-4)
