"""optuna-dashboard, over loopback, on the database of a sweep."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import optuna
import pytest

from lesionsam.sweep.storage import opened

pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
START_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answer(port: int, path: str) -> dict[str, object]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as found:
        return json.loads(found.read())


def test_the_dashboard_shows_the_studies(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweeps.db'}"
    with opened(url) as storage:
        study = optuna.create_study(study_name="sweep-1", storage=storage, direction="maximize")
        study.add_trial(
            optuna.trial.create_trial(
                params={"method.temperature": 0.2},
                distributions={"method.temperature": optuna.distributions.FloatDistribution(0.1, 1.0)},
                value=0.75,
            )
        )
    port = free_port()
    program = "from optuna_dashboard._cli import main; main()"
    command = [sys.executable, "-c", program, url, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    found = answer(port, "/api/studies")
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            (shown,) = found["study_summaries"]  # pyright: ignore
            assert shown["study_name"] == "sweep-1"
            detail = json.dumps(answer(port, f"/api/studies/{shown['study_id']}"))
            assert "method.temperature" in detail
            assert "0.75" in detail
        finally:
            process.terminate()
            process.wait()
