"""A tiny SAM and small drawn lesions, for tests of the methods and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.prior import OUTSIDE, box_prior
from lesionsam.data.dataset import LesionDataset
from lesionsam.data.frames import PRIOR_SCALE, Frames
from lesionsam.models.checkpoint import build_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.sam import Sam
from lesionsam.types import Frame, Sample

SIDE = 32
FRAME = Frame(SIDE)
ARCHITECTURE = CompactArchitecture(
    image_size=SIDE, patch_size=4, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=32
)
SKIN, LESION = np.array([205.0, 165.0, 145.0]), np.array([110.0, 70.0, 60.0])


def tiny_sam(seed: int = 0, sharpness: float = 1.0, architecture: CompactArchitecture = ARCHITECTURE) -> Sam:
    """Random weights; a greater sharpness spreads the logits, so that masks are neither empty nor uncertain."""
    torch.manual_seed(seed)
    sam = build_sam("compact", architecture=architecture)
    with torch.no_grad():
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(sharpness)
            mlp.layers[-1].bias.mul_(sharpness)
    return sam


@dataclass(frozen=True)
class Lesion:
    """One drawn image: (H, W, 3) uint8, its mask (H, W) bool and its two boxes (4,)."""

    image: np.ndarray
    mask: np.ndarray
    big: np.ndarray
    small: np.ndarray


def draw_lesion(
    rng: np.random.Generator, height: int, width: int, contrast: float = 1.0, looseness: float = 0.2
) -> Lesion:
    """A dark ellipse on skin, with noise; the big box `looseness` larger than it, the small one well inside."""
    half = np.array([width, height]) * rng.uniform(0.18, 0.3, 2)
    centre = np.array([width, height]) * rng.uniform(0.42, 0.58, 2)
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    mask = ((columns - centre[0]) / half[0])[None] ** 2 + ((rows - centre[1]) / half[1])[:, None] ** 2 <= 1
    colours = np.where(mask[..., None], SKIN + contrast * (LESION - SKIN), SKIN)
    image = np.clip(colours + rng.normal(0, 5, (height, width, 3)), 0, 255).astype(np.uint8)
    frame = np.array([0, 0, width, height])
    big = np.concatenate([centre - half * (1 + looseness), centre + half * (1 + looseness)])
    big = np.concatenate([np.maximum(big[:2], frame[:2]), np.minimum(big[2:], frame[2:])])
    return Lesion(image, mask, big, np.concatenate([centre - half / 2, centre + half / 2]))


def tiny_data(
    count: int, *, seed: int = 0, with_masks: bool = True, with_others: bool = False, frame: Frame = FRAME
) -> LesionDataset:
    """`count` lesions in a model frame, straight in memory; of three aspect ratios where it is padded."""
    rng, side = np.random.default_rng(seed), frame.side
    shapes = [(side, side)] if frame.squash else [(side, side), (24, side), (side, 28)]
    images, priors = np.zeros((count, side, side, 3), np.uint8), np.full((count, side, side), OUTSIDE)
    masks, sizes = np.zeros((count, side, side), np.uint8), np.zeros((count, 2), np.int64)
    boxes, samples = [], []
    for k in range(count):
        height, width = shapes[k % len(shapes)]
        lesion = draw_lesion(rng, height, width)
        images[k, :height, :width], masks[k, :height, :width] = lesion.image, lesion.mask
        priors[k, :height, :width] = box_prior(lesion.image, lesion.big, lesion.small)
        sizes[k] = height, width
        boxes.append((lesion.big, lesion.small))
        samples.append(
            Sample(
                f"image{k}",
                "0",
                "train",
                Path(f"image{k}.png"),
                Path(f"mask{k}.png"),
                width,
                height,
                lesion.big,
                lesion.small,
            )
        )
    corner = np.array([[0, 0, 6, 5]], np.float32) if with_others else np.zeros((0, 4), np.float32)
    big, small = (np.stack([b[i] for b in boxes]).astype(np.float32) for i in (0, 1))
    frames = Frames(
        images,
        np.round(priors * PRIOR_SCALE).astype(np.int8),
        masks,
        sizes,
        big,
        small,
        (corner,) * count,
        frame.squash,
    )
    return LesionDataset(samples, frames, with_masks=with_masks)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boolean masks; 1 where both are empty."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 1.0


def is_inside(small: np.ndarray, mask: np.ndarray) -> bool:
    """Whether every pixel that a box touches belongs to the mask."""
    x0, y0, x1, y1 = int(np.floor(small[0])), int(np.floor(small[1])), int(np.ceil(small[2])), int(np.ceil(small[3]))
    return (
        x1 > x0
        and y1 > y0
        and bool(mask[y0:y1, x0:x1].all())
        and x0 >= 0
        and y0 >= 0
        and x1 <= mask.shape[1]
        and y1 <= mask.shape[0]
    )


__all__ = ["ARCHITECTURE", "SIDE", "Lesion", "draw_lesion", "iou", "is_inside", "tiny_data", "tiny_sam"]
