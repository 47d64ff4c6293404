"""Memory of a prediction in shards: `python benchmarks/many_images.py --images 20000`; an hour of one core.

Draws small images with one lesion each, predicts them in shards with the compact SAM, one after another, prints the
memory of each shard's process as its masks appear, merges, and counts the rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE, SEED = 96, 0  # of the images [px]
MARKS = (250, 1000, 2500, 5000, 7500, 10_000, 15_000, 20_000)  # masks of a shard at which memory is printed
LOOK_SECONDS = 1.0


def draw(folder: Path, count: int) -> None:
    """Write JPEG images of dark ellipses on skin, and boxes.csv with each one's big box."""
    rng = np.random.default_rng(SEED)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    noise = rng.normal(0, 6, (SIDE, SIDE, 3))
    lines = ["image_id,big_x0,big_y0,big_x1,big_y1"]
    (folder / "images").mkdir()
    for k in range(count):
        (x, y), (a, b) = rng.uniform(36, 60, 2), rng.uniform(14, 26, 2)
        mask = ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1
        image = np.where(mask[..., None], (120, 80, 70), (210, 170, 150)) + noise
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{k:06d}.jpg", quality=85)
        box = np.clip([x - 1.15 * a, y - 1.15 * b, x + 1.15 * a, y + 1.15 * b], 0, SIDE)
        lines.append(f"{k:06d}," + ",".join(f"{value:.1f}" for value in box))
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def watched(folder: Path, *arguments: str) -> None:
    """Run `lesionsam predict` and print its memory; end with an error where it fails."""
    masks = folder / "out" / "masks"
    before, marks, begun = len(os.listdir(masks)) if masks.is_dir() else 0, list(MARKS), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam", "predict", *arguments],
        cwd=folder,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    peak, done = 0.0, 0
    while process.poll() is None:
        time.sleep(LOOK_SECONDS)
        try:
            memory = psutil.Process(process.pid).memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
        peak, done = max(peak, memory), (len(os.listdir(masks)) if masks.is_dir() else 0) - before
        if marks and done >= marks[0]:
            print(f"  {done} masks, {time.monotonic() - begun:.0f} s: {memory:.0f} MiB", flush=True)
            marks = [mark for mark in marks if mark > done]
    print(f"  end: {done} masks, {time.monotonic() - begun:.0f} s: at most {peak:.0f} MiB", flush=True)
    if process.returncode:
        sys.exit(f"lesionsam predict {' '.join(arguments)}: status {process.returncode}")


def main() -> None:
    """Draw, predict, merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, options.images)
        weights = str(ROOT / "foundation" / "compact.safetensors")
        call = [
            "images",
            "--boxes",
            "boxes.csv",
            "--model",
            weights,
            "--out",
            "out",
            "--no-overlays",
            "--device",
            "cpu",
        ]
        for k in range(1, options.shards + 1):
            print(f"shard {k}/{options.shards}", flush=True)
            watched(folder, *call, "--batch-size", "16", "--shard", f"{k}/{options.shards}")
        print("merge", flush=True)
        watched(folder, "--merge", "out")
        with (folder / "out" / "predictions.csv").open(encoding="utf-8") as file:
            num_rows = sum(1 for _ in file) - 1
        print(f"{num_rows} rows of {options.images} images")
        sys.exit(num_rows != options.images)


if __name__ == "__main__":
    main()
