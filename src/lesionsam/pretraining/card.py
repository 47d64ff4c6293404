"""Write the card of the compact SAM: how the weights were made and how good they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from lesionsam.models.compact import CompactArchitecture
from lesionsam.tracking.lineage import lineage_tags

ROWS = ("box", "centre", "ring", "box+prior", "prior")
SETS = {"shapes": "held-out shapes", "data": "development images"}
SEEN = {
    "shapes": "generated shapes only: `lesionsam.pretraining.shapes`. No photograph,\n"
    "no lesion and no annotation of a person took part. It is a stand-in for trying, testing and teaching; it knows "
    "far less\nthan SAM.",
    "data": "the training images and masks of the parameter file's section `data`.",
}


@dataclass
class PretrainProgress:
    """State of a run: steps, chunks, wall-clock and processor seconds, last scores by "set/prompt" (`run.measure`)."""

    step: int = 0
    chunks: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)


def card_text(
    *,
    command: str,
    commit: str,
    seed: int,
    machine: str,
    progress: PretrainProgress,
    sha256: str,
    architecture: CompactArchitecture,
    images: str,
    num_parameters: int,
) -> str:
    """Return the card as Markdown; images: key of SEEN."""
    scores = progress.scores
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
| duration | {progress.step} steps, {progress.seconds / 60:.0f} minutes by the clock, \
{progress.cpu_seconds / 60:.0f} of the processor |
| weights | moving average, float16; SHA-256 {sha256} |

The learning rate follows the clock, so the same command gives much the same scores, not the same bytes.

Prompts it was trained with: loose boxes, boxes with points, one and several points with and without background, and
mask prompts: the box prior (scaled 0.7 to 3 times) and its own earlier logits. One point also trains the three
candidates.

Zero-shot mean IoU in the model's frame (single mask, threshold 0). Big boxes of the held-out shapes are up to 50 % too
large. Ring: ten points between the two boxes, all called foreground, which is often false. Box+prior: the big box with
the box prior as mask prompt; prior: the box prior itself, no network.

| zero-shot | mean IoU |
|---|---|
{table}
"""


def current_commit(folder: Path) -> str:
    """Return the commit of the source tree, with a note if files differ; "unknown" outside a Git clone."""
    tags = lineage_tags(folder)
    commit = tags.get("mlflow.source.git.commit", "unknown")
    return f"{commit} with changes" if tags.get("git.dirty") == "true" else commit
