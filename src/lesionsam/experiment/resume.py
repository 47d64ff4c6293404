"""What a training was begun with: one that was cut short goes on under the same parameters, data and code, or not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lesionsam.config.load import Config, config_digest, flatten
from lesionsam.data.contents import boxes_text, image_sha256, mask_sha256, samples_digest
from lesionsam.errors import UserError, listed
from lesionsam.models.published import CHECKPOINTS
from lesionsam.types import Sample
from lesionsam.utils.code import MODEL_LIBRARIES, NO_RESULT, code_digest, library_versions, module_digests
from lesionsam.utils.files import remove_leftovers, sha256_file, write_json_atomic

ORIGIN = "origin.json"
DONE = "done-"  # begins the name of a scratch folder that is being removed
ANYWAY = "LESIONSAM_RESUME"  # environment variable: `anyway` goes on under code that has changed
SECTIONS = ("model", "method", "train")
TRAINING = "experiment.run"  # the module that trains; whatever it imports counts too


def origin_of(config: Config, samples: Sequence[Sample], weights: Path) -> dict[str, Any]:
    """Return parameters, data, pretrained weights and code of a training that starts now.

    Args:
        samples: of the training and development splits; their files count by contents. weights: pretrained checkpoint.
    """
    values = flatten(config).items()
    own = config.model.name in ("compact", *CHECKPOINTS)  # segment_anything is pinned; transformers moves
    libraries = {} if own else {"libraries": library_versions(*MODEL_LIBRARIES)}
    return {
        "parameters": {key: value for key, value in values if key.split(".")[0] in SECTIONS},
        "images": samples_digest(samples, image_sha256),
        "masks": samples_digest(samples, mask_sha256),
        "boxes": samples_digest(samples, boxes_text),
        "weights": sha256_file(weights),
        "code": {name: digest[:16] for name, digest in module_digests(TRAINING, without=NO_RESULT).items()} | libraries,
    }


def run_key(config: Config, samples: Sequence[Sample], weights: Path) -> str:
    """Return the name of a run's scratch folder: a hash of parameters, data and pretrained weights; not of hardware.

    Args:
        samples, weights: as in `origin_of`.
    """
    parts = {
        "config": config_digest(config, SECTIONS),
        "data": samples_digest(samples),
        "weights": sha256_file(weights),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def training_digest() -> str:
    """Return the digest of all code that a training runs, 16 hex digits."""
    return code_digest(TRAINING, without=NO_RESULT)[:16]


def begin(folder: Path, origin: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """Note what a training was begun with, or compare with what was noted.

    Args:
        folder: scratch of this very run, named by `run_key`; those of other runs lie beside it. No other process may
            work in them.
        say: told where a run of other settings is left behind, and which settings those are.
    Raises:
        UserError: the folder holds states that other code made.
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
                    f"({listed(differences(_read(left.parent), origin))}); this one begins anew"
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
    other = [name for name, digest in new["code"].items() if old["code"].get(name, digest) != digest]
    return f"the code has changed since ({listed(other)})" if other else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two origins differ in, parameters by key and value."""
    before, after = old.get("parameters", {}), new["parameters"]
    found = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    return found + [what for what in ("images", "masks", "boxes", "weights") if old.get(what) != new[what]]


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
