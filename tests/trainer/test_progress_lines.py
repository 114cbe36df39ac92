"""How far the work is, on a terminal and without one."""

import io
import re

import pytest
from rich.console import Console

import fspad.trainer.progress as module
from fspad.trainer.progress import show_progress


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def show(monkeypatch, **options):
    """What is written to a console."""
    written = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=written, width=200, **options))
    return written


def test_lines_without_a_terminal(clock, monkeypatch):
    written = show(monkeypatch, force_terminal=False)
    with show_progress("answers", 100, 40) as advance:
        for _ in range(12):  # 2 rows and 300 tokens in 3 seconds each
            clock.now += 3
            advance(2, 300)
        assert written.getvalue().splitlines() == [
            "answers: 48/100, 100 tokens/s, 0:01:18 left",
            "answers: 56/100, 100 tokens/s, 0:01:06 left",
            "answers: 64/100, 100 tokens/s, 0:00:54 left",
        ]
        clock.now += 24
        advance(36, 1200)
        assert written.getvalue().splitlines()[3:] == ["answers: 100/100, 80 tokens/s, 0:00:00 left"]
    assert len(written.getvalue().splitlines()) == 4


def test_last_line_comes_after_an_error_and_where_nothing_is_left(clock, monkeypatch):
    written = show(monkeypatch, force_terminal=False)

    def fill_the_disk():
        with show_progress("[features]", 8, 0) as advance:
            clock.now += 2
            advance(4, 10)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    with show_progress("answers", 5, 5):
        pass
    assert written.getvalue() == "[features]: 4/8, 5 tokens/s, 0:00:02 left\nanswers: 5/5\n"


def test_time_left_follows_the_recent_speed(clock, monkeypatch):
    written = show(monkeypatch, force_terminal=False)

    def last_line():
        return written.getvalue().splitlines()[-1]

    with show_progress("answers", 1000, 900) as advance:
        for _ in range(10):  # fast ones first
            clock.now += 10
            advance(5, 1000)
        assert last_line() == "answers: 950/1000, 100 tokens/s, 0:01:40 left"
        for _ in range(5):  # then slow ones, each of which takes longer than a minute
            clock.now += 100
            advance(1, 100)
        assert last_line() == "answers: 955/1000, 1 tokens/s, 1:15:00 left"
        for _ in range(7):  # then fast ones again
            clock.now += 10
            advance(5, 1000)
        assert last_line() == "answers: 990/1000, 100 tokens/s, 0:00:20 left"
        for _ in range(100):  # and attempts that give nothing
            clock.now += 10
            advance(0, 1000)
        assert last_line() == "answers: 990/1000, 100 tokens/s"


def test_bar_on_a_terminal(clock, monkeypatch):
    written = show(monkeypatch, force_terminal=True)
    with show_progress("answers", 100, 40) as advance:
        clock.now += 4
        advance(20, 600)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert re.search(r"answers ━+╺?━* +60/100 150 tokens/s, 0:00:08 left", text)


def test_lines_on_a_terminal_without_control_codes(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    written = show(monkeypatch, force_terminal=True)
    with show_progress("answers", 2, 0) as advance:
        clock.now += 1
        advance(1, 5)
    assert written.getvalue() == "answers: 1/2, 5 tokens/s, 0:00:01 left\n"
