"""What `whence plan` says: it runs nothing, and its bytes are those of the tensors that a run then leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.corpus import corpus_digest
from actors.errors import BadRecord, ConfigError
from actors.factors import load_selection
from actors.store import Artifact, Store
from conf.load import compose_config
from conf.problems import ConfigProblems
from conf.schema import ClusterConfig, CorpusConfig, Gpu, PlanConfig, RunConfig
from influence import eigenbasis
from pipelines import cluster, plan
from pipelines.estimate import estimate
from pipelines.graph import build_steps
from pipelines.plan import make_plan, run_plan, step_names
from pipelines.rates import ATTENTION, DECOMPOSITIONS, DOUBLES, ELEMENTWISE, TEXT, Rates, measure, rates_for
from pipelines.runner import Runner
from pipelines.stages import grouped
from pipelines.stepcost import StepCost
from pipelines.timing import dealt, seconds
from pipelines.tracing import TraceResult
from pipelines.workload import Lockstep, Workload, contractions
from tests.integration.world import World, run_locally, write_lines

RATES = Rates(
    dict.fromkeys(("float32", "float64", "bfloat16", ATTENTION, ELEMENTWISE, DECOMPOSITIONS, DOUBLES), 1e9),
    1.0,
    1.0,
    "made up",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"queries__rank": "full", "factors__samples": 70},
    "gpt2": {
        "queries__rank": 2,
        "factors__blocks": 2,
        "queries__fidelity_sample": 4,
        "cluster__memory_per_rank": 1800,
    },
}
PASSES = {"llama": (1, 1), "gpt2": (2, 4)}  # of the covariance and of the correction: two layers, or one, in 1800 bytes


@pytest.fixture(scope="module", params=list(SETTINGS))
def run(
    request: pytest.FixtureRequest, world: World, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, TraceResult, plan.Plan]:
    """A plan made before a run, and the run."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = SETTINGS[request.param] | {"model__path": str(world.root / request.param)}
    config = world.config(folder / "store", **changes)
    before = make_plan(config, RATES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "discard_parts", weighed)
        return config, run_locally(config, folder / "run"), before


PARTS: dict[str, int] = {}  # bytes of partial sums, by the artifact that they were merged into


def weighed(output: Artifact, discard: Callable[[Artifact], None] = grouped.discard_parts) -> None:
    """Note what the partial sums of a stage take, then discard them."""
    PARTS[output.uri] = tensor_bytes(output, "parts/")
    discard(output)


def tensor_bytes(artifact: Artifact, under: str = "") -> int:
    names = [name for name in artifact.list(under) if name.endswith(".safetensors")]
    return sum(tensor.nbytes for name in names for tensor in artifact.read_tensors(name).values())


def disk(made: plan.Plan) -> dict[str, int]:
    return {step.name: step.disk for step in made.steps}


def test_bytes_are_those_of_the_tensors_that_a_run_leaves(run: tuple[RunConfig, TraceResult, plan.Plan]):
    _, result, before = run
    expected = disk(before)
    for name in ("covariance", "eigenbasis", "correction", "ihvp", "queries"):
        assert tensor_bytes(result.outcomes[name].artifact) == expected[name], name
    assert 0.5 * expected["gradients"] < tensor_bytes(result.outcomes["gradients"].artifact) <= expected["gradients"]


