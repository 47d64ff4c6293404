"""Pick the cases that are shown as pictures."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lesionsam.evaluation.columns import LEAKING

GROUPS = ("best", "median", "worst")


DISPUTED = "disputed"


AGREEMENT, APART = 0.85, 0.1  # IoU among a model's answers from which they agree, and by how much more than with a mask


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
