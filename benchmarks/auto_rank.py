"""Fit the weights of `inference.rank` on real pairs: `python benchmarks/auto_rank.py FOLDER --model W`.

FOLDER holds images/{train,val} and masks/{train,val}. As in the comparison, a sixth of its train images, by hash of
their names, are the development images; the val images are not touched. The weights are fitted on the other train
images, every second one seen from farther away as in training (`data.augment`), without any mask: ridge regression of
a candidate's IoU with the thresholded box prior of that image's two boxes, offset found from the boxes. The true masks
of the development images say what the fit is worth, and how far the last decoding should zoom. Prints, as
Markdown, on the development images as they are and from farther away: the mean IoU of each rule on the comparing grid,
of zooms on what `SIGNS` choose, of the big box, and what each gains over `SIGNS` alone, paired; and the
weights for `SIGNS`. `--no-fit` leaves out the train images and what is fitted on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.annotator import annotate
from lesionsam.boxes.geometry import largest_component_box
from lesionsam.boxes.prior import box_prior, outline_offset
from lesionsam.config.load import load_config
from lesionsam.config.schema import SimulatedBoxes
from lesionsam.data.augment import EXTENSION
from lesionsam.data.sources.folder import index_folder
from lesionsam.errors import UserError
from lesionsam.evaluation.statistics import interval
from lesionsam.experiment.auto import auto_options
from lesionsam.inference.image import FeatureCache
from lesionsam.inference.lesion import LesionSearch, candidates, trained_without_prompt
from lesionsam.inference.rank import SIGNS, lesion_scores, small_picture
from lesionsam.inference.zoom import decode_zoomed
from lesionsam.metrics import failure_rate, iou_matrix
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam, decode
from lesionsam.models.transforms import upscale
from lesionsam.types import Prompts
from lesionsam.utils.images import read_image, read_mask, resize
from lesionsam.utils.progress import progress

ROOT = Path(__file__).resolve().parents[1]
DEV_FRACTION, RIDGE = 1 / 6, 10.0
VIEWS = ("dev", "dev, widened")
INTERVAL = {"num_bootstrap": 5000, "confidence": 0.95}
KEPT = "SIGNS as they are"  # what the others are compared with
ZOOMS = ((0.15, 1.75), (0.2, 1.5), (0.2, 1.75), (0.2, 2.5), (0.25, 1.75), (0.35, 1.75))  # looseness, surroundings
ZOOMED_BOX = (0.0, 1.75)  # the same of the annotator's big box, which is loose as it is


@dataclass(frozen=True)
class Seen:
    """One image: (M, D) signs of its candidates, (M, h, w) bool masks, box prior (h, w), boxes, truth (h, w) bool; of a
    development image also the IoU of further answers."""

    signs: np.ndarray
    masks: np.ndarray
    prior: np.ndarray
    big: np.ndarray
    truth: np.ndarray
    further: dict[str, float]


def further_answers(
    sam: Sam,
    features: torch.Tensor,
    frames: torch.Tensor,
    size: tuple[int, int],
    mask: np.ndarray,
    big: np.ndarray,
    truth: np.ndarray,
) -> dict[str, float]:
    """Return name -> IoU with the true mask: zooms on a mask, and the prediction for the big box.

    Args:
        features: (1, C, H', W'). frames: (1, 3, S, S) uint8. size: (h, w) of the image part. mask, truth: (h', w')
            bool, comparing grid. big: (4,) XYXY, model frame.
    """
    found = largest_component_box(mask)
    if found is None:
        raise ValueError("mask: expected one that is not empty")
    around = found * np.array([size[1] / mask.shape[1], size[0] / mask.shape[0]] * 2)

    def held(logits: torch.Tensor) -> float:
        shown = upscale(logits, size, (truth.shape[0], truth.shape[1]), sam.frame) > sam.mask_threshold
        return float(iou_matrix(shown.numpy()[None], truth[None])[0, 0])

    def zoomed(box: np.ndarray, looseness: float, surroundings: float) -> float:
        return held(decode_zoomed(sam, frames, [size], box[None], looseness=looseness, surroundings=surroundings)[0][0])

    answers = {f"SIGNS, then zoomed ({loose:g}, {near:g})": zoomed(around, loose, near) for loose, near in ZOOMS}
    with torch.inference_mode():
        boxed, _ = decode(sam, features, Prompts(boxes=torch.tensor(big[None], dtype=torch.float32)))
    return answers | {"big box": held(boxed[0, 0]), "big box, zoomed": zoomed(big, *ZOOMED_BOX)}


def fitted(signs: list[np.ndarray], ious: list[np.ndarray]) -> np.ndarray:
    """Fit (D,) weights of the signs: ridge regression of the IoU on standardised signs."""
    x, y = np.concatenate(signs), np.concatenate(ious)
    spread = x.std(0) + 1e-9
    a = (x - x.mean(0)) / spread
    return np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ (y - y.mean())) / spread


def main() -> int:
    """Fit and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "adapted" / "best.safetensors")
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--no-fit", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.params, check_files=False)
    b, options = config.boxes, auto_options(config)
    if not isinstance(b, SimulatedBoxes):
        raise UserError(f"{arguments.params}: boxes.source: expected simulated, got {b.source}")
    rows = index_folder(arguments.folder, dev_fraction=DEV_FRACTION, test_split="val")
    splits = ("dev",) if arguments.no_fit else ("train", "dev")
    index = {row["image_id"]: row for row in rows if row["split"] in splits}
    samples = annotate(index, root=Path(), **b.annotator())
    sam = load_sam(None, arguments.model)
    search = LesionSearch(trained_without_prompt(weights_metadata(arguments.model)), options)
    cache = FeatureCache(sam, "cpu", 1)
    found: dict[str, list[Seen]] = {"train": [], **{view: [] for view in VIEWS}}
    jobs = [
        (s, widened)
        for k, s in enumerate(samples)
        for widened in ((False, True) if s.split == "dev" else (bool(k % 2),))
    ]
    for s, widened in progress(jobs, total=len(jobs), title="candidates"):
        image, mask = read_image(s.image_path), read_mask(s.mask_path or "", (s.width, s.height))
        around = (0, round(s.height * EXTENSION / 2)) if s.height < s.width else (round(s.width * EXTENSION / 2), 0)
        columns, rows_added = around if widened else (0, 0)
        edges = ((rows_added, rows_added), (columns, columns))
        image, mask = np.pad(image, (*edges, (0, 0)), mode="reflect"), np.pad(mask, edges)
        images = cache.encode(image)
        frames, features, size = images.frames, images.known_features, images.input_sizes[0]
        one = candidates(sam, features, frames[0].numpy(), size, search=search)
        if one is None:
            continue
        picture = small_picture(frames[0].numpy(), size)
        scale = np.array([picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]] * 2)
        big, small = ((box + np.array([columns, rows_added] * 2)) * scale for box in (s.big_box, s.small_box))
        truth = resize(mask.astype(np.uint8) * np.uint8(255), *picture.shape[:2]) > 127
        framed = big * np.array([size[1] / picture.shape[1], size[0] / picture.shape[0]] * 2)
        chosen = one.masks[int(lesion_scores(one.signs).argmax())]
        further = further_answers(sam, features, frames, size, chosen, framed, truth) if s.split == "dev" else {}
        found[f"{s.split}, widened" if widened and s.split == "dev" else s.split].append(
            Seen(one.signs, one.masks, box_prior(picture, big, small), big, truth, further)
        )
    report(found, None if arguments.no_fit else (b.margin_low + b.margin_high) / 2)
    return 0


