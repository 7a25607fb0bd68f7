"""Progress with and without a terminal, and estimates where they mean something."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from coordconv_patch.display.progress import Progress, progress_over


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_without_a_terminal_there_is_a_line_now_and_then(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "coordconv_patch"):
        for _ in progress_over(range(100), "timing", unit="rounds", alike=True):
            clock[0] += 1
    assert messages(caplog) == [
        "timing: 5 of 100 rounds in 5 s, some 95 s to go",
        "timing: 35 of 100 rounds in 35 s, some 65 s to go",
        "timing: 65 of 100 rounds in 65 s, some 35 s to go",
        "timing: 95 of 100 rounds in 95 s, some 5 s to go",
    ]
    assert capsys.readouterr() == ("", "")


def test_steps_that_are_not_alike_get_no_estimate(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "coordconv_patch"), Progress("lowering", 3) as progress:
        clock[0] += 9
        progress.step()
        clock[0] += 40
        progress.describe("exporting")
    assert messages(caplog) == ["lowering: 1 of 3 in 9 s", "exporting: 1 of 3 in 49 s"]


def test_work_of_unknown_length_is_counted(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "coordconv_patch"):
        for _ in progress_over(iter("abc"), "tracing", unit="modules"):
            clock[0] += 4
    assert messages(caplog) == ["tracing: 2 modules in 8 s"]


def test_quick_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "coordconv_patch"):
        assert list(progress_over("ab", "work")) == ["a", "b"]
    assert messages(caplog) == []


@pytest.mark.parametrize("alike", [True, False])
def test_a_terminal_gets_a_bar_with_an_estimate_where_steps_are_alike(
    alike: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("work", 4, unit="files", alike=alike, delay=0) as progress:
        progress.step(2)
        progress.note("2.5 px")
        progress.describe("rest")
        progress.step()
    shown = terminal.getvalue()
    assert "work:" in shown
    assert "rest:" in shown
    assert ": :" not in shown
    assert ("<" in shown) is alike  # tqdm writes [elapsed<remaining, rate]
    assert messages(caplog) == []


def test_an_error_goes_through_and_takes_the_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def work() -> None:
        with Progress("work", 4, delay=0) as progress:
            progress.step()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert terminal.getvalue().endswith("\r")
