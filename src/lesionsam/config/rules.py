"""Rules between keys of params.yaml, and on the files that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsam.config.schema import CocoData, Config, FolderData
from lesionsam.config.zoo import known

UNREAD = "own"  # path of an input that is not read; the repository has this folder


@dataclass(frozen=True)
class Issue:
    """One fault of a parameter: its dotted key, what was expected and what was found."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def rules(v: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield violated rules between keys, given the flattened values that are valid on their own; some may be absent."""

    def has(*keys: str) -> bool:
        return all(key in v for key in keys)

    for low, high in (("boxes.margin_low", "boxes.margin_high"), ("boxes.core_low", "boxes.core_high")):
        if has(low, high) and v[low] > v[high]:
            yield Issue(low, f"expected at most {high} ({v[high]:g}), got {v[low]:g}")
    if has("data.source", "data.dev_fraction") and v["data.dev_fraction"] == 0:
        if v["data.source"] == "isic2016":
            yield Issue("data.dev_fraction", "expected a number above 0 (isic2016 has no validation split), got 0")
        if v["data.source"] in ("folder", "coco") and v.get("data.test_split") == "val":
            yield Issue("data.dev_fraction", "expected a number above 0 when data.test_split is val, got 0")
    if has("model.image_size") and 0 < v["model.image_size"] < 32:
        yield Issue("model.image_size", f"expected 0 or an integer from 32 to 4096, got {v['model.image_size']}")
    model = known(v.get("model.name"))
    if v.get("model.image_size", 0) % model.multiple:
        side, below = v["model.image_size"], v["model.image_size"] // model.multiple * model.multiple
        nearest = f"the nearest are {below} and {below + model.multiple}"
        yield Issue(
            "model.image_size", f"expected a multiple of {model.multiple} ({v['model.name']}), got {side}; {nearest}"
        )
    if v.get("model.encoder") in ("adapter", "lora") and not model.attention:
        yield Issue(
            "model.encoder",
            f"expected none or blocks: {v['model.name']} has no attention for {v['model.encoder']}, got "
            f"{v['model.encoder']}",
        )
    if has("model.name", "model.checkpoint") and v["model.name"] == "compact" and v["model.checkpoint"] == "published":
        yield Issue("model.checkpoint", "expected a file when model.name is compact, got published")
    most = model.blocks
    for key in ("model.unfreeze_last_k", "model.adapter_last_k", "model.lora_last_k"):
        if v.get(key, 0) > most:
            yield Issue(key, f"expected at most {most}, the blocks of {v['model.name']}, got {v[key]}")
    if v.get("model.encoder") == "none":
        if v.get("model.train_decoder") is False and v.get("model.train_prompt_encoder") is False:
            yield Issue("model.train_decoder", "expected true when model.encoder is none, or nothing trains, got false")
        for term in ("method.weights.contrast", "method.weights.distil"):
            if v.get(term, 0) > 0:
                yield Issue(term, f"expected 0 when model.encoder is none (it teaches nothing else), got {v[term]:g}")
    terms = ("method.weights.contrast", "method.weights.pseudo", "method.weights.projection")
    if has(*terms) and not any(v[term] for term in terms):
        yield Issue(
            "method.weights.contrast",
            f"expected one of {', '.join(terms)} above 0, or nothing is learnt, got 0 for all",
        )
    placebo = v.get("method.target.placebo", "none")
    if placebo != "none" and v.get("train.batch_size") == 1:
        yield Issue("train.batch_size", f"expected 2 or more when method.target.placebo is {placebo}, got 1")
    for kinds in (("ring", "centre", "box", "box+core", "none"), ("box", "points", "box+points")):
        shares = [f"method.prompts.{kind}" for kind in kinds]
        if has(*shares) and not any(v[share] for share in shares):
            yield Issue("method.prompts", "expected shares with a sum above 0, got 0 for all")
    for size, part in (("image_size", "patch_size"), ("width", "num_heads")):
        if has(f"foundation.{size}", f"foundation.{part}") and v[f"foundation.{size}"] % v[f"foundation.{part}"]:
            yield Issue(
                f"foundation.{size}",
                f"expected a multiple of foundation.{part} ({v[f'foundation.{part}']}), got {v[f'foundation.{size}']}",
            )
    if v.get("foundation.prompt_width", 0) % 16:
        yield Issue("foundation.prompt_width", f"expected a multiple of 16, got {v['foundation.prompt_width']}")
    if has("evaluate.prompts") and set(v["evaluate.prompts"]) <= {"none", "zoom"}:
        yield Issue(
            "evaluate.prompts",
            "expected another prompt beside none and zoom, for pictures and curves, got "
            f"{', '.join(v['evaluate.prompts'])} alone",
        )
    for key in ("evaluate.prompts", "evaluate.jitter"):
        if has(key) and len({str(item) for item in v[key]}) < len(v[key]):
            yield Issue(key, f"expected each item once, got {', '.join(map(str, v[key]))}")


