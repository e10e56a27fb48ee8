"""What `whence plan` says: it runs nothing, and its bytes are those of the tensors that a run then leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.corpus import corpus_digest
from actors.errors import BadRecord
from actors.factors import load_selection
from actors.store import Artifact, Store
from conf.load import compose_config
from conf.schema import ClusterConfig, CorpusConfig, Dtype, FactorsConfig, ModelConfig, QueriesConfig, RunConfig
from influence.layers import TrackedLayer
from influence.shape import Attention, ForwardShape, LinearCalls
from pipelines import cluster, plan
from pipelines.estimate import StepCost, Workload, contractions, estimate
from pipelines.graph import build_steps
from pipelines.plan import make_plan, run_plan
from pipelines.rates import ATTENTION, DECOMPOSITIONS, ELEMENTWISE, TEXT, Rates, measure, rates_for
from pipelines.runner import Runner
from pipelines.tracing import TraceResult
from tests.integration.world import World, run_locally, write_lines

RATES = Rates(
    dict.fromkeys(("float32", "float64", "bfloat16", ATTENTION, ELEMENTWISE, DECOMPOSITIONS), 1e9), 1.0, 1.0, "made up"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"queries__rank": "full", "factors__samples": 70},
    "gpt2": {"queries__rank": 2, "factors__blocks": 2, "queries__fidelity_sample": 4},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def run(
    request: pytest.FixtureRequest, world: World, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, TraceResult, plan.Plan]:
    """A plan made before a run, and the run."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = SETTINGS[request.param] | {"model__path": str(world.root / request.param)}
    config = world.config(folder / "store", **changes)
    before = make_plan(config, RATES)
    return config, run_locally(config, folder / "run"), before


def tensor_bytes(artifact: Artifact) -> int:
    names = [name for name in artifact.list() if name.endswith(".safetensors")]
    return sum(tensor.nbytes for name in names for tensor in artifact.read_tensors(name).values())


def disk(made: plan.Plan) -> dict[str, int]:
    return {step.name: step.disk for step in made.steps}


def test_bytes_are_those_of_the_tensors_that_a_run_leaves(run: tuple[RunConfig, TraceResult, plan.Plan]):
    _, result, before = run
    expected = disk(before)
    for name in ("covariance", "eigenbasis", "correction", "ihvp", "queries"):
        assert tensor_bytes(result.outcomes[name].artifact) == expected[name], name
    assert 0.5 * expected["gradients"] < tensor_bytes(result.outcomes["gradients"].artifact) <= expected["gradients"]


def test_sizes_are_those_of_the_run(run: tuple[RunConfig, TraceResult, plan.Plan]):
    config, result, before = run
    index = result.outcomes["sequences"].artifact.read_json("index.json")
    assert before.load.sequences == pytest.approx(index["sequences"], abs=1)
    assert before.load.samples == (config.factors.samples or before.load.sequences)
    assert before.load.candidates >= result.outcomes["candidates"].counts["sequences"]
    assert before.selection == load_selection(result.outcomes["layers"].artifact)  # gate and up share an input
    tokens = sum(step["tokens"] for step in result.outcomes["gradients"].artifact.read_json("queries.json"))
    assert sum(before.load.query_tokens) == tokens


def test_a_finished_run_has_nothing_to_do(run: tuple[RunConfig, TraceResult, plan.Plan]):
    config, result, before = run
    assert {step.state for step in before.steps} == {"to do"}
    after = make_plan(config, RATES)
    assert {step.state for step in after.steps} == {"cached"}
    assert [step.name for step in after.steps] == list(result.outcomes)
    assert after.load.sequences == result.outcomes["sequences"].counts["sequences"]
    assert after.load.candidates == result.outcomes["candidates"].counts["sequences"]
    for step in after.steps:
        files = result.outcomes[step.name].artifact.record()["files"]  # type: ignore[index]
        assert step.disk == sum(file["bytes"] for file in files.values())
    assert "0 of 11" in after.text()
    assert "tokenised already" in after.text()
    other = make_plan(replace(config, factors=replace(config.factors, damping_factor=0.5)), RATES)
    to_do = {step.name for step in other.steps if step.state != "cached"}
    assert to_do == {"ihvp", "queries", "scores", "top"}  # another damping refits no factor


