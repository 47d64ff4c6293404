"""Where a run comes from: repository root, settings as flat parameters, tags that name commit and experiment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesionsam.tracking.spool import clean_name

MAX_PARAM_CHARS = 500


def repository_root(start: Path) -> Path:
    """The root that tracking is anchored on: DVC's, which outlives the copies of `dvc exp run --temp`, or git's."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    start = start.resolve()
    return next((path for path in (start, *start.parents) if (path / ".git").exists()), start)


def flatten_params(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: keys joined by dots, lists as JSON, values of at most 500 characters."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value) if isinstance(value, list | tuple) else str(value)
            flat[clean_name(f"{prefix}{key}")] = text[:MAX_PARAM_CHARS]
    return flat


def lineage_tags(root: Path) -> dict[str, str]:
    """Where a run comes from: git commit and dirty flag, DVC experiment and root."""
    tags = {
        variable.lower(): value
        for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_ROOT")
        if (value := os.environ.get(variable))
    }
    if shutil.which("git") is None:
        return tags
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = str(bool(status.stdout.strip())).lower()
    return tags
