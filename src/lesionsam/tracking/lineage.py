"""Where a run comes from: repository root, tags that name commit and experiment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def repository_root(start: Path) -> Path:
    """Return the root that tracking is anchored on: DVC's root, which outlives the copies of `dvc exp run --temp`, or
    git's, or `start`.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    start = start.resolve()
    return next((path for path in (start, *start.parents) if (path / ".git").exists()), start)


def lineage_tags(root: Path) -> dict[str, str]:
    """Return the tags that identify the code of a run: git commit, dirty flag and DVC experiment."""
    tags = {
        variable.lower(): value
        for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
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
