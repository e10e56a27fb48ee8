"""Composition and validation: defaults, options, paths, and what a user reads when a setting is wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from conf.keys import FOLDER, GROUPS, default_options, group_classes, keys, options
from conf.load import check_command, compose_config, override_strings
from conf.overrides import check_overrides
from conf.problems import ConfigProblems, did_you_mean
from conf.schema import Dtype, PrefilterKind, RunConfig, Solver, UnfilteredKind
from conf.validate import LIMITS, allowed

GIVEN = ("model.path=gpt2", "corpus.path=s3://bucket/corpus", "queries.path=s3://bucket/queries.jsonl")


def refusal(*overrides: str, **settings) -> str:
    with pytest.raises(ConfigProblems) as caught:
        check_command(overrides, **settings)
    return str(caught.value)


def test_defaults_are_the_schemas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed, typed = compose_config(complete=False), RunConfig()
    assert composed.store == str(tmp_path / ".whence/store")
    for group in group_classes():
        assert getattr(composed, group) == getattr(typed, group)


def test_every_key_has_a_meaning_and_every_option_too():
    assert [name for name, key in keys().items() if not key.meaning] == []
    assert [(group, o.name) for group in GROUPS for o in options(group).values() if not o.meaning] == []
    assert set(default_options()) == set(GROUPS)
    assert set(LIMITS) <= set(keys())


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "experiment"])
def test_every_option_composes(group):
    for option in options(group):
        extra = ["prefilter=bm25"] if group == "unfiltered" else []
        extra += ["store=s3://bucket/whence"] if group == "cluster" else []
        compose_config([*GIVEN, *extra, f"{group}={option}"])


def test_options_set_what_they_say():
    config = compose_config(
        [
            *GIVEN,
            "prefilter=none",
            "unfiltered=all",
            "factors=kfac",
            "scan=bfloat16",
            "cluster=replicas2",
            "queries=full",
        ]
    )
    assert config.prefilter.kind is PrefilterKind.none
    assert config.unfiltered.kind is UnfilteredKind.all
    assert config.factors.solver is Solver.kfac
    assert (config.scan.product_dtype, config.scan.sum_dtype) == (Dtype.bfloat16, Dtype.float32)
    assert config.cluster.max_replicas == 2
    assert config.queries.rank == "full"


def test_tinystories(tmp_path, monkeypatch):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = compose_config(["experiment=tinystories", "model.path=.", "corpus.path='stories/*.jsonl'"])
    assert config.name == "tinystories"
    assert (config.corpus.sequence_length, config.corpus.collapse_newlines) == (256, True)
    assert config.unfiltered.kind is UnfilteredKind.all
    assert config.queries.path == str(FOLDER / "experiment/tinystories_queries.jsonl")
    assert config.corpus.path == str(tmp_path / "stories/*.jsonl")
    assert (
        compose_config(["experiment=tinystories", "unfiltered=sample"], complete=False).unfiltered.kind.name == "sample"
    )


def test_own_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nfactors:\n  blocks: 2\nname: mine\n")
    config = compose_config([*GIVEN, "experiment=mine"], config_dir=str(tmp_path))
    assert (config.name, config.factors.blocks) == ("mine", 2)
    (tmp_path / "experiment" / "wrong.yaml").write_text("# @package _global_\nfactors:\n  blokcs: 2\nnaem: mine\n")
    text = refusal(*GIVEN, "experiment=wrong", config_dir=str(tmp_path))
    assert "factors.blokcs=2: there is no such key. Did you mean factors.blocks?" in text
    assert "naem=mine: there is no such key. Did you mean name?" in text


def test_values_are_read_in_the_schemas_types():
    config = compose_config(
        [*GIVEN, "queries.rank=64", "factors.samples=null", "corpus.limit=1e3", "name=2026", "factors.damping_factor=1"]
    )
    assert config.queries.rank == "64"
    assert config.factors.samples is None
    assert (config.corpus.limit, type(config.corpus.limit)) == (1000, int)
    assert config.name == "2026"
    assert type(config.factors.damping_factor) is float


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = compose_config(
        ["model.path=model", "corpus.path=a/../b.txt", "queries.path=gs://q", "store=s3://x"], complete=False
    )
    assert config.model.path == str(tmp_path / "model")
    assert config.corpus.path == str(tmp_path / "b.txt")
    assert (config.queries.path, config.store) == ("gs://q", "s3://x")
    assert compose_config(GIVEN).model.path == "gpt2"
    away = compose_config([*GIVEN, "corpus.path=/on/the/nodes", "cluster.address=auto", "store=/shared/store"])
    assert away.corpus.path == "/on/the/nodes"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "factors.dampng=1",
            "factors.dampng=1: there is no such key. Did you mean factors.damping_factor? Keys of factors: solver",
        ),
        ("batch_size=4", "batch_size=4: there is no such key. Did you mean scan.batch_size?"),
        ("facotrs.blocks=2", "facotrs.blocks=2: there is no such key. Did you mean factors.blocks?"),
        ("+factors.dampng=1", "factors.dampng=1: there is no such key. Did you mean factors.damping_factor?"),
        ("+factors.blocks=1", "+factors.blocks=1: the key exists already. Leave out the plus sign: factors.blocks=1"),
        ("~factors.blocks", "~factors.blocks: a setting cannot be taken away. Give it a value: factors.blocks=..."),
        ("experiment=foo", "experiment=foo: there is no such option. Allowed: almanac, cifar10, concrete,"),
        ("prefilter=bm52", "prefilter=bm52: there is no such option. Allowed: bm25, none. Did you mean bm25?"),
        ("prefilter=null", "prefilter=null: there is no such option. Allowed: bm25, none."),
        ("factors.blocks=0", "factors.blocks=0: allowed: a whole number, at least 1"),
        ("factors.blocks=1.5", "factors.blocks=1.5: allowed: a whole number, at least 1"),
        ("factors.blocks=two", "factors.blocks=two: allowed: a whole number, at least 1"),
        ("factors.blocks=[1]", "factors.blocks=[1]: allowed: a whole number, at least 1"),
        ("factors.blocks=null", "factors.blocks=null: allowed: a whole number, at least 1"),
        ("factors.blocks=true", "factors.blocks=true: allowed: a whole number, at least 1"),
        ("factors.damping_factor=-0.1", "factors.damping_factor=-0.1: allowed: a number, above 0"),
        ("factors.damping_factor=nan", "factors.damping_factor=nan: allowed: a number, above 0"),
        ("queries.rank=abc", "queries.rank=abc: allowed: a whole number of at least 1, or full"),
        ("queries.rank=0", "queries.rank=0: allowed: a whole number of at least 1, or full"),
        ("queries.fidelity=1.5", "queries.fidelity=1.5: allowed: a number, above 0 and at most 1; or null"),
        ("queries.fidelity=0", "queries.fidelity=0: allowed: a number, above 0 and at most 1; or null"),
        (
            "model.dtype=float31",
            "model.dtype=float31: allowed: float32, bfloat16, float16, float64. Did you mean float32",
        ),
        ("scan.sum_dtype=bfloat16", "scan.sum_dtype=bfloat16: allowed: float32, float64"),
        ("scan.batch_size=-1", "scan.batch_size=-1: allowed: a whole number, at least 1"),
        ("model.trust_remote_code=yes", "model.trust_remote_code=yes: allowed: true or false"),
        ("model.layers='('", "model.layers=(: allowed: mlp, attention, all or a regular expression over module names"),
        ("model.layers=.*(a|b)", "\"model.layers='.*(a|b)'\""),
        ("name=a/b", "name=a/b: allowed: letters, digits and . _ -"),
        ("name=${nme}", "name: Interpolation key 'nme' not found"),
        ("trace", "trace: a setting is written key=value"),
        ("seed=1,2", "seed=1,2: several values. Add --multirun"),
        ("model.path=./nowhere", "nowhere: nothing is there. Allowed: local folder or hub name"),
        ("corpus.path=nowhere/*.txt", "nowhere/*.txt: nothing is there. Allowed: file, folder or glob"),
        ("corpus.path=???", "corpus.path: must be given: file, folder or glob"),
        ("cluster=autoscaled", "store=.whence/store: is a folder below the current one, which neither other nodes"),
        ("cluster.min_replicas=2", "cluster.min_replicas=2: more than cluster.max_replicas=1. Allowed: at most 1"),
        ("model.offload=nvme", "model.offload=nvme: needs model.offload_path. Allowed: a folder on a local disk"),
        ("hydra/launcher=foo", "Could not find 'hydra/launcher/foo'"),
    ],
)
def test_refusals(override, said):
    text = refusal(*GIVEN, override)
    assert said in text
    assert len(text.splitlines()) == 1


def test_rules_of_keys_together():
    text = refusal(*GIVEN, "prefilter=none", "unfiltered=none")
    assert "there is nothing to scan. Allowed: prefilter=bm25, unfiltered=sample, unfiltered=all" in text
    text = refusal(*GIVEN, "cluster=replicas2", "cluster.num_cpus=1")
    assert text.startswith("cluster.num_cpus=1: ")
    assert "asks for 2 CPUs" in text


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn3"])
def test_conjugate_gradients_want_an_attention_that_has_forward_mode(attention: str):
    given = [*GIVEN, f"model.attention={attention}"]
    assert compose_config(given).model.attention == attention
    text = refusal(*given, "factors=ekfac_cg")
    assert text.startswith(f"model.attention={attention}: a fused kernel has no forward-mode derivative")
    assert "Allowed: null, sdpa or eager; or factors.solver=ekfac" in text
    assert compose_config([*GIVEN, "model.attention=eager", "factors=ekfac_cg"]).model.attention == "eager"


def test_all_problems_at_once():
    wrong = (
        "factors.dampng=1",
        "prefilter=bm52",
        "factors.blocks=0",
        "queries.rank=abc",
        "scan.batch_size=-1",
        "seed=x",
    )
    text = refusal("model.path=gpt2", "corpus.path=s3://c", *wrong)
    assert [line.split(": ")[0] for line in text.splitlines()] == [*wrong[:2], "seed=x", *wrong[2:5], "queries.path"]


def test_what_must_be_given():
    text = refusal()
    assert [line.split(":")[0] for line in text.splitlines()] == ["model.path", "corpus.path", "queries.path"]
    assert compose_config(complete=False).model.path == "???"


def test_sweeps_are_checked_before_the_first_job():
    assert len(check_command([*GIVEN, "queries.rank=16,32", "factors.damping_factor=0.01,0.1"], multirun=True)) == 4
    text = refusal(*GIVEN, "queries.rank=16,x", "prefilter=bm25,bm52", multirun=True)
    assert "queries.rank=x: allowed" in text
    assert "prefilter=bm52: there is no such option" in text


def test_a_large_sweep_is_checked_value_by_value(monkeypatch):
    monkeypatch.setattr("conf.overrides.MOST_JOBS", 4)
    jobs = check_overrides([*GIVEN, "seed=range(0,5)", "queries.rank=1,2"], multirun=True).jobs
    assert {job[-2] for job in jobs} == {f"seed={seed}" for seed in range(5)}
    assert {job[-1] for job in jobs} == {"queries.rank=1", "queries.rank=2"}
    assert len(jobs) == 5


def test_composes_inside_a_running_hydra():
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        assert compose_config(GIVEN).name == "trace"
        assert compose("config").name == "trace"


def test_override_strings():
    settings = {
        "queries": {"rank": 16, "fidelity": None},
        "corpus.path": "my 'sto\\ries, (a=b).txt",
        "model.layers": r".*\.mlp\.(up|down)",
        "model.dtype": Dtype.float64,
        "corpus.pack": False,
        "prefilter": "none",
        "report.title": "null",
    }
    config = compose_config(override_strings(settings), complete=False)
    assert Path(config.corpus.path).name == settings["corpus.path"]
    assert config.model.layers == settings["model.layers"]
    assert config.model.dtype is Dtype.float64
    assert config.prefilter.kind is PrefilterKind.none
    assert (config.queries.rank, config.corpus.pack, config.report.title) == ("16", False, "null")


def test_problems_survive_pickling():
    with pytest.raises(ConfigProblems) as caught:
        compose_config()
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def test_words():
    assert did_you_mean("bm52", ["bm25", "none"]) == " Did you mean bm25?"
    assert did_you_mean("zzz", ["bm25", "none"]) == ""
    assert allowed(keys()["factors.samples"]) == "a whole number, at least 1; or null"


@pytest.mark.shared
def test_tinystories_is_there(monkeypatch):
    root = FOLDER.parent
    if not (root / "../shared/data/models/stories260K").is_dir():
        pytest.skip("needs ../shared/data")
    monkeypatch.chdir(root)
    assert compose_config(["experiment=tinystories"]).model.path.endswith("stories260K")
