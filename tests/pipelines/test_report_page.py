"""The report as a reader meets it: opened in Chromium, without a server, clicked through, and silent throughout."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import ReportConfig
from pipelines.report import write_report
from tests.pages import chromium
from tests.runs import Size, query, query_ids, row, summary_of, write_plain_run, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page

TEXT = [
    "The",
    " first",
    " President",
    " of",
    " George",
    " Wash",
    "ington",
    " was",
    " 引",
    "",
    "力",
    ".\n",
    " <b>bold</b>",
    " end",
]


@dataclass
class Opened:
    """A page, with everything that went wrong on it and everything that it asked for."""

    page: Page
    path: Path
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def go(self, **parts: object) -> Page:
        """Open the report anew at a permanent link."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.path.as_uri()}{'#' + urlencode(parts) if parts else ''}")
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def said(self, message: ConsoleMessage) -> None:
        """Note errors and warnings of the console."""
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def asked(self, dialog: Dialog) -> None:
        """Note a dialog, which only a script that is not ours would open."""
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def silent(self) -> bool:
        """No error, no warning of the console, no request but for the file itself."""
        assert self.errors == []
        assert {url.partition("#")[0] for url in self.requests} <= {self.path.as_uri(), "about:blank"}
        return True


Open = Callable[[Path], Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_report(browser: Browser) -> Iterator[Open]:
    """Open a report; at the end of the test it must have been silent."""
    opened: list[Opened] = []

    def start(path: Path) -> Opened:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(10_000)
        found = Opened(page, path)
        page.on("console", found.said)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("dialog", found.asked)
        opened.append(found)
        found.go()
        return found

    yield start
    for found in opened:
        assert found.silent()
        found.page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three queries, eight sequences above and three below each; the first begins with `TEXT`."""
    folder = write_run(tmp_path_factory.mktemp("run"), texts=[TEXT])
    return write_report(folder, ReportConfig())


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()  # inner texts of what is not near the window are empty


def until(page: Page, expression: str) -> None:
    """Wait for something to be true; `wait_for_function` would evaluate text in the page, which its policy forbids."""
    ending = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < ending, expression
        page.wait_for_timeout(20)


def ranks(page: Page) -> list[int]:
    return [int(text) for text in texts(page, ".card .rank")]


def unit(page: Page, number: int) -> Locator:
    """A token of the first sequence."""
    return page.locator(f".card >> nth=0 >> [data-unit='{number}']")


def test_the_overview_lists_the_queries_and_sorts_them(report: Path, open_report: Open):
    page = open_report(report).page
    assert page.title() == "whence: trace"
    assert texts(page, ".query-link") == query_ids(Size())
    assert page.locator(".queries .spark path").count() == 6
    assert "4,000" in page.inner_text("main")
    page.click("th[data-key=fidelity] button")
    assert texts(page, "td.fidelity") == ["0.99000", "0.98000", "0.97000"]
    page.click("th[data-key=fidelity] button")
    assert texts(page, "td.fidelity") == ["0.97000", "0.98000", "0.99000"]
    assert page.get_attribute("th[data-key=fidelity]", "aria-sort") == "ascending"
    assert page.evaluate("document.activeElement.closest('th')?.dataset.key") == "fidelity"


def test_clicking_through_queries_and_back(report: Path, open_report: Open):
    page = open_report(report).page
    for number, name in enumerate(query_ids(Size())):
        page.click(f".query-link >> nth={number}")
        page.wait_for_selector(".card")
        assert page.inner_text(".hero h1") == name
        assert texts(page, ".completion") == [f" end of {name}"]
        assert ranks(page) == list(range(1, 9))
        assert page.locator(".plot").count() == 3
        page.go_back()
        page.wait_for_selector(".queries")
    page.select_option("#bar select", "2")
    page.wait_for_selector(".card")
    assert page.inner_text(".hero h1") == query_ids(Size())[2]


def test_a_link_leads_to_its_sequence_also_of_an_odd_query(report: Path, open_report: Open):
    opened = open_report(report)
    for name in query_ids(Size()):
        page = opened.go(q=name, s=7 * 5)
        assert page.inner_text(".card.current .rank") == "5"
        assert page.locator(".card.current").evaluate("card => card.getBoundingClientRect().top") < 200
        assert page.inner_text(".hero h1") == name
        link = page.get_attribute(".card.current .rank", "href") or ""
        assert parse_qs(link.removeprefix("#")) == {"q": [name], "s": ["35"]}
    page = opened.go(q=query_ids(Size())[0], s=1007, side="bottom")
    assert page.inner_text(".card.current .rank") == "1"
    assert page.inner_text(".card.current .score").startswith("−")


def test_links_to_what_is_not_there_say_so(report: Path, open_report: Open):
    opened = open_report(report)
    assert "no query “nobody”" in opened.go(q="nobody").inner_text(".notice")
    assert "Sequence 12 is not among those" in opened.go(q=query_ids(Size())[0], s=12).inner_text(".notice")


def test_search_filter_sort_and_sides(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    page.fill("#search", "george")
    assert ranks(page) == [1]
    assert page.inner_text("#count") == "1 of 8 sequences"
    page.wait_for_selector(".hit")
    assert texts(page, ".hit") == [" George"]
    page.fill("#search", "FILE.JSONL:3")
    assert ranks(page) == [3]
    page.fill("#search", ".*")
    assert ranks(page) == []
    page.click(".nothing button")
    assert ranks(page) == list(range(1, 9))
    page.select_option(".menu:has-text('feed') select", "bm25")
    assert ranks(page) == [2, 4, 6, 8]
    assert texts(page, ".card .badge:not(.warn)") == ["both feeds", "BM25"] * 2
    page.select_option(".menu:has-text('feed') select", "all")
    page.select_option(".menu:has-text('sort') select", "sparsity")
    table = pq.read_table(report.parent / "attribution.parquet").to_pylist()
    mine = [found for found in table if found["query_id"] == query_ids(Size())[0] and found["side"] == "top"]
    assert ranks(page) == [found["rank"] for found in sorted(mine, key=lambda found: -found["sparsity"])]
    page.click("button[data-value=bottom]")
    assert len(ranks(page)) == 3
    assert all(text.startswith("−") for text in texts(page, ".card .score b"))


def test_heatmaps_switch_and_tokens_tell_their_influence(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    first = pq.read_table(report.parent / "attribution.parquet").to_pylist()[0]
    assert "one before the token predicted" in page.inner_text("#reminder")
    for kind, column in (("update", "tokens"), ("output", "output_tokens"), ("input", "input_tokens")):
        page.click(f"button[data-value={kind}]")
        page.wait_for_selector(".card >> nth=0 >> [data-unit]")
        peak = max(abs(value) for value in first[column])
        for token in (0, 3, 6):
            value = first[column][token]
            classes = unit(page, token).get_attribute("class") or ""
            strength = float(unit(page, token).evaluate("span => span.style.getPropertyValue('--v') || 0"))
            assert strength == pytest.approx(abs(value) / peak, abs=0.021)
            if strength:
                assert classes.split()[0] == ("pos" if value > 0 else "neg")
    assert "one before" not in page.inner_text("#reminder")
    assert "another step changes it by 2\xa0%, so it is rough" in page.inner_text("#reminder .rough")
    page.click("button[data-value=update]")
    unit(page, 2).hover()
    tip = page.inner_text("#tip")
    assert re.search(r"the update at  President, where  of is predicted", tip)
    assert value_of(tip) == pytest.approx(first["tokens"][2], rel=0.05)
    page.mouse.move(5, 5)
    assert page.is_hidden("#tip")


def value_of(tip: str) -> float:
    found = re.match(r"[+−]?[\d.,]+", tip)
    assert found, tip
    return float(found[0].replace("−", "-").replace(",", "").replace("+", ""))


def test_tokens_that_are_one_character_are_coloured_as_one(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    assert unit(page, 9).inner_text() == "力"
    first = pq.read_table(report.parent / "attribution.parquet").to_pylist()[0]
    unit(page, 9).hover()
    tip = page.inner_text("#tip")
    assert "2 tokens" in tip
    assert value_of(tip) == pytest.approx(
        first["tokens"][9] + first["tokens"][10], abs=0.03 * abs(max(first["tokens"], key=abs))
    )


def test_scale_of_colours_is_stated_and_can_be_shared(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    scales = texts(page, ".card .scale")
    assert len(set(scales)) > 4
    page.select_option(".menu:has-text('colour') select", "shared")
    assert len(set(texts(page, ".card .scale"))) == 1
    shared = texts(page, ".card .scale")[0].rpartition("±")[2]
    assert shared in page.inner_text("#reminder .legend")
    assert shared in [scale.rpartition("±")[2] for scale in scales]


def test_layers_and_neighbouring_text_on_demand(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    assert page.locator("canvas").count() == 0
    page.click(".card >> nth=0 >> [data-does=layers]")
    until(page, "document.querySelector('canvas')?.width > 300")
    assert texts(page, ".map-rows span") == ["block 2", "block 1", "block 0"]
    colours = page.evaluate(COLOURS)
    assert min(colours) > 100
    page.locator("canvas").hover(position={"x": 20, "y": 5})
    assert "block 2 · down_proj" in page.inner_text(".reading")
    assert page.locator(".card >> nth=0 >> .spot").count() == 1
    page.click(".card >> nth=0 >> [data-does=layers]")
    assert page.locator("canvas").count() == 0
    page.click(".card >> nth=0 >> [data-does=around]")
    assert texts(page, ".around") == ["What stands before it.", "What stands after it."]


def test_a_tap_on_a_map_reads_its_cell(report: Path, browser: Browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(f"{report.as_uri()}#{urlencode({'q': query_ids(Size())[0]})}")
    page.wait_for_selector("html[data-ready]")
    page.tap(".card >> nth=0 >> [data-does=layers]")
    until(page, "document.querySelector('canvas')?.width > 200")
    assert page.inner_text(".reading") == "Point at a cell."
    page.locator("canvas").tap(position={"x": 40, "y": 5})
    assert "block 2 · down_proj" in page.inner_text(".reading")
    assert page.locator(".card >> nth=0 >> .spot").count() == 1
    assert page.is_hidden(".of-sums")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_a_short_axis_has_ticks_between_powers_of_ten(report: Path, open_report: Open, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(report.parent, folder)
    name = query_ids(Size())[0]
    points = [{"query_id": name, "feed": "unfiltered", "influence": x, "survival": 30 / x} for x in range(31, 290)]
    pq.write_table(pa.Table.from_pylist(points), folder / "tails.parquet")
    page = open_report(write_report(folder, ReportConfig())).go(q=name)
    shown = texts(page, ".plot >> nth=0 >> text")
    assert {"50", "100", "200"} <= set(shown)
    assert "1,000" not in shown


def test_the_keyboard(report: Path, open_report: Open):
    page = open_report(report).page
    page.keyboard.press("]")
    page.wait_for_selector(".card")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.inner_text(".card.current .rank") == "2"
    assert page.evaluate("location.hash").endswith("s=14")
    page.keyboard.press(".")
    assert page.is_visible("#tip")
    page.keyboard.press("l")
    assert page.locator(".card.current canvas").count() == 1
    page.keyboard.press("c")
    assert page.locator(".card.current .around").count() == 2
    page.keyboard.press("k")
    assert page.inner_text(".card.current .rank") == "1"
    page.keyboard.press("2")
    page.wait_for_selector("button[data-value=output][aria-pressed=true]")
    page.keyboard.press("b")
    page.wait_for_selector("button[data-value=bottom][aria-pressed=true]")
    page.keyboard.press("s")
    assert page.eval_on_selector(".menu:has-text('sort') select", "menu => menu.value") == "bm25"
    page.keyboard.press("/")
    page.keyboard.type("jkl")
    assert page.input_value("#search") == "jkl"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.is_visible("#help")
    assert "next, previous sequence" in page.inner_text("#help")
    page.keyboard.press("?")
    assert page.is_hidden("#help")
    page.keyboard.press("]")
    until(page, f"document.querySelector('.hero h1').innerText === {query_ids(Size())[1]!r}")
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.keyboard.press("o")
    page.wait_for_selector(".queries")


def test_another_heatmap_leaves_the_reader_where_they_are(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    for key in "jjjjj":
        page.keyboard.press(key)
    page.keyboard.press("c")
    page.keyboard.press("l")
    until(page, "document.querySelector('canvas')?.width > 300")
    page.evaluate("window.scrollBy(0, -37)")
    place = "document.querySelector('.card.current')?.getBoundingClientRect().top"
    before = page.evaluate(place)
    for key, kind in (("2", "output"), ("3", "input"), ("1", "update")):
        page.keyboard.press(key)
        page.wait_for_selector(f"button[data-value={kind}][aria-pressed=true]")
        until(page, f"Math.abs({place} - {before}) <= 1")
        assert page.inner_text(".card.current .rank") == "5"
        assert page.locator(".card.current .around").count() == 2
        assert page.locator(".card canvas").count() == 1
    page.click("button[data-value=output]")
    assert page.evaluate("document.activeElement.dataset.value") == "output"
    page.select_option(".menu:has-text('sort') select", "document")
    assert page.locator(".card.current").count() == 0
    page.click(".shapes > summary")
    page.select_option(".menu:has-text('sort') select", "rank")
    assert page.locator(".shapes[open]").count() == 0


def with_needed(report: Path, folder: Path, needed: dict[str, Any]) -> Path:
    """The report of the same run with another estimate for its first query."""
    shutil.copytree(report.parent, folder)
    record = json.loads((folder / "tails.json").read_text())
    record["queries"][query_ids(Size())[0]]["needed"] |= needed
    (folder / "tails.json").write_text(json.dumps(record))
    return write_report(folder, ReportConfig())


def test_a_poor_power_law_stands_beside_what_was_counted(report: Path, open_report: Open, tmp_path: Path):
    law, counted = ({"sequences": n, "interval": [n / 2, n * 2]} for n in (4000, 900))
    poor = counted | {"p_value": 0.02, "estimates": {"power_law": law, "empirical": counted}}
    page = open_report(with_needed(report, tmp_path / "both", poor)).go(q=query_ids(Size())[0])
    assert (
        "about 900 [450, 1,800] by counting, or about 4,000 [2,000, 8,000] by the power law, which is a poor fit "
        "(p = 0.02), would have to be scanned; 8,000 were."
    ) in page.inner_text(".tails")
    alone = law | {"p_value": 0.02, "estimates": {"power_law": law}}
    page = open_report(with_needed(report, tmp_path / "law", alone)).go(q=query_ids(Size())[0])
    assert "a poor fit (p = 0.02), would have to be scanned; 8,000 were, of which none is." in page.inner_text(".tails")
    good = poor | {"p_value": 0.5}
    page = open_report(with_needed(report, tmp_path / "good", good)).go(q=query_ids(Size())[0])
    assert "about 900 [450, 1,800] would have to be scanned; 8,000 were." in page.inner_text(".tails")


def test_a_query_says_how_far_its_conjugate_gradients_got(report: Path, open_report: Open, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(report.parent, folder)
    name = query_ids(Size())[0]
    summary = json.loads((folder / "summary.json").read_text())
    summary["refinement"] = {"iterations": {name: 10}, "residual": {name: 2.5}, "gain": {name: 0.125}}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = open_report(write_report(folder, ReportConfig())).go(q=name)
    assert "10 iterations, the last brought 12.5\xa0% · relative residual 2.5" in page.inner_text(".hero .meta")


def test_a_printed_overview_has_all_its_columns_and_times(report: Path, open_report: Open):
    page = open_report(report).page
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # A4 without its margins
    box = page.locator("td.spurious").first.bounding_box()  # the last column
    assert box is not None
    assert box["x"] + box["width"] <= 720
    overlap = """() => [...document.querySelectorAll(".stages tr")].some((row) => {
        const bar = row.querySelector(".bar")?.getBoundingClientRect();
        return bar && bar.right > row.querySelector("td.numeric").getBoundingClientRect().left;
    })"""
    assert page.evaluate(overlap) is False


def test_marked_sequences_stay_in_the_list(report: Path, open_report: Open):
    page = open_report(report).go(q=query_ids(Size())[0])
    assert texts(page, ".card.spurious .rank") == ["2"]
    assert "maybe spurious" in page.inner_text(".card.spurious .badge.warn")


def test_long_sequences_begin_as_excerpts(tmp_path: Path, open_report: Open):
    write_run(tmp_path, Size(queries=1, top=3, bottom=0, tokens=500, blocks=2))
    page = open_report(write_report(tmp_path, ReportConfig())).go(q=query_ids(Size())[0])
    page.wait_for_selector(".card >> nth=0 >> [data-unit]")
    shown = page.locator(".card >> nth=0 >> [data-unit]").count()
    assert 40 < shown < 500
    gaps = [int(re.sub(r"\D", "", text)) for text in texts(page, ".card >> nth=0 >> .gap")]
    assert shown + sum(gaps) == 500
    page.click(".card >> nth=0 >> .gap >> nth=0")
    assert page.locator(".card >> nth=0 >> [data-unit]").count() == 500
    assert page.locator(".card >> nth=1 >> [data-unit]").count() < 500
    page.keyboard.press("e")
    until(page, "document.querySelectorAll('.card:nth-child(2) [data-unit]').length === 500")


def test_only_what_is_near_the_window_is_coloured_until_it_is_printed(tmp_path: Path, open_report: Open):
    write_run(tmp_path, Size(queries=1, top=100, bottom=0, tokens=200, blocks=1))
    page = open_report(write_report(tmp_path, ReportConfig())).go(q=query_ids(Size())[0])
    coloured = "document.querySelectorAll('.card:has([data-unit])').length"
    until(page, f"{coloured} > 2")
    assert page.evaluate(coloured) < 50
    plain = page.locator(".card >> nth=99 >> .text")
    assert plain.evaluate("box => box.textContent.length") > 200
    before = plain.evaluate("box => box.getBoundingClientRect().height")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(coloured) == 100
    assert plain.evaluate("box => box.getBoundingClientRect().height") == pytest.approx(before, abs=1)


HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></script></style><!-- -->"
    "\"'&amp; \u202eevil\u202c \x00\x1b[2J שלום \U0001f600 引力 [x](javascript:alert(1))"
)


@pytest.mark.parametrize("attributed", [False, True])
def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, open_report: Open, attributed: bool):
    summary = summary_of(
        queries=[query(HOSTILE, prompt=HOSTILE, completion=HOSTILE), query("half \ud83d", prompt="\ud83d")],
        name=HOSTILE,
        layers=HOSTILE,
        score_unit=HOSTILE,
    )
    summary["config"]["model"]["path"] = HOSTILE
    if attributed:
        pieces = [
            "<script>",
            "window.hacked = 1",
            "</script>",
            "\u202e",
            "evil",
            "\x00",
            "שלום",
            "\U0001f600",
            "引",
            "",
            "力",
            "</p>",
        ]
        write_run(tmp_path, Size(queries=1), texts=[pieces])
        target, seen = query_ids(Size())[0], "<script>window.hacked = 1</script>‹U+202E›evil␀שלום\U0001f600引力</p>"
    else:
        write_plain_run(tmp_path, summary, [row(HOSTILE, 1, text=HOSTILE, document_id=HOSTILE, feed=HOSTILE)])
        target, seen = HOSTILE, "‹U+202E›evil‹U+202C› ␀␛[2J שלום \U0001f600 引力 [x](javascript:alert(1))"
    opened = open_report(write_report(tmp_path, ReportConfig()))
    for parts in ({}, {"q": target}, {"q": target, "s": 41}):
        page = opened.go(**parts)
        assert page.evaluate("window.hacked") is None
        assert page.locator("main :is(script, img, iframe, style)").count() == 0
    assert seen in page.locator(".card .text").first.evaluate("box => box.textContent")
    if not attributed:
        assert page.locator(".hero h1").evaluate("head => head.textContent").startswith("<script>window.hacked")
        assert page.locator("[href^='javascript']").count() == 0
        page = opened.go(q="half \ufffd")
        assert page.inner_text(".hero h1") == "half \ufffd"


def test_right_to_left_text_stays_in_its_place(tmp_path: Path, open_report: Open):
    pieces = ["\u05e9", "\u05dc\u05d5", "\u05dd", " \u05e2\u05d5\u05dc\u05dd", "\u202e", " abc"]
    opened = open_report(write_report(write_run(tmp_path, texts=[pieces]), ReportConfig()))
    page = opened.go(q=query_ids(Size())[0])
    boxes = [unit(page, number).evaluate("span => span.getBoundingClientRect().toJSON()") for number in (0, 1, 5)]
    assert boxes[0]["x"] > boxes[1]["x"] > boxes[2]["x"]  # right to left, and the override did not turn it round
    button = page.locator(".card >> nth=0 >> footer button >> nth=0")
    assert button.evaluate("button => button.getBoundingClientRect().x") < 200


def test_a_run_without_later_steps_is_shown_plain(tmp_path: Path, open_report: Open):
    write_plain_run(tmp_path, summary_of(), [row("one", rank) for rank in (1, 2)])
    opened = open_report(write_report(tmp_path, ReportConfig()))
    page = opened.go(q="one")
    assert texts(page, ".card .text") == ["text one 1", "text one 2"]
    assert page.locator(".shapes, .legend, [data-does], [data-value=update]").count() == 0
    for key in "jl.123cesbk":
        page.keyboard.press(key)
    assert ranks(page) == [1, 2]
    assert "No sequence is listed" in opened.go(q="two").inner_text("#list")


def test_without_scripts_the_page_says_what_it_needs(report: Path, browser: Browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert "needs JavaScript" in page.inner_text("main")
    context.close()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_stands_out(report: Path, open_report: Open, width: int, scheme: Any):
    opened = open_report(report)
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.page.emulate_media(color_scheme=scheme)
    for parts in ({}, {"q": query_ids(Size())[0], "s": 7}):
        page = opened.go(**parts)
        if parts:
            page.click(".card >> nth=0 >> [data-does=layers]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contrasts = page.evaluate(CONTRAST)
        assert min(contrasts) >= 4.5, sorted(contrasts)[:5]


# How many pixels of the map are red, and how many teal.
COLOURS = """() => {
  const canvas = document.querySelector('canvas');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let red = 0, teal = 0;
  for (let at = 0; at < data.length; at += 4) {
    red += data[at] > data[at + 1] + 20;
    teal += data[at + 1] > data[at] + 20;
  }
  return [red, teal];
}"""

# Contrast (WCAG 2.1) of all text with the ground that it stands on, half-transparent colours laid over one another.
CONTRAST = """() => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const pixel = () => [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  const lay = (colour) => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const found = [];
  for (const node of document.querySelectorAll('main *, #bar *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest('svg, option') || node.disabled) continue;
    const line = []; for (let at = node; at; at = at.parentElement) line.unshift(at);
    lay('white'); for (const at of line) lay(getComputedStyle(at).backgroundColor);
    const ground = light(pixel()); lay(getComputedStyle(node).color); const ink = light(pixel());
    found.push((Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05));
  }
  return found;
}"""
