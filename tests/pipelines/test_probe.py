"""Probes: the measures by hand, the tables, the page (inert, self-contained), figures, and the almanac's own probes."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from actors.probes import parse_probes
from pipelines.almanac.probes import REFERENCE, by_training_order, probes_of, write_probes
from pipelines.almanac.results import render_markdown
from pipelines.almanac.train import UNKNOWN, train_tokenizer
from pipelines.almanac.world import World, WorldSpec, generate
from pipelines.command import main
from pipelines.probing.figures import partition_bars, sequence_bars, write_figures
from pipelines.probing.layers import BARS, section, shares
from pipelines.probing.measures import by_partition, mean, median_interval, over_probes, range_of, relative
from pipelines.probing.page import LEVELS, heat_class, write_page
from pipelines.probing.table import render_table, write_tables
from pipelines.report.packing import MapRows

HOSTILE = "<script>alert(1)</script></style>\"'&amp; \u202e\u0000\u001b[2J <!-- אב 引力 \U0001f600"
NOTHING = {"sequences": 0, "range": None}


def test_means_leave_out_what_is_not_finite():
    assert mean([1.0, math.nan, 4.0, math.inf]) == 2.5
    assert mean([math.nan]) is None


@pytest.mark.parametrize(
    ("value", "reference", "expected"), [(3.0, 2.0, 1.5), (-1.0, 4.0, -0.25), (1.0, -2.0, None), (1.0, 0.0, None)]
)
def test_relative_scores_need_a_reference_that_does_what_it_should(value, reference, expected):
    assert relative(value, reference) == expected
    assert relative(None, reference) is None
    assert relative(math.nan, reference) is None
    assert relative(value, None) is None


def test_partitions_are_summarised():
    others = {"sequences": 30, "range": [-1.0, 1.5]}
    names, scores = ["a", "a", "b", "b", "c"], [4.0, 2.0, 1.0, 2.0, math.nan]
    found = by_partition(names, scores, "a", others)
    assert list(found) == ["a", "b", "c"]
    expected = {"sequences": 2, "mean": 3.0, "minimum": 2.0, "maximum": 4.0, "relative": 1.0, "above_others": 2}
    assert found["a"] == expected
    assert found["b"] == {"sequences": 2, "mean": 1.5, "minimum": 1, "maximum": 2, "relative": 0.5, "above_others": 1}
    nothing = {"mean": None, "minimum": None, "maximum": None, "relative": None, "above_others": 0}
    assert found["c"] == {"sequences": 1} | nothing
    assert by_partition(names, scores, "c", NOTHING)["a"]["relative"] is None
    assert by_partition(names, scores, "a", NOTHING)["b"]["above_others"] is None


def test_other_probes_give_a_range_if_there_are_enough():
    values = np.random.default_rng(0).normal(size=400)
    found = range_of([*values, math.nan])
    ordered = np.sort(values)
    assert found["sequences"] == 400
    assert ordered[9] <= found["range"][0] <= ordered[10]  # 2.5 % of 400 are ten
    assert ordered[389] <= found["range"][1] <= ordered[390]
    assert range_of(values[:19].tolist()) == {"sequences": 19, "range": None}


def test_the_interval_of_a_median_covers_it():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert median_interval([]) is None
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 6.0]  # covers with 1 - 2/64
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        low, high = median_interval(rng.exponential(size=15)) or (0.0, 0.0)
        inside += low <= math.log(2) <= high
    assert inside >= 0.94 * 400


def probe_of(name: str, reference: str, **relatives: float | None) -> dict[str, Any]:
    partitions = {
        key: {"sequences": 2, "mean": value, "relative": value, "above_others": None}
        for key, value in relatives.items()
    }
    head = {"probe_id": name, "prompt": "the capital is", "completion": " Dunek", "contrast": None, "measured": -0.5}
    return head | {"reference": reference, "partitions": partitions, "others": NOTHING}


def test_partitions_are_compared_over_probes():
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 1.6]
    probes = [probe_of(str(number), "a", a=1.0, b=value) for number, value in enumerate(values)]
    found = over_probes([*probes, probe_of("x", "a", a=1.0, b=None)])
    assert found["a"] == {"probes": 7, "defined": 7, "median": 1.0, "interval": None, "below": None}
    assert found["b"]["median"] == pytest.approx(0.35)
    assert (found["b"]["probes"], found["b"]["defined"], found["b"]["below"]) == (7, 6, 5)
    assert found["b"]["interval"] == [0.1, 1.6]


def row_of(probe_id: str, partition: str, index: int, score: float | None, text: str = "ab c") -> dict[str, Any]:
    pieces = ["<s>", "ab", " c"] if text == "ab c" else ["<s>", text[:9], text[9:]]
    share = [0.0, 0.75, 0.25] if score is not None else [math.nan] * 3
    total = score or 0.0
    return {
        "probe_id": probe_id,
        "partition": partition,
        "index": index,
        "text": text,
        "length": 3,
        "score": score,
        "relative": None if score is None else score / 2,
        "scores": [total, 0.0],
        "pieces": pieces,
        "tokens": [total * part for part in share],
        "layers": [total / 2, total / 2],
    }


def summary_of(*probes: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "probe",
        "config": {
            "model": {"path": "models/x"},
            "factors": {"solver": "ekfac", "damping_factor": 0.1},
            "corpus": {"path": "corpus.jsonl"},
            "probe": {"path": "probes.yaml"},
        },
        "layers": "6 layers",
        "fidelity": {"minimum": 0.99, "mean": 0.999, "sample": 64},
        "probes": list(probes),
        "partitions": over_probes(probes),
        "not_finite": [],
        "score_unit": "nats",
    }


def test_tables_hold_every_sequence(tmp_path: Path):
    rows = [row_of("one", "a", 1, 2.0), row_of("one", HOSTILE, 1, None, HOSTILE)]
    write_tables(tmp_path, rows, ["one", "two"], ["l.0", "l.1"])
    table = pq.read_table(tmp_path / "probe.parquet")
    assert json.loads(table.schema.metadata[b"layer_names"]) == ["l.0", "l.1"]
    assert json.loads(table.schema.metadata[b"probe_ids"]) == ["one", "two"]
    found = table.to_pylist()
    assert found[0] == rows[0]
    assert (found[1]["text"], found[1]["score"]) == (HOSTILE, None)
    with (tmp_path / "probe.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(line.replace("\0", "0") for line in file))
    assert [line["partition"] for line in lines] == ["a", HOSTILE.replace("\0", "0")]
    assert (lines[0]["score"], lines[1]["score"]) == ("2", "")


def test_the_terminal_shows_partitions_and_steers_nothing():
    summary = summary_of(probe_of(HOSTILE, "a", a=1.0, **{HOSTILE: 0.25}), probe_of("two", "a", a=None))
    text = render_table(summary)
    assert "\x1b" not in text
    assert "\0" not in text
    assert "\u202e" not in text
    lines = text.splitlines()
    assert re.search(r"^  a +2 +1 +1\.00 ← 1$", text, re.MULTILINE)
    assert re.search(r"^  <script>alert.* 2 +0\.25 +0\.25$", text, re.MULTILINE)
    assert "over 2 probes, relative to each probe's reference:" in lines


class Reader(HTMLParser):
    """Tags with their attributes, and text by itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


