"""Progress: what a log says, when, with which rate and ETA."""

from __future__ import annotations

import logging

import pytest

from pipelines.progress import Progress, duration, short


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="pipelines.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_names_count_rate_tokens_and_eta(clock, said):
    progress = Progress("covariance", 10_000, "sequences", every=10, terminal=False, clock=clock)
    for _ in range(4):
        clock.now += 2.5
        progress.advance(125, tokens=125 * 512)

    assert said() == ["covariance 500/10,000 sequences · 50.0/s · 25.6k tokens/s · ETA 3m10s"]


def test_lines_come_every_few_seconds_and_the_last_says_how_long(clock, said):
    with Progress("scan", 100, "sequences", every=10, terminal=False, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.25
            progress.advance()

    assert said() == [
        "scan 40/100 sequences · 4.00/s · ETA 15s",
        "scan 80/100 sequences · 4.00/s · ETA 5.0s",
        "scan 100/100 sequences · 4.00/s · after 25s",
    ]


def test_quick_work_says_nothing(clock, said):
    with Progress("scan", 3, "sequences", every=10, terminal=False, clock=clock) as progress:
        progress.advance(3)
    assert said() == []


def test_unknown_total_has_no_eta(clock, said):
    progress = Progress("tokenise", None, "documents", every=1, terminal=False, clock=clock)
    clock.now += 2
    progress.advance(5_000)
    assert said() == ["tokenise 5,000 documents · 2.50k/s"]


def test_resumed_work_is_no_part_of_the_rate(clock, said):
    progress = Progress("scan", 1_000, "sequences", every=10, terminal=False, clock=clock)
    progress.resume(900)
    clock.now += 10
    progress.advance(10)
    progress.close()
    assert said() == [
        "scan 910/1,000 sequences · 1.00/s · ETA 1m30s",
        "scan 910/1,000 sequences · 1.00/s · after 10s",
    ]


def test_rate_is_that_of_the_last_lines(clock, said):
    progress = Progress("scan", 100_000, "sequences", every=10, terminal=False, clock=clock)
    for rate in [1] * 6 + [100] * 6:
        clock.now += 10
        progress.advance(10 * rate)
    assert "· 1.00/s ·" in said()[5]
    assert "· 100/s ·" in said()[-1]


def test_a_check_stops_the_work(clock):
    def lost() -> None:
        raise RuntimeError("claim lost")

    with pytest.raises(RuntimeError, match="claim lost"):
        Progress("scan", 1, "sequences", terminal=False, clock=clock, check=lost).advance()


def test_a_terminal_gets_a_bar(capsys, said):
    with Progress("scan", 10, "sequences", every=0, terminal=True) as progress:
        progress.resume(4)
        progress.advance(6)
    assert "scan: 100%" in capsys.readouterr().err
    assert said() == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01234, "0.0123"), (4.561, "4.56"), (45.12, "45.1"), (789.4, "789"), (999.7, "1.00k"), (120_300, "120k"),
     (3_400_000, "3.40M"), (0, "0")],
)  # fmt: skip
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4s"), (12, "12s"), (59.7, "1m00s"), (192, "3m12s"), (7_500, "2h05m"), (3 * 86_400 + 4 * 3_600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
