"""Memory of a training on a CPU: a lack of it is an error, from which the training recovers."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from helpers.tiny import tiny_data
from helpers.training import CPU, Mean, run, weights
from lesionsam.experiment.resources import memory_limit
from lesionsam.types import Batch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 1 GiB left."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))


def test_an_allocation_beyond_what_is_left_fails_while_the_limit_holds() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limit(CPU):
        torch.empty(1 << 29, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(1 << 31, dtype=torch.uint8)  # never touched: Linux would have granted it
    torch.empty(1 << 31, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_limit_of_the_user_is_not_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    own = psutil.Process().memory_info().data + (1 << 29)
    resource.setrlimit(resource.RLIMIT_DATA, (own, before[1]))
    try:
        with memory_limit(CPU):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_training_beyond_the_memory_of_the_cpu_goes_on_in_smaller_parts(tmp_path: Path) -> None:
    def hungry() -> Any:
        method = Mean()
        losses = method.losses

        def with_workspace(batch: Batch, generator: torch.Generator) -> Any:
            torch.empty(len(batch.ids) * 400 << 20, dtype=torch.uint8)  # two images fit into 1 GiB, four do not
            return losses(batch, generator)

        method.losses = with_workspace
        return method

    data, lines, plain, limited = tiny_data(8), [], Mean(), hungry()
    run(plain, data, tmp_path / "plain", epochs=1)
    with memory_limit(CPU):
        progress = run(limited, data, tmp_path / "limited", epochs=1, say=lines.append)
    assert progress.parts == 2
    assert "can't allocate memory" in next(line for line in lines if "out of memory" in line)
    for name, value in weights(plain).items():
        assert torch.allclose(weights(limited)[name], value, atol=1e-6), name