def test_partial_sums_take_what_is_said(run: tuple[RunConfig, TraceResult, plan.Plan]):
    config, result, before = run
    passes = PASSES[Path(config.model.path).name]
    for name, expected in zip(("covariance", "correction"), passes, strict=True):
        planned = costs_of(before)[name]
        assert len(planned.passes) == expected
        assert PARTS[result.outcomes[name].artifact.uri] == planned.temporary > 0


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
    assert f"0 of {len(after.steps)}" in after.text()
    assert "tokenised already" in after.text()
    other = make_plan(replace(config, factors=replace(config.factors, damping_factor=0.5)), RATES)
    to_do = {step.name for step in other.steps if step.state != "cached"}
    refits_no_factor = {"ihvp", "queries", "fidelity", "scores", "agreement", "top", "attribution", "tails"}
    assert to_do == refits_no_factor


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
        "16 of 16",
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
    for solver, without in (("identity", {"covariance", "eigenbasis", "correction"}), ("kfac", {"correction"})):
        names = {step.name for step in make_plan(world.config(tmp_path, factors__solver=solver), RATES).steps}
        assert not names & without
    for solver in ("identity", "kfac", "ekfac"):
        config = world.config(tmp_path, factors__solver=solver)
        assert set(step_names(config)) == {step.name for step in build_steps(config)}


def test_time_is_work_over_rates():
    cost = StepCost({"float32": 8 * 10**9, ELEMENTWISE: 10**9}, moved={"rows": 6 * 10**9}, stored=10**9, pieces=4)
    of = {"float32": 2e9, ELEMENTWISE: 1e9}

    def time(workers: float, world_size: int = 1) -> tuple[float, float, float]:
        found = seconds(cost, Rates(of, workers, 1, "", link=1e9, store=2e9), world_size)
        return found.compute, found.network, found.store

    assert cost.flops == 8 * 10**9
    assert time(1) == (5, 6, 0.5)
    assert time(2) == (2.5, 3, 0.5)
    assert time(16) == (1.25, 1.5, 0.5)  # there are four pieces
    assert time(16, 8) == (5 / 16, 6 / 16, 0.5)  # but two gangs of eight ranks have two pieces each
    found = seconds(cost, Rates(of, 1, 1, "", link=1e9, store=2e9))
    assert (found.total, found.overlapped, found.limit) == (11.5, 6, "network")
    assert seconds(StepCost({TEXT: 0}), Rates({}, 1, 1, "")).total == 0
    tasks = StepCost({"float32": 8 * 10**9}, pieces=3, tasks=True)
    assert seconds(tasks, Rates(of, 1, 2, "")).total == 4 / 1.5  # two, then one


def test_pieces_are_dealt_whole():
    assert dealt(16, 16) == dealt(16, 100) == 16
    assert dealt(16, 12) == dealt(16, 8) == 8
    assert dealt(10**9, 12) == pytest.approx(12)
    assert dealt(4, 0.5) == 0.5  # two processes share a core
    assert dealt(1 << 30, 2.5) == pytest.approx(2.5)


def test_ranks_go_through_micro_batches_together():
    assert Lockstep.over([10], ranks=1, batch=4) == Lockstep(3, 10)
    assert Lockstep.over([10, 8], ranks=2, batch=2) == Lockstep(3 + 2, 5 + 4)
    assert Lockstep.over([9], ranks=4, batch=2) == Lockstep(2, 3)  # the last sequence, and three to fill up


def test_rates_are_measured_with_the_configured_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.rates.SECONDS", 0.05)
    before = torch.get_num_threads()
    found = measure(["float32", "bfloat16", ELEMENTWISE, DECOMPOSITIONS], 1)
    assert torch.get_num_threads() == before
    assert all(rate > 1e6 for rate in found.values())
    monkeypatch.setattr("pipelines.rates.cores", lambda: 4)
    rates = rates_for(ClusterConfig(max_replicas=3, cpus_per_rank=2), ["float32"])
    assert (rates.workers, rates.tasks, rates.memory) == (2, 2, None)
    assert "3 ranks of 2 threads share 4 cores" in rates.how


def test_gpu_rates_are_assumed_and_said_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.rates.SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rates = rates_for(ClusterConfig(address="auto", max_replicas=8, gpus_per_rank=1.0), ["bfloat16"])
    assert rates.of["bfloat16"] == pytest.approx(0.4 * 312e12)
    assert rates.workers == 8
    assert "40% of the peak of an A100 (assumed" in rates.how
    assert "not measured" in rates.how


