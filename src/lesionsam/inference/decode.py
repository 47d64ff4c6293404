"""Decode prompts of any kind, many lesions at once: for predictions and for the evaluation alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lesionsam.boxes.geometry import jitter_boxes, to_model_frame
from lesionsam.boxes.outline import FOUND_OFFSET, Outline
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions
from lesionsam.inference.fusion import fuse
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.lesion import LesionSearch, find_lesions, trained_without_prompt
from lesionsam.inference.prediction import DecodedMask, LesionPrompt
from lesionsam.inference.zoom import decode_zoomed
from lesionsam.metrics import batch_iou
from lesionsam.models.sam import Sam, decode
from lesionsam.prompts import BOTH, NONE, POINTS, ZOOM, seeded_prompts
from lesionsam.types import Frame, Prompts

SEED, NUM_POINTS = 0, 10  # of drawn prompts; as in the evaluation's defaults
SELF_ENCODED = (ZOOM, BOTH)  # kinds that encode an enlarged crop of each lesion instead of the whole image
ENSEMBLE_SHARE = 0.1  # boxes of an ensemble's members: sides and centre change by up to this share of the side


@dataclass(frozen=True)
class DecodeOptions:
    """How the prompts of lesions are decoded.

    Attributes:
        kind: `points`; `none`; or made from boxes: one of `prompts.KINDS`, `tight` or `zoom`.
        num_points: of the kind `ring`. seed: of drawn points.
        num_members: decodings per lesion with boxes, all but the first with jittered boxes.
        search: of the kind `none`. outline: of the kind `box+core`, the correction of its box prior.
    """

    kind: str = "box"
    num_points: int = NUM_POINTS
    seed: int = SEED
    num_members: int = 1
    search: LesionSearch = field(default_factory=LesionSearch)
    outline: Outline = field(default_factory=lambda: Outline(FOUND_OFFSET))

    @classmethod
    def of_metadata(cls, metadata: dict[str, str], auto: AutoMaskOptions = AUTO_DEFAULTS) -> DecodeOptions:
        """Return what the metadata of a weights file say of how it is used; auto: settings of the automatic masks."""
        search = LesionSearch(trained_without_prompt(metadata), auto)
        return cls(search=search, outline=Outline.of_metadata(metadata))


@torch.inference_mode()
def decode_lesions(
    sam: Sam,
    images: EncodedImages,
    prompts: Sequence[LesionPrompt],
    rows: Sequence[int],
    keys: Sequence[str],
    options: DecodeOptions,
) -> list[DecodedMask]:
    """Decode the prompts of N lesions, all of one kind.

    Args:
        images: with features, unless the kind is one of `SELF_ENCODED`.
        rows: N, the image of each lesion. With the kind `none` all lesions of an image get its one mask.
        keys: N "image_id/lesion_id"; points and jitter depend on them alone, whatever the batch.
    Returns:
        N masks.
    """
    if not prompts:
        return []
    if options.kind == NONE:
        chosen = sorted(set(rows))
        part = images[chosen]
        found = find_lesions(sam, part.known_features, part.frames, part.input_sizes, search=options.search)
        by_image = dict(zip(chosen, found, strict=True))
        return [by_image[row] for row in rows]
    if options.kind == POINTS:
        return _decode_points(sam, images, prompts, rows)
    return _decode_boxes(sam, images, prompts, rows, keys, options)


def _decode_boxes(
    sam: Sam,
    images: EncodedImages,
    prompts: Sequence[LesionPrompt],
    rows: Sequence[int],
    keys: Sequence[str],
    options: DecodeOptions,
) -> list[DecodedMask]:
    """Decode prompts made from boxes; of an ensemble the mean over its members."""
    shapes = [images.shapes[row] for row in rows]
    total, predicted, signs = None, torch.zeros(len(prompts)), []
    drawn: Prompts | None = None
    for member in range(options.num_members):
        boxes = [_boxes(prompt) for prompt in prompts]
        if member:
            boxes = [
                jitter_boxes(*pair, shape, share=ENSEMBLE_SHARE, key=f"{options.seed}|ensemble|{member}|{key}")
                for pair, shape, key in zip(boxes, shapes, keys, strict=True)
            ]
        big, small = (_framed([pair[k] for pair in boxes], shapes, images.frame) for k in (0, 1))
        if options.kind in SELF_ENCODED:
            others = [
                to_model_frame(prompt.others, shape[1], shape[0], images.frame)
                for prompt, shape in zip(prompts, shapes, strict=True)
            ]
            logits, iou = _decode_enlarged(sam, images[list(rows)], big, small, others, options)
        else:
            features = images.known_features
            made = seeded_prompts(
                options.kind, _tensor(big), _tensor(small), keys, num_points=options.num_points, seed=options.seed
            )
            drawn = drawn or made
            low_res, iou = decode(sam, features, made.to(features.device), rows=rows)
            logits, iou = low_res[:, 0].float(), iou[:, 0].float()
        total = logits if total is None else total + logits
        predicted += iou.cpu()
        signs.append(logits > 0)
    if total is None:
        raise ValueError(f"num_members: expected at least 1, got {options.num_members}")
    mean = total / options.num_members
    agreement = torch.full((len(prompts),), math.nan)
    if options.num_members > 1:
        agreement = torch.stack([batch_iou(sign, mean > 0) for sign in signs]).mean(0).cpu()
    points = None if drawn is None or drawn.points is None else drawn.points.numpy()
    decoded = []
    for k, (height, width) in enumerate(shapes):
        own = None if points is None else points[k] / to_model_frame(np.ones(2), width, height, images.frame)
        labels = None if own is None else np.ones(len(own), np.int64)
        quality = float(predicted[k]) / options.num_members
        decoded.append(DecodedMask(mean[k], quality, float(agreement[k]), own, labels))
    return decoded


def _decode_enlarged(
    sam: Sam,
    images: EncodedImages,
    big: np.ndarray,
    small: np.ndarray,
    others: Sequence[np.ndarray],
    options: DecodeOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the big boxes of N lesions on enlarged crops; of the kind `box+core`, fuse each mask with its box prior.

    Args:
        images: N, one for each lesion. big, small: (N, 4) XYXY; others: N of (M, 4); model frame.
    Returns:
        (N, T, T) float32 logits; (N,) predicted IoU.
    """
    logits, predicted = decode_zoomed(sam, images.frames, images.input_sizes, big)
    if options.kind == BOTH:
        logits = torch.stack(
            [
                fuse(one, images.frames[k], images.input_sizes[k], big[k], small[k], others[k], options.outline)
                for k, one in enumerate(logits)
            ]
        )
    return logits, predicted


