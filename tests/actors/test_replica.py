"""A replica in this process: what it commits and reports, and what it does when memory or numbers fail it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.bench import out_of_memory
from actors.errors import BadRecord, Cancelled, MemoryRanOut, WhenceError
from actors.factors import covariance_tensors, layer_file, part_file
from actors.replica import Replica
from actors.scores import ShardReport, read_report
from actors.store import Artifact, Store
from actors.summing import COVARIANCE_PASS
from actors.tasks import GroupTask, QueryTask, ReplicaSpec, ScanTask
from conf.schema import ClusterConfig, Dtype, Labels, Measurement, ModelConfig, ScanConfig
from influence.batch import Batch
from influence.covariance import CovarianceSums
from influence.labels import SampledLabels
from influence.measurement import MeasuredQuery
from influence.scoring import LayerQueries
from influence.worker import NonFiniteSequences, Worker
from tests.integration.world import VOCABULARY, World, write_candidates, write_sequences
from tests.ranks import ThreadExchange, on_ranks

RANDOM = np.random.default_rng(1)
ROWS = [RANDOM.integers(2, VOCABULARY, size=length).tolist() for length in (3, 9, 2, 12, 7, 7, 5, 1, 12, 4)]
DOUBLE = ScanConfig(batch_size=3, product_dtype=Dtype.float64, sum_dtype=Dtype.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def spec(world: World) -> ReplicaSpec:
    model = ModelConfig(path=str(world.root / "gpt2"), dtype=Dtype.float64)
    return ReplicaSpec(model, DOUBLE, ClusterConfig(cpus_per_rank=1))


@pytest.fixture
def replica(spec: ReplicaSpec) -> Replica:
    return Replica(spec)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def corpus(store: Store) -> Artifact:
    return write_sequences(store, ROWS, shard=4)


@pytest.fixture
def group(replica: Replica, store: Store, corpus: Artifact) -> GroupTask:
    """Eight of the ten sequences."""
    output, names = store.folder("covariance", "c" * 64), tuple(layer.name for layer in replica.selection.layers)
    return GroupTask(output, "parts/x/group-0003", 3, names, (0, 1, 2, 4, 5, 6, 7, 9), corpus, Labels.sampled, seed=5)


def done_of(task: GroupTask) -> dict:
    return task.output.read_json(f"{task.folder}/done.json")


def sums_of(task: GroupTask) -> dict[str, torch.Tensor]:
    return task.output.read_tensors(part_file(task.folder, 0, 0))


def test_a_part_holds_the_sums_of_its_sequences(replica: Replica, group: GroupTask):
    report = replica.covariance(group)
    sums = CovarianceSums.empty(replica.selection, 1, torch.float64)
    for number in group.sequence_ids:
        batch = Batch.collate([number], [ROWS[number]])
        replica.worker.accumulate_covariance(batch, SampledLabels(5, COVARIANCE_PASS), sums)
    stored = sums_of(group)
    expected, _ = covariance_tensors(sums, replica.selection.layers)
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value)
    predicted = sum(len(ROWS[number]) - 1 for number in group.sequence_ids)
    done = done_of(group)
    assert (done["sequences"], done["tokens"], done["excluded"]) == (8, predicted, {})
    assert set(done["rows"].values()) == {predicted}
    assert (report.sequences, report.tokens, report.excluded) == (8, predicted, {})
    assert replica.progress() == 8


def test_a_task_that_fails_commits_nothing(replica: Replica, group: GroupTask, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a wrong shape")

    monkeypatch.setattr(replica.worker, "accumulate_covariance", fail)
    with pytest.raises(RuntimeError, match="a wrong shape"):
        replica.covariance(group)
    assert group.output.list() == []


def test_a_task_can_be_done_again(replica: Replica, group: GroupTask):
    replica.covariance(group)
    first = sums_of(group)
    replica.covariance(group)
    assert all(torch.equal(first[key], value) for key, value in sums_of(group).items())


def test_labels_depend_on_the_seed(replica: Replica, group: GroupTask):
    replica.covariance(group)
    first = sums_of(group)
    replica.covariance(replace(group, seed=6))
    name = replica.selection.layers[0].name
    second = sums_of(group)
    assert torch.equal(first[f"activation/{name}/0.0"], second[f"activation/{name}/0.0"])
    assert not torch.equal(first[f"gradient/{name}/0.0"], second[f"gradient/{name}/0.0"])


def only_up_to(limit: int, given: Any, error: BaseException) -> Any:
    def method(batch: Batch, *rest: Any, **named: Any) -> Any:
        if len(batch) > limit:
            raise error
        return given(batch, *rest, **named)

    return method


def test_a_micro_batch_is_halved_until_memory_suffices_and_stays_so(
    replica: Replica, group: GroupTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    replica.covariance(group)
    expected = sums_of(group)
    replica.batch_size = 8
    given = replica.worker.accumulate_covariance
    error = torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(replica.worker, "accumulate_covariance", only_up_to(2, given, error))
    with caplog.at_level(logging.WARNING):
        replica.covariance(group)
    assert replica.batch_size == 2
    assert "the micro-batch is now 2 sequences; next time set scan.batch_size=2" in caplog.text
    assert done_of(group)["sequences"] == 8
    for key, value in sums_of(group).items():
        torch.testing.assert_close(value, expected[key])


def test_one_sequence_that_is_too_much_is_an_error(replica: Replica, group: GroupTask, monkeypatch: pytest.MonkeyPatch):
    given = replica.worker.accumulate_covariance
    monkeypatch.setattr(replica.worker, "accumulate_covariance", only_up_to(0, given, MemoryError()))
    with pytest.raises(WhenceError, match="a micro-batch of one sequence") as caught:
        replica.covariance(group)
    assert "corpus.sequence_length" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("HIP out of memory"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out_of_memory(error: BaseException, expected: bool):
    assert out_of_memory(error) == expected


def test_sequences_that_are_not_finite_are_left_out_of_the_sums(
    replica: Replica, group: GroupTask, monkeypatch: pytest.MonkeyPatch
):
    bad = {1: "the loss is not finite", 6: "the gradient at layer x is not finite"}
    without = replace(group, sequence_ids=tuple(n for n in group.sequence_ids if n not in bad), folder="parts/x/other")
    replica.covariance(without)
    given = replica.worker.accumulate_covariance

    def fail(batch: Batch, labels: Any, sums: CovarianceSums) -> None:
        given(batch, labels, sums)  # what was added already must be thrown away
        found = {number: bad[number] for number in batch.sequence_ids.tolist() if number in bad}
        if found:
            raise NonFiniteSequences(found)

    monkeypatch.setattr(replica.worker, "accumulate_covariance", fail)
    report = replica.covariance(group)
    assert report.excluded == bad
    assert done_of(group)["excluded"] == {str(number): why for number, why in bad.items()}
    assert done_of(group)["sequences"] == 6
    expected = sums_of(without)
    for key, value in sums_of(group).items():
        torch.testing.assert_close(value, expected[key])


@pytest.fixture
def scan(replica: Replica, store: Store, corpus: Artifact) -> ScanTask:
    """Candidates 1, 3, 4, 8 and 9 of two queries that are noise."""
    queries = store.folder("queries", "e" * 64)
    feeds = ["bm25", "bm25", "unfiltered", "unfiltered", "bm25", "bm25"]
    rows = [(None, number, feed, None) for number, feed in zip([1, 3, 3, 4, 8, 9], feeds, strict=True)]
    candidates = write_candidates(store, rows, block=4)
    generator = torch.Generator().manual_seed(0)
    for layer in replica.selection.layers:
        dense_QOI = torch.randn(2, layer.outputs, layer.columns, generator=generator, dtype=torch.float64)
        queries.write_tensors(layer_file(layer.name), {"dense": dense_QOI})
    queries.write_json("queries.json", [{"query_id": "a"}, {"query_id": "b"}])
    output = store.folder("scores", "f" * 64)
    return ScanTask(output, 6, 3, 10, 4, corpus, candidates, queries)


def held_queries(replica: Replica, scan: ScanTask) -> dict[str, LayerQueries]:
    names = [layer.name for layer in replica.selection.layers]
    return {name: LayerQueries(2, dense_QOI=scan.queries.read_tensors(layer_file(name))["dense"]) for name in names}


def test_a_scan_writes_the_scores_of_its_range_in_the_order_of_sequences(replica: Replica, scan: ScanTask):
    report = replica.scan(scan)
    table = scan.output.read_table("shard-000006.parquet")
    assert table.column("sequence_id").to_pylist() == [3, 4, 8, 9]
    assert table.column("feed").to_pylist() == ["both", "unfiltered", "bm25", "bm25"]
    assert table.column("scores").type == pa.list_(pa.float64(), 2)
    for number, scores in zip([3, 4, 8, 9], table.column("scores").to_pylist(), strict=True):
        batch = Batch.collate([number], [ROWS[number]])
        alone = replica.worker.scores(batch, held_queries(replica, scan)).scores_BQ[0]
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), alone, rtol=1e-9, atol=1e-12)
    tokens = sum(len(ROWS[number]) for number in (3, 4, 8, 9))
    assert (report.sequences, report.tokens, report.excluded) == (4, tokens, {})
    assert read_report(scan.output, "shard-000006.parquet") == ShardReport(4, tokens, report.seconds, {})


def test_scores_have_the_type_of_the_sums(spec: ReplicaSpec, scan: ScanTask):
    single = replace(spec.scan, product_dtype=Dtype.float32, sum_dtype=Dtype.float32)
    Replica(ReplicaSpec(replace(spec.model, dtype=Dtype.float32), single, spec.cluster)).scan(scan)
    assert scan.output.read_table("shard-000006.parquet").column("scores").type == pa.list_(pa.float32(), 2)


@pytest.mark.parametrize("broken", [(8,), (3, 4, 8, 9)])
def test_scores_that_are_not_finite_are_left_out_by_name(
    replica: Replica, scan: ScanTask, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]
):
    given = replica.worker.scores

    def fail(batch: Batch, *rest: Any, **named: Any) -> Any:
        block = given(batch, *rest, **named)
        for row, number in enumerate(batch.sequence_ids.tolist()):
            if number in broken:
                block.scores_BQ[row, 1] = float("inf")
        return block

    monkeypatch.setattr(replica.worker, "scores", fail)
    report = replica.scan(scan)
    assert report.excluded == dict.fromkeys(broken, "its loss or gradient is not finite")
    table = scan.output.read_table("shard-000006.parquet")
    assert table.column("sequence_id").to_pylist() == [number for number in (3, 4, 8, 9) if number not in broken]
    assert table.schema.field("feed").type == pa.dictionary(pa.int32(), pa.string())


def test_a_scan_survives_memory_that_runs_out_midway(replica: Replica, scan: ScanTask, monkeypatch: pytest.MonkeyPatch):
    replica.scan(scan)
    expected = scan.output.read_table("shard-000006.parquet")
    monkeypatch.setattr(replica.worker, "scores", only_up_to(1, replica.worker.scores, MemoryError()))
    replica.scan(scan)
    found = scan.output.read_table("shard-000006.parquet")
    assert found.column("sequence_id").equals(expected.column("sequence_id"))
    np.testing.assert_allclose(found.column("scores").to_pylist(), expected.column("scores").to_pylist(), rtol=1e-9)


def gradients_task(store: Store, *queries: MeasuredQuery) -> QueryTask:
    output = store.folder("gradients", "a" * 64)
    named = tuple((number, f"query {number}", query) for number, query in enumerate(queries))
    return QueryTask(output, 0, named, Measurement.log_probability)


def test_query_gradients_report_the_value_that_was_measured(replica: Replica, store: Store):
    queries = [MeasuredQuery.of([5, 6, 7], [8, 9]), MeasuredQuery.of([11], [12])]
    report = replica.query_gradients(gradients_task(store, *queries))
    with torch.no_grad():
        for number, query in enumerate(queries):
            tokens = torch.tensor([query.input_ids])
            log_p = torch.log_softmax(replica.worker.model(input_ids=tokens).logits[0, :-1], -1)
            chosen = log_p.gather(1, tokens[0, 1:, None])[query.first_measured - 1 :]
            assert report.result[f"query {number}"] == pytest.approx(float(chosen.sum()))  # type: ignore[index]
    assert (report.sequences, report.tokens) == (2, 7)
    names = [layer.name for layer in replica.selection.layers]
    written = [name for name in gradients_task(store).output.list() if name.startswith("layers/")]
    assert len(written) == len(names)


def test_a_query_that_is_not_finite_is_refused_by_name(replica: Replica, store: Store, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise NonFiniteSequences({0: "the loss is not finite", 1: "the loss is not finite"})

    monkeypatch.setattr(Worker, "token_factors", fail)
    with pytest.raises(BadRecord, match="query 'query 0' cannot be traced: the measurement is not finite"):
        replica.query_gradients(gradients_task(store, MeasuredQuery.of([5], [8])))


def test_a_pass_sums_its_own_layers_alone(replica: Replica, group: GroupTask):
    replica.covariance(group)
    whole = sums_of(group)
    for number, layer in enumerate(replica.selection.layers):
        task = replace(group, layers=(layer.name,), folder=f"parts/{number}")
        replica.covariance(task)
        part = sums_of(task)
        assert {key.split("/")[1] for key in part} == {layer.name}
        assert all(torch.equal(whole[key], value) for key, value in part.items())


def test_sequences_that_another_pass_set_aside_are_left_out(replica: Replica, group: GroupTask):
    kept = tuple(number for number in group.sequence_ids if number != 4)
    replica.covariance(replace(group, sequence_ids=kept))
    expected = sums_of(group)
    report = replica.covariance(replace(group, excluded={4: "the gradient at layer x is not finite"}))
    assert report.excluded == {4: "the gradient at layer x is not finite"}
    assert all(torch.equal(expected[key], value) for key, value in sums_of(group).items())


@pytest.mark.parametrize("method", ["covariance", "scan"])
def test_a_task_that_is_called_off_commits_nothing(replica: Replica, group: GroupTask, scan: ScanTask, method: str):
    replica.cancelled = True
    task = group if method == "covariance" else scan
    with pytest.raises(Cancelled):
        getattr(replica, method)(task)
    assert task.output.list() == []


def on_gang(size: int, spec: ReplicaSpec, *calls: tuple[str, Any]) -> list[list[Any]]:
    replicas = [Replica(spec) for _ in range(size)]  # each with a whole model: what is sharded here is the work

    def run(exchange: ThreadExchange) -> list[Any]:
        replica = replicas[exchange.rank]
        replica.exchange = replica.worker.exchange = exchange
        replica.queries._exchange = replica.bases._exchange = exchange
        return [getattr(replica, method)(task) for method, task in calls]

    return on_ranks(size, run)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_commit_together_what_one_process_commits(
    spec: ReplicaSpec, replica: Replica, group: GroupTask, scan: ScanTask, store: Store, size: int
):
    query = gradients_task(store, *(MeasuredQuery.of([5, 6, number], [8, 9]) for number in range(3)))
    replica.covariance(group)
    replica.scan(scan)
    replica.query_gradients(query)
    expected = sums_of(group)
    scores = scan.output.read_table("shard-000006.parquet").column("scores").to_pylist()
    names = [name for name in query.output.list() if name.startswith("layers/")]
    gradients = {name: query.output.read_tensors(name) for name in names}
    reports = on_gang(size, spec, ("covariance", group), ("scan", scan), ("query_gradients", query))
    assert all(done[0].sequences == 8 and done[1].sequences == 4 for done in reports)
    assert done_of(group)["ranks"] == size
    found: dict[str, torch.Tensor] = {}
    for rank in range(size):
        part = group.output.read_tensors(part_file(group.folder, rank, 0))
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    again = scan.output.read_table("shard-000006.parquet").column("scores").to_pylist()
    np.testing.assert_allclose(again, scores, rtol=1e-9)
    for name, tensors in gradients.items():
        written = query.output.read_tensors(name)
        assert written.keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(written[key], value)


def test_queries_larger_than_the_memory_of_a_rank_are_shared(spec: ReplicaSpec, replica: Replica, scan: ScanTask):
    replica.scan(scan)
    scores = scan.output.read_table("shard-000006.parquet").column("scores").to_pylist()
    small = replace(spec, cluster=replace(spec.cluster, memory_per_rank=1))
    on_gang(2, small, ("scan", scan))
    again = scan.output.read_table("shard-000006.parquet").column("scores").to_pylist()
    np.testing.assert_allclose(again, scores, rtol=1e-9)


def test_memory_that_runs_out_on_a_rank_ends_the_task_for_the_gang(
    spec: ReplicaSpec, group: GroupTask, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: Worker, batch: Batch, *_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Worker, "accumulate_covariance", fail)
    with pytest.raises(MemoryRanOut, match="a micro-batch of 3 sequences a rank") as caught:
        on_gang(2, spec, ("covariance", group))
    assert caught.value.batch_size == 3
    assert group.output.list() == []
