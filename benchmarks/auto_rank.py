"""Fits what `inference_rank` weighs by, on real pairs: `python benchmarks/auto_rank.py FOLDER --model W`.

FOLDER holds images/{train,val} and masks/{train,val}. As in the comparison, a sixth of its train images, by hash of
their names, are the development images; the val images are not touched. The weights are fitted on the other train
images, every second one seen from farther away as in training (`data.widening`), without any mask: ridge regression of
a candidate's IoU with the thresholded box prior of that image's two boxes, offset found from the boxes. The true masks
of the development images say what the fit is worth. Prints, as Markdown: the mean IoU of each rule on the comparing
grid, on the development images as they are and from farther away, and the weights for `SIGNS`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lesionsam.box_prior import box_prior, outline_offset
from lesionsam.boxes import annotate
from lesionsam.config import load_config
from lesionsam.data.folder import index_folder
from lesionsam.data.widening import EXTENSION, resize
from lesionsam.errors import UserError
from lesionsam.experiment_auto import auto_options
from lesionsam.files import read_image, read_mask
from lesionsam.inference_image import FeatureCache
from lesionsam.inference_lesion import candidates, way
from lesionsam.inference_rank import SIGNS, lesion_scores, overlaps, small_picture
from lesionsam.metrics import failure_rate
from lesionsam.models.sam import load_sam, model_frames, weights_metadata
from lesionsam.progress import progress
from lesionsam.schema import SimulatedBoxes

ROOT = Path(__file__).resolve().parents[1]
DEV_FRACTION, RIDGE = 1 / 6, 10.0


@dataclass(frozen=True)
class Seen:
    """One image: (M, D) signs of its candidates, (M, h, w) bool masks, box prior (h, w), boxes, truth (h, w) bool."""

    signs: np.ndarray
    masks: np.ndarray
    prior: np.ndarray
    big: np.ndarray
    truth: np.ndarray


def fitted(signs: list[np.ndarray], ious: list[np.ndarray]) -> np.ndarray:
    """(D,) weights of the signs: ridge regression of the IoU on standardised signs."""
    x, y = np.concatenate(signs), np.concatenate(ious)
    spread = x.std(0) + 1e-9
    a = (x - x.mean(0)) / spread
    return np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ (y - y.mean())) / spread


def main() -> int:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "adapted" / "best.safetensors")
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.params, check_files=False)
    b, options = config.boxes, auto_options(config)
    if not isinstance(b, SimulatedBoxes):
        raise UserError(f"{arguments.params}: boxes.source: expected simulated, got {b.source}")
    rows = index_folder(arguments.folder, dev_fraction=DEV_FRACTION, test_split="val")
    index = {row["image_id"]: row for row in rows if row["split"] != "test"}
    samples = annotate(index, root=Path(), **b.annotator())
    sam, by = load_sam(None, arguments.model), way(weights_metadata(arguments.model))
    cache, side = FeatureCache(sam, "cpu", 1), int(sam.image_encoder.img_size)
    found: dict[str, list[Seen]] = {"train": [], "dev": [], "dev, widened": []}
    jobs = [(s, widened) for k, s in enumerate(samples)
            for widened in ((False, True) if s.split == "dev" else (bool(k % 2),))]
    for s, widened in progress(jobs, total=len(jobs), title="candidates"):
        image, mask = read_image(s.image_path), read_mask(s.mask_path or "", (s.width, s.height))
        around = (0, round(s.height * EXTENSION / 2)) if s.height < s.width else (round(s.width * EXTENSION / 2), 0)
        columns, rows_added = around if widened else (0, 0)
        edges = ((rows_added, rows_added), (columns, columns))
        image, mask = np.pad(image, (*edges, (0, 0)), mode="reflect"), np.pad(mask, edges)
        (frames, _), (features, size) = model_frames([image], side), cache.features(image)
        one = candidates(sam, features, frames[0].numpy(), size, by=by, options=options)
        if one is None:
            continue
        picture = small_picture(frames[0].numpy(), size)
        scale = np.array([picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]] * 2)
        big, small = ((box + np.array([columns, rows_added] * 2)) * scale for box in (s.big_box, s.small_box))
        truth = resize(mask.astype(np.uint8) * np.uint8(255), *picture.shape[:2]) > 127
        found[f"{s.split}, widened" if widened and s.split == "dev" else s.split].append(
            Seen(one.signs, one.masks, box_prior(picture, big, small), big, truth))
    train = found["train"]
    looseness = (b.margin_low + b.margin_high) / 2
    offset = outline_offset([one.prior for one in train], [one.big for one in train], looseness)
    weights = fitted([one.signs for one in train],
                     [overlaps(one.masks, (one.prior + offset > 0)[None])[:, 0] for one in train])
    by_masks = fitted([one.signs for one in train], [overlaps(one.masks, one.truth[None])[:, 0] for one in train])
    print(f"{len(train)} images to fit on, {len(found['dev'])} development images, outline offset {offset:+.2f}\n\n"
          "| rule | mean IoU (failures) | widened |\n|---|---|---|")
    rules = {"the best of the candidates": lambda one: overlaps(one.masks, one.truth[None])[:, 0],
             "the most plausible automatic mask": lambda one: -np.arange(len(one.signs)),
             "SIGNS as they are": lambda one: lesion_scores(one.signs),
             "fitted here, boxes alone": lambda one: one.signs @ weights,
             "fitted here, true masks": lambda one: one.signs @ by_masks}
    for name, rule in rules.items():
        cells = []
        for split in ("dev", "dev, widened"):
            values = np.array([overlaps(one.masks[int(np.argmax(rule(one)))][None], one.truth[None])[0, 0]
                               for one in found[split]])
            cells.append(f"{values.mean():.4f} ({failure_rate(values):.1%})")
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for name, weight in zip(SIGNS, weights, strict=True):
        print(f'    "{name}": {weight:.4g},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