LAYERS = ["model.layers.0.up_proj", "model.layers.1.up_proj"]


def page_of(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    write_page(folder / "probe.html", summary, rows, LAYERS)
    return (folder / "probe.html").read_text(encoding="utf-8")


def test_the_page_shows_what_was_probed_and_nothing_comes_alive(tmp_path: Path):
    probe = probe_of("one", "a", a=1.0, **{HOSTILE: -0.5}) | {"completion": HOSTILE, "contrast": HOSTILE}
    rows = [row_of("one", "a", 1, 2.0), row_of("one", HOSTILE, 1, -1.0, HOSTILE)]
    page = page_of(tmp_path, summary_of(probe, probe_of("two", "a", a=1.0)), rows)
    found = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "a:href"} & {tag for tag, _ in found.tags}
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in found.tags)
    assert not any(name.startswith("on") or name == "style" for _, attrs in found.tags for name in attrs)
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    shown = "".join(found.texts)
    assert HOSTILE.replace("\0", "\ufffd").replace("\x1b", "\ufffd") in shown
    assert "\0" not in page
    spans = [attrs for tag, attrs in found.tags if tag == "span" and "title" in attrs]
    assert len(spans) == 6
    assert [attrs.get("class") for attrs in spans[:3]] == [None, f"pos{LEVELS}", f"pos{LEVELS // 3}"]
    assert spans[1]["title"] == "1.5 · predicts “ c”"
    assert [attrs.get("class") for attrs in spans[4:]] == [f"neg{LEVELS // 2}", f"neg{LEVELS // 6}"]


