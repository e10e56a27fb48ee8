"""What a validation shows: tables as they are written, plots of what there is, an inert and self-contained page."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.command import main
from pipelines.plots.validation import Estimate, Plane, Series, below, dependence, method_bars, planes, wall_clock
from pipelines.validation.presentation import wording
from pipelines.validation.presentation.figures import PAIRS, figures, labels
from pipelines.validation.presentation.folder import write_folder
from pipelines.validation.presentation.markdown import markdown, terminal
from pipelines.validation.presentation.sections import headline, sections
from pipelines.validation.presentation.tables import Column, Section, flat, seconds, size, written
from tests.pages import Markup, chromium
from tests.pipelines.validated import (
    HOSTILE,
    facts_document,
    language_document,
    network_document,
    response,
    sizes,
    statistic,
    write_pairs,
)

NETWORK = {"agreement", "response", "time", "convergence", "linearity", "lds", "removal", "blocks", "sizes"}
LANGUAGE = {
    "agreement",
    "time",
    "convergence",
    "linearity",
    "iterations",
    "lds",
    "removal",
    "tracing",
    "ranks",
    "scale",
}
MEAN = {"mean": 0.5, "interval": [-0.25, 0.75], "values": []}


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("mean", MEAN, "0.500 [−0.250, 0.750]"),
        ("mean", {"mean": -0.5, "interval": None}, "−0.500"),
        ("mean", {"mean": None, "interval": None}, "–"),
        ("mean", 0.25, "0.250"),
        ("count", 17793, "17,793"),
        ("count", None, "–"),
        ("number", 1.25e-9, "1.25e-09"),
        ("number", float("nan"), "–"),
        ("number", 1234567.0, "1,234,567"),
        ("share", 0.125, "12%"),
        ("seconds", 0.0, "0 s"),
        ("seconds", 0.002, "2 ms"),
        ("text", "a", "a"),
    ],
)
def test_cells(kind: str, value: Any, expected: str) -> None:
    assert written(Column("x", "x", kind), value) == expected


def test_times_and_sizes() -> None:
    assert [seconds(value) for value in (1.234, 12.34, 99.4, 100, 3599, 3600, 7325)] == [
        "1.23 s",
        "12.3 s",
        "99.4 s",
        "1 min 40 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 02 min",
    ]
    assert [size(value) for value in (0, 5, 999, 1000, 999_600, 1.25e6, 3e9, 5e15)] == [
        "0 B",
        "5 B",
        "999 B",
        "1 kB",
        "1 MB",
        "1.25 MB",
        "3 GB",
        "5e+03 TB",
    ]


def test_means_become_three_columns_of_a_csv() -> None:
    columns = (Column("method", "method"), Column("mean", "mean", "mean"), Column("worst", "worst", "mean"))
    rows = [{"method": "a", "mean": MEAN, "worst": 0.1}, {"method": "b", "mean": None}]
    names, cells = flat(Section("name", "title", (), columns, rows))
    assert names == ["method", "mean", "mean_low", "mean_high", "worst"]
    assert cells[0] == {"method": "a", "mean": 0.5, "mean_low": -0.25, "mean_high": 0.75, "worst": 0.1}
    assert cells[1] == {"method": "b", "mean": None}


def test_names_of_methods() -> None:
    assert wording.method("ekfac_blocks_4") == "EK-FAC, 4 blocks"
    assert wording.method("unheard_of") == "unheard_of"
    assert wording.pair("ekfac - lissa") == "EK-FAC − LiSSA"
    assert wording.colour("ekfac_blocks_4") == wording.colour("ekfac") != wording.colour("lissa")
    assert (wording.blocks("ekfac"), wording.blocks("ekfac_blocks_8")) == (1, 8)
    assert wording.title("validate_concrete", "concrete") == "Concrete"
    assert wording.title("mine", "concrete") == "Concrete (mine)"
    assert wording.title("validate_stories", "language") == "stories"
    assert wording.title("validate", "language") == "language model"


# --- sections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document", [network_document(), language_document(), facts_document()], ids=lambda d: d["name"]
)
def test_every_study_has_a_section_and_no_other(document: dict[str, Any]) -> None:
    whole = [section.name for section in sections(document)]
    assert len(set(whole)) == len(whole)
    for study in set(document["studies"]) - {"model"}:
        without = copy.deepcopy(document)
        del without["studies"][study]
        left = [section.name for section in sections(without)]
        assert set(left) < set(whole), study
        assert markdown(without)
        assert terminal(without)


def test_rows_are_those_of_the_methods() -> None:
    by_name = {section.name: section for section in sections(network_document())}
    methods = [row["method"] for row in by_name["agreement"].rows]
    assert methods == ["gradient dot product", "K-FAC", "EK-FAC", "LiSSA", "EK-FAC + CG", "exact Gauss-Newton"]
    assert "EK-FAC, 2 blocks" in [row["method"] for row in by_name["time"].rows]
    verdicts = {row["pair"]: row["verdict"] for row in by_name["differences"].rows}
    assert verdicts == {
        "EK-FAC − LiSSA": "not told apart",
        "EK-FAC − gradient dot product": "better",
        "K-FAC − EK-FAC": "worse",
    }


def test_without_a_response_agreement_is_with_exact_solves() -> None:
    document = network_document()
    studies = document["studies"]
    agreed = studies.pop("agreement")
    del studies["response"]
    methods = {name: record for name, record in agreed["methods"].items() if name != "exact"}
    studies |= {"solved": agreed | {"methods": methods}, "blocks": language_document()["studies"]["blocks"]}
    by_name = {section.name: section for section in sections(document)}
    assert list(by_name)[:2] == ["solved", "differences"]
    assert "exact Gauss-Newton" not in [row["method"] for row in by_name["solved"].rows]
    assert "correlations with exact solves" in by_name["differences"].about[0]
    assert "PBRF" not in markdown(document)
    assert headline(document)[0].startswith("Correlation with exact solves: EK-FAC + CG 0.970, ")
    assert "solved" in [name for name, _, _ in figures([document])]


def test_failures_are_shown_before_the_numbers() -> None:
    document = network_document()
    assert not [warning for section in sections(document) for warning in section.warnings]
    studies = document["studies"]
    studies["response"], studies["sizes"] = response(488), sizes(0.6)
    studies["agreement"]["methods"]["exact"]["slope"] = statistic(0.7)
    studies["cost"]["methods"]["lissa"]["notes"]["change"] = 0.4
    warned = {section.name: section.warnings for section in sections(document) if section.warnings}
    assert set(warned) == {"agreement", "time", "response", "sizes"}
    for text in (terminal(document), markdown(document)):
        assert "The objective of 12 of 500 points was not minimised." in text
        assert "Responses are 0.70 times what exact solves predict" in text
        assert "agree by 0.60 only" in text
        assert "LiSSA’s last step still moved its vectors by 40%" in text


def test_markdown_tables_are_aligned_and_whole() -> None:
    text = markdown(network_document(), {"agreement": "plots/agreement.svg"})
    assert "](plots/agreement.svg)" in text
    assert "plots/time.svg" not in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == len(sections(network_document()))
    for table in tables:
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert re.fullmatch(r"[| :-]+", lines[1])


# --- plots ------------------------------------------------------------------------------------------------------------


def test_plots_of_one_run(tmp_path: Path) -> None:
    document = network_document()
    pairs = write_pairs(tmp_path / PAIRS, document)
    assert {name for name, _, _ in figures([document], pairs)} == NETWORK
    assert {name for name, _, _ in figures([language_document()])} == LANGUAGE | {"blocks"}
    assert [name for name, _, _ in figures([facts_document()])] == ["tracing"]


def test_plots_of_several_runs() -> None:
    runs = [network_document(), network_document("validate_energy", "energy", 0.1), network_document("mine")]
    assert labels([*runs, runs[0]]) == ["Concrete, run 1", "Energy", "Concrete (mine)", "Concrete, run 2"]
    drawn = {name: figure for name, _, figure in figures(runs)}
    assert set(drawn) == {"agreement", "time", "lds", "blocks", "sizes"}
    labelled = [text.get_text() for text in drawn["agreement"].axes[0].get_xticklabels()]
    assert labelled == ["Concrete", "Energy", "Concrete (mine)"]
    assert drawn["time"].axes[0].get_yscale() == "log"


def test_bars_are_the_means() -> None:
    groups = {"a": {"one": Estimate(0.5, [0.4, 0.6], [0.4, 0.6]), "two": Estimate(-0.25), "three": Estimate(None)}}
    figure = method_bars(groups, dict.fromkeys(("one", "two", "three"), "#000000"), label="x")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, -0.25]
    several = method_bars(
        {"a": groups["a"], "b": groups["a"]}, dict.fromkeys(("one", "two", "three"), "#0000ff"), label="x"
    )
    assert [bar.get_height() for bar in several.axes[0].patches] == [0.5, -0.25, 0.5, -0.25]


def test_lines_are_the_means() -> None:
    series = [Series("s", [1, 2, 4], [Estimate(0.9), Estimate(None), Estimate(0.7, [0.6, 0.8])])]
    figure = dependence({"y": series}, label="x", limit=1.0)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert ([1, 4], [0.9, 0.7]) in lines
    assert ([4, 4], [0.6, 0.8]) in lines


def test_many_intervals_become_a_band() -> None:
    crowded = Series("s", range(1, 31), [Estimate(0.5, [0.4, 0.6])] * 30)
    figure = dependence({"y": [crowded]}, label="x")
    assert len(figure.axes[0].collections) == 1
    assert len(figure.axes[0].lines) == 1


def test_points_without_a_finite_gradient_are_missed_in_the_curve() -> None:
    figure = below({"a": [0.01, 0.02, np.inf, np.inf]}, label="x", limit=0.05, limit_name="limit")
    curve = max(figure.axes[0].lines, key=lambda line: len(line.get_xdata()))
    assert max(curve.get_ydata()) == 50


@pytest.mark.parametrize(
    "draw",
    [
        lambda name: method_bars({name: {name: Estimate(0.5)}}, {name: "#000000"}, label=name, reference=(name, 0.4)),
        lambda name: method_bars(
            {name: {name: Estimate(1.0)}, "b": {}}, {name: "#000000"}, label=name, logarithmic=True
        ),
        lambda name: wall_clock({name: (0.0, 0.0), "b": (20.0, 2.0)}, {name: "#000000", "b": "#ff0000"}, label=name),
        lambda name: dependence({name: [Series(name, [1], [Estimate(0.1)])] * 2}, label=name, mark=(name, 1.0)),
        lambda name: planes([Plane(name, [0.0, 1.0], [0.0, 1.0], 1.0, name), Plane(name, [], [])], name, name),
        lambda name: below({name: [0.1, 0.0]}, label=name, limit=0.05, limit_name=name),
        lambda name: below({name: []}, label=name, limit=0.05, limit_name=name),
    ],
)
def test_names_are_drawn_as_they_are(draw: Any, tmp_path: Path) -> None:
    from pipelines.plots import save

    for path in save(draw(HOSTILE), tmp_path, "plot"):
        assert path.stat().st_size > 1000
    assert "<script" not in (tmp_path / "plot.svg").read_text(encoding="utf-8")


# --- the folder and the page ------------------------------------------------------------------------------------------


def hostile_document() -> dict[str, Any]:
    document = network_document()
    document["config"]["validation"]["path"] = HOSTILE
    document["studies"]["model"] = {"kind": "network", "facts": [[HOSTILE, HOSTILE]], "warnings": [HOSTILE]}
    document["studies"]["response"]["warnings"] = [HOSTILE]
    return document


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a network's validation with hostile text, and of a language model's."""
    found = {}
    for name, document in (("network", hostile_document()), ("language", language_document())):
        found[name] = tmp_path_factory.mktemp(name)
        if name == "network":
            write_pairs(found[name] / PAIRS, document)
        (found[name] / "tables").mkdir()
        (found[name] / "tables/stale.csv").touch()
        write_folder(found[name], document)
    return found


