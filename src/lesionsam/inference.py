"""Masks for images: the interactive `Predictor`, and `predict_files`, which segments files given their boxes."""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes import to_model_frame
from lesionsam.errors import UserError
from lesionsam.files import sha256_file
from lesionsam.inference_inputs import find_images, needs_small, plan
from lesionsam.inference_run import Options, Run, complain
from lesionsam.models.sam import Sam, decode, encode, load_sam, model_frames, preprocess, upscale
from lesionsam.prompts import KINDS
from lesionsam.types import Prompts

SHOWN_IDS = 3


class Predictor:
    """SAM on one image at a time with any number of prompts, with the verbs of segment_anything's SamPredictor.

    Coordinates are pixels of the original image. Features of the last few images are kept, so that coming back to one
    costs no second encoder pass: the weights must not change while a Predictor lives.

    Args:
        sam: moved to the device and set to eval mode. num_cached: images whose features are kept.
    """

    def __init__(self, sam: Sam, device: torch.device | str = "cpu", *, num_cached: int = 8) -> None:
        self.sam, self.device, self.num_cached = sam.to(device).eval(), torch.device(device), num_cached
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.reset_image()

    @property
    def side(self) -> int:
        """S, side of the model's input, pixels."""
        return int(self.sam.image_encoder.img_size)

    def reset_image(self) -> None:
        """Forget the image and every kept feature."""
        self._cache.clear()
        self._features: torch.Tensor | None = None
        self.original_size, self.input_size = (0, 0), (0, 0)

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encode an image.

        Args:
            image: (H, W, 3) uint8 RGB, original frame.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        key = hashlib.blake2b(np.ascontiguousarray(image).data, person=b"%dx%d" % image.shape[:2]).digest()
        frames, sizes = model_frames([image], self.side)
        if key not in self._cache:
            frames, sizes_there = frames.to(self.device), sizes.to(self.device)
            self._cache[key] = encode(self.sam, preprocess(frames, sizes_there))
            while len(self._cache) > self.num_cached:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        self._features = self._cache[key]
        self.original_size, self.input_size = (image.shape[0], image.shape[1]), (int(sizes[0, 0]), int(sizes[0, 1]))

    def get_image_embedding(self) -> torch.Tensor:
        """(1, C, H', W') features of the image that is set."""
        if self._features is None:
            raise RuntimeError("no image is set; call set_image first")
        return self._features

    @torch.inference_mode()
    def predict(self, point_coords: np.ndarray | None = None, point_labels: np.ndarray | None = None,
                box: np.ndarray | None = None, mask_input: np.ndarray | None = None, multimask_output: bool = True,
                return_logits: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one prompt: everything given is one joint prompt.

        Args:
            point_coords: (N, 2) XY. point_labels: (N,), 1 foreground, 0 background. box: (4,) XYXY.
            mask_input: (1, T, T) logits of an earlier call. multimask_output: three candidates instead of one mask.
            return_logits: masks as logits.
        Returns:
            masks (K, H, W) bool (or float32 logits), original frame; iou_predictions (K,) float32; low_res_masks
            (K, T, T) float32 logits, model frame, T = 4 H'.
        """
        features = self.get_image_embedding()
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels: expected both or neither")
        points = labels = boxes = masks = None
        if point_coords is not None and point_labels is not None:
            points, labels = self._framed(point_coords), torch.as_tensor(point_labels, dtype=torch.int64)[None]
            if points.shape[1:] != (labels.shape[1], 2):
                raise ValueError(f"point_coords: expected ({labels.shape[1]}, 2) for as many labels, got "
                                 f"{np.shape(point_coords)}")
        if box is not None:
            boxes = self._framed(box)
            if boxes.shape != (1, 4):
                raise ValueError(f"box: expected (4,) XYXY, got {np.shape(box)}")
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float32)[None]
        prompts = Prompts(points, labels, boxes, masks).to(self.device)
        low_res, predicted = decode(self.sam, features, prompts, multimask_output)
        low_res = low_res[0].float()
        logits = upscale(low_res, self.input_size, self.original_size, self.side)
        full = logits if return_logits else logits > self.sam.mask_threshold
        return full.cpu().numpy(), predicted[0].float().cpu().numpy(), low_res.cpu().numpy()

    def _framed(self, coordinates: np.ndarray) -> torch.Tensor:
        height, width = self.original_size
        return torch.as_tensor(to_model_frame(np.asarray(coordinates, float), width, height, self.side),
                               dtype=torch.float32)[None]


def predict_files(images: Sequence[str | Path], boxes: Path, *, weights: Path, out: Path, prompt: str = "box",
                  device: torch.device | str = "cpu", batch_size: int = 8, overlays: bool = True,
                  threshold: float = 0.5) -> int:
    """Segment the lesions of image files, given their boxes.

    Writes, each file whole or not at all: masks/<image_id>.png (<image_id>_<lesion_id>.png where an image has several
    rows) of 0 and 255 at the image's original size, overlays/ of the same names, and predictions.csv. What an earlier
    call with the same weights, prompt, threshold, boxes and image has done is kept.

    Args:
        images: files, folders, patterns. boxes: CSV with image_id, [lesion_id], big_x0 to big_y1 and, where the prompt
            needs the core, small_x0 to small_y1; original pixels. prompt: of `prompts.KINDS`.
        weights: SAM's or this project's; the file says which model it holds. batch_size: images per encoder pass and
            lesions per decoder pass. threshold: probability above which a pixel is lesion.
    Returns:
        exit code: 0, or 1 if an image or a row that was asked for gave no mask; each is named on stderr.
    Raises:
        UserError: nothing can be predicted at all.
    """
    if prompt not in KINDS:
        raise UserError(f"--prompt: expected one of {', '.join(KINDS)}, got {prompt!r}")
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    jobs, unmatched, unused = plan(paths, boxes, with_small=needs_small(prompt))
    problems += unmatched
    for line in problems:
        complain(line)
    if unused:
        shown = ", ".join(unused[:SHOWN_IDS]) + (", ..." if len(unused) > SHOWN_IDS else "")
        print(f"note: {boxes} has rows of {len(unused)} images that were not given: {shown}", file=sys.stderr)
    sam = load_sam(None, weights).to(device)
    run = Run(sam, Options(sha256_file(weights), boxes, prompt, threshold, out, overlays), device, batch_size)
    try:
        run.work(jobs)
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory does not suffice for {batch_size} images at once; lower --batch-size or use "
                        "--device cpu") from None
    finally:
        run.save()
    faults = len(problems) + run.num_faults
    print(f"{run.num_done} masks written to {out / 'masks'}"
          + (f", {run.num_kept} kept from before" if run.num_kept else "")
          + (f", {run.num_empty} of them empty" if run.num_empty else "")
          + (f"; {faults} faults, named above" if faults else ""))
    return 1 if faults else 0