def test_bars_start_at_zero_on_an_axis_of_the_probe(tmp_path: Path):
    probe = probe_of("one", "a", a=1.0, b=-0.5)
    page = page_of(tmp_path, summary_of(probe), [row_of("one", "a", 1, 3.0), row_of("one", "b", 1, -1.0)])
    bars = [attrs for tag, attrs in Reader(page.partition("<details")[0]).tags if tag == "rect"]
    assert [(bar["x"], bar["width"], bar.get("class")) for bar in bars] == [
        ("25.00", "75.00", None),
        ("0.00", "25.00", "minus"),
    ]


def test_shares_of_layers_are_means_over_sequences_that_count_the_same():
    layers = [[3.0, -1.0, 0.0], [10.0, 10.0, -20.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]]
    each = MapRows(("a", "b", "c"), ("a", "b", "c"), np.eye(3, dtype=np.float32))
    found = shares(layers, each)
    assert [share.plus for share in found] == pytest.approx([(0.75 + 0.25) / 2, 0.25 / 2, 0.0])
    assert [share.minus for share in found] == pytest.approx([0.0, 0.25 / 2, 0.5 / 2])
    assert [share.mean for share in found] == pytest.approx([6.5, 4.5, -10.0])
    assert sum(share.plus + share.minus for share in found) == pytest.approx(1.0)
    together = MapRows(("a – b", "c"), ("a – b", "c"), np.array([[1, 0], [1, 0], [0, 1]], np.float32))
    assert [share.plus for share in shares(layers, together)] == pytest.approx([(1.0 + 0.5) / 2, 0.0])
    assert shares([[0.0, 0.0, 0.0]], each) == shares([], each) == []


def test_the_page_shows_the_layers_of_each_partition(tmp_path: Path):
    probe = probe_of("one", "a", a=1.0, **{HOSTILE: -0.5})
    rows = [row_of("one", "a", 1, 2.0) | {"layers": [3.0, -1.0]}, row_of("one", HOSTILE, 1, -1.0, HOSTILE)]
    page = page_of(tmp_path, summary_of(probe), rows)
    part = page[page.index("<details") : page.index("</details>")]
    read = Reader(part)
    bars = [attrs for tag, attrs in read.tags if tag == "rect"]
    assert [(bar["y"], bar["height"], bar.get("class")) for bar in bars] == [
        ("0.00", "60.00", None),  # the first layer raises by 75 % of the first sequence's, the most there is
        ("60.00", "0.00", "minus"),
        ("60.00", "0.00", None),
        ("60.00", "20.00", "minus"),
        ("60.00", "0.00", None),
        ("60.00", "40.00", "minus"),
        ("60.00", "0.00", None),
        ("60.00", "40.00", "minus"),
    ]
    assert "block 0 · up_proj: raises 75 %, lowers 0 %, mean influence 3" in part
    assert "block 1 · up_proj: raises 0 %, lowers 25 %, mean influence \u22121" in part
    assert HOSTILE.replace("\0", "\ufffd").replace("\x1b", "\ufffd") in "".join(read.texts)
    assert [attrs.get("class") for tag, attrs in read.tags if tag == "span"][-2:] == ["wide1", "wide1"]
    assert f".wide{BARS} " in page
    assert section(rows, ["a"], []) == ""
    assert section([row_of("one", "a", 1, None) | {"layers": [math.nan] * 2}], ["a"], LAYERS) == ""
    deep = [f"layers.{number}.mlp" for number in range(200)]
    many = section([row_of("one", "a", 1, 1.0) | {"layers": [0.01] * 200}], ["a"], deep)
    assert len([tag for tag, _ in Reader(many).tags if tag == "g"]) == 50  # four blocks a bar


def test_colour_is_symmetric_and_saturates():
    assert heat_class(1.0, 1.0) == f"pos{LEVELS}"
    assert heat_class(-5.0, 1.0) == f"neg{LEVELS}"
    assert heat_class(0.5, 1.0).removeprefix("pos") == heat_class(-0.5, 1.0).removeprefix("neg")
    assert heat_class(0.01, 1.0) == heat_class(math.nan, 1.0) == heat_class(1.0, 0.0) == ""


def test_figures_are_written_for_each_probe_and_for_all(tmp_path: Path):
    summary = summary_of(probe_of("one", "a", a=1.0, b=0.1), probe_of(HOSTILE, "a", a=1.0, b=0.2))
    rows = [row_of(name, part, 1, 2.0) for name in ("one", HOSTILE) for part in "ab"]
    written = write_figures(tmp_path, summary, rows)
    assert len(written) == 6
    assert all(path.stat().st_size > 1000 for path in written)
    svg = (tmp_path / "plots/probes.svg").read_text(encoding="utf-8")
    assert "median over probes" in svg
    assert "<script" not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("plots/*.svg"))