def test_the_folder(folders: dict[str, Path]) -> None:
    folder = folders["network"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    plots = {f"plots/{name}.{ending}" for name in NETWORK for ending in ("svg", "png")}
    tables = {f"tables/{section.name}.csv" for section in sections(hostile_document())}
    assert names == {"validation.html", "validation.md", PAIRS} | plots | tables
    rows = list(csv.DictReader((folder / "tables/agreement.csv").read_text().splitlines()))
    assert [float(row["pearson"]) for row in rows] == pytest.approx([0.42, 0.81, 0.88, 0.9, 0.97, 0.985])
    assert float(rows[0]["pearson_low"]) == pytest.approx(0.38)
    assert (folder / "validation.md").read_text().count("](plots/") == len(NETWORK)


def test_the_page_is_inert_and_has_everything(folders: dict[str, Path]) -> None:
    page = (folders["network"] / "validation.html").read_text(encoding="utf-8")
    found = Markup(page)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    sources = [value for name, value in found.attributes if name == "src"]
    assert len(sources) == len(NETWORK)
    assert all(value and value.startswith("data:image/svg+xml;base64,") for value in sources)
    assert "\u0000" not in page
    for section in sections(hostile_document()):
        assert section.title in found.text
        assert f'id="{section.name}"' in page
    anchors = {value for name, value in found.attributes if name == "id"}
    assert {value[1:] for name, value in found.attributes if name == "href" and value} <= anchors


@pytest.mark.slow
def test_the_page_in_a_browser(folders: dict[str, Path]) -> None:
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for folder, width in itertools.product(folders.values(), (1440, 390)):
            page, said, asked = browser.new_page(viewport={"width": width, "height": 900}), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
            page.goto((folder / "validation.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
            assert page.evaluate(broken) == 0
            assert not said
            assert [url for url in asked if not url.startswith("data:")] == [(folder / "validation.html").as_uri()]
        browser.close()


# --- several runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Folders of two data sets and of facts."""
    documents = [network_document(), network_document("validate_energy", "energy", 0.1), facts_document()]
    documents[1]["studies"]["response"] = response(450)
    for document in documents:
        folder = tmp_path / document["name"]
        folder.mkdir()
        (folder / "validation.json").write_text(json.dumps(document), encoding="utf-8")
    return [str(tmp_path / document["name"]) for document in documents]


def test_compare_puts_validations_side_by_side(runs: list[str], tmp_path: Path, capsys) -> None:
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^\| EK-FAC +\| +0\.880 \[0\.840, 0\.920\] \| +0\.780 \[0\.740, 0\.820\] \|$", text, re.MULTILINE)
    assert "! Energy: The objective of 50 of 500 points was not minimised." in text
    assert text.endswith(f"{tmp_path / 'out/compare.html'}\n")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {
        "compare.html",
        "tables/agreement.csv",
        "plots/agreement.svg",
        "plots/time.svg",
        "plots/blocks.png",
    } <= names
    rows = list(csv.DictReader((tmp_path / "out/tables/agreement.csv").read_text().splitlines()))
    assert rows[0]["what"] == "gradient dot product"
    assert float(rows[0]["Energy_high"]) == pytest.approx(0.36)


def test_compare_refuses_a_mixture(runs: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "other").mkdir()
    assert main(["compare", runs[0], str(tmp_path / "other")]) == 2
    assert "it is not the folder of a finished validation" in capsys.readouterr().err
    (tmp_path / "other/validation.json").write_text("{")
    assert main(["compare", runs[0], str(tmp_path / "other")]) == 2
    (tmp_path / "other/validation.json").write_text("[]")
    assert main(["compare", runs[0], str(tmp_path / "other")]) == 2
    assert "it is no record of a validation" in capsys.readouterr().err
