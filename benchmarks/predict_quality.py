"""Measure prediction on the development images of real pairs: `python benchmarks/predict_quality.py FOLDER`.

FOLDER holds images/{train,val} and masks/{train,val}. As in the comparison, a sixth of its train images, by hash of
their names, are the development images; the val images are not touched. Prints, as Markdown: the gain of an ensemble
over jittered boxes, and of a look from nearer; the lesion without a prompt, by decoder and by automatic masks; what the
flag `look` finds.
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
from lesionsam.inference.decode import Answer, Asked, answers, prediction
from lesionsam.inference.image import FeatureCache
from lesionsam.inference.lesion import DECODER, MASKS, find_lesions, from_nearer
from lesionsam.metrics import FAILURE, failure_rate, iou
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.transforms import model_frames
from lesionsam.utils.images import read_image, read_mask
from lesionsam.utils.progress import progress

DEV_FRACTION, INTERVAL = 1 / 6, {"num_bootstrap": 5000, "confidence": 0.95}
MEMBERS = (1, 2, 4, 8)
FLAGGED = ("ensemble of 1", "ensemble of 4", f"no prompt, by {MASKS}")  # of which the flag `look` is held to the truth
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
    cache, side = FeatureCache(sam, "cpu", 1), int(sam.image_encoder.img_size)
    ious: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    flags: list[tuple[float, tuple[str, ...]]] = []
    for s in progress(samples, total=len(samples), title="development images"):
        image, truth = read_image(s.image_path), read_mask(s.mask_path or "", (s.width, s.height))
        features, input_size = cache.features(image)
        shape, asked = (s.height, s.width), Asked(s.big_box, s.small_box)

        def keep(name: str, answer: Answer, asked: Asked, begun: float) -> None:
            one = prediction(
                answer,
                asked,
                image_id=s.image_id,  # noqa: B023
                lesion_id="0",
                shape=shape,  # noqa: B023
                input_size=input_size,  # noqa: B023
                side=side,
            )
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - begun
            ious.setdefault(name, []).append(iou(one.mask, truth))  # noqa: B023
            if name in FLAGGED:
                flags.append((ious[name][-1], (name, *(kind_of(reason) for reason in one.look))))

        for count in MEMBERS:
            begun = time.process_time()
            (answer,) = answers(
                sam, features, [shape], [asked], [f"{s.image_id}/0"], prompt=arguments.prompt, num_members=count
            )
            keep(f"ensemble of {count}", answer, asked, begun)
        frames = model_frames([image], side)[0]
        if arguments.prompt == "box":
            begun = time.process_time()
            (answer,) = from_nearer(sam, frames, [input_size], [shape], [asked])
            keep("from nearer", answer, asked, begun)
        for way in (DECODER, MASKS):
            begun = time.process_time()
            ((logits, quality, agreement),) = find_lesions(sam, features, frames, [input_size], by=way, options=options)
            keep(f"no prompt, by {way}", Answer(logits, quality, agreement), Asked(), begun)
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
            f"\nLook, {kind}: {flagged.mean():.1%} flagged; they hold {(flagged & failed).sum()} of {failed.sum()} "
            f"failures; mean IoU flagged {values[flagged].mean() if flagged.any() else float('nan'):.3f}, "
            f"others {values[~flagged].mean():.3f}"
        )
        for reason, count in Counter(name for _, names in own for name in names).most_common():
            print(f"- {reason}: {count}")


if __name__ == "__main__":
    sys.exit(main())
