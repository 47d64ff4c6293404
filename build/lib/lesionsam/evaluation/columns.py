"""Names and columns of the evaluation's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

ELLIPSE, PRIOR, PRIOR_OFFSET = "ellipse", "box prior", "box prior + offset"


ROW_COLUMNS = (
    "model",
    "run",
    "prompt",
    "image_id",
    "lesion_id",
    "width",
    "height",
    "lesion_share",
    "iou",
    "dice",
    "boundary_f1",
    "hd95",
    "thresholded_jaccard",
    "predicted_share",
    "predicted_iou",
    "entropy",
    "core_coverage",
    "leakage",
    "consistency",
)


JITTER_COLUMNS = ("model", "run", "prompt", "share", "image_id", "lesion_id", "iou")


CALIBRATION_COLUMNS = (
    "model",
    "run",
    "prompt",
    "region",
    "bin",
    "count",
    "probability_sum",
    "truth_sum",
    "squared_error",
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in long format.

    Attributes:
        rows: `ROW_COLUMNS`; lesion_share to thresholded_jaccard are NaN without a mask, predicted_iou, entropy and
            consistency NaN for the baselines.
        calibration: `CALIBRATION_COLUMNS`; region is image or big_box.
        jitter: `JITTER_COLUMNS`.
    """

    rows: pd.DataFrame
    calibration: pd.DataFrame
    jitter: pd.DataFrame

    def labelled(self, model: str, run: str) -> Evaluation:
        """The same figures under a model's name and a run's (runs are seeds of one model)."""
        return Evaluation(*(frame.assign(model=model, run=run) for frame in (self.rows, self.calibration, self.jitter)))


def concat(parts: Sequence[Evaluation]) -> Evaluation:
    """Several models' figures in one."""
    frames = []
    for name in ("rows", "calibration", "jitter"):
        filled = [frame for part in parts if len(frame := getattr(part, name))]
        frames.append(pd.concat(filled, ignore_index=True) if filled else getattr(parts[0], name))
    return Evaluation(*frames)


LEAKING = "tight"  # the bounding box of the true mask: leaks the label


NEARER = "nearer"  # the big box, looked at from nearer
