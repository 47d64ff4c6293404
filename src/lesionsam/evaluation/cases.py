"""Lesions with the truth that their masks are compared with, and a model's masks for them.

One encoder pass per image serves every prompt, the jittered ones included. The truth is the whole mask if an image has
one lesion, and the mask inside its big box if it has several; pixels inside other lesions' big boxes (and outside the
own one) are then left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lesionsam import metrics
from lesionsam.boxes.geometry import box_slices, jitter_boxes, model_frame_size
from lesionsam.errors import UserError
from lesionsam.evaluation.columns import LEAKING
from lesionsam.inference.decode import DecodeOptions, decode_lesions
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.prediction import DecodedMask, LesionPrompt
from lesionsam.models.sam import Sam
from lesionsam.models.transforms import upscale
from lesionsam.types import Frame, Sample
from lesionsam.utils.progress import progress

LoadImage = Callable[[Sample], np.ndarray]  # -> (H, W, 3) uint8 RGB, original frame
LoadMask = Callable[[Sample], np.ndarray | None]  # -> (H, W) bool, or None where there is no mask
Request = tuple[str, float]  # prompt source, share by which its boxes are jittered (0: as annotated)


@dataclass(frozen=True)
class Case:
    """One lesion in the original frame, with the truth and the regions that its masks are compared with.

    Attributes:
        truth: (H, W) bool, or None. valid: (H, W) bool, False inside other lesions' big boxes, or None for all True.
        outline: of the truth, or None. big, small: rows and columns of the pixels whose centres lie in the boxes.
        others: (M, 4) XYXY, big boxes of the image's other lesions.
    """

    sample: Sample
    shape: tuple[int, int]
    truth: np.ndarray | None
    valid: np.ndarray | None
    outline: metrics.Outline | None
    big: tuple[slice, slice]
    small: tuple[slice, slice]
    others: np.ndarray


def build_case(sample: Sample, mask: np.ndarray | None, siblings: Sequence[Sample]) -> Case:
    """Return the truth and the regions of a lesion.

    Args:
        mask: (H, W) bool, the image's whole mask, or the lesion's own one where it has one, or None.
        siblings: the image's other lesions.
    """
    shape = (sample.height, sample.width)
    big, small = box_slices(sample.big_box, shape), box_slices(sample.small_box, shape)
    truth, valid = mask, None
    if siblings:
        valid = np.ones(shape, bool)
        for other in siblings:
            valid[box_slices(other.big_box, shape)] = False
        valid[big] = True
        if mask is not None and sample.own_mask:
            truth = mask & valid
        elif mask is not None:
            truth = np.zeros(shape, bool)
            truth[big] = mask[big]
    outline = None if truth is None else metrics.Outline.of(truth)
    others = np.array([other.big_box for other in siblings], float).reshape(-1, 4)
    return Case(sample, shape, truth, valid, outline, big, small, others)


def measure(logits: np.ndarray, case: Case, tolerance: float) -> dict[str, float]:
    """Return the metrics of one mask: logits (H, W) float32, original frame, positive = lesion."""
    prediction = logits > 0
    if case.valid is not None:
        prediction &= case.valid
    area = int(np.count_nonzero(prediction))
    outside = area - int(np.count_nonzero(prediction[case.big]))
    scores = {
        name: float("nan") for name in ("lesion_share", "iou", "dice", "boundary_f1", "hd95", "thresholded_jaccard")
    }
    if case.truth is not None and case.outline is not None:
        value = metrics.iou(prediction, case.truth)
        f1, distance = metrics.boundary_scores(metrics.Outline.of(prediction), case.outline, tolerance)
        scores = {
            "lesion_share": float(case.truth.mean()),
            "iou": value,
            "dice": 2 * value / (1 + value),
            "boundary_f1": f1,
            "hd95": distance,
            "thresholded_jaccard": metrics.thresholded_jaccard(value),
        }
    return scores | {
        "predicted_share": area / prediction.size,
        "core_coverage": float(prediction[case.small].mean()),
        "leakage": outside / area if area else 0.0,
    }


def predict_cases(
    sam: Sam,
    samples: Sequence[Sample],
    load_image: LoadImage,
    load_mask: LoadMask | None,
    *,
    requests: Sequence[Request],
    seed: int,
    batch_size: int,
    num_points: int,
    device: torch.device | str,
    decoding: DecodeOptions | None = None,
    title: str = "evaluating",
) -> Iterator[tuple[Case, dict[Request, DecodedMask]]]:
    """Encode each image once and decode every request for each of its lesions.

    Args:
        requests: prompt sources of `prompts.KINDS`, `none`, `zoom` or `tight` (left out for lesions without a true
            mask), with jitter.
        batch_size: images per encoder pass and lesions per decoder pass.
        decoding: what the weights say of it, see `DecodeOptions.of_metadata`; its kind, points and seed are not read.
    Yields:
        (case, {request: mask}), image by image.
    """
    images = by_image(samples)
    was_training = sam.training
    sam.to(device).eval()
    try:
        starts = range(0, len(images), batch_size)
        for start in progress(starts, total=len(starts), title=title):
            chunk = images[start : start + batch_size]
            cases = [case for lesions in chunk for case in build_cases(lesions, load_mask)]
            rows = [k for k, lesions in enumerate(chunk) for _ in lesions]
            framed = EncodedImages.of([load_checked(lesions[0], load_image) for lesions in chunk], sam.frame)
            # Memory layout of the training's batches: convolutions of another one differ in the last bit.
            frames = framed.frames.contiguous(memory_format=torch.channels_last)
            encoded = replace(framed, frames=frames).encoded(sam)
            for low in range(0, len(cases), batch_size):
                part = slice(low, low + batch_size)
                masks = _decode_requests(
                    sam, encoded, cases[part], rows[part], requests, seed=seed, num_points=num_points, decoding=decoding
                )
                yield from zip(cases[part], masks, strict=True)
    finally:
        sam.train(was_training)


def _decode_requests(
    sam: Sam,
    images: EncodedImages,
    cases: Sequence[Case],
    rows: Sequence[int],
    requests: Sequence[Request],
    *,
    seed: int,
    num_points: int,
    decoding: DecodeOptions | None,
) -> list[dict[Request, DecodedMask]]:
    """Decode every request for some cases; rows: the image of each case."""
    masks: list[dict[Request, DecodedMask]] = [{} for _ in cases]
    for kind, share in requests:
        prompts = {
            k: prompt for k, case in enumerate(cases) if (prompt := _prompt(case, kind, share, seed)) is not None
        }
        options = replace(decoding or DecodeOptions(), kind=kind, num_points=num_points, seed=seed)
        keys = [_key(cases[k].sample) for k in prompts]
        decoded = decode_lesions(sam, images, list(prompts.values()), [rows[k] for k in prompts], keys, options)
        for k, mask in zip(prompts, decoded, strict=True):
            masks[k][(kind, share)] = mask
    return masks


def _prompt(case: Case, kind: str, share: float, seed: int) -> LesionPrompt | None:
    """Return the boxes of a case, jittered by `share`; None if the kind is `tight` and there is no true mask."""
    sample = case.sample
    big, small = sample.big_box, sample.small_box
    if share:
        big, small = jitter_boxes(big, small, case.shape, share=share, key=f"{seed}|jitter|{_key(sample)}")
    if kind == LEAKING:
        tight = metrics.bounding_box(case.truth) if case.truth is not None else None
        return None if tight is None else LesionPrompt(tight, small)
    return LesionPrompt(big, small, others=case.others)


def load_checked(sample: Sample, load_image: LoadImage) -> np.ndarray:
    """Return a sample's image, (H, W, 3) uint8 RGB; UserError if its size is not that of the box CSV."""
    image = load_image(sample)
    if image.shape[:2] != (sample.height, sample.width):
        raise UserError(
            f"{sample.image_path}: expected {sample.width}x{sample.height} px as in the box CSV, got "
            f"{image.shape[1]}x{image.shape[0]}; run the boxes stage again"
        )
    return image


def by_image(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Group lesions by image, in the order in which images first appear."""
    images: dict[str, list[Sample]] = {}
    for sample in samples:
        images.setdefault(sample.image_id, []).append(sample)
    return list(images.values())


def build_cases(lesions: Sequence[Sample], load_mask: LoadMask | None) -> Iterator[Case]:
    """Build the cases of one image; a mask that they share is read once."""
    mask, path = None, None
    for sample in lesions:
        if load_mask is not None and (path is None or sample.mask_path != path):
            mask, path = load_mask(sample), sample.mask_path
        yield build_case(sample, mask, [other for other in lesions if other is not sample])


def _key(sample: Sample) -> str:
    return f"{sample.image_id}/{sample.lesion_id}"


def upscaled(low_res: torch.Tensor, case: Case, frame: Frame) -> np.ndarray:
    """Upscale (T, T) low-resolution logits to (H, W) float32 at the case's original size."""
    scaled = model_frame_size(case.shape[1], case.shape[0], frame)
    return upscale(low_res, scaled, case.shape, frame).cpu().numpy()
