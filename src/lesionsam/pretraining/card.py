"""Write the card of the compact SAM: how the weights were made and how good they are."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lesionsam.models.compact import CompactArchitecture

ROWS = ("box", "centre", "ring", "box+prior", "prior")
SETS = {"shapes": "held-out shapes", "data": "development images", "probe": "real images"}
SEEN = {
    "shapes": "generated shapes only: `lesionsam.pretraining.shapes`. No photograph,\n"
    "no lesion and no annotation of a person took part. It is a stand-in for trying, testing and teaching; it knows "
    "far less\nthan SAM.",
    "data": "the training images and masks of the parameter file's section `data`.",
}


def card_text(
    *,
    command: str,
    commit: str,
    seed: int,
    machine: str,
    steps: int,
    minutes: float,
    cpu_minutes: float,
    scores: Mapping[str, float],
    sha256: str,
    architecture: CompactArchitecture,
    images: str,
    num_parameters: int,
) -> str:
    """Return the card as Markdown; scores are keyed "set/prompt" as `run.measure` returns them; images: key of
    SEEN.
    """
    numbers = ", ".join(f"{name} {value}" for name, value in asdict(architecture).items())
    table = "\n".join(
        f"| {SETS[name]}, {kind} | {scores[f'{name}/{kind}']:.4f} |"
        for name in SETS
        for kind in ROWS
        if f"{name}/{kind}" in scores
    )
    return f"""# The compact SAM

Segment-anything's own modules with small numbers ({numbers}; {num_parameters:,} parameters), trained from scratch on
{SEEN[images]}

| | |
|---|---|
| command | `{command}` |
| commit | {commit} |
| seed | {seed} |
| machine | {machine} |
| duration | {steps} steps, {minutes:.0f} minutes by the clock, {cpu_minutes:.0f} of the processor |
| weights | moving average, float16; SHA-256 {sha256} |

The learning rate follows the clock, so the same command gives much the same scores, not the same bytes.

Prompts it was trained with: loose boxes, boxes with points, one and several points with and without background, and
mask prompts: the box prior (scaled 0.7 to 3 times) and its own earlier logits. One point also trains the three
candidates.

Zero-shot mean IoU in the model's frame (single mask, threshold 0). Big boxes of the held-out shapes are up to 50 % too
large, those of real images 10 to 20 %. Ring: ten points between the two boxes, all called foreground, which is often
false. Box+prior: the big box with the box prior as mask prompt; prior: the box prior itself, no network. Real images
were measured on, never trained or selected on: the run ends by the clock.

| zero-shot | mean IoU |
|---|---|
{table}
"""


def describe_machine(threads: int) -> str:
    """Return cores and kind of processor, and the number of threads used."""
    return f"{os.cpu_count()}-core {platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def current_commit(folder: Path) -> str:
    """Return the commit of the source tree, with a note if files differ; "unknown" outside a Git clone."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit} with changes" if git("status", "--porcelain", "--untracked-files=no", "--", "src") else commit
