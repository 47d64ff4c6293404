"""Names, columns and data frames of the evaluation's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lesionsam.evaluation.statistics import LABEL_FREE, METRICS
from lesionsam.metrics import Calibration

ELLIPSE, PRIOR, PRIOR_OFFSET = "ellipse", "box prior", "box prior + offset"
LEAKING = "tight"  # prompt source: the bounding box of the true mask, which leaks the label

LESION = ("image_id", "lesion_id", "width", "height", "lesion_share")
ROW_COLUMNS = ("model", "run", "prompt", *LESION, *METRICS, "predicted_share", *LABEL_FREE)
JITTER_COLUMNS = ("model", "run", "prompt", "share", "image_id", "lesion_id", "iou")
SUMS = ("count", "probability_sum", "truth_sum", "squared_error")
CALIBRATION_COLUMNS = ("model", "run", "prompt", "region", "bin", *SUMS)


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
    frames = []
    for (prompt, region), c in sums.items():
        squared = np.zeros(len(c.counts))
        squared[0] = c.squared_error  # one number: it stands in the first bin's row
        values = dict(zip(SUMS, (c.counts, c.probability_sums, c.truth_sums, squared), strict=True))
        frames.append(pd.DataFrame({"prompt": prompt, "region": region, "bin": range(len(c.counts)), **values}))
    if not frames:
        return long_frame([], CALIBRATION_COLUMNS)
    return pd.concat(frames, ignore_index=True).reindex(columns=list(CALIBRATION_COLUMNS))
