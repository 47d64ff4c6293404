"""`make ui`: MLflow's page, opened on the training runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from helpers.registry import train
from lesionsam.tracking.tracker import sync

pytest.importorskip("mlflow", reason="mlflow is not installed: nothing to show")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
START_SECONDS = 180.0


def test_the_page_of_the_runs_is_named_and_answers(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "params.yaml").write_text("tracking:\n  experiment: tests\n", encoding="utf-8")
    train(tmp_path, tmp_path / "one", seed=0)
    port = "18765"
    log = tmp_path / "ui.log"
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lesionsam.tracking.ui", "--port", port],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"runs: (\S+)/#/experiments/(\d+)/runs", log.read_text(errors="replace"))):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        assert found[1] == f"http://127.0.0.1:{port}"
        assert found[2] != "0", "the experiment of the runs, not MLflow's default"
        api = f"{found[1]}/api/2.0/mlflow/experiments/get?experiment_id={found[2]}"
        with urllib.request.urlopen(api, timeout=30) as answer:
            assert b'"tests"' in answer.read()
        assert sync(tmp_path) == 0, "what waited was sent before"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
