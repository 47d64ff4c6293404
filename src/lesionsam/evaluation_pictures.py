"""Best, median, worst and disputed cases as pictures: expert's outline, prediction and both boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lesionsam.evaluation_cases import LEAKING, LoadImage, LoadMask, predict_cases, upscaled
from lesionsam.models.sam import Sam
from lesionsam.overlays import overlay, sheet, write_png
from lesionsam.types import Sample

GROUPS = ("best", "median", "worst")
DISPUTED = "disputed"
AGREEMENT, APART = 0.85, 0.1  # IoU among a model's answers from which they agree, and by how much more than with a mask
MAX_SIDE = 420  # longer side of a picture, pixels


@dataclass(frozen=True)
class Pick:
    """A lesion chosen to be shown: its group, its place in it from 1, and its key."""

    group: str
    rank: int
    image_id: str
    lesion_id: str

    @property
    def file_name(self) -> str:
        """`worst_1_IMAGE.png`, with the lesion's id where it is not the first; safe on any file system."""
        name = self.image_id if self.lesion_id == "0" else f"{self.image_id}_{self.lesion_id}"
        return f"{self.group}_{self.rank}_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}.png"


def pick_cases(rows: pd.DataFrame, count: int) -> list[Pick]:
    """Best, median and worst lesions by IoU, or by agreement between prompts where there is no mask; each once.

    Args:
        rows: of one model and prompt source. count: of each group, at most.
    """
    column = "iou" if rows["iou"].notna().any() else "consistency"
    ranked = rows.dropna(subset=[column]).sort_values([column, "image_id", "lesion_id"], ascending=[False, True, True])
    keys = list(ranked[["image_id", "lesion_id"]].itertuples(index=False, name=None))
    count = min(count, len(keys) // len(GROUPS)) or min(1, len(keys))
    start = max(0, (len(keys) - count) // 2)
    chosen = {"best": keys[:count], "median": keys[start : start + count], "worst": keys[::-1][:count]}
    picks, seen = [], set()
    for group in GROUPS:
        for rank, key in enumerate(chosen[group], 1):
            if key not in seen:
                seen.add(key)
                picks.append(Pick(group, rank, *key))
    return picks


def disputed(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """Lesions whose mask deserves a second look: the model gives one answer to all prompts, the mask is another.

    Args:
        rows: of one model, all prompt sources. count: at most so many.
    Returns:
        image_id, lesion_id, consistency (agreement between prompts), iou (the best of any prompt that does not leak the
        mask); the widest gap first. Empty without masks, or where one prompt source alone was evaluated.
    """
    rows = rows[rows["prompt"] != LEAKING].dropna(subset=["iou", "consistency"])
    lesions = rows.groupby(["image_id", "lesion_id"], sort=True)[["consistency", "iou"]].max().reset_index()
    gap = lesions["consistency"] - lesions["iou"]
    chosen = lesions[(lesions["consistency"] >= AGREEMENT) & (gap >= APART)]
    return chosen.loc[gap[chosen.index].sort_values(ascending=False, kind="stable").index].head(count)


def write_pictures(
    folder: Path,
    sam: Sam,
    samples: Sequence[Sample],
    rows: pd.DataFrame,
    load_image: LoadImage,
    load_mask: LoadMask | None,
    *,
    prompt: str,
    model: str,
    count: int,
    seed: int,
    batch_size: int,
    num_points: int,
    device: torch.device | str,
) -> list[Path]:
    """Draw the picked cases of one model and prompt source, and all of them on one sheet.

    Args:
        rows: of the whole evaluation; captions also name what the other models reach on the same lesion.
    Returns:
        Files written: GROUP_RANK_IMAGE.png for each pick, disputed ones among them, and sheet.png with the others; none
        where nothing was picked.
    """
    own = rows[rows["model"] == model]
    shown_on_sheet = pick_cases(own[own["prompt"] == prompt], count) if count else []
    doubts = disputed(own, count)[["image_id", "lesion_id"]].itertuples(index=False, name=None)
    picks = [*shown_on_sheet, *(Pick(DISPUTED, rank, *key) for rank, key in enumerate(doubts, 1))]
    images = {pick.image_id for pick in picks}
    shown = [s for s in samples if s.image_id in images]  # whole images: siblings belong to the truth's rule
    drawn: dict[Pick, np.ndarray] = {}
    for case, answers in predict_cases(
        sam,
        shown,
        load_image,
        load_mask,
        requests=[(prompt, 0.0)],
        seed=seed,
        batch_size=batch_size,
        num_points=num_points,
        device=device,
        title="pictures",
    ):
        sample = case.sample
        of_lesion = [pick for pick in picks if (pick.image_id, pick.lesion_id) == (sample.image_id, sample.lesion_id)]
        if not of_lesion or (prompt, 0.0) not in answers:
            continue
        prediction = upscaled(answers[(prompt, 0.0)][0], case, int(sam.image_encoder.img_size)) > 0
        for pick in of_lesion:
            drawn[pick] = overlay(
                load_image(sample),
                truth=case.truth,
                prediction=prediction,
                big=sample.big_box,
                small=sample.small_box,
                caption=caption(rows, pick, prompt),
                max_side=MAX_SIDE,
            )
    written = []
    for pick in picks:
        write_png(folder / pick.file_name, drawn[pick])
        written.append(folder / pick.file_name)
    if shown_on_sheet:
        page = sheet(
            [drawn[pick] for pick in shown_on_sheet],
            count if len(shown_on_sheet) == count * len(GROUPS) else 4,
            f"{', '.join(GROUPS)} cases of the {model} model, prompt: {prompt}",
        )
        write_png(folder / "sheet.png", page)
        written.append(folder / "sheet.png")
    return written


def caption(rows: pd.DataFrame, pick: Pick, prompt: str) -> str:
    """Group, image and what each model reaches on this lesion with this prompt, the last one of the tables first."""
    same = rows[
        (rows["image_id"] == pick.image_id) & (rows["lesion_id"] == pick.lesion_id) & (rows["prompt"] == prompt)
    ]
    figures = [f"{row['model']} {row['iou']:.2f}" for _, row in same[::-1].iterrows() if pd.notna(row["iou"])]
    lesion = "" if pick.lesion_id == "0" else f" lesion {pick.lesion_id}"
    second = (
        ("IoU: " + ", ".join(figures)) if figures else f"agreement between prompts {same['consistency'].iloc[-1]:.2f}"
    )
    return f"{pick.group} {pick.rank}: {pick.image_id}{lesion}\n{second}"
