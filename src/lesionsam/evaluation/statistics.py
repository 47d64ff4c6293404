"""Statistics of one row per lesion: intervals over images, paired tests, strata.

Everywhere the unit is the image: lesions of one image and seeds (runs) of one model are averaged per image first, then
images are resampled, so that an interval says how the figure would move with other images. How it moves with another
seed is the seeds' standard deviation, which stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lesionsam import metrics

METRICS = ("iou", "dice", "boundary_f1", "hd95", "thresholded_jaccard")  # need a mask
LABEL_FREE = ("predicted_iou", "entropy", "core_coverage", "leakage", "consistency")
OBJECTIVE_PROMPTS = ("ring", "centre", "box")  # selection, early stop and sweep use their mean IoU
STRATA = ("small", "medium", "large")


def interval(values: np.ndarray, *, num_bootstrap: int, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of the mean over images.

    Args:
        values: (N,) one figure per image.
    Returns:
        (low, high); both the mean where all values are equal or N is 1, NaN for no values.
    """
    values = np.asarray(values, float)
    if values.size == 0 or np.isnan(values).any():
        return float("nan"), float("nan")
    if values.size == 1 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    batch = max(1, 10_000_000 // values.size)  # resamples at once, so that memory stays under 100 MB
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=num_bootstrap,
        confidence_level=confidence,
        batch=batch,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilcoxon(differences: np.ndarray) -> float:
    """Return the two-sided p of the Wilcoxon signed-rank test; 1 if every difference is 0, NaN for no pairs."""
    differences = np.asarray(differences, float)
    if differences.size == 0:
        return float("nan")
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def per_image(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return one value per image, the mean over its lesions and over runs. Index image_id, sorted."""
    by_run = rows.groupby(["image_id", "run"], sort=True)[column].mean()
    return by_run.groupby("image_id", sort=True).mean()


def paired(
    first: pd.DataFrame, second: pd.DataFrame, column: str, *, num_bootstrap: int, confidence: float
) -> dict[str, float]:
    """Compare first minus second on the images that both have.

    Returns:
        difference, difference_low, difference_high (bootstrap over images), p (Wilcoxon) and num_pairs.
    """
    both = pd.concat([per_image(first, column), per_image(second, column)], axis=1, join="inner").dropna()
    differences = (both.iloc[:, 0] - both.iloc[:, 1]).to_numpy()
    low, high = interval(differences, num_bootstrap=num_bootstrap, confidence=confidence)
    return {
        "difference": float(differences.mean()) if differences.size else float("nan"),
        "difference_low": low,
        "difference_high": high,
        "p": wilcoxon(differences),
        "num_pairs": float(differences.size),
    }


def groups(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Return (model, prompt, rows) in the order in which they first appear."""
    keys = rows[["model", "prompt"]].drop_duplicates().itertuples(index=False, name=None)
    grouped = dict(list(rows.groupby(["model", "prompt"], sort=False)))
    return [(model, prompt, grouped[(model, prompt)]) for model, prompt in keys]


def table(rows: pd.DataFrame, *, reference: str | None, num_bootstrap: int, confidence: float) -> pd.DataFrame:
    """Summarise rows to one row per model and prompt source.

    Args:
        rows: long format of `columns.Evaluation.rows`, with the columns model, run, prompt, image_id and figures.
        reference: model against which the same images are tested in pairs; None for no test.
    Returns:
        model, prompt, num_images, num_runs, miou, low, high, runs_sd (standard deviation over runs of their mean IoU),
        failure_rate, dice, boundary_f1, hd95, thresholded_jaccard, the label-free means, and the paired difference of
        IoU to the reference. Without masks the label-free columns only.
    """
    labelled = has_truth(rows)
    out = []
    for model, prompt, group in groups(rows):
        row: dict[str, float | str | int] = {
            "model": model,
            "prompt": prompt,
            "num_images": group["image_id"].nunique(),
            "num_runs": group["run"].nunique(),
        }
        if labelled:
            known = group.dropna(subset=["iou"])
            values = per_image(known, "iou").to_numpy()
            low, high = interval(values, num_bootstrap=num_bootstrap, confidence=confidence)
            by_run = [per_image(run, "iou").mean() for _, run in known.groupby("run")]
            row |= {
                "miou": float(values.mean()) if values.size else float("nan"),
                "low": low,
                "high": high,
                "runs_sd": float(np.std(by_run, ddof=1)) if len(by_run) > 1 else float("nan"),
                "failure_rate": failures(known),
            }
            row |= {name: float(per_image(known, name).mean()) for name in METRICS if name != "iou"}
        row |= {name: float(per_image(group, name).mean()) for name in LABEL_FREE if name in group}
        out.append(row)
    result = pd.DataFrame(out)
    if labelled and reference is not None:
        tests = []
        for model, prompt, group in groups(rows):
            other = rows[(rows["model"] == reference) & (rows["prompt"] == prompt)]
            comparable = model != reference and len(other)
            tests.append(
                paired(group, other, "iou", num_bootstrap=num_bootstrap, confidence=confidence) if comparable else {}
            )
        columns = ["difference", "difference_low", "difference_high", "p"]
        result = pd.concat([result, pd.DataFrame(tests, columns=columns)], axis=1)
    return result


def failures(rows: pd.DataFrame) -> float:
    """Return the share of masks below IoU 0.65: per image over its lesions and runs, then the mean over images."""
    failed = rows.assign(failed=(rows["iou"] < metrics.FAILURE).astype(float))
    return float(per_image(failed, "failed").mean()) if len(failed) else float("nan")


def has_truth(rows: pd.DataFrame) -> bool:
    """Return whether any row was compared with a true mask."""
    return "iou" in rows and bool(rows["iou"].notna().any())


def objective(rows: pd.DataFrame, model: str) -> float:
    """Return the mean of a model's mIoU over ring, centre point and big box; NaN if one of them is missing."""
    values = []
    for prompt in OBJECTIVE_PROMPTS:
        group = rows[(rows["model"] == model) & (rows["prompt"] == prompt)].dropna(subset=["iou"])
        values.append(float(per_image(group, "iou").mean()) if len(group) else float("nan"))
    return float(np.mean(values))


def strata(rows: pd.DataFrame, *, num_bootstrap: int, confidence: float) -> pd.DataFrame:
    """Return the mean IoU by lesion size: tertiles of the true mask's share of the image over the evaluated lesions.

    Returns:
        model, prompt, stratum, share_low, share_high (of the lesions in it), num_images, miou, low, high, failure_rate;
        empty without masks.
    """
    columns = ["model", "prompt", "stratum", "share_low", "share_high", "num_images", "miou", "low", "high"]
    columns.append("failure_rate")
    if not has_truth(rows):
        return pd.DataFrame(columns=columns)
    rows = rows.dropna(subset=["iou"])
    lesions = rows.drop_duplicates(["image_id", "lesion_id"])
    edges = np.quantile(lesions["lesion_share"], [1 / 3, 2 / 3])
    which = np.searchsorted(edges, rows["lesion_share"], side="left")
    out = []
    for k, name in enumerate(STRATA):
        for model, prompt, group in groups(rows[which == k]):
            values = per_image(group, "iou").to_numpy()
            low, high = interval(values, num_bootstrap=num_bootstrap, confidence=confidence)
            shares = group["lesion_share"].min(), group["lesion_share"].max()
            out.append([model, prompt, name, *shares, values.size, float(values.mean()), low, high, failures(group)])
    return pd.DataFrame(out, columns=columns)


def calibration_scores(calibration: pd.DataFrame) -> pd.DataFrame:
    """Return ECE and Brier score per model, prompt and region from the bin sums of `columns.Evaluation.calibration`."""
    keys = ["model", "prompt", "region"]
    sums = calibration.assign(gap=(calibration["truth_sum"] - calibration["probability_sum"]).abs())
    total = sums.groupby(keys, sort=False)[["gap", "squared_error", "count"]].sum().reset_index()
    return total[keys].assign(ece=total["gap"] / total["count"], brier=total["squared_error"] / total["count"])


def format_interval(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """Format as `0.812 [0.790, 0.830]`, with plus signs for differences; empty for NaN."""
    if np.isnan(value):
        return ""
    return f"{value:{'+' if sign else ''}.3f} [{low:{'+' if sign else ''}.3f}, {high:{'+' if sign else ''}.3f}]"


def wide(result: pd.DataFrame, prompts: Sequence[str], value: str) -> list[list[str]]:
    """Format the table as cells: one row per model, one column per prompt source.

    Args:
        value: "miou" or "difference", with their intervals, "p", or any plain column.
    """
    out = []
    for model in result["model"].drop_duplicates():
        cells = [str(model)]
        for prompt in prompts:
            match = result[(result["model"] == model) & (result["prompt"] == prompt)]
            cells.append(_cell(match.iloc[0], value) if len(match) else "")
        if any(cells[1:]):
            out.append(cells)
    return out


def _cell(row: pd.Series, value: str) -> str:
    if value not in row:
        return ""
    if value == "miou":
        return format_interval(row["miou"], row["low"], row["high"])
    if value == "difference":
        text = format_interval(row["difference"], row["difference_low"], row["difference_high"], sign=True)
        return f"{text} {format_p(row['p'])}" if text else ""
    return "" if pd.isna(row[value]) else f"{row[value]:.{1 if value == 'hd95' else 3}f}"


def format_p(p: float) -> str:
    """Format as `p<.001` or `p=.012`."""
    return "p<.001" if p < 0.001 else f"p={p:.3f}".replace("0.", ".", 1)