def _decode_points(
    sam: Sam, images: EncodedImages, prompts: Sequence[LesionPrompt], rows: Sequence[int]
) -> list[DecodedMask]:
    """Decode prompts of points; those with as many points share a decoder call, as padding would change the result."""
    decoded: dict[int, DecodedMask] = {}
    counts = [0 if prompt.points is None else len(prompt.points) for prompt in prompts]
    for count in sorted(set(counts)):
        chosen = [k for k, number in enumerate(counts) if number == count]
        shapes = [images.shapes[rows[k]] for k in chosen]
        points = _tensor(_framed([np.asarray(prompts[k].points) for k in chosen], shapes, images.frame))
        labels = torch.from_numpy(np.stack([np.asarray(prompts[k].labels) for k in chosen]))
        features = images.known_features
        made = Prompts(points, labels).to(features.device)
        low_res, iou = decode(sam, features, made, rows=[rows[k] for k in chosen])
        for k, logits, quality in zip(chosen, low_res[:, 0].float(), iou[:, 0].tolist(), strict=True):
            decoded[k] = DecodedMask(logits, quality, points=prompts[k].points, labels=prompts[k].labels)
    return [decoded[k] for k in range(len(prompts))]


def _boxes(prompt: LesionPrompt) -> tuple[np.ndarray, np.ndarray]:
    """Return (big_box, small_box) of a prompt that has both."""
    if prompt.big_box is None or prompt.small_box is None:
        raise ValueError("prompts: expected boxes for every lesion")
    return prompt.big_box, prompt.small_box


def _framed(coordinates: Sequence[np.ndarray], shapes: Sequence[tuple[int, int]], frame: Frame) -> np.ndarray:
    """Scale N arrays of original pixels, each of an image of its own shape (H, W), to the model frame: (N, ...)."""
    return np.stack(
        [
            to_model_frame(np.asarray(each, float), width, height, frame)
            for each, (height, width) in zip(coordinates, shapes, strict=True)
        ]
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
