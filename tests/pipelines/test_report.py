"""The report's file: complete, self-contained, within its budget, and inert whatever the corpus holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import ReportConfig, RunConfig, plain
from pipelines.command import main
from pipelines.report import write_report
from pipelines.report.packing import MAP_LEVELS, map_rows, quantised, restored
from pipelines.report.reading import Layers, ReportError
from pipelines.stages.convergence import beyond
from tests.pages import Markup, element, maps, record, sequences
from tests.runs import Size, query, query_ids, row, summary_of, write_json, write_plain_run, write_run

HOSTILE = "<script>alert(1)</script></td>\"'&amp; \u202e\u0000\u001b[2J <!-- --> </style> {{title}} 引力 \U0001f600"


def page_of(folder: Path, summary: dict, rows: list[dict], config: ReportConfig | None = None) -> str:
    write_plain_run(folder, summary, rows)
    return write_report(folder, config or ReportConfig()).read_text(encoding="utf-8")


def facts(page: str) -> dict[str, str]:
    return dict(record(page)["facts"])


def test_every_query_has_its_own_rows_up_to_the_number_asked_for(tmp_path: Path):
    rows = [row(name, rank) for name in ("one", "two") for rank in range(1, 6)]
    page = page_of(tmp_path, summary_of(), rows, ReportConfig(sequences=3))
    for number, name in enumerate(("one", "two")):
        assert [item["text"] for item in sequences(page, number)] == [f"text {name} {rank}" for rank in (1, 2, 3)]
    first = record(page)["queries"][0]
    assert (first["id"], first["top"], first["highest"], first["measured"]) == ("one", 3, 10.0, -1.5)
    assert first["fidelity"] == "0.99000"


@pytest.mark.parametrize(("samples", "low"), [(1000, True), (4000, False)])
def test_fits_that_agree_little_are_a_fact_with_the_remedy(tmp_path: Path, samples: int, low: bool):
    sizes = [
        {"sequences": size, "pearson": {"one": mean, "two": None}, "mean": mean, "minimum": mean}
        for size, mean in ((31, 0.2), (62, 1 / 3), (125, 0.5))
    ]
    found = {"samples": samples, "sizes": sizes, "extrapolated": beyond(sizes, samples)}
    page = page_of(tmp_path, summary_of(convergence=found), [])
    first, *curve = facts(page)["convergence"].splitlines()
    assert first.startswith("scores by two fits on 125 sequences each: correlation 0.50000 on average")
    assert f"on {samples:,} each, as here, it would be 0." in first
    assert (". Low: another sample of 1,000 sequences may give" in first) == low
    assert ("raise factors.samples; about 2,416 would reach 0.95" in first) == low
    assert curve[0] == "31 sequences a fit: 0.20000 on average, 0.20000 at worst"
    assert len(curve) == 3
    told = [query["convergence"] for query in record(page)["queries"]]
    assert float(told[0] or 0) > 0.5
    assert told[1] == "undefined"


def test_a_run_without_a_comparison_of_fits_says_nothing_or_why(tmp_path: Path):
    assert "convergence" not in facts(page_of(tmp_path, summary_of(), []))  # a run of an earlier version
    assert "convergence" not in facts(page_of(tmp_path, summary_of(convergence={}), []))
    page = page_of(tmp_path, summary_of(convergence={"samples": 9, "reason": "9 sequences: few"}), [])
    assert facts(page)["convergence"] == "not measured: 9 sequences: few"
    assert [query["convergence"] for query in record(page)["queries"]] == [None, None]


def test_a_whole_run_comes_back_from_the_page(tmp_path: Path):
    size = Size(queries=2, top=5, bottom=2, tokens=30, blocks=2)
    page = write_report(write_run(tmp_path, size), ReportConfig()).read_text(encoding="utf-8")
    table = pq.read_table(tmp_path / "attribution.parquet").to_pylist()
    for number, name in enumerate(query_ids(size)):
        wanted = [found for found in table if found["query_id"] == name]
        packed, cells = sequences(page, number), maps(page, number)
        assert [(item["side"], item["rank"]) for item in packed] == [(found["side"], found["rank"]) for found in wanted]
        for item, found in zip(packed, wanted, strict=True):
            assert item["text"] == "".join(found["pieces"])
            assert item["lengths"] == [len(piece) for piece in found["pieces"]]
            assert item["score"] == pytest.approx(found["score"], rel=1e-6)
            assert (item["before"], item["spurious"]) == (found["before"], found["spurious"])
            np.testing.assert_allclose(item["rows"], found["layers"], rtol=1e-3, atol=1e-3)
            for kind, column in (("update", "tokens"), ("output", "output_tokens"), ("input", "input_tokens")):
                values, peak = np.array(found[column]), item["peaks"][kind]
                assert peak == pytest.approx(np.abs(values).max(), rel=1e-4)
                near(restored(item["codes"][kind], peak), values, peak, 127)
            near(
                restored(cells[f"{item['side']}:{item['rank']}"], item["map_peak"], MAP_LEVELS),
                np.array(found["matrix"]),
                item["map_peak"],
                MAP_LEVELS,
            )


def near(found: np.ndarray, values: np.ndarray, peak: float, levels: int) -> None:
    """Within half a step of the square roots: |√|a|−√|b|| ≤ √peak / 2 levels; and of the same sign."""
    roots = np.abs(np.sqrt(np.abs(found)) - np.sqrt(np.abs(values)))
    assert roots.max() <= np.sqrt(peak) / (2 * levels) * 1.01
    assert (found * values >= 0).all()


def test_quantised_values_hold_zero_both_ends_and_what_is_not_finite():
    codes = quantised(np.array([0.0, -8.0, 8.0, np.nan, np.inf, 1e-9, -2.0]))
    assert codes.peak == 8.0
    assert restored(codes.codes, codes.peak)[:6].tolist() == [0.0, -8.0, 8.0, 0.0, 0.0, 0.0]
    assert restored(codes.codes, codes.peak)[6] == pytest.approx(-2.0, rel=0.02)
    assert quantised(np.zeros(3)).peak == 0.0


def test_many_layers_are_drawn_by_group_without_losing_any():
    layers = Layers(
        *(tuple(f"{word}{n // per}" for n in range(210)) for word, per in (("l", 1), ("block ", 3), ("k", 210)))
    )
    rows = map_rows(layers, most=48)
    assert len(rows.labels) == 35
    assert rows.labels[0] == "block 0 – block 1"
    assert rows.share_LR.sum(axis=1).tolist() == [1.0] * 210
    assert rows.share_LR[:6, 0].sum() == 6
    few = map_rows(Layers(("a", "b"), ("block 0", "block 1"), ("up", "up")))
    assert few.labels == ("block 0 · up", "block 1 · up")


def test_maps_of_lower_ranks_are_left_out_where_the_budget_ends_and_the_page_says_so(tmp_path: Path):
    write_run(tmp_path, Size(queries=4, top=40, bottom=0, tokens=400, blocks=12))
    whole = write_report(tmp_path, ReportConfig()).read_text(encoding="utf-8")
    assert record(whole)["maps"] == 40
    assert record(whole)["notes"] == []
    assert len(whole) > 1_500_000
    cut = write_report(tmp_path, ReportConfig(megabytes=1)).read_text(encoding="utf-8")
    assert len(cut.encode()) <= 1_000_000
    ranks = record(cut)["maps"]
    assert 0 < ranks < 40
    assert maps(cut, 3).keys() == {f"top:{rank}" for rank in range(1, ranks + 1)}
    assert len(sequences(cut, 0)) == 40
    assert any(f"for ranks 1 to {ranks} only" in note and "megabytes=1" in note for note in record(cut)["notes"])
    another = sum(
        len(item)
        for number in range(4)
        for key, item in json.loads(element(whole, f"maps-{number}")).items()
        if key == f"top:{ranks + 1}"
    )
    assert len(cut.encode()) + another > 1_000_000 - 20_000 - 200  # one rank more would not have fitted


def test_where_even_the_texts_exceed_the_budget_fewer_sequences_are_shown(tmp_path: Path):
    generator = np.random.default_rng(0)
    noise = ["".join(map(chr, generator.integers(0x4E00, 0x9FFF, 4000))) for _ in range(200)]
    rows = [row("one", rank, text=noise[rank - 1]) for rank in range(1, 201)]
    page = page_of(tmp_path, summary_of(queries=[query("one")]), rows, ReportConfig(sequences=200, megabytes=1))
    shown = len(sequences(page, 0))
    assert 0 < shown < 200
    assert len(page.encode()) <= 1_000_000
    assert [item["rank"] for item in sequences(page, 0)] == list(range(1, shown + 1))
    assert record(page)["notes"][0].startswith(f"The {shown} first sequences")


def test_a_page_says_what_the_run_did_not_leave(tmp_path: Path):
    page = page_of(tmp_path, summary_of(), [row("one", 1)])
    assert record(page)["kinds"] == []
    assert any("attribution.parquet" in note for note in record(page)["notes"])
    assert any("tails.json" in note for note in record(page)["notes"])
    assert "codes" in sequences(page, 0)[0]
    assert sequences(page, 1) == []


def test_tails_and_survival_reach_the_page(tmp_path: Path):
    page = write_report(write_run(tmp_path), ReportConfig()).read_text(encoding="utf-8")
    found = record(page)["queries"][0]
    assert found["survival"].keys() == {"unfiltered", "bm25"}
    influences, shares = found["survival"]["unfiltered"]
    assert len(influences) == len(shares) > 10
    assert found["tails"]["feeds"]["unfiltered"]["fits"]["power_law"]["alpha"] > 2
    assert found["tails"]["share"][-1][0] == 100


def test_conjugate_gradients_are_told_with_what_they_lack(tmp_path: Path):
    name, other = query_ids(Size())[:2]
    residual = {"residual": {name: 2.5, other: 0.01}, "iterations": {name: 10, other: 7}}
    found = residual | {"gain": {name: 0.125, other: None}}
    folder = write_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | {"refinement": found})
    told = record(write_report(folder, ReportConfig()).read_text(encoding="utf-8"))
    assert told["queries"][0]["refinement"] == {"iterations": 10, "residual": 2.5, "gain": 0.125}
    assert told["queries"][1]["refinement"]["gain"] is None
    assert told["queries"][2]["refinement"] is None
    text = dict(told["facts"])["conjugate gradients"]
    assert "10 iterations at most; relative residual 1.25 (median), 2.5 (worst)" in text
    assert "the last iteration brought 12.5 % (median)" in text
    write_json(folder / "summary.json", summary | {"refinement": {}})
    told = record(write_report(folder, ReportConfig()).read_text(encoding="utf-8"))
    assert "conjugate gradients" not in dict(told["facts"])


def test_only_its_own_style_and_script_may_run_and_nothing_may_be_asked_for(tmp_path: Path):
    page = write_report(write_run(tmp_path), ReportConfig()).read_text(encoding="utf-8")
    markup = Markup(page)
    policy = next(value or "" for name, value in markup.attributes if value and value.startswith("default-src"))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        inline = re.findall(rf"<{tag}(?: type=\"module\")?>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(markup.tags)
    assert not [
        name for name, value in markup.attributes if name == "src" or name.startswith("on") or "://" in (value or "")
    ]


@pytest.mark.parametrize("field", ["text", "document_id", "feed"])
def test_hostile_text_of_a_sequence_adds_no_markup(tmp_path: Path, field: str):
    page = page_of(tmp_path / "hostile", summary_of(), [row("one", 1, **{field: HOSTILE})])
    same_structure(page, page_of(tmp_path / "plain", summary_of(), [row("one", 1)]))
    assert sequences(page, 0)[0][{"document_id": "document"}.get(field, field)] == HOSTILE


@pytest.mark.parametrize("field", ["query_id", "prompt", "completion", "contrast"])
def test_hostile_text_of_a_query_adds_no_markup(tmp_path: Path, field: str):
    config = plain(RunConfig())
    assert isinstance(config, dict)
    config["queries"]["measurement"] = "contrast"
    named = [query("one", contrast=" other"), query("one", contrast=" other") | {field: HOSTILE}]
    plain_page, page = (
        page_of(tmp_path / str(n), summary_of(queries=[found], config=config), []) for n, found in enumerate(named)
    )
    same_structure(page, plain_page)
    assert record(page)["queries"][0][{"query_id": "id"}.get(field, field)] == HOSTILE


def test_hostile_pieces_and_neighbours_add_no_markup(tmp_path: Path):
    pieces = ["<", "/script>", "\u202e", "\x00", "引", "", "\U0001f600", "</", "style", "><!--", "{{blobs}}"]
    page = write_report(write_run(tmp_path / "run", texts=[pieces]), ReportConfig()).read_text(encoding="utf-8")
    same_structure(page, write_report(write_run(tmp_path / "plain"), ReportConfig()).read_text(encoding="utf-8"))
    first = sequences(page, 0)[0]
    assert first["text"] == "".join(pieces)
    assert first["lengths"][6] == 2  # as JavaScript counts


def test_hostile_settings_add_no_markup(tmp_path: Path):
    config = plain(RunConfig())
    assert isinstance(config, dict)
    config["model"]["path"] = config["corpus"]["path"] = HOSTILE
    given = summary_of(config=config, name=HOSTILE, layers=HOSTILE)
    page = page_of(tmp_path / "a", given, [])
    same_structure(page, page_of(tmp_path / "b", summary_of(), []))
    assert facts(page)["model"] == HOSTILE
    titled = page_of(tmp_path / "c", given, [], ReportConfig(title=HOSTILE))
    same_structure(titled, page)
    assert record(titled)["title"] == HOSTILE
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", titled)


def same_structure(page: str, other: str) -> None:
    ours, theirs = Markup(page), Markup(other)
    assert ours.tags == theirs.tags
    assert [name for name, _ in ours.attributes] == [name for name, _ in theirs.attributes]


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path):
    given = summary_of(queries=[query("half \ud83d of", prompt="\udc00")], name="\ud83d")
    page = page_of(tmp_path, given, [])
    assert record(page)["queries"][0]["id"] == "half \ud83d of"


def test_numbers_that_json_lacks_become_null(tmp_path: Path):
    given = summary_of(queries=[query("one", measured=float("nan"))])
    assert record(page_of(tmp_path, given, [row("one", 1, score=float("inf"))]))["queries"][0]["measured"] is None


def test_a_second_completion_is_there_only_where_it_was_measured(tmp_path: Path):
    given = summary_of(queries=[query("one", contrast=" other end")])
    assert "other end" not in page_of(tmp_path, given, [])
    given["config"]["queries"]["measurement"] = "contrast"
    assert record(page_of(tmp_path, given, []))["queries"][0]["contrast"] == " other end"


def test_what_was_skipped_and_set_aside_is_said(tmp_path: Path):
    corpus = {"sequences": 7, "tokens": 70, "documents": 5, "skipped": {"malformed JSON": 2, "empty": 1}}
    page = page_of(tmp_path, summary_of(corpus=corpus, excluded={"scores": {"3": "why", "4": "why"}}), [])
    assert "3 records skipped (malformed JSON: 2, empty: 1)" in facts(page)["corpus"]
    assert facts(page)["set aside"] == "scores: 2"


def test_measurements_that_are_undefined_are_said_to_be_so(tmp_path: Path):
    undefined = {"sample": 1, "minimum": None, "mean": None, "pearson": {"one": None, "two": None}}
    page = page_of(tmp_path, summary_of(fidelity=undefined, agreement=undefined), [])
    assert facts(page)["fidelity"].count("undefined") == 2
    assert facts(page)["precision"].endswith("undefined")
    assert [found["fidelity"] for found in record(page)["queries"]] == ["undefined"] * 2
    assert "not measured" in facts(page_of(tmp_path, summary_of(fidelity={}), []))["fidelity"]


# The verb.


def test_report_again_takes_the_folder_alone_and_keeps_the_settings_of_the_run(tmp_path: Path, capsys):
    summary = summary_of()
    summary["config"]["report"] = {"title": "As it was", "sequences": 2}
    write_plain_run(tmp_path, summary, [row("one", rank) for rank in range(1, 6)])
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (record(page)["title"], len(sequences(page, 0))) == ("As it was", 2)
    assert main(["report", str(tmp_path), "report.sequences=4"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (record(page)["title"], len(sequences(page, 0))) == ("As it was", 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder. Remedy: give the folder of a run"),
        (
            ["."],
            "this is not the folder of a finished run: summary.json and top.parquet missing. Remedy: runs/a/1 is one",
        ),
        (["runs/a/1", "queries.rank=3"], "queries.rank=3: whence report takes the folder of one run and settings"),
        (["runs/a/1", "report.sequences=0"], "report.sequences=0: allowed: a whole number, at least 1"),
        (["runs/a/1", "report.size=3"], "there is no such key"),
    ],
)
def test_what_is_no_run_or_no_setting_is_refused(words: list[str], said: str, tmp_path: Path, monkeypatch, capsys):
    write_plain_run(tmp_path / "runs/a/1", summary_of(), [])
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.html"))


def test_the_words_of_the_verb_are_explained(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert "the following arguments are required: RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "from its folder alone" in " ".join(capsys.readouterr().out.split())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "tails.json").write_text("{")
    with pytest.raises(ReportError, match=r"tails\.json: it cannot be read \(JSONDecodeError.*run whence trace again"):
        write_report(tmp_path, ReportConfig())
    write_run(tmp_path)
    (tmp_path / "attribution.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReportError, match=r"attribution\.parquet: it cannot be read"):
        write_report(tmp_path, ReportConfig())
    write_json(tmp_path / "summary.json", {"probes": []})
    with pytest.raises(ReportError, match="not the summary of a trace"):
        write_report(tmp_path, ReportConfig())


def test_attribution_of_some_sequences_leaves_the_others_plain(tmp_path: Path):
    write_run(tmp_path)
    table = pq.read_table(tmp_path / "attribution.parquet")
    few = table.filter(pa.array([found["rank"] <= 2 for found in table.to_pylist()]))
    pq.write_table(few, tmp_path / "attribution.parquet")
    page = write_report(tmp_path, ReportConfig()).read_text(encoding="utf-8")
    packed: list[dict[str, Any]] = sequences(page, 0)
    assert ["lengths" in item for item in packed if item["side"] == "top"] == [True] * 2 + [False] * 6
    assert record(page)["queries"][0]["attributed"] == 4