def test_it_runs_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan starts nothing and loads no weights")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(cluster.Cluster, "start", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    text = run_plan(world.config(tmp_path / "store", cluster__cpus_per_rank=1))
    assert not (tmp_path / "store").exists()
    for expected in (
        "nothing is run",
        "tracked 6 layers",
        "not tracked, attention, not selected",
        "3, ",  # queries
        "an estimate: the first",
        "bytes a token",
        "bm25 at most 90 (3 queries, 30 each), unfiltered 60",
        "11 of 11",
        "time: an estimate. products (192 × 16 × 24) timed for 0.5 s on this machine with 1 threads",
        "0 layers by two thin products, 6 by full gradients",
    ):
        assert expected in text


def test_work_that_was_begun_is_said(world: World, tmp_path: Path):
    config = world.config(tmp_path / "store")
    steps = {step.name: step for step in make_plan(config, RATES).steps}
    assert steps["covariance"].state == "to do"
    runner = Runner(Store(config.store), build_steps(config), config)
    planned = next(item for item in runner.plan() if item.step.name == "covariance")
    Store(config.store).folder("covariance", planned.fingerprint).write_json("parts/group-0000/done.json", {})
    steps = {step.name: step for step in make_plan(config, RATES).steps}
    assert steps["covariance"].state == "begun"


def test_a_bad_record_at_the_start_of_the_corpus_is_told(world: World, tmp_path: Path):
    path = write_lines(tmp_path / "bad.jsonl", ['{"text": "fine"}', "not JSON"])
    config = world.config(tmp_path / "store", corpus__path=str(path))
    with pytest.raises(BadRecord, match="malformed JSON"):
        make_plan(config, RATES)


def test_long_and_limited_corpora_are_estimated_from_their_first_lines(world: World, tmp_path: Path):
    line = {"text": "The green lantern of Orrin hums at dusk. " * 3}
    path = write_lines(tmp_path / "long.jsonl", [line] * 5000)
    config = world.config(tmp_path / "store", corpus__path=str(path))
    whole = make_plan(config, RATES).load
    limited = make_plan(replace(config, corpus=replace(config.corpus, limit=500)), RATES).load
    apart = make_plan(replace(config, corpus=replace(config.corpus, pack=False)), RATES).load
    assert path.stat().st_size > 2 * 2**18
    assert whole.sequences == pytest.approx(10 * limited.sequences, rel=0.01)
    assert apart.sequences >= 5000
    assert whole.corpus_bytes == path.stat().st_size
    assert corpus_digest(config.corpus)  # the same files


def test_the_solver_decides_what_there_is_to_do(world: World, tmp_path: Path):
    names = {
        solver: [step.name for step in make_plan(world.config(tmp_path, factors__solver=solver), RATES).steps]
        for solver in ("identity", "kfac", "ekfac")
    }
    assert "covariance" not in names["identity"]
    assert "correction" not in names["kfac"]
    assert len(names["ekfac"]) == 11


def test_time_is_work_over_rates():
    cost = StepCost({"float32": 8 * 10**9, ELEMENTWISE: 10**9}, pieces=4)
    rates = {"float32": 2e9, ELEMENTWISE: 1e9}
    assert cost.flops == 8 * 10**9
    assert cost.seconds(rates, 1) == 5
    assert cost.seconds(rates, 2) == 2.5
    assert cost.seconds(rates, 16) == 1.25  # there are four pieces
    assert StepCost({TEXT: 0}).seconds({}, 1) == 0


