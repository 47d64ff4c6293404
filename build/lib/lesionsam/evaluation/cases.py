"""Lesions with what their masks are held against, and a model's answers for them.

One encoder pass per image serves every prompt, the jittered ones included. Truth is the whole mask where an image has
one lesion, and the mask inside its big box where it has several; pixels inside other lesions' big boxes (and outside
one's own) then count for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lesionsam import metrics
from lesionsam.boxes.geometry import _moved, box_slices, model_frame_size, to_model_frame
from lesionsam.errors import UserError
from lesionsam.evaluation.columns import LEAKING, NEARER
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import preprocess, resize_longest, upscale
from lesionsam.prompts import NONE, seeded_prompts
from lesionsam.types import Sample
from lesionsam.utils.progress import progress

LoadImage = Callable[[Sample], np.ndarray]  # -> (H, W, 3) uint8 RGB, original frame
LoadMask = Callable[[Sample], np.ndarray | None]  # -> (H, W) bool, or None where there is no mask
Request = tuple[str, float]  # prompt source, share by which its boxes are jittered (0: as annotated)
Answer = tuple[torch.Tensor, float]  # low-resolution logits (T, T) float32 on the model's device, predicted IoU

# See `inference_lesion.find_lesions`: features, frames and sizes of some images -> an answer for each.
FindLesions = Callable[
    [Sam, torch.Tensor, torch.Tensor, Sequence[tuple[int, int]]], Sequence[tuple[torch.Tensor, float, float]]
]

# See `inference_lesion.look_at_boxes`: frames, sizes and boxes -> logits and predicted IoU of each.
LookAtBoxes = Callable[[Sam, torch.Tensor, Sequence[tuple[int, int]], np.ndarray], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One lesion in the original frame with all that its masks are held against.

    Attributes:
        truth: (H, W) bool, or None. valid: (H, W) bool, False inside other lesions' big boxes, or None for all True.
        outline: of the truth, or None. big, small: rows and columns of the pixels whose centres lie in the boxes.
    """

    sample: Sample
    shape: tuple[int, int]
    truth: np.ndarray | None
    valid: np.ndarray | None
    outline: metrics.Outline | None
    big: tuple[slice, slice]
    small: tuple[slice, slice]


def build_case(sample: Sample, mask: np.ndarray | None, siblings: Sequence[Sample]) -> Case:
    """Truth and regions of a lesion.

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
    return Case(sample, shape, truth, valid, None if truth is None else metrics.Outline.of(truth), big, small)


def measure(logits: np.ndarray, case: Case, tolerance: float) -> dict[str, float]:
    """The figures of one mask: logits (H, W) float32, original frame, positive = lesion."""
    prediction = logits > 0
    if case.valid is not None:
        prediction &= case.valid
    area = int(np.count_nonzero(prediction))
    outside = area - int(np.count_nonzero(prediction[case.big]))
    figures = {
        name: float("nan") for name in ("lesion_share", "iou", "dice", "boundary_f1", "hd95", "thresholded_jaccard")
    }
    if case.truth is not None and case.outline is not None:
        value = metrics.iou(prediction, case.truth)
        f1, distance = metrics.boundary_scores(metrics.Outline.of(prediction), case.outline, tolerance)
        figures = {
            "lesion_share": float(case.truth.mean()),
            "iou": value,
            "dice": 2 * value / (1 + value),
            "boundary_f1": f1,
            "hd95": distance,
            "thresholded_jaccard": metrics.thresholded_jaccard(value),
        }
    return figures | {
        "predicted_share": area / prediction.size,
        "core_coverage": float(prediction[case.small].mean()),
        "leakage": outside / area if area else 0.0,
    }


def jitter_boxes(sample: Sample, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A sloppier annotator: each box's sides times 1 + U(-share, share), its centre moved by up to share of the side.

    The same uniforms serve every share, so that a curve over shares compares like with like. The big box is cut at the
    frame, the small box at the big box.

    Returns:
        (big_box, small_box), (4,) float64 XYXY, original pixels.
    """
    digest = hashlib.sha256(f"{seed}|jitter|{sample.image_id}/{sample.lesion_id}".encode()).digest()
    draws = np.random.default_rng(np.frombuffer(digest, np.uint64)).uniform(-1, 1, (2, 4)) * share
    frame = np.array([0, 0, sample.width, sample.height], float)
    big = _moved(sample.big_box, draws[0], frame)
    return big, _moved(sample.small_box, draws[1], big)


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
    find: FindLesions | None = None,
    look: LookAtBoxes | None = None,
    title: str = "evaluating",
) -> Iterator[tuple[Case, dict[Request, Answer]]]:
    """Encode each image once, decode every request for each of its lesions.

    Args:
        requests: prompt sources of `prompts.KINDS`, `none`, `nearer` or `tight` (left out for lesions without a true
            mask), with jitter.
        batch_size: images per encoder pass and lesions per decoder pass.
        find: answers the request `none`; all lesions of an image get the one answer that it has.
        look: answers the request `nearer`.
    Yields:
        (case, {request: (low-resolution logits (T, T) float32 on `device`, predicted IoU)}), image by image.
    """
    images = by_image(samples)
    side = int(sam.image_encoder.img_size)
    was_training = sam.training
    sam.to(device).eval()
    try:
        starts = range(0, len(images), batch_size)
        for start in progress(starts, total=len(starts), title=title):
            chunk = images[start : start + batch_size]
            cases = [case for lesions in chunk for case in build_cases(lesions, load_mask)]
            owner = torch.tensor([k for k, lesions in enumerate(chunk) for _ in lesions])
            with torch.inference_mode():
                frames, sizes = frames_of([lesions[0] for lesions in chunk], load_image, side, device)
                features = encode(sam, preprocess(frames, sizes))
                for low in range(0, len(cases), batch_size):
                    part = slice(low, low + batch_size)
                    answers = _answer(
                        sam, features, frames, owner[part], cases[part], requests, seed, num_points, side, find, look
                    )
                    yield from zip(cases[part], answers, strict=True)
    finally:
        sam.train(was_training)


