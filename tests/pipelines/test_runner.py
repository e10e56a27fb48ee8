"""The runner: computes what is missing and nothing else, resumes, shares a store with other runs, names failures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.errors import BadRecord, ChecksumError, ClaimLost, StaleArtifact
from actors.store import Store
from conf.schema import RunConfig
from pipelines.claims import Claims
from pipelines.runner import REPAIRS, Runner, StageOutcome
from pipelines.steps import StageContext, StageResult, Step


class Graph:
    """Four steps that count how often each was computed: numbers -> (double, square) -> total."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.identity = {name: {"version": 1} for name in ("numbers", "double", "square", "total")}

    def steps(self) -> list[Step]:
        inputs = {"total": ("double", "square"), "double": ("numbers",), "square": ("numbers",), "numbers": ()}
        return [Step(name, f"{name}s", inputs[name], self.identity[name], self._stage(name)) for name in inputs]

    def _stage(self, name: str):
        def run(context: StageContext) -> StageResult:
            self.calls.append(name)
            made = [context.inputs[key].read_json("value.json") for key in sorted(context.inputs)]
            results = {"numbers": lambda: 3, "double": lambda: made[0] * 2, "square": lambda: made[0] ** 2}
            value = results.get(name, lambda: sum(made))()
            context.artifact.write_json("value.json", value)
            return StageResult(counts={"rows": value}, extra={"note": name})

        return run


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def runner(store: Store, steps: list[Step], **options) -> Runner:
    claims = Claims(store, heartbeat=0.05, poll=0.02)
    return Runner(store, steps, RunConfig(), claims=claims, **options)


def one(run, name: str = "only", **identity) -> list[Step]:
    return [Step(name, "onlys", (), {"version": 1, **identity}, run)]


def test_runs_in_order_of_dependency(store):
    graph = Graph()
    outcomes = runner(store, graph.steps()).run()

    assert graph.calls[0] == "numbers"
    assert graph.calls[-1] == "total"
    assert outcomes["total"].artifact.read_json("value.json") == 15
    assert outcomes["total"].counts == {"rows": 15}
    assert outcomes["total"].extra == {"note": "total", "resumed": False}
    assert not any(outcome.cached for outcome in outcomes.values())
    record = outcomes["total"].artifact.record()
    assert record["config"] == {"version": 1}
    assert record["inputs"] == {name: outcomes[name].artifact.fingerprint for name in ("double", "square")}


def test_second_run_computes_nothing(store, caplog):
    runner(store, Graph().steps()).run()
    caplog.set_level(logging.INFO, logger="pipelines.runner")
    caplog.clear()
    graph = Graph()
    outcomes = runner(store, graph.steps(), cluster_factory=lambda: pytest.fail("no cluster is needed")).run()

    assert graph.calls == []
    assert all(outcome.cached for outcome in outcomes.values())
    assert outcomes["total"].counts == {"rows": 15}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "numbers: cached (3 rows)"
    assert len(lines) == 4


def test_a_changed_identity_recomputes_only_dependants(store):
    runner(store, Graph().steps()).run()
    graph = Graph()
    graph.identity["double"] = {"version": 1, "damping": 0.2}
    outcomes = runner(store, graph.steps()).run()

    assert graph.calls == ["double", "total"]
    assert {name for name, outcome in outcomes.items() if outcome.cached} == {"numbers", "square"}


def test_plan_says_what_is_cached_and_creates_nothing(store):
    graph = Graph()
    planned = runner(store, graph.steps()).plan()
    assert not Path(store.uri).exists()
    assert next((step.name, cached) for step, _, cached in planned) == ("numbers", False)

    runner(store, graph.steps()).run()
    graph.identity["total"] = {"version": 2}
    planned = runner(store, graph.steps()).plan()
    assert {step.name: cached for step, _, cached in planned} == {
        "numbers": True,
        "double": True,
        "square": True,
        "total": False,
    }
    assert graph.calls.count("total") == 1


def test_cluster_starts_once_lazily_and_is_shut_down(store):
    events: list[str] = []

    @contextmanager
    def cluster():
        events.append("start")
        yield "replicas"
        events.append("stop")

    def first(context: StageContext) -> StageResult:
        events.append(context.cluster)
        return StageResult()

    steps = [Step(name, name, (), {}, first) for name in ("a", "b")]
    running = runner(store, steps, cluster_factory=cluster)
    assert events == []
    running.run()
    assert events == ["start", "replicas", "replicas", "stop"]


