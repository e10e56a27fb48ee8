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

from actors.errors import BadRecord, ConfigError, WhenceError
from actors.factors import layer_file, part_folder
from actors.replica import COVARIANCE_PASS, Replica, out_of_memory
from actors.store import Store
from actors.tasks import GroupTask, QueryTask, ReplicaSpec, ScanTask
from conf.schema import ClusterConfig, Dtype, Labels, Measurement, ModelConfig, ScanConfig
from influence.batch import Batch
from influence.covariance import CovarianceSums
from influence.labels import SampledLabels
from influence.measurement import MeasuredQuery
from influence.scoring import LayerQueries
from influence.worker import NonFiniteSequences, Worker
from tests.integration.world import VOCABULARY, World, write_sequences

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
def group(store: Store) -> GroupTask:
    """Eight of the ten sequences."""
    output = store.folder("covariance", "c" * 64)
    return GroupTask(output, 3, (0, 1, 2, 4, 5, 6, 7, 9), write_sequences(store, ROWS, shard=4), Labels.sampled, seed=5)


def done_of(task: GroupTask) -> dict:
    return task.output.read_json(f"{part_folder(task.group)}/done.json")


def sums_of(task: GroupTask) -> dict[str, torch.Tensor]:
    return task.output.read_tensors(f"{part_folder(task.group)}/bundle-00.safetensors")


def test_a_gang_of_ranks_is_refused_by_name(spec: ReplicaSpec):
    with pytest.raises(ConfigError, match=r"cluster\.world_size=2: .* set cluster\.world_size=1"):
        Replica(replace(spec, cluster=ClusterConfig(world_size=2)))


def test_a_part_holds_the_sums_of_its_sequences(replica: Replica, group: GroupTask):
    report = replica.covariance(group)
    sums = CovarianceSums.empty(replica.selection, 1, torch.float64)
    for number in group.sequence_ids:
        batch = Batch.collate([number], [ROWS[number]])
        replica.worker.accumulate_covariance(batch, SampledLabels(5, COVARIANCE_PASS), sums)
    stored = sums_of(group)
    for layer in replica.selection.layers:
        torch.testing.assert_close(stored[f"gradient/{layer.name}/0"], sums.gradient[layer.name].blocks[0])
        torch.testing.assert_close(stored[f"activation/{layer.name}/0"], sums.activation[layer.name].blocks[0])
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
    assert torch.equal(first[f"activation/{name}/0"], second[f"activation/{name}/0"])
    assert not torch.equal(first[f"gradient/{name}/0"], second[f"gradient/{name}/0"])


def only_up_to(limit: int, given: Any, error: BaseException) -> Any:
    def method(batch: Batch, *rest: Any) -> Any:
        if len(batch) > limit:
            raise error
        return given(batch, *rest)

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
    replica.covariance(replace(group, sequence_ids=tuple(n for n in group.sequence_ids if n not in bad), group=4))
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
    expected = sums_of(replace(group, group=4))
    for key, value in sums_of(group).items():
        torch.testing.assert_close(value, expected[key])


@pytest.fixture
def scan(replica: Replica, store: Store) -> ScanTask:
    """Candidates 1, 3, 4, 8 and 9 of two queries that are noise."""
    candidates, queries = store.folder("candidates", "d" * 64), store.folder("queries", "e" * 64)
    rows = {"sequence_id": [1, 3, 3, 4, 8, 9], "feed": ["bm25", "bm25", "unfiltered", "unfiltered", "bm25", "bm25"]}
    candidates.write_table("candidates.parquet", pa.table(rows))
    generator = torch.Generator().manual_seed(0)
    for layer in replica.selection.layers:
        dense_QOI = torch.randn(2, layer.outputs, layer.columns, generator=generator, dtype=torch.float64)
        queries.write_tensors(layer_file(layer.name), {"dense": dense_QOI})
    queries.write_json("queries.json", [{"query_id": "a"}, {"query_id": "b"}])
    output, sequences = store.folder("scores", "f" * 64), write_sequences(store, ROWS, shard=4)
    return ScanTask(output, 6, 3, 10, 4, sequences, candidates, queries)


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
    stored = scan.output.read_json("parts/shard-000006.json")
    assert (stored["sequences"], stored["tokens"], stored["excluded"]) == (4, tokens, {})


def test_scores_have_the_type_of_the_sums(spec: ReplicaSpec, scan: ScanTask):
    single = replace(spec.scan, product_dtype=Dtype.float32, sum_dtype=Dtype.float32)
    Replica(ReplicaSpec(replace(spec.model, dtype=Dtype.float32), single, spec.cluster)).scan(scan)
    assert scan.output.read_table("shard-000006.parquet").column("scores").type == pa.list_(pa.float32(), 2)


@pytest.mark.parametrize("broken", [(8,), (3, 4, 8, 9)])
def test_scores_that_are_not_finite_are_left_out_by_name(
    replica: Replica, scan: ScanTask, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]
):
    given = replica.worker.scores

    def fail(batch: Batch, *rest: Any) -> Any:
        block = given(batch, *rest)
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
