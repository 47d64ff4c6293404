"""From prompts to masks: prompts of many lesions decoded at once, boxes jittered for an ensemble, figures of each mask,
and whether a person should look at it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.models.sam import Sam, decode
from lesionsam.models.transforms import upscale
from lesionsam.prompts import seeded_prompts
from lesionsam.types import Prompts

SEED, NUM_POINTS = 0, 10  # of drawn prompts; as in the evaluation's defaults
ENSEMBLE_SHARE = 0.1  # boxes of an ensemble's members: sides and centre change by up to this share of the side
# When a mask is worth a look; what that finds: docs/log.md, "Predict and export on real images".
LOW_IOU = 0.6  # predicted IoU
LOW_STABILITY = 0.75  # IoU of the masks cut a logit above and a logit below the threshold
LOW_AGREEMENT = 0.8  # of an ensemble's members with their mean; of the candidates where there is no prompt
HIGH_LEAKAGE = 0.15  # share of the mask outside the big box
LOW_COVERAGE = 0.75  # share of the small box, or of the points of label 1, that the mask holds
STABILITY_OFFSET = 1.0  # logits


@dataclass(frozen=True)
class Asked:
    """The prompt of one lesion, original pixels; nothing in it stands for no prompt.

    Attributes:
        big, small: (4,) float64 XYXY; small is the big box again where the prompt has no use for it.
        points: (N, 2) float64 XY. labels: (N,) int64, 1 lesion, 0 not.
    """

    big: np.ndarray | None = None
    small: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """What the decoder gives for one prompt.

    Attributes:
        low_res: (T, T) float32 logits, model frame, on the model's device; the members' mean of an ensemble.
        predicted_iou: SAM's own estimate. agreement: mean IoU of an ensemble's members with their mean, without a
            prompt `inference_rank.agreement`, else NaN.
        points, labels: those prompted with, drawn ones included: (N, 2) XY original pixels and (N,), or None.
    """

    low_res: torch.Tensor
    predicted_iou: float
    agreement: float = math.nan
    points: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """One mask with its figures, original frame.

    Attributes:
        image_id, lesion_id: whose mask it is. mask: (H, W) bool. asked: the prompt, with the points drawn for it.
        predicted_iou: SAM's own estimate. entropy: mean over all pixels, nats, at most 0.693; NaN for automatic masks.
        stability: IoU of the masks cut a logit above and below the threshold.
        agreement: as of `Answer`. look: why a person should look at it; empty: no reason.
    """

    image_id: str
    lesion_id: str
    mask: np.ndarray
    asked: Asked
    predicted_iou: float
    entropy: float
    stability: float
    agreement: float
    look: tuple[str, ...]

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.mask))


@torch.inference_mode()
def answers(
    sam: Sam,
    features: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    asked: Sequence[Asked],
    keys: Sequence[str],
    *,
    prompt: str,
    num_members: int = 1,
    owners: Sequence[int] | None = None,
) -> list[Answer]:
    """Decode the prompts of N lesions, all made the same way.

    Args:
        features: (B, C, H', W'). shapes: N of (H, W), original pixels, each lesion's image.
        keys: N "image_id/lesion_id"; points are drawn by them, whatever the batch.
        prompt: of `prompts.KINDS`, where the lesions have boxes.
        num_members: decodings of each lesion; all but the first with jittered boxes.
        owners: N images of the B, the one that each lesion is on; None: N = B, in order.
    """
    if not asked:
        return []
    side = int(sam.image_encoder.img_size)
    if asked[0].points is not None:
        return _from_points(sam, features, shapes, asked, side, owners or range(len(asked)))
    total, predicted, signs = None, torch.zeros(len(asked)), []
    drawn: Prompts | None = None
    for member in range(num_members):
        boxes = [_jittered(each, shape, key, member) for each, shape, key in zip(asked, shapes, keys, strict=True)]
        big, small = (_framed([pair[k] for pair in boxes], shapes, side) for k in (0, 1))
        prompts = seeded_prompts(prompt, big, small, keys, num_points=NUM_POINTS, seed=SEED)
        drawn = drawn or prompts
        low_res, iou = decode(sam, features, prompts.to(features.device), rows=owners)
        logits = low_res[:, 0].float()
        total = logits if total is None else total + logits
        predicted += iou[:, 0].float().cpu()
        signs.append(logits > 0)
    if total is None:
        raise ValueError(f"num_members: expected at least 1, got {num_members}")
    mean = total / num_members
    agreement = torch.full((len(asked),), math.nan)
    if num_members > 1:
        agreement = torch.stack([_iou(sign, mean > 0) for sign in signs]).mean(0).cpu()
    points = None if drawn is None or drawn.points is None else drawn.points.numpy()
    found = []
    for k, (height, width) in enumerate(shapes):
        own = None if points is None else points[k] / to_model_frame(np.ones(2), width, height, side)
        found.append(
            Answer(
                mean[k],
                float(predicted[k]) / num_members,
                float(agreement[k]),
                own,
                None if own is None else np.ones(len(own), np.int64),
            )
        )
    return found


def _from_points(
    sam: Sam,
    features: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    asked: Sequence[Asked],
    side: int,
    owners: Sequence[int],
) -> list[Answer]:
    """Prompts with as many points share a decoder call; padding would change what the others answer."""
    found: dict[int, Answer] = {}
    counts = [0 if each.points is None else len(each.points) for each in asked]
    for count in sorted(set(counts)):
        rows = [k for k, number in enumerate(counts) if number == count]
        points = _framed([asked[k].points for k in rows], [shapes[k] for k in rows], side)
        labels = torch.from_numpy(np.stack([np.asarray(asked[k].labels) for k in rows]))
        low_res, iou = decode(
            sam, features, Prompts(points, labels).to(features.device), rows=[owners[k] for k in rows]
        )
        for k, logits, quality in zip(rows, low_res[:, 0].float(), iou[:, 0].tolist(), strict=True):
            found[k] = Answer(logits, quality, points=asked[k].points, labels=asked[k].labels)
    return [found[k] for k in range(len(asked))]


def _framed(coordinates: Sequence[np.ndarray | None], shapes: Sequence[tuple[int, int]], side: int) -> torch.Tensor:
    """Original pixels, each of its own image, to float32 in the model frame."""
    rows = [
        to_model_frame(np.asarray(each, float), width, height, side)
        for each, (height, width) in zip(coordinates, shapes, strict=True)
    ]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _jittered(asked: Asked, shape: tuple[int, int], key: str, member: int) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of an ensemble's member: sides times 1 + U(-s, s), centres moved by up to s of the side, s =
    `ENSEMBLE_SHARE`; cut at the frame, the small box at the big one. Member 0 has the boxes as they are."""
    if asked.big is None or asked.small is None:
        raise ValueError("a lesion without boxes among lesions with boxes")
    if member == 0:
        return asked.big, asked.small
    digest = hashlib.sha256(f"{SEED}|ensemble|{member}|{key}".encode()).digest()
    draws = np.random.default_rng(np.frombuffer(digest, np.uint64)).uniform(-1, 1, (2, 4)) * ENSEMBLE_SHARE
    frame = np.array([0, 0, shape[1], shape[0]], float)
    big = _moved(asked.big, draws[0], frame)
    return big, _moved(asked.small, draws[1], big)


