"""The command as a user meets it: help, refusals, folders, sweeps, errors, exit statuses."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from actors.errors import BadRecord, ConfigError
from conf.keys import GROUPS, keys
from conf.schema import cores
from pipelines.command import VERBS, main
from pipelines.ending import rearm

ROOT = Path(__file__).parents[2]
GIVEN = ("model.path=gpt2", "corpus.path=s3://bucket/corpus", "queries.path=s3://bucket/queries.jsonl")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Run in an empty folder, and put the logging back that Hydra replaces."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def traced(monkeypatch):
    """A trace that only notes what it was asked for."""
    calls = []

    def run_trace(config, run_dir):
        logging.getLogger("pipelines.fake").info("at work on seed %d", config.seed)
        calls.append((config, Path(run_dir)))
        error = {
            13: BadRecord("it is empty", file="a.jsonl", row=3, remedy="remove it"),
            14: KeyError("ours"),
            15: ConfigError("no"),
        }
        if config.seed in error:
            raise error[config.seed]
        return types.SimpleNamespace(table=lambda: f"table of rank {config.queries.rank}, seed {config.seed}")

    monkeypatch.setitem(sys.modules, "pipelines.tracing", types.SimpleNamespace(run_trace=run_trace))
    return calls


def test_trace(traced, tmp_path, capsys):
    assert main(["trace", *GIVEN, "queries.rank=full", "name=mine"]) == 0
    out, err = capsys.readouterr()
    assert out == "table of rank full, seed 0\n"
    assert "INFO    at work on seed 0" in err
    config, run_dir = traced[0]
    assert (config.name, config.queries.rank) == ("mine", "full")
    assert run_dir.parent == tmp_path / "runs" / "mine"
    assert "at work on seed 0" in (run_dir / "trace.log").read_text()
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()
    assert Path.cwd() == tmp_path


def test_sweep(traced, tmp_path, capsys):
    assert main(["trace", *GIVEN, "--multirun", "queries.rank=16,32", "seed=1,2"]) == 0
    asked = [(config.queries.rank, config.seed) for config, _ in traced]
    assert asked == [("16", 1), ("16", 2), ("32", 1), ("32", 2)]
    folders = [run_dir for _, run_dir in traced]
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert {folder.parent.parent for folder in folders} == {tmp_path / "multirun" / "trace"}
    out = capsys.readouterr().out
    assert out.count("table of rank") == 4
    assert out.count("| done ") == 4
    assert f"\n{folders[0].parent / 'sweep.md'}\n" in out


def test_a_sweep_goes_on_after_a_job_that_failed(traced, capsys):
    assert main(["trace", *GIVEN, "-m", "seed=13,1"]) == 1
    assert [config.seed for config, _ in traced] == [13, 1]
    out, err = capsys.readouterr()
    assert "a.jsonl, row 3: it is empty. Remedy: remove it" in err
    assert "| 0   | 13   | failed: a.jsonl, row 3: it is empty. Remedy: remove it |" in out
    assert "| 1   | 1    | done " in out
    assert main(["trace", *GIVEN, "-m", "seed=1,15"]) == 2


def test_an_interrupt_of_a_sweep_ends_it_with_a_table(monkeypatch, capsys):
    def interrupted(config, run_dir):
        if config.seed == 2:
            raise KeyboardInterrupt
        return types.SimpleNamespace(table=lambda: "")

    monkeypatch.setitem(sys.modules, "pipelines.tracing", types.SimpleNamespace(run_trace=interrupted))
    assert main(["trace", *GIVEN, "-m", "seed=1,2,3"]) == 130
    out = capsys.readouterr().out
    assert "| 0   | 1    | done " in out
    assert "| 1   | 2    | stopped " in out


def test_plan_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        sys.modules, "pipelines.plan", types.SimpleNamespace(run_plan=lambda config: f"plan of {config.name}")
    )
    assert main(["plan", *GIVEN]) == 0
    assert capsys.readouterr().out == "plan of trace\n"
    assert list(tmp_path.iterdir()) == []


def test_demo_gets_the_overrides_and_a_folder(monkeypatch, tmp_path):
    given = []

    def demo(overrides, run_dir):
        given.append((overrides, Path(run_dir).parent))

    monkeypatch.setitem(sys.modules, "pipelines.almanac", types.SimpleNamespace(demo=demo))
    assert main(["demo", "factors.blocks=2"]) == 0
    assert main(["demo", "factors.blocks=0"]) == 2
    assert given == [(["name=almanac", "factors.blocks=2"], tmp_path / "runs" / "almanac")]


def test_errors_with_a_name_are_one_line(traced, capsys):
    assert main(["trace", *GIVEN, "seed=13"]) == 1
    err = capsys.readouterr().err
    assert "ERROR   a.jsonl, row 3: it is empty. Remedy: remove it" in err
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert "row 3: it is empty" in (traced[0][1] / "trace.log").read_text()
    assert main(["trace", *GIVEN, "seed=15"]) == 2


def test_other_errors_show_their_traceback(traced, capsys):
    assert main(["trace", *GIVEN, "seed=14"]) == 1
    assert capsys.readouterr().err.count("Traceback") == 1
    assert "KeyError: 'ours'" in (traced[0][1] / "trace.log").read_text()


def test_an_interrupt(monkeypatch, capsys):
    def interrupted(config, run_dir):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "pipelines.tracing", types.SimpleNamespace(run_trace=interrupted))
    assert main(["trace", *GIVEN]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [False, True])
def test_sigterm_unwinds(monkeypatch, capsys, replaced):
    released = []

    def terminated(config, run_dir):
        if replaced:  # as Ray does when it starts
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            rearm()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not cut this short
            released.append("claim")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "pipelines.tracing", types.SimpleNamespace(run_trace=terminated))
    assert main(["trace", *GIVEN]) == 143
    assert released == ["claim"]
    assert "whence trace: terminated. What was committed stays; the same command" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_folder_that_goes_away_with_its_job_is_pointed_out(traced, tmp_path, capsys):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    assert main(["trace", *GIVEN, f"hydra.run.dir={folder}"]) == 0
    assert "goes away with this job: set hydra.run.dir" in capsys.readouterr().err


def test_a_job_that_starts_a_ray_of_its_own_is_told(traced, monkeypatch, capsys):
    assert main(["trace", *GIVEN]) == 0
    assert "inside this job" not in capsys.readouterr().err
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert main(["trace", *GIVEN]) == 0
    assert "cluster.address=local starts a Ray of its own inside this job" in capsys.readouterr().err
    assert main(["trace", *GIVEN, "cluster.address=auto", "store=/shared/store"]) == 0
    assert "inside this job" not in capsys.readouterr().err


def test_refusals(traced, tmp_path, capsys):
    assert main(["trace", "model.path=gpt2", "corpus.path=s3://c", "factors.dampng=1", "factors.blocks=0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("whence trace: 3 settings are not allowed; nothing was started.\n")
    assert "  factors.dampng=1: there is no such key. Did you mean factors.damping_factor?" in err
    assert "  factors.blocks=0: allowed: a whole number, at least 1\n" in err
    assert "  queries.path: must be given: JSONL of query_id, prompt, completion" in err
    assert "Traceback" not in err
    assert (traced, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "What shall be done? Verbs: trace, plan, probe, demo, validate, report, compare."),
        (["trase"], "trase: the first word must be a verb. Did you mean trace?"),
        (["validate"], "whence validate: validation.path: must be given: its data: a CSV file"),
        (["validate", "validation.subject=language"], "  model.path: must be given"),
        (["validate", "validation.path=none.csv"], "none.csv: nothing is there. Allowed: its data: a CSV file"),
        (
            ["validate", "experiment=concrete", "validation.point=5"],
            "validation.point=5: there is no such key. Did you mean validation.points",
        ),
        (["validate", "validation.subject=iris"], "validation.subject=iris: allowed: concrete, energy, mnist"),
        (["trace", "experiment=concrete"], "validation.subject=concrete: brings no model, corpus and queries to trace"),
        (["plan", "experiment=almanac"], "Allowed: whence validate, with the same settings"),
        (["trace", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["trace", *GIVEN, "seed=1,2"], "seed=1,2: several values. Add --multirun"),
        (["trace", *GIVEN, "-m", "seed=1,x"], "seed=x: allowed: a whole number"),
    ],
)
def test_wrong_commands(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trace", "--multrun"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --multrun" in capsys.readouterr().err


def test_ray_launcher_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["trace", *GIVEN, "-m", "hydra/launcher=whence_ray", "seed=1,2"]) == 2
    assert "pip install 'whence[sweep]'" in capsys.readouterr().err


def test_ray_launcher_composes(capsys):
    assert (
        main(
            [
                "trace",
                "--cfg",
                "hydra",
                "-p",
                "hydra.launcher",
                "hydra.launcher.ray.init.address=auto",
                "hydra/launcher=basic",
            ]
        )
        == 2
    )
    capsys.readouterr()
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=whence_ray", "cluster.address=auto"], return_hydra_config=True)
    init = cfg.hydra.launcher.ray.init
    assert (init.address, init.object_store_memory, init.num_cpus) == ("auto", None, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.cpus_per_rank=3"], 4 * 3 + cores()),
        (["cluster=replicas2", "cluster.world_size=2"], 4 * 2 * 2 + cores()),
        (["cluster.num_cpus=5", "cluster.cpus_per_rank=1"], 5),
        (["cluster=autoscaled"], None),
    ],
)
def test_a_local_ray_of_a_sweep_has_cpus_for_the_jobs_side_by_side(overrides, expected):
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        launcher = compose("config", ["hydra/launcher=whence_ray", *overrides], return_hydra_config=True).hydra.launcher
    assert launcher.ray.init.num_cpus == expected
    assert launcher.ray.remote.num_cpus == 0
    assert dict(launcher.ray.remote.resources) == {"node:__internal_head__": 1 / 4}


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb.name}" in text
    for group in GROUPS:
        assert f"\n{group}: " in text
    for name in keys():
        assert f"    {name} " in text
    assert "factors.damping_factor     0.1             damping = factor * mean(correction)" in text
    assert "prefilter=bm25 (default)" in text
    assert "--multirun queries.rank=16,32" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_of_a_verb(capsys):
    assert main(["trace", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: whence trace [group=option]" in text
    assert "Must be given, on the command line or by an experiment: model.path, corpus.path, queries.path." in text
    assert "factors.blocks" in text
    assert main(["validate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: whence validate [group=option]" in text
    needed = " ".join(text.partition("Must be given, on the command line or by an experiment: ")[2].split())
    assert needed.startswith("validation.path of a data set or of facts; model.path, corpus.path and queries.path for")
    assert "experiment=concrete" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("whence ")


@pytest.mark.parametrize("words", [["--help"], ["trace", "factors.blocks=0"], ["trace", "--cfg", "job"]])
def test_neither_torch_nor_ray_is_imported(words):
    script = (
        "import sys; from pipelines.__main__ import main; status = main(sys.argv[1:]);"
        "sys.stderr.write(str([status, sorted({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith(f"[{2 if 'factors.blocks=0' in words else 0}, []]")


@pytest.fixture
def validated(monkeypatch):
    """A validation that only notes what it was asked for."""
    calls = []

    def run_validation(config, run_dir):
        calls.append((config, Path(run_dir)))
        return types.SimpleNamespace(table=lambda: f"table of {config.validation.subject.name}")

    monkeypatch.setitem(sys.modules, "pipelines.validation.run", types.SimpleNamespace(run_validation=run_validation))
    return calls


def test_validate(validated, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert main(["validate", "experiment=energy", "validation.path=mine.csv", "validation.points=7"]) == 0
    assert capsys.readouterr().out == "table of energy\n"
    config, run_dir = validated[0]
    assert (config.validation.path, config.validation.points) == (str(tmp_path / "mine.csv"), 7)
    assert run_dir.parent == tmp_path / "runs" / "validate_energy"
    assert (run_dir / "validate.log").exists()


def test_validations_are_named(validated, tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert main(["validate", "validation.path=mine.csv"]) == 0
    assert main(["validate", "experiment=almanac"]) == 0
    assert main(["validate", "experiment=almanac", "name=mine"]) == 0
    assert [run_dir.parent.name for _, run_dir in validated] == ["validate", "validate_almanac", "mine"]


def test_validations_of_several_data_sets_are_a_sweep(validated, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert main(["validate", "-m", "experiment=concrete,energy", "validation.path=mine.csv"]) == 0
    assert [config.validation.subject.name for config, _ in validated] == ["concrete", "energy"]
    assert capsys.readouterr().out == "table of concrete\ntable of energy\n"
