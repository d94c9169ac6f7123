"""Progress: a bar on a terminal, plain lines elsewhere, silence on request; what becomes of log records."""

import io
import logging
import sys

import pytest
import tqdm.std

from locft_jax import logs
from locft_jax.logs import Bar, log, log_to_terminal


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_now_and_then_with_what_is_left(clock, capsys):
    with Bar("editing", 40) as bar:
        for step in range(1, 41):
            clock.now += 1
            bar.advance(note=f"loss {step}")
        assert bar.rate() == 1
    assert capsys.readouterr().err.splitlines() == [
        "editing: 10/40 (25 %), 00:10 gone, 00:30 left, loss 10",
        "editing: 20/40 (50 %), 00:20 gone, 00:20 left, loss 20",
        "editing: 30/40 (75 %), 00:30 gone, 00:10 left, loss 30",
        "editing: 40/40 (100 %), 00:40 gone, 00:00 left, loss 40",
        "editing: 40/40 (100 %), 00:40 gone, 00:00 left, loss 40",
    ]


def test_what_was_done_earlier_does_not_count_for_the_rate(clock, capsys):
    with Bar("editing", 1000) as bar:
        bar.skip(900)
        clock.now += 20
        bar.advance()
        clock.now += 20
        bar.skip(9)
        bar.advance(10)
        assert bar.rate() == 0.5
    assert capsys.readouterr().err.splitlines()[1] == "editing: 920/1000 (92 %), 00:40 gone, 02:40 left"


def test_a_slow_first_step_does_not_stay_in_what_is_left(clock, capsys):
    """The first step compiles."""
    with Bar("editing", 1000) as bar:
        bar.advance(0)
        for seconds in [60.0, *[0.125] * 500]:
            clock.now += seconds
            bar.advance()
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "editing: 1/1000 (0 %), 01:00 gone, ? left"
    assert second == "editing: 81/1000 (8 %), 01:10 gone, 01:54 left"


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
        bar.skip()
        bar.advance()
        assert bar.rate() == 0
    assert capsys.readouterr() == ("", "") and (not terminal or sys.stderr.getvalue() == "")


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar("editing", 30) as bar:
        bar.advance(10, "loss 0.5")
        bar.advance(20, "loss [0.1]")
    shown = sys.stderr.getvalue()
    assert "editing" in shown and "30/30" in shown and "loss [0.1]" in shown
    assert shown.endswith("\n")  # what follows begins on a line of its own


def test_nothing_to_do_is_no_division_by_zero(clock, capsys):
    with Bar("before", 0) as bar:
        clock.now += 20
        bar.advance(0)
    assert bar.rate() == 0 and "Traceback" not in capsys.readouterr().err


def test_notes_are_plain_lines_and_other_libraries_say_no_more_than_one(capsys):
    level = log.level
    log_to_terminal()
    log_to_terminal()  # once is enough
    log.info("in passing")
    log.warning("a \x1b[2Jthing, 100 %")
    logging.getLogger("absl").warning("chatter")
    logging.getLogger("jax._src.xla_bridge").warning("no GPU here")
    try:
        raise OSError("disk full")
    except OSError:
        logging.getLogger("absl").exception("could not write\nand more")
    log.setLevel(level)
    logging.root.handlers = [h for h in logging.root.handlers if not isinstance(h, logs.Terminal)]
    said = ["in passing", "note: a  [2Jthing, 100 %", "note: jax: no GPU here", "absl: could not write"]
    assert capsys.readouterr().err.splitlines() == said
