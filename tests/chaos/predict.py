"""Predictions that are killed at a file, gone on with by other options, and what the folder holds at last."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chaos.run import Run, has_traceback, in_child
from helpers.tiny import tiny_sam
from lesionsam.inference import files as inference_files
from lesionsam.inference import outputs as inference_outputs
from lesionsam.inference.files import predict_files
from lesionsam.models.checkpoint import save_sam

KILL, TERM, INT, OTHERS = "killed at a file", "SIGTERM at a file", "Ctrl-C at a file", "whole, then another's options"
SIGNALS = {KILL: signal.SIGKILL, TERM: signal.SIGTERM, INT: signal.SIGINT}
LESIONS = {"a": 1, "b": 1, "c": 3, "d": 2}  # image -> boxes on it
SIZE, MOST_FILES = (72, 96), 30  # height, width; of the files that a call renames into place
KINDS = {"masks": ".png", "overlays": ".png", "polygons": ".geojson"}


class Campaign:
    """Four images and seven boxes, predicted by one to three calls that are cut short, each with options of its own,
    and by a last one that is not: what it leaves must be what it leaves in an empty folder.

    Args:
        without: `keys` keeps what an earlier call made, whatever it was asked.
    """

    def __init__(self, folder: Path, *, without: str = "") -> None:
        self.case, self.without = folder / "case", without
        (self.case / "images").mkdir(parents=True)
        save_sam(tiny_sam(sharpness=40.0), self.case / "weights.safetensors", name="compact")
        rng = np.random.default_rng(0)
        lines = ["image_id,lesion_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1"]
        for name, count in LESIONS.items():
            pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(self.case / "images" / f"{name}.png")
            for k in range(count):
                x, y = rng.integers(2, 30, 2)
                lines.append(f"{name},{k},{x},{y},{x + 40},{y + 36},{x + 12},{y + 10},{x + 28},{y + 24}")
        (self.case / "boxes.csv").write_text("\n".join(lines) + "\n")

    def options(self, rng: random.Random) -> dict[str, Any]:
        """Of one call."""
        drawn: dict[str, Any] = {
            "batch_size": rng.choice((1, 3)),
            "overlays": rng.random() < 0.7,
            "shapes": rng.random() < 0.7,
            "threshold": rng.choice((0.5, 0.6)),
        }
        if rng.random() < 0.2:
            return drawn | {"auto": True}
        drawn["prompt"] = rng.choice(("box", "box", "centre", "box+core"))
        if drawn["prompt"] == "box":
            drawn |= {"zoom": rng.random() < 0.5}
        return drawn | {"boxes": self.case / "boxes.csv"}

    def call(self, out: Path, options: dict[str, Any], fatal: tuple[int, int] | None = None) -> None:
        """What `lesionsam predict` does. fatal: a file's number and the signal that comes as it is renamed."""
        if self.without:
            inference_files.PredictRun._is_there = lambda run, place, key: place in run.folder.rows
        rename, count = os.replace, 0

        def counted(*places: Any, **named: Any) -> None:
            nonlocal count
            count += 1
            if fatal is not None and count == fatal[0]:
                os.kill(os.getpid(), fatal[1])
            rename(*places, **named)

        os.replace = counted
        code = predict_files([str(self.case / "images")], model=self.case / "weights.safetensors", out=out, **options)
        if code:
            raise SystemExit(code)

    def run(self, rng: random.Random, folder: Path) -> Run:
        """One folder, by several calls."""
        done = Run(rng.choice((KILL, KILL, TERM, INT, OTHERS)))
        folder.mkdir(parents=True)
        log, out, last = folder / "log", folder / "out", self.options(rng)
        for _ in range(rng.randint(1, 3)):
            options = last if rng.random() < 0.3 else self.options(rng)
            fatal = (rng.randint(1, MOST_FILES), SIGNALS[done.fault]) if done.fault in SIGNALS else None
            status = in_child(lambda given=options, at=fatal: self.call(out, given, at), log)
            done.kills += status != 0
            if status not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT):
                done.broken.append(f"exit status {status} of a call with {options}")
        if status := in_child(lambda: self.call(out, last), log):
            done.broken.append(f"exit status {status} at last: {log.read_text().splitlines()[-1]}")
        in_child(lambda: self.call(folder / "fresh", last | {"overlays": True, "shapes": True}), folder / "fresh.log")
        done.broken += differences(out, folder / "fresh", last)
        if has_traceback(log):
            done.broken.append("traceback")
        return done


def differences(out: Path, fresh: Path, options: dict[str, Any]) -> list[str]:
    """What a folder holds otherwise than one that the last call alone has made, with pictures and polygons."""
    broken = []
    if rows(out) != rows(fresh):
        broken.append("other rows")
    for kind, ending in KINDS.items():
        found, expected = (
            {path.name: path.read_bytes() for path in (place / kind).glob(f"*{ending}")} for place in (out, fresh)
        )
        wanted = kind == "masks" or options["overlays" if kind == "overlays" else "shapes"]
        if wanted and found.keys() != expected.keys():
            broken.append(f"{kind}: {sorted(found)} instead of {sorted(expected)}")
        if wrong := [name for name in found if found[name] != expected.get(name)]:
            broken.append(f"{kind}: of other options: {wrong}")
    if (options["shapes"] or (out / "coco.json").exists()) and objects(out) != objects(fresh):
        broken.append("coco.json holds something else")
    if left := [path.name for path in out.rglob(".*")]:
        broken.append(f"left behind: {left}")
    return broken


def rows(out: Path) -> list[tuple[str, ...]]:
    """Of the table, in an order of their own."""
    with (out / inference_outputs.TABLE).open(newline="") as file:
        return sorted(tuple(row.values()) for row in csv.DictReader(file))


def objects(out: Path) -> list[str]:
    """Of coco.json, without their numbers."""
    if not (out / "coco.json").exists():
        return []
    coco = json.loads((out / "coco.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    return sorted(
        json.dumps({**each, "id": 0, "image_id": names[each["image_id"]]}, sort_keys=True)
        for each in coco["annotations"]
    )
