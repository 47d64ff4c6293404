"""Time our prediction against a bare loop over segment_anything: `python benchmarks/predict.py`; minutes on one core.

Same weights (the compact SAM), same generated images, same prompts, one thread. The two take turns, image by image, and
CPU time is counted, so that another load on the machine touches both alike. Prints a Markdown table of ratios, images a
second of ours over theirs, and ends with an error where a limit is missed. `--device cuda` counts wall time instead.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from lesionsam.data.sources.synthetic import generate
from lesionsam.inference.auto import AUTO_DEFAULTS, automatic_masks
from lesionsam.inference.files import predict_files
from lesionsam.inference.predictor import Predictor
from lesionsam.models.checkpoint import load_sam

WEIGHTS = Path(__file__).resolve().parents[1] / "foundation" / "compact.safetensors"
ONE_LIMIT, SEVERAL_LIMIT, SECOND_LIMIT_MS = 0.9, 1.0, 100.0
NUM_SEVERAL = 5  # prompts of an image where it has several
Work = Callable[[int], object]  # does one image, or one round of images


def ratio(ours: Work, theirs: Work, rounds: int, clock: Callable[[], float]) -> tuple[float, float, float, float]:
    """Time ours against theirs in turns.

    Returns:
        median ratio of speed, its least and greatest over rounds, our median seconds.
    """
    ours(-1)
    theirs(-1)  # what is made once is made before the clock runs; the last image, whose features the first round drops
    ratios, spent = [], []
    for k in range(rounds):
        times = {}
        for work in (ours, theirs) if k % 2 else (theirs, ours):
            begun = clock()
            work(k)
            times[work] = clock() - begun
        ratios.append(times[theirs] / times[ours])
        spent.append(times[ours])
    return float(np.median(ratios)), min(ratios), max(ratios), float(np.median(spent))


def boxes_of(width: int, height: int) -> np.ndarray:
    """Return (NUM_SEVERAL, 4) XYXY boxes about the middle, of growing size."""
    shares = np.linspace(0.2, 0.45, NUM_SEVERAL)[:, None]
    middle = np.array([width, height]) / 2
    return np.concatenate([middle * (1 - 2 * shares), middle * (1 + 2 * shares)], 1).clip(0, [width, height] * 2)


def write_images(folder: Path, images: Sequence[np.ndarray]) -> None:
    """Write the images as files, and a CSV of one box each."""
    (folder / "images").mkdir()
    rows = ["image_id,big_x0,big_y0,big_x1,big_y1"]
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{k:03}.jpg", quality=95)
        rows.append(f"{k:03}," + ",".join(f"{value:.1f}" for value in boxes_of(*image.shape[1::-1])[2]))
    (folder / "boxes.csv").write_text("\n".join(rows), encoding="utf-8")


def main() -> int:
    """Measure, print the table, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--side", type=int, default=512, help="longest side of the images [px]")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    clock = time.process_time if device.type == "cpu" else time.monotonic
    images = [generate(0, k, arguments.side)[0] for k in range(8)]
    boxes = [boxes_of(*image.shape[1::-1]) for image in images]
    sam = load_sam(None, WEIGHTS).to(device)
    ours, theirs = Predictor(sam, device, num_cached=1), SamPredictor(sam)

    def their_boxes(k: int, chosen: slice) -> None:
        theirs.set_image(images[k % len(images)])
        for box in boxes[k % len(images)][chosen]:
            theirs.predict(box=box, multimask_output=False)

    def their_batch(k: int) -> None:
        image, its = images[k % len(images)], boxes[k % len(images)]
        theirs.set_image(image)
        framed = theirs.transform.apply_boxes_torch(torch.tensor(its, device=device), image.shape[:2])
        theirs.predict_torch(None, None, boxes=framed, multimask_output=False)[0].cpu().numpy()

    def our_boxes(k: int, chosen: slice) -> None:
        ours.predict(images[k % len(images)], boxes=boxes[k % len(images)][chosen])

    one, several = slice(2, 3), slice(None)
    rows: list[tuple[str, tuple[float, float, float, float], float | None]] = [
        (
            "one box, in memory",
            ratio(lambda k: our_boxes(k, one), lambda k: their_boxes(k, one), arguments.rounds, clock),
            ONE_LIMIT,
        ),
        (
            f"{NUM_SEVERAL} boxes, in memory, theirs one by one",
            ratio(lambda k: our_boxes(k, several), lambda k: their_boxes(k, several), arguments.rounds, clock),
            SEVERAL_LIMIT,
        ),
        (
            f"{NUM_SEVERAL} boxes, in memory, theirs as one batch",
            ratio(lambda k: our_boxes(k, several), their_batch, arguments.rounds, clock),
            None,
        ),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, images * 2)
        files = sorted((folder / "images").iterdir())
        (folder / "theirs").mkdir()

        def our_files(k: int) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                predict_files(
                    [folder / "images"],
                    boxes=folder / "boxes.csv",
                    model=WEIGHTS,
                    out=folder / f"out{k}.{time.monotonic_ns()}",
                    device=device,
                    overlays=False,
                    shapes=False,
                )

        def their_files(k: int) -> None:
            predictor = SamPredictor(load_sam(None, WEIGHTS).to(device))
            for path in files:
                image = np.asarray(Image.open(path).convert("RGB"))
                predictor.set_image(image)
                masks, _, _ = predictor.predict(box=boxes_of(*image.shape[1::-1])[2], multimask_output=False)
                Image.fromarray(masks[0].astype(np.uint8) * 255).save(folder / "theirs" / f"{path.stem}.png")

        rows.append(
            (
                f"one box, {len(files)} files to files, loading the weights too",
                ratio(our_files, their_files, max(4, arguments.rounds // 8), clock),
                None,
            )
        )
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=AUTO_DEFAULTS.points_per_side,
        pred_iou_thresh=AUTO_DEFAULTS.pred_iou_thresh,
        stability_score_thresh=AUTO_DEFAULTS.stability_score_thresh,
    )
    rows.append(
        (
            f"all automatic masks, {AUTO_DEFAULTS.points_per_side} points a side",
            ratio(
                lambda k: automatic_masks(sam, images[k % len(images)], AUTO_DEFAULTS, device=device),
                lambda k: generator.generate(images[k % len(images)]),
                max(4, arguments.rounds // 8),
                clock,
            ),
            None,
        )
    )
    ours.predict(images[0], boxes=boxes[0][0])
    again = []
    for k in range(10):
        begun = clock()
        ours.predict(images[0], boxes=boxes[0][k % NUM_SEVERAL])
        again.append(1000 * (clock() - begun))

    today = datetime.datetime.now(tz=datetime.UTC).date()
    print(f"{today}, {platform.machine()}, torch {torch.__version__}, {device}, {arguments.side} px, compact SAM\n")
    print("| images a second, ours / theirs | median | least to greatest | limit | ours [ms] |\n|---|---|---|---|---|")
    for title, (median, low, high, seconds), limit in rows:
        print(f"| {title} | {median:.2f} | {low:.2f} to {high:.2f} | {limit or ''} | {1000 * seconds:.0f} |")
    print(f"\nSecond prompt on an image: {np.median(again):.0f} ms (limit {SECOND_LIMIT_MS:.0f} ms).")
    missed = [title for title, (median, *_), limit in rows if limit is not None and median < limit]
    missed += ["second prompt"] if np.median(again) > SECOND_LIMIT_MS else []
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
