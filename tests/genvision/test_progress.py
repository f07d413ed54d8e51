"""Progress: a bar on a terminal, plain lines when piped, nothing when it is not wanted."""

import io
import sys

import pytest

from genvision import progress as module
from genvision.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_line(monkeypatch):
    """No waiting between lines."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)


def test_piped_output_is_plain_lines_on_stderr(capsys, every_line):
    progress = Progress(10, "sampling", unit="images")
    progress.advance(4)
    progress.advance(6, note="loss 1.5")
    progress.close()
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    first, last = err.splitlines()
    assert first.startswith("sampling: 4/10 images, ") and first.endswith(" s left") and " images/s" in first
    assert last.startswith("sampling: 10/10 images, ") and last.endswith("loss 1.5") and "left" not in last


def test_a_piped_job_is_quiet_between_lines_but_says_its_end(capsys):
    progress = Progress(1000, "encode")
    for _ in range(1000):
        progress.advance()
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encode: 1000/1000 images")


def test_a_resumed_job_counts_what_was_done_but_not_in_its_rate(capsys, every_line, monkeypatch):
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    Progress(100, "training", start=90, unit="steps").advance(5)
    assert capsys.readouterr().err == "training: 95/100 steps, 2.5 steps/s, 2 s left\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(3, "sampling")
    progress.advance(3, note="loss 1.5")
    progress.close()
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue() and "loss 1.5" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_where_it_is_not_wanted(monkeypatch, every_line, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track(range(5), 5, "sampling", show=False)) == list(range(5))
    assert stream.getvalue() == ""


def test_track_passes_items_on(capsys):
    assert list(track("abc", 3, "reading", unit="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("reading: 3/3 letters")