def test_a_killed_stage_goes_on_from_its_parts(store, caplog):
    computed: list[str] = []

    def stage(context: StageContext, die_after: int) -> StageResult:
        for index in range(4):
            name = f"parts/{index}.json"
            if context.artifact.exists(name):
                continue
            if len(computed) == die_after:
                raise KeyboardInterrupt
            context.artifact.write_json(name, index * index)
            computed.append(name)
        return StageResult(counts={"parts": 4})

    with pytest.raises(KeyboardInterrupt):
        runner(store, one(lambda context: stage(context, die_after=2))).run()
    assert len(computed) == 2
    assert not next(plan.cached for plan in runner(store, one(stage)).plan())

    caplog.set_level(logging.INFO, logger="pipelines.runner")
    outcome = runner(store, one(lambda context: stage(context, die_after=9))).run()["only"]

    assert computed == [f"parts/{index}.json" for index in range(4)]
    assert outcome.extra["resumed"]
    assert [outcome.artifact.read_json(name) for name in outcome.artifact.list("parts/")] == [0, 1, 4, 9]
    assert "only: goes on from 2 files of an earlier attempt" in caplog.text


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_names_the_stage_and_releases_the_claim(store, error):
    def fails(context: StageContext) -> StageResult:
        context.artifact.write_json("part.json", 1)
        raise error

    with pytest.raises(type(error)) as raised:
        runner(store, one(fails)).run()

    assert any("in stage 'only'; its finished parts are kept in" in note for note in raised.value.__notes__)
    assert list(Path(store.uri, "claims").glob("*.json")) == []
    assert not list(Path(store.uri).rglob("artifact.json"))


def test_an_error_of_ours_gets_the_stage(store):
    def fails(context: StageContext) -> StageResult:
        raise BadRecord("the field 'text' is missing", file="a.jsonl", row=3, remedy="set corpus.on_bad_record=skip")

    with pytest.raises(BadRecord) as raised:
        runner(store, one(fails)).run()
    assert str(raised.value).startswith("only: a.jsonl, row 3: the field 'text' is missing. Remedy: set")


def test_stale_artifacts_are_never_served(store):
    step = one(lambda context: StageResult())
    artifact = runner(store, step).run()["only"].artifact
    path = Path(artifact.uri, "artifact.json")
    record = json.loads(path.read_text())
    other = store.folder("onlys", "f" * 64)
    other.commit(config={}, inputs={}, counts={}, seconds=0)
    path.write_bytes(Path(other.uri, "artifact.json").read_bytes())  # a folder copied to the wrong place

    for what in (runner(store, step).plan, runner(store, step).run):
        with pytest.raises(StaleArtifact, match=f"wanted '{record['fingerprint']}'.*Remedy: move the folder"):
            what()


def test_damage_in_an_input_stops_the_stage_that_reads_it(store):
    graph = Graph()
    outcomes = runner(store, graph.steps()).run()
    Path(outcomes["numbers"].artifact.uri, "value.json").write_text("4")
    graph.identity["square"] = {"version": 2}

    with pytest.raises(ChecksumError, match=r"^square: .*numberss/.*/value\.json: its content is not what was written"):
        runner(store, graph.steps()).run()


def stopping_after(parts: int, computed: list[str]):
    """A stage of four groups, each with a file and what vouches for it; stops after some of them."""

    def stage(context: StageContext) -> StageResult:
        for group in range(4):
            if context.artifact.exists(f"parts/{group}/done.json"):
                continue
            if len(computed) == parts:
                raise KeyboardInterrupt
            context.artifact.write_bytes(f"parts/{group}/sums", bytes([group]))
            context.artifact.write_json(f"parts/{group}/done.json", {})
            computed.append(str(group))
        return StageResult({"sum": sum(context.artifact.read_bytes(f"parts/{group}/sums")[0] for group in range(4))})

    return stage


@pytest.mark.parametrize("name", ["sums", "done.json"])
@pytest.mark.parametrize("data", [b"?", b"", None])
def test_damage_in_unfinished_work_is_done_again(store, caplog, name, data):
    computed: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        runner(store, one(stopping_after(3, computed))).run()
    victim = next(Path(store.uri).glob(f"onlys/*/parts/1/{name}"))
    victim.unlink() if data is None else victim.write_bytes(data)
    outcome = runner(store, one(stopping_after(9, computed))).run()["only"]

    assert outcome.counts == {"sum": 6}
    if name == "sums":
        assert computed == ["0", "1", "2", "3", "1"]
        assert f"only: {victim}: " in caplog.text
        assert "it is unfinished work, of which 2 files are forgotten and made again" in caplog.text


def test_damage_that_comes_back_is_left_to_the_user(store):
    attempts = []

    def stage(context: StageContext) -> StageResult:
        attempts.append(1)
        context.artifact.write_bytes("part", b"12345")
        Path(context.artifact.uri, "part").write_bytes(b"?")
        return StageResult({"bytes": len(context.artifact.read_bytes("part"))})

    with pytest.raises(ChecksumError, match=r"^only: .*/part: it has 1 bytes where 5 were written. Remedy: delete"):
        runner(store, one(stage)).run()
    assert len(attempts) == REPAIRS + 1


