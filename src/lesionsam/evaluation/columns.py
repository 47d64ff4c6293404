"""Names, columns and data frames of the evaluation's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lesionsam.metrics import Calibration

ELLIPSE, PRIOR, PRIOR_OFFSET = "ellipse", "box prior", "box prior + offset"
LEAKING = "tight"  # prompt source: the bounding box of the true mask, which leaks the label

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
    """The results of an evaluation, in long format.

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
        """Return the same results under the name of a model and of a run (runs are seeds of one model)."""
        return Evaluation(*(frame.assign(model=model, run=run) for frame in (self.rows, self.calibration, self.jitter)))


def concat(parts: Sequence[Evaluation]) -> Evaluation:
    """Join the results of several models."""
    frames = []
    for name in ("rows", "calibration", "jitter"):
        filled = [frame for part in parts if len(frame := getattr(part, name))]
        frames.append(pd.concat(filled, ignore_index=True) if filled else getattr(parts[0], name))
    return Evaluation(*frames)


def long_frame(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    """Return rows as a data frame with these columns, also without rows."""
    return pd.DataFrame(rows, columns=list(columns))


def calibration_frame(sums: Mapping[tuple[str, str], Calibration]) -> pd.DataFrame:
    """Return the calibration of each (prompt, region) as `CALIBRATION_COLUMNS`, a row per bin."""
    rows = []
    for (prompt, region), c in sums.items():
        for k in range(len(c.counts)):  # the squared error is one number: it stands in the first bin's row
            rows.append(
                {
                    "prompt": prompt,
                    "region": region,
                    "bin": k,
                    "count": c.counts[k],
                    "probability_sum": c.probability_sums[k],
                    "truth_sum": c.truth_sums[k],
                    "squared_error": c.squared_error if k == 0 else 0.0,
                }
            )
    return long_frame(rows, CALIBRATION_COLUMNS)