def test_rates_are_measured_with_the_configured_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.rates.SECONDS", 0.05)
    before = torch.get_num_threads()
    found = measure(["float32", "bfloat16", ELEMENTWISE, DECOMPOSITIONS], 1)
    assert torch.get_num_threads() == before
    assert all(rate > 1e6 for rate in found.values())
    monkeypatch.setattr("pipelines.rates.cores", lambda: 4)
    rates = rates_for(ClusterConfig(max_replicas=3, cpus_per_rank=2), ["float32"])
    assert (rates.workers, rates.tasks) == (2, 2)
    assert "3 ranks of 2 threads share 4 cores" in rates.how


def test_gpu_rates_are_assumed_and_said_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.rates.SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rates = rates_for(ClusterConfig(address="auto", max_replicas=8, gpus_per_rank=1.0), ["bfloat16"])
    assert rates.of["bfloat16"] == pytest.approx(0.4 * 312e12)
    assert rates.workers == 8
    assert "40% of the peak of an A100 (assumed" in rates.how
    assert "not measured" in rates.how


def paper_case() -> Workload:
    """Section 5's 52 billion parameters: 64 layers of width 8192; 10 million sequences of 512, 100 queries."""
    width, inner, blocks = 8192, 32768, 64
    layers, linears, attentions = [], [], []
    for block in range(blocks):
        for name, inputs, outputs in (("up", width, inner), ("down", inner, width)):
            path = f"{block}.{name}"
            layers.append(TrackedLayer(path, (path,), inputs, outputs, True, False, path))
            linears.append(LinearCalls(path, inputs, outputs))
        linears += [LinearCalls(f"{block}.qkv", width, 3 * width), LinearCalls(f"{block}.out", width, width)]
        attentions.append(Attention(f"{block}", width))
    linears.append(LinearCalls("head", width, 50_000))
    shape = ForwardShape(
        tuple(linears), tuple(attentions), {layer.name: 1 for layer in layers}, 50_000, 64 * 20 * width
    )
    config = RunConfig(
        model=ModelConfig(dtype=Dtype.bfloat16), factors=FactorsConfig(blocks=2), queries=QueriesConfig(rank="32")
    )
    return Workload(config, tuple(layers), shape, 52_000_000_000, 10_000_000, 512, 10_000_000, (64,) * 100)


def test_a_model_that_nobody_has_can_be_planned():
    load = paper_case()
    costs = estimate(load)
    assert costs["covariance"].memory["weights"] == 2 * 52_000_000_000
    one_block = 4 * (8193**2 + 2 * 32768**2 + 32769**2 + 8192**2 - 32768**2) / 2
    assert costs["covariance"].memory["sums"] == pytest.approx(64 * one_block, rel=1e-3)
    assert costs["correction"].memory["sums"] == 64 * 4 * (8193 * 32768 + 32769 * 8192)
    assert set(contractions(load).values()) == {"factored"}  # full queries would not fit
    floor = costs["scores"].work["bfloat16"] / load.candidates
    assert floor == pytest.approx(4 * 512 * 52e9, rel=0.05)  # forward and backward to activations: 4·T·parameters
    extra = costs["scores"].work["float32"] / load.candidates
    assert extra == 2 * 64 * 512 * 3200 * 2 * (8192 + 32768)
    assert all(cost.flops >= 0 for cost in costs.values())


@pytest.mark.shared
def test_tinystories(shared_data: Path, tmp_path: Path):
    """A pretrained model and a corpus of another tokenizer."""
    corpus = shared_data / "text" / "tinystories_train_1000.jsonl"
    if not corpus.exists():
        pytest.skip(f"needs {corpus}")
    config = compose_config(
        [
            "experiment=tinystories",
            f"model.path={shared_data / 'models' / 'stories260K'}",
            f"corpus.path={corpus}",
            f"store={tmp_path / 'store'}",
        ]
    )
    made = make_plan(config, RATES)
    assert made.load.sequences == pytest.approx(1880, rel=0.05)
    assert isinstance(config.corpus, CorpusConfig)
    assert "tracked 15 layers" in made.text()