def _moved(box: np.ndarray, draw: np.ndarray, limits: np.ndarray) -> np.ndarray:
    side = box[2:] - box[:2]
    middle = np.clip((box[:2] + box[2:]) / 2 + side * draw[:2], limits[:2], limits[2:])
    half = side * (1 + draw[2:]) / 2
    return np.concatenate([np.maximum(middle - half, limits[:2]), np.minimum(middle + half, limits[2:])])


def _iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(N,) IoU of two (N, T, T) bool; 1 where both are empty."""
    both, either = (first & second).flatten(1).sum(1), (first | second).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both, dtype=torch.float32))


@torch.inference_mode()
def prediction(
    answer: Answer,
    asked: Asked,
    *,
    image_id: str,
    lesion_id: str,
    shape: tuple[int, int],
    input_size: tuple[int, int],
    side: int,
    threshold: float = 0.5,
) -> Prediction:
    """The mask at the image's own size, and its figures.

    Args:
        shape: (H, W), original pixels. input_size: (h, w) of the image part of the model frame of side `side`.
        threshold: probability above which a pixel is lesion.
    """
    logits_there = upscale(answer.low_res, input_size, shape, side)
    entropy = mean_entropy(logits_there)
    logits = logits_there.cpu().numpy()
    cut = math.log(threshold / (1 - threshold))
    mask = logits > cut
    outer = np.count_nonzero(logits > cut - STABILITY_OFFSET)
    stability = float(np.count_nonzero(logits > cut + STABILITY_OFFSET) / outer) if outer else math.nan
    asked = Asked(asked.big, asked.small, answer.points, answer.labels)
    return Prediction(
        image_id,
        lesion_id,
        mask,
        asked,
        answer.predicted_iou,
        entropy,
        stability,
        answer.agreement,
        reasons(mask, asked, answer.predicted_iou, stability, answer.agreement),
    )


def mean_entropy(logits: torch.Tensor) -> float:
    """`metrics.mean_entropy` of a tensor, in a fraction of the time: mean binary entropy, nats."""
    size = logits.abs()
    e = size.neg().exp_()
    size.mul_(e).div_(1 + e)
    return float(size.add_(e.log1p_()).mean())


def reasons(
    mask: np.ndarray, asked: Asked, predicted_iou: float, stability: float, agreement: float
) -> tuple[str, ...]:
    """Why a person should look at a mask; see the thresholds at the top of this module.

    Args:
        mask: (H, W) bool. stability, agreement: NaN where they are not known.
    """
    if not mask.any():
        return ("empty",)
    found = []
    if predicted_iou < LOW_IOU:
        found.append(f"predicted IoU {predicted_iou:.2f} below {LOW_IOU:g}")
    if stability < LOW_STABILITY:
        found.append(f"outline uncertain: stability {stability:.2f} below {LOW_STABILITY:g}")
    if agreement < LOW_AGREEMENT:
        who = "candidates for the lesion disagree" if asked.big is None else "jittered boxes disagree"
        found.append(f"{who}: {agreement:.2f} below {LOW_AGREEMENT:g}")
    if asked.big is not None:
        leakage = 1 - np.count_nonzero(mask[_pixels(asked.big, mask)]) / np.count_nonzero(mask)
        if leakage > HIGH_LEAKAGE:
            found.append(f"{leakage:.0%} of the mask outside its box")
    held = _held(mask, asked)
    if held < LOW_COVERAGE:
        found.append(f"only {held:.0%} of what must be lesion is in the mask")
    return tuple(found)


def _held(mask: np.ndarray, asked: Asked) -> float:
    """Share of the small box, or of the points of label 1, inside the mask; NaN without either."""
    if asked.small is not None and asked.small is not asked.big:
        return float(mask[_pixels(asked.small, mask)].mean())
    if asked.big is None and asked.points is not None and asked.labels is not None:
        limits = np.array(mask.shape[::-1]) - 1
        columns, rows = np.minimum(asked.points[asked.labels == 1].astype(int), limits).T
        return float(mask[rows, columns].mean())
    return math.nan


def _pixels(box: np.ndarray, mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a mask that a (4,) XYXY box touches; at least one pixel."""
    out = []
    for low, high, length in ((box[1], box[3], mask.shape[0]), (box[0], box[2], mask.shape[1])):
        start = min(int(low), length - 1)
        out.append(slice(start, max(start + 1, min(math.ceil(high), length))))
    return out[0], out[1]
