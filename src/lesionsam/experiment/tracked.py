"""Open the tracked run of a training as section `tracking` of params.yaml says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesionsam.config.load import Config, flatten
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.naming import run_name
from lesionsam.tracking.tracker import NullTracker, Tracker


def open_training(config: Config, folder: Path, tags: Mapping[str, Any]) -> NullTracker:
    """Return the tracker of a training of its own, named by what differs from the previous one."""
    first = f"{config.method.name}-{config.model.name}-{config.data.source}"
    root = repository_root(Path.cwd())
    name = run_name(root, folder, flatten(config), first) if config.tracking.enabled else first
    return open_tracker(config, folder, name, tags, is_training=True)


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """Return a training's values by MLflow name: `train/loss` of a step, `train/loss_epoch`, `dev/objective`."""
    out = {}
    for name, value in values.items():
        group, _, rest = name.partition("_")
        if group == "dev":
            out[f"dev/{rest}"] = value
        else:
            out[f"train/{rest}_epoch" if group == "train" else f"train/{name}"] = value
    return out


def open_tracker(config: Config, folder: Path, name: str, tags: Mapping[str, Any], **keywords: Any) -> NullTracker:
    """Return the run's tracker; without tracking, only metrics.jsonl is written into its folder.

    Args:
        name: of the run. tags: beside those of method, model and data. keywords: further ones of `Tracker.open`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not config.tracking.enabled:
        return NullTracker(folder)
    return Tracker.open(
        folder,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        root=repository_root(Path.cwd()),
        run_name=name,
        params=flatten(config),
        tags={"method": config.method.name, "model": config.model.name, "data": config.data.source, **tags},
        **{"system_metrics": config.tracking.system_metrics, **keywords},
    )
