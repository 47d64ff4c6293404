"""Run the command line in a process of its own."""

from __future__ import annotations

import sys

import pytest

from lesionsam.cli.app import main


def lesionsam(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["lesionsam", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
