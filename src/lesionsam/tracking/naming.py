"""Name a training run by what tells it apart, and describe how to reproduce it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lesionsam.tracking.spool import Spool, read_lines, read_record

# Sections that change no result: where and how a run goes, and the tools around it.
SILENT = ("runtime", "tracking", "cluster", "sweep", "evaluate", "inputs", "foundation")
MAX_SHOWN = 4  # changed values in a name
REPEATED = "repeat of "


def run_name(root: Path, folder: Path, params: Mapping[str, object], first: str) -> str:
    """Return the name of a training run.

    A resumed run keeps its name. Under `dvc exp run` it is the experiment's name. Otherwise it lists the values that
    differ from the previous training in the same project, such as `temperature=0.2 epochs=20`.

    Args:
        root: holds the spools, see `tracking.spool`. folder: of the run; its run.json marks a resumed one.
        params: by dotted key. first: name of a project's first run.
    """
    own_id = read_record(folder).get("local_id")
    spools = Spool.all(root)
    for spool in spools:
        if spool.local_id == own_id and (name := spool.read_json("meta.json").get("run_name")):
            return str(name)
    if name := os.environ.get("DVC_EXP_NAME"):
        return name
    for spool in reversed(spools):
        meta = spool.read_json("meta.json")
        if not meta.get("is_training") or (before := logged_params(spool)) is None:
            continue
        now = {key: str(value) for key, value in params.items()}
        return changes(before, now) or REPEATED + str(meta["run_name"]).removeprefix(REPEATED)
    return first


def logged_params(spool: Spool) -> dict[str, str] | None:
    """Return the parameters that a run has logged last; None before any."""
    found = [entry["values"] for entry, _ in read_lines(spool.path("journal")) if entry and entry["kind"] == "params"]
    return found[-1] if found else None


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the values of `now` that differ from those of `before`, as `key=value` with the shortest clear keys."""
    changed = [key for key, value in now.items() if before.get(key) != value and key.split(".")[0] not in SILENT]
    changed.sort(key=lambda key: not key.endswith(".name"))  # of a method or model: it brings the others along
    if any(key.endswith(".name") for key in changed):
        changed = [key for key in changed if key in before or key.endswith(".name")]
    shown = [f"{short_key(key, changed)}={now[key]}" for key in changed[:MAX_SHOWN]]
    return " ".join(shown) + (f" and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else "")


def short_key(key: str, among: list[str]) -> str:
    """Return the last part of a dotted key, with its section where that is `name` or not unique."""
    section, _, last = key.rpartition(".")
    if last == "name":
        return section.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in among) == 1 else key


def reproduction(tags: Mapping[str, str]) -> str:
    """Return, as Markdown, the commands that train a run again.

    Args:
        tags: of `lineage.lineage_tags`.
    """
    commands = []
    if commit := tags.get("mlflow.source.git.commit"):
        dirty = "   # it also had changes that were not committed" if tags.get("git.dirty") == "true" else ""
        commands.append(f"git checkout {commit}{dirty}")
    if name := tags.get("dvc_exp_name"):
        commands.append(f"dvc exp apply {name}   # while DVC keeps the experiment")
    commands += ["cp PATH/params.yaml .   # artifact config/params.yaml of this run", "dvc repro"]
    return "**Reproduce**\n\n```\n" + "\n".join(commands) + "\n```"
