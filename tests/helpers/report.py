"""Results laid out for a report, and the page as a parser reads it."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lesionsam.evaluation.columns import JITTER_COLUMNS, PRIOR_OFFSET, Evaluation
from lesionsam.evaluation.tables import write_results
from lesionsam.overlays import write_png
from lesionsam.utils.files import write_json_atomic

PROMPTS = ("ring", "centre", "box")


NUM_IMAGES = 9


def made_up(masks: bool, num_images: int = NUM_IMAGES, gain: float = 0.0, seed: int = 0) -> Evaluation:
    """An evaluation of three models by draws, with names that would break a page that does not escape them.

    Args:
        gain: added to every IoU of the adapted model.
    """
    rng = np.random.default_rng(seed)
    rows, curve, bins = [], [], []
    for model, level, prompts in (
        ("zero-shot", 0.5, PROMPTS),
        ("adapted", 0.7, PROMPTS),
        (PRIOR_OFFSET, 0.8, ("box+core",)),
    ):
        for prompt in prompts:
            for k in range(num_images):
                value = float(np.clip(rng.normal(level, 0.05), 0, 1)) if masks else np.nan
                value += gain if model == "adapted" else 0.0
                rows.append(
                    {
                        "model": model,
                        "run": "0",
                        "prompt": prompt,
                        "image_id": f"<b>{k}",
                        "lesion_id": "0",
                        "width": 10,
                        "height": 8,
                        "lesion_share": k / (2 * num_images + 2) if masks else np.nan,
                        "iou": value,
                        "dice": value,
                        "boundary_f1": value,
                        "hd95": 3 * value,
                        "thresholded_jaccard": value,
                        "predicted_share": 0.2,
                        "predicted_iou": 0.7,
                        "entropy": 0.1,
                        "core_coverage": 0.9,
                        "leakage": 0.05,
                        "consistency": 0.85,
                    }
                )
                if prompt == "box" and masks:
                    curve += [
                        {
                            "model": model,
                            "run": "0",
                            "prompt": prompt,
                            "share": share,
                            "image_id": str(k),
                            "lesion_id": "0",
                            "iou": value - share,
                        }
                        for share in (0.0, 0.3)
                    ]
            if masks and model != PRIOR_OFFSET:
                bins += [
                    {
                        "model": model,
                        "run": "0",
                        "prompt": prompt,
                        "region": region,
                        "bin": k,
                        "count": 10,
                        "probability_sum": k * 0.6,
                        "truth_sum": k * 0.5,
                        "squared_error": 1.0,
                    }
                    for region in ("image", "big_box")
                    for k in range(15)
                ]
    columns = ["model", "run", "prompt", "region", "bin", "count", "probability_sum", "truth_sum", "squared_error"]
    return Evaluation(
        pd.DataFrame(rows), pd.DataFrame(bins, columns=columns), pd.DataFrame(curve, columns=list(JITTER_COLUMNS))
    )


def lay_out(folder: Path, root: Path, masks: bool = True, **how: Any) -> tuple[Path, Path]:
    results, training = folder / "results", folder / "models" / "adapted"
    write_results(results, made_up(masks, **how), num_bootstrap=100, confidence=0.95, settings={})
    rng = np.random.default_rng(0)
    for name in ("best_1_a", "best_10_b", "best_2_c", "worst_1_d"):
        write_png(results / "overlays" / f"{name}.png", rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    training.mkdir(parents=True)
    shutil.copy(root / "params.yaml", training)
    write_png(results / "overlays" / "disputed_1_e.png", rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    curves = {
        "loss": [3.0, 2.0, 1.5],
        "objective" if masks else "label_free": [0.5, 0.6, 0.7],
        "trusted": [0.2, 0.5, 0.9],
        "trusted_small": [0.1, 0.2, 0.3],
    }
    pd.DataFrame({"epoch": [1, 2, 3], **curves}).to_csv(training / "history.csv")
    write_json_atomic(
        training / "cost.json",
        {
            "seconds": 90.0,
            "steps": 60,
            "peak_memory_gb": 0.5,
            "threads": 2,
            "memory_of": "process",
            "device": "a <CPU>",
            "torch": "2",
        },
    )
    return results, training


class Page(HTMLParser):
    """What a reader sees: text, table cells and the addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())
