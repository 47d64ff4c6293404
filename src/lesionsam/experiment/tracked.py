"""Open the tracked run of a training as section `tracking` of params.yaml says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesionsam.config.load import Config, flatten
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tracker import NullTracker, Tracker


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