def test_bars_leave_nothing_finite_out():
    rows = [row_of("one", "a", 1, 2.0), row_of("one", "a", 2, 3.0), row_of("one", "b", 1, None)]
    assert sequence_bars(rows) == {"a": {"ab c": (2.0, None), "ab c (2)": (3.0, None)}}
    over = over_probes([probe_of("one", "a", a=1.0, b=None)])
    assert partition_bars(over) == {"": {"a (1 probes)": (1.0, None)}}


@pytest.fixture(scope="module")
def world() -> World:
    return generate(WorldSpec())


def test_the_almanacs_probes_can_be_read_and_hold_known_words_only(world: World, tmp_path: Path):
    probes = parse_probes(str(write_probes(world, tmp_path / "probes.yaml")))
    assert [(p.probe_id, p.query.prompt, p.query.completion) for p in probes] == [
        (q.query_id, q.prompt, q.completion) for q in world.queries
    ]
    tokenizer = train_tokenizer([document.text for document in world.documents])
    for probe in probes:
        assert probe.reference == REFERENCE
        assert len(probe.partitions) == 13
        for sequence in probe.sequences:
            assert UNKNOWN not in tokenizer.convert_ids_to_tokens(tokenizer.encode(sequence.text))


def test_the_almanacs_partitions_are_what_they_are_called(world: World):
    facts = {fact.fact_id: fact for fact in world.facts}
    for probe in probes_of(world):
        fact = facts[probe["id"]]
        for name, texts in probe["partitions"].items():
            assert len(texts) >= 3
            for text in texts:
                named = {"subject": fact.subject in text, "object": fact.object in text}
                if name in (REFERENCE, "same order, more words", "same order, other words"):
                    assert text.index(fact.subject) < text.index(fact.object)
                elif name.startswith("inverted order"):
                    assert text.index(fact.object) < text.index(fact.subject)
                elif name == "irrelevant":
                    assert not any(named.values())
                elif name == "both named, not stated":
                    assert all(named.values())
                elif name.startswith("completion removed") or name == "another completion":
                    assert named == {"subject": True, "object": False}, text
                else:
                    assert named == {"subject": False, "object": True}, text


def test_facts_are_told_apart_by_the_order_in_which_they_were_learnt():
    probes = [probe_of("one", "a", a=1.0, b=0.5), probe_of("two", "a", a=1.0, b=2.0)]
    found = by_training_order({"probes": probes}, {"one": "forward", "two": "both"})
    assert (found["forward"]["b"]["median"], found["both"]["b"]["median"]) == (0.5, 2.0)
    results: dict[str, Any] = {"k": 10, "documents": 3, "queries": {}, "methods": {}, "probes": found}
    training = {"parameters": 1, "epochs": 1, "seconds": 1.0, "accuracy": 1.0}
    text = render_markdown(results | {"training": training})
    assert "learnt in one order (1 facts) | learnt in both orders (1 facts)" in text
    assert re.search(r"\| b +\| +0\.50, 1 of 1 \| +2\.00, 0 of 1 \|", text)


def test_the_command_says_what_is_missing_before_anything_starts(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("x")
    given = ["model.path=gpt2", "corpus.path=corpus.txt"]
    assert main(["probe", *given]) == 2
    assert "probe.path: must be given" in capsys.readouterr().err
    assert main(["probe", *given, "probe.path=none.yaml"]) == 2
    assert "none.yaml: nothing is there" in capsys.readouterr().err
    assert main(["trace", *given]) == 2
    assert "queries.path: must be given" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_of_the_verb_names_what_it_needs(capsys):
    assert main(["probe", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: whence probe" in text
    assert "Must be given, on the command line or by an experiment: model.path, corpus.path, probe.path." in text
    assert re.search(r"^ +probe\.path +null +YAML list", text, re.MULTILINE)


def test_the_probes_yaml_of_the_guide_can_be_read(tmp_path: Path):
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```yaml\n(.*?)^```$", guide, re.M | re.S) if "partitions:" in block]
    assert len(blocks) == 1
    (tmp_path / "probes.yaml").write_text(blocks[0], encoding="utf-8")
    assert yaml.safe_load(blocks[0])
    assert parse_probes(str(tmp_path / "probes.yaml"))[0].partitions
