"""What a training was begun with: one that was cut short goes on under the same parameters, data and code, or not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lesionsam.config.load import Config, config_digest, flatten
from lesionsam.errors import UserError
from lesionsam.utils.files import remove_leftovers, sha256_file, write_json_atomic

ORIGIN = "origin.json"
DONE = "done-"  # begins the name of a scratch folder that is being removed
ANYWAY = "LESIONSAM_RESUME"  # environment variable: `anyway` goes on under code that has changed
SECTIONS = ("model.", "method.", "train.")
# Packages and modules that run beside a training and change nothing of its result.
BESIDE = ("tracking", "errors", "utils", "cli", "experiment.resume")
# Of the others those that no training loads.
ELSEWHERE = ("annotation", "engine", "export", "pretraining", "inference", "report", "sweep.report")
SHOWN = 4  # of the names that a message could hold


def origin_of(
    config: Config, index_csv: Path, boxes_csv: Path, weights: Path, masks: Iterable[Path] = ()
) -> dict[str, Any]:
    """Parameters, data, pretrained weights and code of a training that starts now.

    The index holds a hash of each image, and none of the masks. The code is that of this package's modules which are
    loaded, each by a hash of its source.
    """
    modules = {
        name.removeprefix("lesionsam."): Path(file)
        for name, module in sorted(sys.modules.items())
        if name.startswith("lesionsam.") and (file := getattr(module, "__file__", None))
    }
    return {
        "parameters": {key: value for key, value in flatten(config).items() if key.startswith(SECTIONS)},
        "images": sha256_file(index_csv),
        "masks": hashlib.sha256("".join(sha256_file(path) for path in masks).encode()).hexdigest(),
        "boxes": sha256_file(boxes_csv),
        "weights": sha256_file(weights),
        "code": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for name, path in modules.items()
            if not name.startswith(BESIDE)
        },
    }


@cache
def code_digest() -> str:
    """Of the source of every module of this package but those that change nothing of what a training gives, as it was
    when first asked for: a process does not change with its files."""
    package = Path(__file__).resolve().parents[1]
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    text = "".join(
        f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for name, path in sorted(sources.items())
        if not name.startswith((*BESIDE, *ELSEWHERE))
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begin(folder: Path, origin: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """Note what a training was begun with, or compare with what was noted.

    Args:
        folder: scratch of this very run, see `experiment.run_key`; those of other runs lie beside it. Nobody else
            may be at work in them.
        say: told where a run of other settings is left behind, and which settings those are.
    Raises:
        UserError: the folder holds states that other code made, or that were made from other images or masks.
    """
    for done in folder.parent.glob(f"{DONE}*"):  # a kill came while it was removed
        shutil.rmtree(done, ignore_errors=True)
    remove_leftovers(folder, "run", "overlays")
    if any(folder.glob("state-*.pt")):
        if what := _refusal(_read(folder), origin):
            if os.environ.get(ANYWAY) != "anyway":
                raise UserError(
                    f"{folder}: holds an unfinished training, and {what}; delete the folder to start anew, go back to "
                    f"what it was, or go on all the same with {ANYWAY}=anyway in the environment"
                )
            say(f"warning: {folder}: {what}; going on all the same")
    else:
        if (folder / ORIGIN).exists() and _refusal(_read(folder), origin):
            shutil.rmtree(folder)  # nothing to go on from, and its first points are not this run's
        for left in sorted(folder.parent.glob(f"*/{ORIGIN}")):
            if left.parent != folder and any(left.parent.glob("state-*.pt")):
                say(
                    f"an unfinished training of other settings stays in {left.parent} "
                    f"({_some(differences(_read(left.parent), origin))}); this one begins anew"
                )
    write_json_atomic(folder / ORIGIN, dict(origin))


def finish(folder: Path) -> None:
    """Remove the scratch of a training that is over. A kill meanwhile leaves no half of it that would be taken up."""
    done = folder.with_name(f"{DONE}{folder.name}")
    os.replace(folder, done)
    shutil.rmtree(done, ignore_errors=True)


def _refusal(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Why a training that was begun with the old does not go on with the new; empty where nothing is against it."""
    if not old.get("code"):
        return "it is not noted by which code"
    if old.get("images") != new["images"]:
        return "the images have changed since"
    if old.get("masks", new.get("masks")) != new.get("masks"):
        return "the masks have changed since"
    other = [name for name, digest in new["code"].items() if old["code"].get(name, digest) != digest]
    return f"the code has changed since ({_some(other)})" if other else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two origins differ in, parameters by key and value."""
    before, after = old.get("parameters", {}), new["parameters"]
    found = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    return found + [what for what in ("images", "boxes", "weights") if old.get(what) != new[what]]


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def run_key(config: Config, boxes_csv: Path, weights: Path) -> str:
    """Name of a run's scratch folder: hash of parameters, data and pretrained weights; hardware is not in it."""
    parts = {
        "config": config_digest(config, ("model", "method", "train")),
        "boxes": sha256_file(boxes_csv),
        "weights": sha256_file(weights),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
