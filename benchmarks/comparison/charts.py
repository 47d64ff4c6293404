"""Draw how many masks two boxes are worth."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lesionsam.evaluation import statistics
from lesionsam.utils.files import write_bytes_atomic

PANELS = {"ring": "ten ring points", "centre": "centre point", "box": "big box"}
SUPERVISED, BOXES, REFERENCE = "#0b62a3", "#d1702a", "#8a8f99"
NAME = re.compile(r"supervised, (\d+|all) masks")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
}
INTERVALS = {"num_bootstrap": 5000, "confidence": 0.95}


def curve(figures: pd.DataFrame, num_all: int) -> pd.DataFrame:
    """Return the rows of supervised runs by number of masks: masks, prompt, miou, low, high.

    Args:
        figures: long format, see `comparison.units.read_units`. num_all: masks of the row that has all of them.
    """
    table = statistics.table(figures, reference=None, **INTERVALS)
    counts = {
        name: num_all if match[1] == "all" else int(match[1])
        for name in table["model"].unique()
        if (match := NAME.fullmatch(name))
    }
    return table[table["model"].isin(list(counts))].assign(masks=lambda t: t["model"].map(counts)).sort_values("masks")


def masks_worth(supervised: pd.DataFrame, miou: float) -> str:
    """Return how many masks reach a mIoU, interpolated on the curve linearly in the logarithm of their number.

    Args:
        supervised: rows of `curve` of one prompt.
    Returns:
        "about 57", "fewer than 10", or "more than 750".
    """
    masks, values = supervised["masks"].to_numpy(float), np.maximum.accumulate(supervised["miou"].to_numpy(float))
    if miou <= values[0]:
        return f"fewer than {masks[0]:.0f}"
    if miou > values[-1]:
        return f"more than {masks[-1]:.0f}"
    return f"about {np.exp(np.interp(miou, values, np.log(masks))):.0f}"


def draw_labels(path: Path, figures: pd.DataFrame, boxes: str, num_all: int) -> dict[str, str]:
    """Write the picture as PNG and return, per prompt, how many masks the two boxes are worth.

    Args:
        boxes: name of the row without masks. num_all: masks of the row that has all of them.
    """
    supervised, worth = curve(figures, num_all), {}
    table = statistics.table(figures, reference=None, **INTERVALS).set_index(["model", "prompt"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        for axes, (prompt, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
            mine = supervised[supervised["prompt"] == prompt]
            flat = table.loc[(boxes, prompt)]
            worth[prompt] = masks_worth(mine, flat["miou"])
            axes.axhline(flat["miou"], color=BOXES, label="two boxes, no mask")
            axes.axhspan(flat["low"], flat["high"], color=BOXES, alpha=0.15, linewidth=0)
            axes.plot(mine["masks"], mine["miou"], "o-", color=SUPERVISED, label="supervised")
            axes.fill_between(mine["masks"], mine["low"], mine["high"], color=SUPERVISED, alpha=0.15, linewidth=0)
            if (zero := ("zero-shot", prompt)) in table.index:
                axes.axhline(table.loc[zero, "miou"], color=REFERENCE, linestyle=":", label="zero-shot")
            axes.set(xscale="log", xlabel="masks", title=f"{title}: {worth[prompt]} masks")
            axes.set_xticks(mine["masks"].tolist(), [str(n) for n in mine["masks"]], minor=False)
            axes.minorticks_off()
        figure.axes[0].set_ylabel("mean IoU")
        figure.axes[0].legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomic(path, buffer.getvalue())
    return worth
