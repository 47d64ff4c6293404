"""The second sink: what is missing is named; where the package is there, its own reader finds what was logged."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lesionsam.errors import UserError
from lesionsam.tracking.tensorboard import Board

PRESENT = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(PRESENT, reason="tensorboard is installed")
def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.tensorboard: true needs the package tensorboard .*`pip install"):
        Board(tmp_path)


@pytest.mark.skipif(not PRESENT, reason="needs the optional package tensorboard")
@pytest.mark.filterwarnings("ignore")  # of tensorboard's own dependencies
def test_values_come_back_and_a_resumed_runs_are_not_doubled(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # killed after step 4, resumed from the checkpoint at step 2
        board = Board(tmp_path)
        for step in steps:
            board.log({"loss": 1 / step, "dev_objective": 0.5}, step)
        board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "dev_objective"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([1 / step for step in range(1, 6)])
