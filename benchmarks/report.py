"""How large a report is, how soon it is there and how smoothly it scrolls: 30 queries x 100 sequences x 512 tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.report [--queries 30] [--sequences 100] [--tokens 512] [--blocks 8]
        [--output docs/results/report.md]

The run is made up (tests/runs.py): its attribution table has the size of a real one, its values are heavy-tailed, its
words follow Zipf's law. Each time is the median over fresh pages of a Chromium without a window: from navigation until
the overview is drawn; until the first coloured sequences of a query, by its permanent link, are; between two pages of
queries. Scrolling is a wheel that turns through a query's whole list; frames longer than 50 ms are those that a reader
notices.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

from conf.schema import ReportConfig
from pipelines.report import write_report
from tests.pages import CHROMIUM, record
from tests.runs import Size, query_ids, write_run

ROUNDS = 5
OPEN = 2.0  # seconds that issue 4 allows
NOTICED = 50.0  # milliseconds of a frame


@dataclass(frozen=True)
class Measured:
    """Of one report: sizes in bytes, times in seconds, frames of scrolling in milliseconds."""

    table: int
    page: int
    writing: float
    maps: int
    opening: float
    linked: float
    turning: float
    frames: list[float]
    memory: float

    def lines(self, size: Size) -> list[str]:
        """Rows of the results."""
        slow = sum(frame > NOTICED for frame in self.frames)
        ninety = statistics.quantiles(self.frames, n=100)[98]
        return [
            f"| attribution.parquet | {self.table / 1e6:.0f} MB |",
            f"| written in | {self.writing:.1f} s |",
            f"| report.html | {self.page / 1e6:.1f} MB |",
            f"| layer × token maps | ranks 1 to {self.maps} of {size.top} |",
            f"| opens (overview drawn) | {self.opening:.2f} s |",
            f"| opens at a permanent link (sequence coloured) | {self.linked:.2f} s |",
            f"| from one query to the next | {self.turning:.2f} s |",
            f"| scrolling through {size.top} sequences: frames, median, 99 % | {len(self.frames)}, "
            f"{statistics.median(self.frames):.0f} ms, {ninety:.0f} ms |",
            f"| frames above {NOTICED:.0f} ms | {slow} |",
            f"| heap of the page's scripts after that | {self.memory / 1e6:.0f} MB |",
        ]


def measure(size: Size, folder: Path, browser: Browser) -> Measured:
    """Write the run, write its report, open it."""
    write_run(folder, size)
    started = time.perf_counter()
    path = write_report(folder, ReportConfig(sequences=size.top))
    writing = time.perf_counter() - started
    first, second = query_ids(size)[:2]
    link = f"{path.as_uri()}#{urlencode({'q': first, 's': 7})}"
    opening = median(lambda: opened(browser, path.as_uri(), ".queries"))
    linked = median(lambda: opened(browser, link, ".card.current [data-unit]"))
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(link)
    page.wait_for_selector(".card.current [data-unit]")
    turning = turn(page, second)
    return Measured(
        (folder / "attribution.parquet").stat().st_size,
        path.stat().st_size,
        writing,
        record(path.read_text(encoding="utf-8"))["maps"],
        opening,
        linked,
        turning,
        scroll(page),
        page.evaluate("performance.memory.usedJSHeapSize"),
    )


def median(once: Any) -> float:
    return statistics.median(once() for _ in range(ROUNDS))


def opened(browser: Browser, url: str, selector: str) -> float:
    """Seconds from navigation until what is looked for is in the page and painted."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.add_init_script(f"({WATCH})({selector!r})")
    page.goto(url)
    seconds = page.evaluate("window.painted") / 1000
    page.close()
    return seconds


# Since navigation began, until the frame after the one that drew it.
WATCH = """(selector) => { window.painted = new Promise((done) => {
  const look = () => document.querySelector(selector)
    ? requestAnimationFrame(() => setTimeout(() => done(performance.now()))) : requestAnimationFrame(look);
  look(); }); }"""

TURN = """async (href) => { const began = performance.now(); location.hash = href;
  const old = document.querySelector('.hero h1');
  while (document.querySelector('.hero h1') === old || !document.querySelector('.card [data-unit]'))
    await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return performance.now() - began; }"""


def turn(page: Page, name: str) -> float:
    """Seconds from one query's page to another's."""
    return page.evaluate(TURN, f"#{urlencode({'q': name})}") / 1000


FRAMES = """() => { window.frames_ms = []; let last = performance.now();
  const tick = (now) => { window.frames_ms.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick); }"""


def scroll(page: Page) -> list[float]:
    """Times between frames while a wheel turns from the top of the list to its end."""
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(700, 500)
    page.evaluate(FRAMES)
    while page.evaluate("scrollY + innerHeight < document.documentElement.scrollHeight - 2"):
        page.mouse.wheel(0, 400)
        page.wait_for_timeout(30)
    return page.evaluate("window.frames_ms.slice(1)")


def main() -> int:
    """Measure and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 30), ("sequences", 100), ("tokens", 512), ("blocks", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    size = Size(given.queries, given.sequences, 0, given.tokens, given.blocks)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-precise-memory-info"]
        )
        found = measure(size, Path(folder), browser)
        text = "\n".join([f"| what | Chromium {browser.version} |", "| --- | --- |", *found.lines(size)])
        browser.close()
    head = (
        f"# The report\n\n`python -m benchmarks.report {' '.join(sys.argv[1:])}`".rstrip()
        + f", {date.today().isoformat()}: {size.queries} queries × {size.top} sequences × {size.tokens} tokens, "
        f"{3 * size.blocks} layers, made up. Other work was on the machine (load {os.getloadavg()[0]:.0f} on "
        f"{len(os.sched_getaffinity(0))} cores), so times are upper bounds.\n\n"
    )
    sys.stdout.write(f"{text}\n")
    if given.output:
        given.output.write_text(f"{head}{text}\n", encoding="utf-8")
    return 0 if found.opening <= OPEN and found.page <= ReportConfig().megabytes * 1_000_000 else 1


if __name__ == "__main__":
    raise SystemExit(main())
