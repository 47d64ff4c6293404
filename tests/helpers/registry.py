"""A tracked run with a model, for tests of the registry."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny import tiny_sam
from lesionsam.models.checkpoint import save_sam
from lesionsam.tracking.tracker import Tracker


def train(root: Path, folder: Path, *, seed: int) -> None:
    """What the train stage leaves: weights, run.json, and a run with a logged model."""
    tracker = Tracker.open(
        folder,
        uri="",
        experiment="tests",
        root=root,
        run_name="r",
        params={"a": seed},
        tags={"model": "compact", "method": "contrastive"},
        system_metrics=False,
        send=False,
    )
    save_sam(tiny_sam(seed), folder / "best.safetensors", name="compact")
    tracker.log_checkpoint(folder / "best.safetensors", "lesionsam", {"objective": 0.5}, 7)
    tracker.close()
