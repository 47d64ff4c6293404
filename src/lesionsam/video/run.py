"""`lesionsam track`: follow lesions through a clip, frame by frame, resumable at any moment."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lesionsam.errors import UserError, listed
from lesionsam.inference.jobs import file_stem
from lesionsam.inference.outputs import make_folder
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam2 import Sam2
from lesionsam.utils.files import atomic_write, remove_leftovers, sha256_file
from lesionsam.utils.locks import folder_lock
from lesionsam.utils.progress import Meter
from lesionsam.utils.weights import find_weights, weights_sha256
from lesionsam.video.boxes import LesionBoxes, Prompts, read_prompts
from lesionsam.video.clips import Clip, DamagedClip, open_clip
from lesionsam.video.memory import MemoryTracker, has_memory, load_video_model
from lesionsam.video.outputs import (
    COCO,
    MASKS,
    OVERLAY,
    ROWS,
    TABLE,
    Rows,
    write_coco,
    write_frame,
    write_overlay,
    write_table,
)
from lesionsam.video.propagation import Propagation
from lesionsam.video.tracker import Tracker

STATE = ".track.pt"
SAVE_EVERY = 50  # frames
VERSION = 1  # of the tracking: another one begins anew


def track(
    path: Path,
    *,
    boxes: Path,
    model: Path,
    out: Path,
    memory: str | None = None,
    mask_prompt: bool = False,
    overlay: bool = True,
    device: torch.device | str = "cpu",
) -> int:
    """Track the lesions of a clip from boxes in one frame or a few.

    Writes masks/ (PNG of 0 and 255, the clip's own size), tracks.csv (frame, time, area, lost), coco.json (images are
    frames) and overlay.mp4. A call that was interrupted goes on from its last saved state, with the same results.

    Args:
        path: video file, GIF or folder of images. boxes: CSV, see `boxes.read_prompts`. model: weights of any SAM.
        memory: video model of the Hub, or a folder of that form, whose memory tracks; None: that of `model` where it
            has one, else propagation. mask_prompt: of propagation, see there. overlay: write overlay.mp4.
    Returns:
        exit code: 0, or 1 if the clip is damaged before its end.
    Raises:
        UserError: a clip, boxes or weights that cannot be used; a folder that holds other files of these names.
    """
    clip = open_clip(path)
    prompts = read_prompts(boxes, path.name, clip.size, clip.num_frames)
    lesion_ids = {lesion_id for given in prompts.values() for lesion_id in given}
    if len({file_stem(lesion_id) for lesion_id in lesion_ids}) < len(lesion_ids):
        raise UserError(
            f"{boxes}: lesion_id: two of {listed(sorted(lesion_ids))} make the same folder name; rename one"
        )
    weights = find_weights(model)
    tracker, how = _tracker(weights, memory, mask_prompt, device)
    facts = (VERSION, clip.stamp(), sha256_file(boxes), weights_sha256(weights), how)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    make_folder(out)
    with folder_lock(out, "wait for it, or choose another --out"):
        state = _begin(out, key)
        state, damage = _follow(clip, prompts, tracker, out, state, alone=len(lesion_ids) == 1)
        num_frames = state["frames"]
        wanted = [TABLE, COCO, *([OVERLAY] if overlay else [])]
        if not state["closed"] or not all((out / name).is_file() for name in wanted):
            write_table(out)
            write_coco(out, clip)
            if overlay:
                write_overlay(out, clip, num_frames)
            _save(out, state | {"closed": True})
    print(f"{num_frames} frames of {path.name}, tracked by {how.split()[0]}, in {out}: {', '.join([MASKS, *wanted])}")
    if damage:
        print(f"error: {damage}; the files hold the {num_frames} frames before", file=sys.stderr)
    return 1 if damage else 0


def _tracker(weights: Path, memory: str | None, mask_prompt: bool, device: torch.device | str) -> tuple[Tracker, str]:
    """Return the tracker and what it is, as text."""
    sam = load_sam(None, weights).to(device).eval()
    if isinstance(sam, Sam2):
        folder = find_weights(Path(memory)) if memory else weights
        if memory or has_memory(weights):
            if mask_prompt:
                raise UserError("--mask-prompt: is of propagation; the model's memory tracks, leave it out")
            return MemoryTracker(sam, load_video_model(sam, folder)), f"memory {weights_sha256(folder)}"
        print(
            f"note: {weights.name} holds no memory and is tracked by propagation; --memory NAME takes that of a video "
            "model, such as facebook/sam2.1-hiera-tiny",
            file=sys.stderr,
        )
    elif memory:
        raise UserError(f"--memory {memory}: {sam.name} has none; SAM 2.1, EdgeTAM and SAM 3 do; leave it out")
    return Propagation(sam, mask_prompt=mask_prompt), f"propagation {mask_prompt}"


def _begin(out: Path, key: str) -> dict[str, Any]:
    """Return the saved state of this very call, or that of a beginning; then the folder's own files are removed."""
    remove_leftovers(out, MASKS)
    fresh = {"key": key, "frames": 0, "bytes": 0, "ended": False, "closed": False, "damage": "", "tracker": {}}
    held = out / STATE
    if not held.exists():
        if found := [name for name in (MASKS, TABLE, COCO, OVERLAY) if (out / name).exists()]:
            raise UserError(f"{out / found[0]}: is not of `lesionsam track`; choose another --out")
    else:
        state = torch.load(held, weights_only=True)
        if state["key"] == key:
            if state["frames"] and not state["closed"]:
                print(f"going on after frame {state['frames'] - 1}", file=sys.stderr)
            return state
        print(f"note: removed the masks of an earlier call with other inputs from {out}", file=sys.stderr)
        shutil.rmtree(out / MASKS, ignore_errors=True)
        for name in (TABLE, COCO, OVERLAY, ROWS):
            (out / name).unlink(missing_ok=True)
    _save(out, fresh)
    return fresh


def _save(out: Path, state: Mapping[str, Any]) -> None:
    with atomic_write(out / STATE) as file:
        torch.save(dict(state), file)


def _follow(
    clip: Clip, prompts: Prompts, tracker: Tracker, out: Path, state: dict[str, Any], *, alone: bool
) -> tuple[dict[str, Any], str]:
    """Track the frames that are left; return the last state and how the clip is damaged, empty if it is not."""
    if state["ended"]:
        return state, state["damage"]
    tracker.restore(state["tracker"]) if state["frames"] else None
    rows, done, damage = Rows(out / ROWS, state["bytes"]), state["frames"], ""
    none: dict[str, LesionBoxes] = {}

    def now(**ended: object) -> dict[str, Any]:
        held = {"key": state["key"], "frames": done, "bytes": rows.sync(), "tracker": tracker.state()}
        return held | {"ended": False, "closed": False, "damage": ""} | ended

    try:
        with Meter("tracking", clip.num_frames, done, in_bytes=False) as meter:
            try:
                for frame in clip.frames(done):
                    found = tracker.step(frame.image, prompts.get(frame.number, none))
                    write_frame(out, rows, frame.number, frame.time, found, alone)
                    done += 1
                    meter.at(done)
                    if done % SAVE_EVERY == 0:
                        _save(out, now())
            except DamagedClip as error:
                damage = str(error)
        if not done:
            raise UserError(damage or f"{clip.path}: no frame can be decoded; copy or convert it again")
        late = [number for number in prompts if number >= done]
        if late and not damage:
            raise UserError(f"frame {min(late)} has boxes and does not exist; {clip.path.name} has {done} frames")
        state = now(ended=True, damage=damage)
        _save(out, state)
        return state, damage
    finally:
        rows.close()