def file_rules(config: Config, root: Path) -> Iterator[Issue]:
    """Yield violated rules on the user's own files, whose paths are relative to `root`."""
    folder, boxes = root / config.inputs.folder, root / config.inputs.boxes
    if left := left_behind(config, root):
        paths = " ".join(f"--copy-paths {path}" for path in left)
        yield Issue(
            "inputs",
            f"expected {', '.join(left)} in the copy of the project that this experiment runs in, got none, as git "
            f"ignores them; give `dvc exp run` also {paths}, or leave --temp and --queue away",
        )
        return
    if config.boxes.source == "csv" and not boxes.is_file():
        yield Issue("inputs.boxes", f"expected a CSV file when boxes.source is csv, got none at {config.inputs.boxes}")
    for key, path, is_read in (
        ("boxes", boxes, config.boxes.source == "csv"),
        ("folder", folder, isinstance(config.data, CocoData | FolderData)),
    ):
        named = getattr(config.inputs, key)
        if named != UNREAD and not is_read and not path.exists():
            yield Issue(f"inputs.{key}", f"expected {UNREAD} where it is not read (DVC watches the path), got {named}")
    if isinstance(config.data, CocoData):
        yield from _coco_rules(config.data, folder, config.inputs.folder)
    if not isinstance(config.data, FolderData):
        return
    splits = ("train", config.data.test_split) + (() if config.data.dev_fraction else ("val",))
    missing = [f"images/{split}" for split in dict.fromkeys(splits) if not (folder / "images" / split).is_dir()]
    if missing:
        yield Issue("inputs.folder", f"expected a folder that holds {', '.join(missing)}, got {config.inputs.folder}")
        return
    for split in dict.fromkeys(splits):
        if config.boxes.source == "simulated" and not (folder / "masks" / split).is_dir():
            yield Issue("boxes.source", f"expected csv, as {config.inputs.folder} has no masks/{split}, got simulated")
    if not (folder / "masks").is_dir():
        if config.method.name == "supervised":
            yield Issue("method.name", f"expected contrastive when {config.inputs.folder} has no masks, got supervised")
        if config.train.select == "objective":
            yield Issue("train.select", f"expected label_free when {config.inputs.folder} has no masks, got objective")


def experiment_copy(folder: Path) -> Path | None:
    """Return the project that `dvc exp run --temp` or `--queue` has copied to the folder; None if it did not.

    The copy holds what git tracks and what DVC's cache has.
    """
    root = os.environ.get("DVC_ROOT")
    return Path(root) if root and folder.resolve().is_relative_to(Path(root).resolve() / ".dvc" / "tmp") else None


def left_behind(config: Config, root: Path) -> list[str]:
    """Return the user's own files that are read, and lie in the project, but not in an experiment's copy of it."""
    if (project := experiment_copy(root)) is None:
        return []
    wanted = [Path(config.model.checkpoint)]
    if config.boxes.source == "csv":
        wanted.append(Path(config.inputs.boxes))
    if isinstance(config.data, CocoData | FolderData):
        parts = ["images", "masks"]
        if isinstance(config.data, CocoData):
            parts = [Path(pattern).parts[0] for pattern in (config.data.images, config.data.annotations)]
        wanted += [Path(config.inputs.folder) / part for part in parts if "{" not in part]
    return [path.as_posix() for path in wanted if not (root / path).exists() and (project / path).exists()]


def _coco_rules(data: CocoData, folder: Path, named: str) -> Iterator[Issue]:
    for split in dict.fromkeys(("train", data.test_split) + (() if data.dev_fraction else ("val",))):
        file, images = (pattern.replace("{split}", split) for pattern in (data.annotations, data.images))
        if not (folder / file).is_file():
            yield Issue("data.annotations", f"expected {file} in {named} (inputs.folder), got no such file")
        if not (folder / images).is_dir():
            yield Issue("data.images", f"expected a folder {images} in {named} (inputs.folder), got none")
