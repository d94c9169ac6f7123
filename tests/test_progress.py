"""Progress: a bar on a terminal, plain lines elsewhere, silence on request."""

import io
import sys

import pytest

from locft_jax import logs
from locft_jax.logs import Bar


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_now_and_then_with_what_is_left(clock, capsys):
    with Bar("editing", 40) as bar:
        for step in range(1, 41):
            clock.now += 1
            bar.advance(note=f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "editing: 10/40 (25 %)  30 s left  loss 10",
        "editing: 20/40 (50 %)  20 s left  loss 20",
        "editing: 30/40 (75 %)  10 s left  loss 30",
        "editing: 40/40 (100 %)  0 s left  loss 40",
        "editing: 40 in 40 s",
    ]


def test_short_work_says_nothing(clock, capsys):
    with Bar("before", 100) as bar:
        clock.now += 5
        bar.advance(100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet(clock, capsys, monkeypatch, terminal):
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar("editing", 2, show=False) as bar:
        clock.now += 100
        bar.advance(2)
    assert bar.done == 2
    assert capsys.readouterr() == ("", "") and (not terminal or sys.stderr.getvalue() == "")


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar("editing", 30) as bar:
        bar.advance(10, "loss 0.5")
        bar.advance(20, "loss [0.1]")
    shown = sys.stderr.getvalue()
    assert "editing" in shown and "30/30" in shown and "loss [0.1]" in shown
    # What follows begins on a line of its own, and the cursor is shown again.
    assert shown.endswith("\n\x1b[?25h")


def test_a_bar_gives_the_terminal_back_after_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError), Bar("editing", 30) as bar:
        raise ValueError
    assert not bar.bar.live.is_started


def test_nothing_to_do_is_no_division_by_zero(clock, capsys):
    with Bar("before", 0) as bar:
        clock.now += 20
        bar.advance(0)
    assert "before" in capsys.readouterr().err