def test_a_claim_that_was_lost_commits_nothing(store):
    def stage(context: StageContext) -> StageResult:
        claims = Claims(store)
        name = f"onlys-{context.artifact.fingerprint[:16]}.json"
        thief = claims._read(name)
        claims._write(name, type(thief)(**{**vars(thief), "token": "thief"}))
        with context.progress("only", None, "rows") as progress:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                progress.advance()
        return StageResult()

    with pytest.raises(ClaimLost, match=r"^only: another process took over"):
        runner(store, one(stage)).run()
    assert not list(Path(store.uri).rglob("artifact.json"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": ("b",), "b": ("a",)}, "in a circle"),
        ({"a": ("nowhere",)}, r"'a' depends on \['nowhere'\]"),
    ],
)
def test_graphs_that_are_none(store, inputs, message):
    steps = [Step(name, name, needs, {}, lambda context: StageResult()) for name, needs in inputs.items()]
    with pytest.raises(ValueError, match=message):
        runner(store, steps)


def test_two_steps_of_one_name(store):
    with pytest.raises(ValueError, match="share a name"):
        runner(store, one(StageResult) + one(StageResult))


def test_an_identity_without_canonical_form(store):
    with pytest.raises(ValueError, match="has no canonical form"):
        runner(store, one(StageResult, f=len))


PROGRAM = """
import logging, os, sys, time
from pathlib import Path
from actors.store import Store
from conf.schema import RunConfig
from pipelines import claims
from pipelines.claims import Claims
from pipelines.runner import Runner
from pipelines.steps import StageResult, Step

logging.basicConfig(level=logging.INFO, format="%(message)s")
root, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "die elsewhere":
    claims.machine = lambda: "another machine"

class Waiting(logging.Handler):
    def emit(self, record):
        if "waiting for it" in record.getMessage():
            (root / "waiting").touch()

logging.getLogger("pipelines.claims").addHandler(Waiting())
store = Store(sys.argv[3])

def stage(context):
    with (root / "computed.txt").open("a") as file:
        file.write(f"{context.artifact.kind}\\n")
    while mode == "together" and not (root / "waiting").exists():
        time.sleep(0.01)
    for index in range(5):
        if context.artifact.exists(f"{index}.json"):
            continue
        context.artifact.write_json(f"{index}.json", index)
        if mode.startswith("die") and index == 2:
            os._exit(9)
    return StageResult()

steps = [Step("a", "a", (), {"version": 1}, stage), Step("b", "b", ("a",), {"version": 1}, stage)]
(root / f"ready-{os.getpid()}").touch()
while mode == "together" and len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.01)
outcomes = Runner(store, steps, RunConfig(), claims=Claims(store, poll=0.05, dead_after=float(sys.argv[4]))).run()
print(*[name for name, outcome in outcomes.items() if not outcome.cached])
"""


def start(tmp_path: Path, mode: str, store: str | None = None, dead_after: float = 60.0) -> subprocess.Popen:
    """A process that runs two steps on a store, the local one if no other is given."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), mode, store or str(tmp_path / "store"), str(dead_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_compute_once(tmp_path):
    both = [start(tmp_path, "together") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]

    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(" ".join(out for out, _ in said).split()) == ["a", "b"]
    assert (tmp_path / "computed.txt").read_text().split() == ["a", "b"]
    assert any("is being computed by process" in err for _, err in said)
    assert any("computed by another run" in err for _, err in said)


@pytest.mark.parametrize("mode", ["die", "die elsewhere"])
def test_a_dead_process_is_succeeded_by_one_that_resumes(tmp_path, mode):
    """On the same machine its PID is missed, on another its heartbeat stands still."""
    killed = start(tmp_path, mode)
    killed.communicate(timeout=120)
    assert killed.returncode == 9
    assert list((tmp_path / "store" / "claims").glob("*.json")), "its claim is still there"

    began = time.monotonic()
    heir = start(tmp_path, "live", dead_after=60.0 if mode == "die" else 3.0)
    out, err = heir.communicate(timeout=120)
    if mode == "die elsewhere":
        assert time.monotonic() - began >= 3.0
        assert "waiting for it" in err

    assert heir.returncode == 0, err
    assert out.split() == ["a", "b"]
    assert "its holder is dead" in err
    assert "a: goes on from 3 files of an earlier attempt" in err


def test_outcomes_are_values(store):
    outcome = runner(store, one(lambda context: StageResult())).run()["only"]
    assert outcome == StageOutcome(outcome.artifact, False, outcome.seconds, {}, {"resumed": False})
