"""Log the values of steps, and write the progress line of an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from lesionsam.training.state import Progress

Log = Callable[[Mapping[str, float], int], None]
Scalars = Mapping[str, torch.Tensor]

FLUSH_STEPS = 20  # steps whose values wait on the device before they are logged
SHORT_NAMES = {"contrast": "cont", "projection": "proj"}  # in the progress line
# The published total adds the monitors to the loss, `mask` with weight 1 and `iou` with the published beta.
PUBLISHED_MONITORS = {"mask": 1.0, "iou": 0.5}


class StepLog:
    """Log the values of steps; they come from the device in one transfer for many steps.

    Args:
        at: `sums` adds up an epoch's values.
    """

    def __init__(self, at: Progress, log: Log) -> None:
        self.at, self.log = at, log
        self._waiting: list[tuple[int, Scalars, Scalars, Mapping[str, float]]] = []

    def add(self, losses: Scalars, monitors: Scalars, rates: Mapping[str, float]) -> None:
        """Add the values of the step that has just ended.

        Args:
            losses: `loss` and its unweighted terms. monitors: not part of it. rates: learning rates of the step.
        """
        self._waiting.append((self.at.step, losses, monitors, rates))
        if len(self._waiting) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Log the values that are waiting and add them to the epoch's sums."""
        if not self._waiting:
            return
        scalars = [v.float().reshape(()) for _, *both, _ in self._waiting for values in both for v in values.values()]
        numbers, sums = iter(torch.stack(scalars).tolist()), self.at.sums
        for step, losses, monitors, rates in self._waiting:
            row = {name: next(numbers) for name in (*losses, *monitors)}
            self.log(row | dict(rates), step)
            total = row["loss"] + sum(w * row[name] for name, w in PUBLISHED_MONITORS.items() if name in monitors)
            for name, value in (row | {"total": total, "steps": 1.0}).items():
                sums[name] = sums.get(name, 0.0) + value
        self._waiting.clear()

    def end_epoch(self) -> dict[str, float]:
        """Return the means over the epoch's steps, `total` as published among them; begin the next epoch's sums."""
        self.flush()
        num_steps = self.at.sums.pop("steps", 1.0)
        means = {name: value / num_steps for name, value in self.at.sums.items()}
        self.at.sums = {}
        return means


class Clock:
    """Measure the seconds spent in steps, the time since the last save and the time left.

    Args:
        at: `seconds` adds up the time spent in steps, in all processes of the run.
    """

    def __init__(self, at: Progress) -> None:
        self.at = at
        self.begun = self.saved = self._started = time.monotonic()
        self.first_step = at.step

    def start(self) -> None:
        """Begin to count."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """Add the time since the start to `at.seconds`."""
        self.at.seconds += time.monotonic() - self._started

    def seconds_left(self, num_steps: int) -> float:
        """Return the time that so many more steps take, evaluations included."""
        return (time.monotonic() - self.begun) / max(1, self.at.step - self.first_step) * num_steps


def progress_line(at: Progress, means: Mapping[str, float], scores: Mapping[str, float], eta: float) -> str:
    """Return `E1 L=2.3226 mask=0.2250 cont=2.0826 iou=0.0299`, then scores, the best one and the time left.

    L is the published total: the loss plus the monitors, weighted by `PUBLISHED_MONITORS`.
    """
    hidden = ("loss", "total", "entropy")
    shown = {name: v for name, v in means.items() if name not in hidden and not name.startswith("trusted_")}
    parts = [f"E{at.epoch}", f"L={means['total']:.4f}"]
    for name in sorted(shown, key=lambda name: name != "mask"):  # as published: `mask` comes first
        parts.append(f"{SHORT_NAMES.get(name, name)}={shown[name]:.4f}")
    parts += ["|", *(f"{name}={value:.4f}" for name, value in scores.items())]
    return " ".join(parts) + f" | best={at.best_score:.4f} (E{at.best_epoch}) ETA {int(eta // 60)}:{int(eta % 60):02d}"
