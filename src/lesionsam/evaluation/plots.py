"""Small tables for `dvc plots`, one column per curve: DVC draws columns, and does not select rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lesionsam.evaluation.tables import ADAPTED, ZERO_SHOT, slug, write_csv
from lesionsam.metrics import NUM_BINS

MODELS = (ZERO_SHOT, ADAPTED)
SHOWN = (*MODELS, "box prior + offset")
JITTER_PROMPTS = ("box", "box+core")


def write_plots(folder: Path, table: pd.DataFrame, jitter: pd.DataFrame, calibration: pd.DataFrame) -> None:
    """Write prompts.csv, jitter.csv and calibration.csv.

    Without masks there is no IoU: prompts.csv then holds the agreement between prompts, and the others one empty row.

    Args:
        table, jitter, calibration: as in the CSV files of `tables.write_results`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    score = "miou" if "miou" in table else "consistency"
    rows = table[table["model"].isin(SHOWN) & table[score].notna()]
    bars = pd.DataFrame({"row": rows["prompt"] + ", " + rows["model"], "score": rows[score]})
    write_csv(folder / "prompts.csv", bars.sort_values("row"))
    write_csv(folder / "jitter.csv", _curves(jitter, "share", "miou", JITTER_PROMPTS))
    whole = calibration[calibration["region"] == "image"] if len(calibration) else calibration
    whole = whole.assign(confidence=(whole["bin"] + 0.5) / NUM_BINS) if len(whole) else whole
    write_csv(folder / "calibration.csv", _curves(whole, "confidence", "accuracy", ("box",)))


def _curves(rows: pd.DataFrame, x: str, y: str, prompts: tuple[str, ...]) -> pd.DataFrame:
    """Return a column of y per model and prompt, by x; a row of NaN where there is nothing to show."""
    names = [f"{slug(model)}_{slug(prompt)}" for model in MODELS for prompt in prompts]
    if not len(rows):
        return pd.DataFrame([[0.0, *(float("nan") for _ in names)]], columns=[x, *names])
    named = rows.assign(curve=[f"{slug(m)}_{slug(p)}" for m, p in zip(rows["model"], rows["prompt"], strict=True)])
    return named.pivot_table(index=x, columns="curve", values=y).reindex(columns=names).reset_index()
