"""Say what an evaluation means, before any table: better than zero-shot, than no network, and where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lesionsam.evaluation import statistics
from lesionsam.evaluation.columns import PRIOR_OFFSET
from lesionsam.evaluation.tables import ADAPTED, LABEL_FREE_TITLES, ZERO_SHOT
from lesionsam.metrics import FAILURE
from lesionsam.prompts import BOTH

NOTICEABLE = 0.03  # change of a label-free measure that is said
SHOWN_IDS = 5
LESS_IS_BETTER = ("leakage", "entropy")


def verdict(table: pd.DataFrame, strata: pd.DataFrame, rows: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    """Return the sentences that a reader needs who reads no table.

    Args:
        table, strata, rows: table.csv, strata.csv and per_image.csv of the results. summary: their summary.json.
    """
    if "miou" not in table:
        return label_free_verdict(rows)
    own = table[table["model"] == ADAPTED].set_index("prompt")
    prompt = next((name for name in ("box", "centre", "ring") if name in own.index), "")
    if not prompt:
        return []
    found = [against_zero_shot(table, own.loc[prompt], prompt)]
    found += against_prior(summary["against_baselines"])
    found.append(failures(own.loc[prompt], strata, prompt))
    return found


def against_zero_shot(table: pd.DataFrame, row: pd.Series, prompt: str) -> str:
    """Compare the adapted model with the one it started from."""
    reached = f"With the prompt {prompt} the adapted model reaches {row['miou']:.3f} mean IoU (Dice {row['dice']:.3f})"
    before = table[(table["model"] == ZERO_SHOT) & (table["prompt"] == prompt)]
    if before.empty or pd.isna(row.get("difference")):
        return f"{reached}."
    low, high = float(row["difference_low"]), float(row["difference_high"])
    return (
        f"{reached}, {compared(low, high)} the unadapted one, which reaches {before.iloc[0]['miou']:.3f}: a difference "
        f"of {statistics.format_interval(row['difference'], low, high, sign=True)}."
    )


def compared(low: float, high: float) -> str:
    """Return in words what the interval of a difference says."""
    return "better than" if low > 0 else "worse than" if high < 0 else "not to be told apart from"


def against_prior(against: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare the answer to both boxes with the best that needs no network, as `tables.against_baselines` has it."""
    for one in against:
        if one["model"] == f"{ADAPTED}, {BOTH}" and one["baseline"] == PRIOR_OFFSET:
            low, high = float(one["difference_low"]), float(one["difference_high"])
            figure = statistics.format_interval(float(one["difference"]), low, high, sign=True)
            return [
                f"Given both boxes it is {compared(low, high)} what needs no network, the box prior with its outline "
                f"offset: {figure}."
            ]
    return []


def failures(row: pd.Series, strata: pd.DataFrame, prompt: str) -> str:
    """Say how often the adapted model fails, and among lesions of which size most often."""
    share = float(row["failure_rate"])
    if not share:
        return f"No mask lies below an IoU of {FAILURE}."
    text = f"On {share:.1%} of the images its mask lies below an IoU of {FAILURE}"
    mine = strata[(strata["model"] == ADAPTED) & (strata["prompt"] == prompt)] if len(strata) else strata
    if mine.empty or mine["failure_rate"].nunique() < 2:
        return f"{text}; see the worst cases."
    worst = mine.loc[mine["failure_rate"].idxmax()]
    return (
        f"{text}, most often among the {worst['stratum']} lesions ({worst['failure_rate']:.1%}, mean IoU "
        f"{worst['miou']:.3f}); see the worst cases."
    )


def label_free_verdict(rows: pd.DataFrame) -> list[str]:
    """Say how measures that need no mask changed by the adaptation, and which images to look at."""
    means = rows.groupby("model", sort=False)[list(LABEL_FREE_TITLES)].mean()
    if not {ZERO_SHOT, ADAPTED} <= set(means.index):
        return []
    found = []
    for name, title in LABEL_FREE_TITLES.items():
        before, after = float(means.loc[ZERO_SHOT, name]), float(means.loc[ADAPTED, name])
        if not np.isfinite([before, after]).all() or abs(after - before) < NOTICEABLE:
            continue
        rose = after > before
        is_worse = rose == (name in LESS_IS_BETTER)
        text = f"{title.capitalize()} {'rose' if rose else 'fell'} from {before:.2f} to {after:.2f}"
        if is_worse:
            own = rows[rows["model"] == ADAPTED].groupby("image_id")[name].mean()
            worst = own.sort_values(ascending=name not in LESS_IS_BETTER).index[:SHOWN_IDS]
            text += f": look at {', '.join(map(str, worst))}"
        found.append(f"{text}.")
    return found or [
        f"No measure that needs no mask changed by {NOTICEABLE} or more; whether the masks are better, only masks tell."
    ]
