"""Log values of steps, and the progress line of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lesionsam.training.state import Progress

Log = Callable[[Mapping[str, float], int], None]


SHORT_NAMES = {"contrast": "cont", "projection": "proj"}  # of the progress line


def flush(waiting: list[tuple[int, dict[str, torch.Tensor]]], at: Progress, log: Log, learning_rate: float) -> None:
    """Bring the waiting values to the host in one transfer, log them and add them to the epoch's sums."""
    if not waiting:
        return
    flat = torch.stack([value.float().reshape(()) for _, values in waiting for value in values.values()]).tolist()
    for step, values in waiting:
        row = {name: flat.pop(0) for name in values}
        log(row | {"lr": learning_rate}, step)
        for name, value in row.items():
            at.sums[name] = at.sums.get(name, 0.0) + value
        at.sums["batches"] = at.sums.get("batches", 0.0) + 1
    waiting.clear()


def progress_line(at: Progress, means: Mapping[str, float], scores: Mapping[str, float], eta: float) -> str:
    """E1 L=2.3226 mask=0.2250 cont=2.0826 iou=0.0299, then scores, the best one and the time left."""
    terms = {
        name: value
        for name, value in means.items()
        if name not in ("loss", "entropy") and not name.startswith("trusted_")
    }
    parts = [f"E{at.epoch}", f"L={means['loss']:.4f}", *(f"{SHORT_NAMES.get(n, n)}={v:.4f}" for n, v in terms.items())]
    parts += ["|", *(f"{name}={value:.4f}" for name, value in scores.items())]
    return " ".join(parts) + f" | best={at.best_score:.4f} (E{at.best_epoch}) ETA {int(eta // 60)}:{int(eta % 60):02d}"