def by_image(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Lesions grouped by image, in the order in which images first come."""
    images: dict[str, list[Sample]] = {}
    for sample in samples:
        images.setdefault(sample.image_id, []).append(sample)
    return list(images.values())


def build_cases(lesions: Sequence[Sample], load_mask: LoadMask | None) -> Iterator[Case]:
    """The lesions of one image; a mask that they share is read once."""
    mask, path = None, None
    for sample in lesions:
        if load_mask is not None and (path is None or sample.mask_path != path):
            mask, path = load_mask(sample), sample.mask_path
        yield build_case(sample, mask, [other for other in lesions if other is not sample])


def frames_of(
    samples: Sequence[Sample], load_image: LoadImage, side: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image per sample in the model frame, (B, 3, S, S) uint8, and (B, 2) height and width of the image part:
    what `preprocess` takes.

    Raises:
        UserError: an image of another size than its sample's.
    """
    frames = np.zeros((len(samples), side, side, 3), np.uint8)
    sizes = []
    for k, sample in enumerate(samples):
        image = load_image(sample)
        if image.shape[:2] != (sample.height, sample.width):
            raise UserError(
                f"{sample.image_path}: expected {sample.width}x{sample.height} px as in the box CSV, got "
                f"{image.shape[1]}x{image.shape[0]}; run the boxes stage again"
            )
        small = resize_longest(image, side)
        frames[k, : small.shape[0], : small.shape[1]] = small
        sizes.append(small.shape[:2])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)
    return pixels, torch.tensor(sizes, device=device)


def _answer(
    sam: Sam,
    features: torch.Tensor,
    frames: torch.Tensor,
    owner: torch.Tensor,
    cases: Sequence[Case],
    requests: Sequence[Request],
    seed: int,
    num_points: int,
    side: int,
    find: FindLesions | None,
    look: LookAtBoxes | None,
) -> list[dict[Request, Answer]]:
    answers: list[dict[Request, Answer]] = [{} for _ in cases]
    for kind, share in requests:
        if kind == NONE:
            if find is None:
                raise ValueError("the prompt source `none` needs a function that finds lesions")
            images = sorted(set(owner.tolist()))  # those whose lesions these are, each asked once
            shapes = {int(k): case.shape for k, case in zip(owner, cases, strict=True)}
            sizes = [model_frame_size(shapes[k][1], shapes[k][0], side) for k in images]
            found = dict(zip(images, find(sam, features[images], frames[images], sizes), strict=True))
            for k, answer in zip(owner.tolist(), answers, strict=True):
                answer[(kind, share)] = found[k][:2]
            continue
        rows, bigs, smalls = [], [], []
        for k, case in enumerate(cases):
            big, small = (
                jitter_boxes(case.sample, share, seed) if share else (case.sample.big_box, case.sample.small_box)
            )
            if kind == LEAKING:
                tight = metrics.bounding_box(case.truth) if case.truth is not None else None
                if tight is None:
                    continue
                big = tight
            rows.append(k)
            bigs.append(to_model_frame(big, case.sample.width, case.sample.height, side))
            smalls.append(to_model_frame(small, case.sample.width, case.sample.height, side))
        if not rows:
            continue
        if kind == NEARER:
            if look is None:
                raise ValueError("the prompt source `nearer` needs a function that looks at boxes")
            sizes = [model_frame_size(case.shape[1], case.shape[0], side) for case in cases]
            masks, qualities = look(sam, frames[owner], sizes, np.stack(bigs))
        else:
            prompts = seeded_prompts(
                kind,
                _tensor(bigs),
                _tensor(smalls),
                [_key(cases[k].sample) for k in rows],
                num_points=num_points,
                seed=seed,
            ).to(features.device)
            low_res, predicted = decode(sam, features, prompts, rows=owner[rows].tolist())
            masks, qualities = low_res[:, 0].float(), predicted[:, 0]
        for row, mask, quality in zip(rows, masks, qualities.tolist(), strict=True):
            answers[row][(kind, share)] = (mask, quality)
    return answers


def _tensor(boxes: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(boxes).astype(np.float32))


def _key(sample: Sample) -> str:
    return f"{sample.image_id}/{sample.lesion_id}"


def upscaled(low_res: torch.Tensor, case: Case, side: int) -> np.ndarray:
    """(H, W) float32 logits at original size of (T, T) low-resolution ones."""
    scaled = model_frame_size(case.shape[1], case.shape[0], side)
    return upscale(low_res, scaled, case.shape, side).cpu().numpy()
