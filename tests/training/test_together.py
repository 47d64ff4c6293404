"""Two processes that train together against one: the same values, the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.together import CASES

SCRIPT = Path(__file__).parents[1] / "helpers" / "together.py"
TOLERANCE = 1e-6  # sums in another order, fp32; of values above 1 twice as large a share


def start(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process and what two found, by case."""
    folder = tmp_path_factory.mktemp("together")
    together = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    started = {"one": start(folder / "one"), "two": start(folder / "two", *together)}
    for process in started.values():
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
    return [torch.load(folder / name / "steps.pt") for name in started]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, found: list[dict[str, Any]]) -> None:
    one, two = (each[case] for each in found)
    steps = [row for row in one["rows"] if "epoch" not in row]
    assert len(steps) == len(one["gradients"]) == len(two["gradients"]) == (5 if case == "accumulated" else 10)
    for own, other in zip(one["rows"], two["rows"], strict=True):
        assert own == pytest.approx(other, rel=2 * TOLERANCE, abs=TOLERANCE)
    if case == "part trusted":
        assert any(0 < row["trusted"] < 1 for row in steps), "else no count would differ between the processes"
    largest = 0.0
    for own, other in zip(one["gradients"], two["gradients"], strict=True):
        assert own.keys() == other.keys()
        for name, gradient in own.items():
            assert (gradient - other[name]).abs().max().item() <= TOLERANCE, name
            largest = max(largest, gradient.abs().max().item())
    assert largest > 1e-3, "gradients of ten steps are not all nothing"