def report(found: dict[str, list[Seen]], looseness: float | None) -> None:
    """Fit and print the tables.

    Args:
        looseness: of the annotators' big boxes; None: nothing is fitted.
    """
    rules: dict[str, Callable[[Seen], np.ndarray]] = {
        "the best of the candidates": lambda one: iou_matrix(one.masks, one.truth[None])[:, 0],
        "the most plausible automatic mask": lambda one: -np.arange(len(one.signs)),
        KEPT: lambda one: lesion_scores(one.signs),
    }
    weights: np.ndarray | None = None
    if looseness is not None:
        train = found["train"]
        offset = outline_offset([one.prior for one in train], [one.big for one in train], looseness)
        weights = by_boxes = fitted(
            [one.signs for one in train], [iou_matrix(one.masks, (one.prior + offset > 0)[None])[:, 0] for one in train]
        )
        by_masks = fitted([one.signs for one in train], [iou_matrix(one.masks, one.truth[None])[:, 0] for one in train])
        rules |= {
            "fitted here, boxes alone": lambda one: one.signs @ by_boxes,
            "fitted here, true masks": lambda one: one.signs @ by_masks,
        }
        print(f"{len(train)} images to fit on, outline offset {offset:+.2f}")
    values = {
        (name, view): np.array(
            [iou_matrix(one.masks[int(np.argmax(rule(one)))][None], one.truth[None])[0, 0] for one in found[view]]
        )
        for name, rule in rules.items()
        for view in VIEWS
    }
    values |= {
        (name, view): np.array([one.further[name] for one in found[view]])
        for name in found[VIEWS[0]][0].further
        for view in VIEWS
    }
    print(
        f"{len(found[VIEWS[0]])} development images\n\n"
        "| rule | mean IoU (failures) | gain | widened | gain |\n|---|---|---|---|---|"
    )
    for name in dict.fromkeys(name for name, _ in values):
        cells = []
        for view in VIEWS:
            own, gain = values[name, view], values[name, view] - values[KEPT, view]
            low, high = interval(gain, **INTERVAL)
            cells += [f"{own.mean():.4f} ({failure_rate(own):.1%})", f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]"]
        print(f"| {name} | {' | '.join(cells)} |")
    if weights is not None:
        print()
        for name, weight in zip(SIGNS, weights, strict=True):
            print(f'    "{name}": {weight:.4g},')


if __name__ == "__main__":
    sys.exit(main())
