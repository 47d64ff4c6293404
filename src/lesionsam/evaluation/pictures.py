"""Draw best, median, worst and disputed cases: the expert's outline, the prediction and both boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lesionsam.evaluation.cases import LoadImage, LoadMask, predict_cases, upscaled
from lesionsam.evaluation.picks import DISPUTED, GROUPS, Pick, disputed, pick_cases
from lesionsam.models.sam import Sam
from lesionsam.overlays import overlay, sheet, write_png
from lesionsam.types import Sample

MAX_SIDE = 420  # longer side of a picture, pixels


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
        if nothing was picked.
    """
    own = rows[rows["model"] == model]
    shown_on_sheet = pick_cases(own[own["prompt"] == prompt], count) if count else []
    doubts = disputed(own, count)[["image_id", "lesion_id"]].itertuples(index=False, name=None)
    picks = [*shown_on_sheet, *(Pick(DISPUTED, rank, *key) for rank, key in enumerate(doubts, 1))]
    images = {pick.image_id for pick in picks}
    shown = [s for s in samples if s.image_id in images]  # whole images: siblings belong to the truth's rule
    drawn: dict[Pick, np.ndarray] = {}
    for case, masks in predict_cases(
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
        if not of_lesion or (prompt, 0.0) not in masks:
            continue
        prediction = upscaled(masks[(prompt, 0.0)].low_res, case, sam.frame) > 0
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
    """Return group, image and the IoU of each model on this lesion and prompt, the last model of the tables first."""
    same = rows[
        (rows["image_id"] == pick.image_id) & (rows["lesion_id"] == pick.lesion_id) & (rows["prompt"] == prompt)
    ]
    figures = [f"{row['model']} {row['iou']:.2f}" for _, row in same[::-1].iterrows() if pd.notna(row["iou"])]
    lesion = "" if pick.lesion_id == "0" else f" lesion {pick.lesion_id}"
    second = (
        ("IoU: " + ", ".join(figures)) if figures else f"agreement between prompts {same['consistency'].iloc[-1]:.2f}"
    )
    return f"{pick.group} {pick.rank}: {pick.image_id}{lesion}\n{second}"
