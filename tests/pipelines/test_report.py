"""The report: complete, self-contained, and inert whatever the corpus holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conf.schema import ReportConfig, RunConfig, plain
from pipelines.report import write_report

HOSTILE = "<script>alert(1)</script></td>\"'&amp; \u202e\u0000\u001b[2J <!-- -->"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def summary_of(**changes: Any) -> dict[str, Any]:
    """A summary as `run_trace` writes it."""
    stage = {"cached": False, "seconds": 12.0, "counts": {"sequences": 7, "tokens": 70}, "tokens_per_second": 5.8}
    return {
        "name": "trace",
        "config": plain(RunConfig()),
        "stages": {"covariance": stage, "scores": stage | {"cached": True}},
        "corpus": {"sequences": 7, "tokens": 70, "documents": 5, "skipped": {}},
        "layers": "2 layers",
        "candidates": {"per_feed": {"bm25": 3, "unfiltered": 4}},
        "fidelity": {"sample": 6, "minimum": 0.91, "mean": 0.95, "pearson": {"one": 0.91, "two": 0.99}},
        "agreement": {},
        "excluded": {},
        "queries": [query("one"), query("two")],
        "score_unit": "nats",
    } | changes


def query(name: str, **changes: Any) -> dict[str, Any]:
    found = {"query_id": name, "prompt": f"prompt of {name}", "completion": f" end of {name}", "measured": -1.5}
    return found | {"contrast": None} | changes


def row(name: str, rank: int, **changes: Any) -> dict[str, Any]:
    found = {"query_id": name, "rank": rank, "sequence_id": 40 + rank, "feed": "both", "score": 10.0 / rank}
    return found | {"document_id": f"file:{rank}", "offset": 0, "text": f"text {name} {rank}"} | changes


def page_of(path: Path, summary: dict, rows: list[dict], config: ReportConfig | None = None) -> Page:
    write_report(path, summary, rows, config or ReportConfig())
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_every_query_shows_its_own_rows_up_to_the_number_asked_for(tmp_path: Path):
    rows = [row(name, rank) for name in ("one", "two") for rank in range(1, 6)]
    page = page_of(tmp_path / "report.html", summary_of(), rows, ReportConfig(sequences=3))
    assert [f"text one {rank}" in page.text for rank in range(1, 6)] == [True, True, True, False, False]
    assert page.text.index("text one 3") < page.text.rindex("prompt of two") < page.text.index("text two 1")
    assert "fidelity 0.91000" in page.text
    assert "measured value -1.5000 nats" in page.text


def test_links_lead_to_the_queries(tmp_path: Path):
    page = page_of(tmp_path / "report.html", summary_of(), [])
    targets = {value for name, value in page.attributes if name == "id"}
    links = [value or "" for name, value in page.attributes if name == "href"]
    assert len(links) == 2
    assert {link.removeprefix("#") for link in links} == targets


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path):
    page = page_of(tmp_path / "report.html", summary_of(), [row("one", 1)])
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not [value for name, value in page.attributes if name == "src" or "://" in (value or "")]
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)


@pytest.mark.parametrize("field", ["text", "document_id", "feed"])
def test_hostile_text_of_a_sequence_is_shown_and_inert(tmp_path: Path, field: str):
    page = page_of(tmp_path / "report.html", summary_of(), [row("one", 1, **{field: HOSTILE})])
    plain_page = page_of(tmp_path / "plain.html", summary_of(), [row("one", 1)])
    assert page.tags == plain_page.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain_page.attributes]
    assert "<script>alert(1)</script></td>\"'&amp; " in page.text
    assert not any(char in page.text for char in "\x00\x1b")


@pytest.mark.parametrize("field", ["query_id", "prompt", "completion", "contrast"])
def test_hostile_text_of_a_query_is_shown_and_inert(tmp_path: Path, field: str):
    config = plain(RunConfig())
    assert isinstance(config, dict)
    config["queries"]["measurement"] = "contrast"
    given = summary_of(queries=[query("one", contrast=" other") | {field: HOSTILE}], fidelity={}, config=config)
    page = page_of(tmp_path / "report.html", given, [])
    assert not {"script", "img"} & set(page.tags)
    assert "<script>alert(1)</script></td>\"'&amp; " in page.text


def test_hostile_settings_are_inert(tmp_path: Path):
    config = plain(RunConfig())
    assert isinstance(config, dict)
    config["model"]["path"] = config["corpus"]["path"] = HOSTILE
    given = summary_of(config=config, name=HOSTILE, layers=HOSTILE)
    page = page_of(tmp_path / "report.html", given, [])
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 4
    assert "script" not in page_of(tmp_path / "titled.html", given, [], ReportConfig(title=HOSTILE)).tags


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path: Path):
    page = page_of(tmp_path / "report.html", summary_of(), [row("one", 1, text="half \ud83d of a pair")])
    assert "of a pair" in page.text


def test_a_second_completion_is_shown_only_where_it_was_measured(tmp_path: Path):
    given = summary_of(queries=[query("one", contrast=" other end")])
    assert "other end" not in page_of(tmp_path / "report.html", given, []).text
    given["config"]["queries"]["measurement"] = "contrast"
    assert "against  other end" in page_of(tmp_path / "report.html", given, []).text


def test_what_was_skipped_and_set_aside_is_said(tmp_path: Path):
    corpus = {"sequences": 7, "tokens": 70, "documents": 5, "skipped": {"malformed JSON": 2, "empty": 1}}
    given = summary_of(corpus=corpus, excluded={"scores": {"3": "why", "4": "why"}})
    page = page_of(tmp_path / "report.html", given, [])
    assert "3 records skipped" in page.text
    assert "malformed JSON" in page.text
    assert "scores: 2" in page.text


def test_measurements_that_are_undefined_are_said_to_be_so(tmp_path: Path):
    undefined = {"sample": 1, "minimum": None, "mean": None, "pearson": {"one": None, "two": None}}
    page = page_of(tmp_path / "report.html", summary_of(fidelity=undefined, agreement=undefined), [])
    assert page.text.count("undefined") == 5
    assert "not measured" in page_of(tmp_path / "full.html", summary_of(fidelity={}), []).text
