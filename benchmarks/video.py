"""Track lesions through generated clips from one given box, beside that box copied and the box given in every frame.

    python benchmarks/video.py --write        # about ten minutes on one core; puts the table into docs/results.md

Each clip is generated with the mask of every frame (`data.sources.clips`); in every fourth a part of the lesion leaves
the frame. Big boxes are 10 to 20 % larger than the lesion. A frame without lesion counts 1 where the mask is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.geometry import largest_component_box, loosen
from lesionsam.data.sources.clips import GeneratedClip
from lesionsam.metrics import iou
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.video.boxes import with_core
from lesionsam.video.crops import decode_crop
from lesionsam.video.propagation import Propagation
from record import Limits, provenance, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- video: written by benchmarks/video.py -->", "<!-- end of video -->"
SEED = 0
LOOSENESS = (0.10, 0.20)
MARGIN = 0.03  # mean IoU that following may lie below a box in every frame
ROWS = ("box in frame 0, copied", "box in frame 0, followed", "the same with mask prompt", "box in every frame")


def measure(sam: Sam, clip: GeneratedClip, looseness: float) -> np.ndarray:
    """Return (4, frames) IoU of `ROWS`."""
    trackers = Propagation(sam), Propagation(sam, mask_prompt=True)
    first: np.ndarray | None = None
    found = []
    for number in range(len(clip)):
        image, mask = clip.frame(number)
        box = largest_component_box(mask)
        box = None if box is None else loosen(box, looseness, (mask.shape[0], mask.shape[1]))
        if number == 0:
            first = box
        if first is None:
            raise ValueError("a clip begins with its lesion in view")
        given = {"0": with_core(first)} if number == 0 else {}
        masks = [decode_crop(sam, image, first).mask(mask.shape, sam.frame)]
        masks += [tracker.step(image, given)["0"].mask for tracker in trackers]
        masks.append(np.zeros_like(mask) if box is None else decode_crop(sam, image, box).mask(mask.shape, sam.frame))
        found.append([1.0 if not (one | mask).any() else iou(one, mask) for one in masks])
    return np.array(found).T


def text_of(scores: np.ndarray, leaves: Sequence[bool], limits: Limits, source: str) -> str:
    """Return the table of (clips, 4, frames) IoU."""
    groups = {"all": np.ones(len(leaves), bool), "stays in view": ~np.array(leaves), "partly leaves": np.array(leaves)}
    rows = []
    for k, name in enumerate(ROWS):
        cells = [f"{scores[chosen, k].mean():.3f}" for chosen in groups.values()]
        last = f"{scores[:, k, -1].mean():.3f}"
        lost = f"{(scores[:, k] < 0.5).mean():.1%}"
        rows.append([name, *cells, last, lost])
    gap = float(scores[:, 3].mean() - scores[:, 1].mean())
    limit = limits.cell("below a box in every frame", 100 * gap, 100 * MARGIN, most=True, form=".1f")
    heads = ["boxes", *(f"{name} ({int(chosen.sum())} clips)" for name, chosen in groups.items()), "last frame"]
    return (
        f"Mean IoU per frame over {len(scores)} generated clips of {scores.shape[2]} frames, {source}.\n\n"
        + table([*heads, "frames below .5"], rows)
        + f"\n\nFollowing from one box is {limit} points below a box in every frame.\n"
    )


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "foundation" / "compact.safetensors", help="weights")
    parser.add_argument("--clips", type=int, default=20, help="number of clips (20)")
    parser.add_argument("--frames", type=int, default=60, help="of a clip (60)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    a = parser.parse_args()
    torch.set_num_threads(1)
    sam = load_sam(None, a.model)
    scores, leaves = [], []
    for index in range(a.clips):
        leaves.append(index % 4 == 3)
        looseness = np.random.default_rng([SEED, index]).uniform(*LOOSENESS)
        clip = GeneratedClip(SEED, index, num_frames=a.frames, leaves=leaves[-1])
        scores.append(measure(sam, clip, looseness))
        print(
            f"clip {index}: "
            + ", ".join(f"{name} {one.mean():.3f}" for name, one in zip(ROWS, scores[-1], strict=True)),
            flush=True,
        )
    limits = Limits()
    source = f"{a.model.name} as it is, seed {SEED}; {provenance(torch.device('cpu'))}"
    text = text_of(np.array(scores), leaves, limits, source)
    print(text)
    if a.write:
        old = RESULTS.read_text(encoding="utf-8")
        head, _, rest = old.partition(BEGIN)
        _, _, tail = rest.partition(END)
        RESULTS.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", encoding="utf-8")
    return limits.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
