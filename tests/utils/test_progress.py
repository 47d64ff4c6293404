"""Lines in a log while long work runs."""

from __future__ import annotations

import time

import pytest

from lesionsam.utils import progress


def test_work_without_lines_of_its_own_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.3)
    with progress.working("counting"):
        time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("counting: ") and line.endswith(" so far") for line in lines)
    time.sleep(0.5)
    assert capsys.readouterr().err == "", "nothing after its end"


def test_work_that_prints_is_not_spoken_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 1.5)
    with progress.working("counting"):
        for k in range(20):
            progress.say(f"line {k}")
            time.sleep(0.1)
    assert "so far" not in capsys.readouterr().err


def test_silenced_work_stays_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with progress.silent(), progress.working("counting"):
        time.sleep(0.7)
    assert capsys.readouterr().err == ""
