"""Measure prediction on the development images of real pairs: `python benchmarks/predict_quality.py FOLDER`.

FOLDER holds images/{train,val} and masks/{train,val}. As in the comparison, a sixth of its train images, by hash of
their names, are the development images; the val images are not touched. Prints, as Markdown: the gain of an ensemble
over jittered boxes, and of the zoom; the lesion without a prompt, by decoder and by automatic masks; what the
`review_reasons` find.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.annotator import annotate
from lesionsam.config.load import load_config
from lesionsam.config.schema import SimulatedBoxes
from lesionsam.data.sources.folder import index_folder
from lesionsam.errors import UserError
from lesionsam.evaluation.statistics import interval
from lesionsam.experiment.auto import auto_options
from lesionsam.inference.decode import DecodeOptions, decode_lesions
from lesionsam.inference.image import FeatureCache
from lesionsam.inference.lesion import LesionSearch
from lesionsam.inference.prediction import LesionPrompt, to_prediction
from lesionsam.metrics import FAILURE, failure_rate, iou
from lesionsam.models.checkpoint import load_sam
from lesionsam.prompts import NONE, ZOOM
from lesionsam.utils.images import read_image, read_mask
from lesionsam.utils.progress import progress

DEV_FRACTION, INTERVAL = 1 / 6, {"num_bootstrap": 5000, "confidence": 0.95}
MEMBERS = (1, 2, 4, 8)
FLAGGED = (
    "ensemble of 1",
    "ensemble of 4",
    "no prompt, by masks",
)  # whose `review_reasons` are compared with the truth
ROOT = Path(__file__).resolve().parents[1]


def shown(values: np.ndarray, *, sign: bool = False) -> str:
    """Return mean and interval as text."""
    low, high = interval(values, **INTERVAL)
    form = "+.4f" if sign else ".3f"
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def kind_of(reason: str) -> str:
    """Return a review reason without its numbers."""
    return " ".join(word for word in reason.split(" below")[0].split() if not any(c.isdigit() for c in word))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "adapted" / "best.safetensors")
    parser.add_argument("--prompt", default="box", help="box or box+core")
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.params, check_files=False)
    b, options = config.boxes, auto_options(config)
    if not isinstance(b, SimulatedBoxes):
        raise UserError(f"{arguments.params}: boxes.source: expected simulated, got {b.source}")
    every = index_folder(arguments.folder, dev_fraction=DEV_FRACTION, test_split="val")
    index = {row["image_id"]: row for row in every if row["split"] == "dev"}
    samples = annotate(index, root=Path(), **b.annotator())
    sam = load_sam(None, arguments.model)
    cache = FeatureCache(sam, "cpu", 1)
    ious: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    flags: list[tuple[float, tuple[str, ...]]] = []
    for s in progress(samples, total=len(samples), title="development images"):
        image, truth = read_image(s.image_path), read_mask(s.mask_path or "", (s.width, s.height))
        images, boxes = cache.encode(image), LesionPrompt(s.big_box, s.small_box)
        by_masks, by_decoder = (LesionSearch(by_decoder, options) for by_decoder in (False, True))
        ways = {f"ensemble of {count}": DecodeOptions(arguments.prompt, num_members=count) for count in MEMBERS}
        if arguments.prompt == "box":
            ways["zoom"] = DecodeOptions(ZOOM)
        ways |= {"no prompt, by decoder": DecodeOptions(NONE, search=by_decoder)}
        ways |= {"no prompt, by masks": DecodeOptions(NONE, search=by_masks)}
        for name, how in ways.items():
            begun = time.process_time()
            prompt = LesionPrompt() if how.kind == NONE else boxes
            (decoded,) = decode_lesions(sam, images, [prompt], [0], [f"{s.image_id}/0"], how)
            one = to_prediction(
                decoded,
                prompt,
                image_id=s.image_id,
                lesion_id="0",
                shape=images.shapes[0],
                input_size=images.input_sizes[0],
                frame=images.frame,
            )
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - begun
            ious.setdefault(name, []).append(iou(one.mask, truth))
            if name in FLAGGED:
                flags.append((ious[name][-1], (name, *(kind_of(reason) for reason in one.review_reasons))))
    report(ious, seconds, flags, arguments.prompt)
    return 0


def report(
    ious: dict[str, list[float]], seconds: dict[str, float], flags: list[tuple[float, tuple[str, ...]]], prompt: str
) -> None:
    """Print the tables."""
    first = np.array(ious["ensemble of 1"])
    print(f"{len(first)} development images, prompt {prompt}\n\n| | mean IoU | paired difference | failures | CPU ms |")
    print("|---|---|---|---|---|")
    for name, values in ious.items():
        v = np.array(values)
        difference = shown(v - first, sign=True) if name != "ensemble of 1" else ""
        print(f"| {name} | {shown(v)} | {difference} | {failure_rate(v):.1%} | {1000 * seconds[name] / len(v):.0f} |")
    for kind in FLAGGED:
        own = [(value, names[1:]) for value, names in flags if names[0] == kind]
        values, flagged = np.array([value for value, _ in own]), np.array([bool(names) for _, names in own])
        failed = values < FAILURE
        print(
            f"\nReview, {kind}: {flagged.mean():.1%} flagged; they hold {(flagged & failed).sum()} of {failed.sum()} "
            f"failures; mean IoU flagged {values[flagged].mean() if flagged.any() else float('nan'):.3f}, "
            f"others {values[~flagged].mean():.3f}"
        )
        for reason, count in Counter(name for _, names in own for name in names).most_common():
            print(f"- {reason}: {count}")


if __name__ == "__main__":
    sys.exit(main())