@pytest.fixture(scope="module")
def paper() -> plan.Plan:
    """Section 5's largest model: 64 layers of width 8192; 10 million sequences of 512, 100 queries, 128 GPUs."""
    return make_plan(compose_config(["experiment=paper_52b"], planned=True))


def costs_of(made: plan.Plan) -> dict[str, StepCost]:
    return {step.name: step.cost for step in made.steps}


def replanned(made: plan.Plan, **changes: Any) -> Workload:
    """Its workload with other settings of the cluster."""
    config = made.load.config
    return replace(made.load, config=replace(config, cluster=replace(config.cluster, **changes)))


def test_a_model_that_nobody_has_can_be_planned(paper: plan.Plan):
    load, costs = paper.load, costs_of(paper)
    assert load.parameters == pytest.approx(52e9, rel=0.001)
    assert (load.sequences, load.tokens, load.candidates, load.queries) == (10**7, 512, 10**7, 100)
    assert {step.state for step in paper.steps} == {"to do"}
    weights = costs["covariance"].memory["weights"]
    assert weights == -(-load.parameters // 8) * 2
    one_block = 4 * (8193**2 + 2 * 32768**2 + 32769**2 + 8192**2 - 32768**2) / 2  # two blocks a side
    assert 8 * costs["covariance"].memory["sums"] == pytest.approx(64 * one_block / 2, rel=0.02)
    bases = 2 * (8193**2 + 32768**2 + 32769**2 + 8192**2) // 2
    first = len(costs["correction"].passes[0]) / 2
    assert 8 * costs["correction"].memory["bases"] == pytest.approx(first * bases, rel=0.01)
    assert set(contractions(load).values()) == {"factored"}  # full queries would not fit
    floor = (costs["scores"].work["bfloat16"] / load.candidates) - 2 * 64 * 512 * 3200 * 2 * (8192 + 32768)
    assert floor == pytest.approx(4 * 512 * 52e9, rel=0.06)  # forward and backward to activations: 4·T·parameters
    assert all(cost.flops >= 0 for cost in costs.values())
    assert not paper.warnings


def test_passes_hold_what_a_rank_may_hold(paper: plan.Plan):
    one, limit = costs_of(paper)["correction"], 20_000_000_000
    two = estimate(replanned(paper, memory_per_rank=limit))["correction"]
    assert (len(one.passes), len(two.passes)) == (1, 3)
    assert two.memory["sums"] + two.memory["bases"] <= limit < one.memory["sums"] + one.memory["bases"]
    assert 1.3 < two.flops / one.flops < 1.8  # the model runs over the sample again
    assert two.moved["rows"] == pytest.approx(one.moved["rows"], rel=1e-6)
    assert 2 < two.moved["weights"] / one.moved["weights"] < 3  # a pass over the last layers goes back less far
    assert two.pieces == 3 * one.pieces


def test_bytes_moved_are_those_of_the_formulas(paper: plan.Plan):
    load, costs = paper.load, costs_of(paper)
    steps = load.samples // (8 * 2)  # in groups of 6250 sequences, 391 micro-batches each
    once = 7 / 8 * 2 * load.parameters  # bytes of bfloat16 that a rank has not got
    forward_and_backward = costs["covariance"].moved["weights"] / 8 / steps / once
    assert forward_and_backward == pytest.approx(2, abs=0.03)
    rows = 7 * 100_000 * 511 * 128 * (8192 + 32768) * 2
    assert costs["covariance"].moved["rows"] == pytest.approx(rows, rel=0.001)
    assert "rows" not in costs["scores"].moved
    shared = estimate(replanned(paper, memory_per_rank=30_000_000_000))["scores"]
    assert shared.moved["rows"] == pytest.approx(100 * rows, rel=0.001)
    factored = costs["scores"].memory["factored queries"]
    assert factored == 2 * 128 * 3200 * (8192 + 32768) + 2 * 128 * 3200  # with a row for the bias
    assert shared.memory["factored queries"] == factored // 8
    alone = estimate(replanned(paper, world_size=1))
    assert not any(cost.moved for cost in alone.values())


def test_a_plan_warns_of_what_would_not_work(monkeypatch):
    base = ["experiment=paper_52b"]

    def warnings(*overrides: str) -> str:
        return "\n".join(make_plan(compose_config([*base, *overrides], planned=True)).warnings)

    assert "LAPACK" not in warnings("factors.blocks=1")
    monkeypatch.setattr(eigenbasis, "_numpy_counts_in_64_bits", lambda: False)
    assert "LAPACK" not in warnings()
    whole = warnings("factors.blocks=1")
    assert "blocks of 32,769 coordinates; LAPACK with 32-bit integers decomposes 32,766 at most" in whole
    assert "Set factors.blocks=2 or more" in whole
    narrow = warnings("cluster.memory_per_rank=null", "cluster.world_size=4", "cluster.max_replicas=16")
    assert "correction: a rank would hold" in narrow
    assert "Set cluster.memory_per_rank below what is free" in narrow
    assert "Lower scan.batch_size (now 16)" in warnings("scan.batch_size=16")
    assert "16 units of work for 32 replicas. Raise factors.groups" in warnings("cluster.max_replicas=32")
    config = compose_config([*base, "cluster.memory_per_rank=100_000_000"], planned=True)
    with pytest.raises(ConfigError, match=r"too small for transformer\.h\.0\.mlp\.c_fc") as caught:
        make_plan(config)
    assert "set cluster.world_size=64" in str(caught.value)


def test_numbers_stand_in_for_files_in_a_plan_alone(world: World, tmp_path: Path):
    given = [f"model.path={world.root / 'llama'}", f"store={tmp_path}"]
    stand_ins = ["plan.sequences=1000", "plan.queries=5", "corpus.sequence_length=16"]
    with pytest.raises(ConfigProblems, match=r"corpus\.path: must be given"):
        compose_config([*given, *stand_ins])
    with pytest.raises(ConfigProblems, match=r"queries\.path: must be given"):
        compose_config([*given, "plan.sequences=1000"], planned=True)
    made = make_plan(compose_config([*given, *stand_ins], planned=True), RATES)
    assert (made.load.sequences, made.load.tokens, made.load.query_tokens) == (1000, 16, (64,) * 5)
    assert "plan.sequences, of 16 tokens each: no corpus was read" in made.text()
    contrast = [*given, *stand_ins, "queries.measurement=contrast", "plan.query_tokens=9"]
    assert make_plan(compose_config(contrast, planned=True), RATES).load.query_tokens == (18,) * 5


def test_gpus_networks_and_stores_that_are_given():
    cluster = ClusterConfig(address="auto", max_replicas=4, world_size=16, cpus_per_rank=4, gpus_per_rank=1.0)
    given = PlanConfig(gpu=Gpu.h100, cpu_flops=1e10, network_bytes=50e9, store_bytes=2e9, utilisation=0.5)
    rates = rates_for(cluster, ["bfloat16"], assumed=given)
    assert rates.of["bfloat16"] == 0.5 * 989e12
    assert rates.of[DOUBLES] == 4e10
    assert rates.link == 50e9  # a gang of 16 spans two nodes of eight
    assert rates.store == 8 * 2e9
    assert (rates.workers, rates.tasks, rates.memory) == (64, 64, 80 * 10**9)
    inside = rates_for(replace(cluster, world_size=8), ["bfloat16"], assumed=given)
    assert inside.link == pytest.approx(0.7 * 450e9)
    assert rates_for(cluster, ["bfloat16"], assumed=replace(given, cpus=1024)).tasks == 256


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
