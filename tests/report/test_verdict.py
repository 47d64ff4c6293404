"""The sentences at the top of the report: what an evaluation means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lesionsam.evaluation.columns import PRIOR_OFFSET
from lesionsam.evaluation.tables import ADAPTED, LABEL_FREE_TITLES, ZERO_SHOT
from lesionsam.report.verdict import verdict


def table(difference: tuple[float, float, float], failure_rate: float = 0.05) -> pd.DataFrame:
    names = ("difference", "difference_low", "difference_high")
    rows = [
        {"model": ZERO_SHOT, "prompt": "box", "miou": 0.765, "dice": 0.85, "failure_rate": 0.2}
        | dict.fromkeys(names, np.nan),
        {"model": ADAPTED, "prompt": "box", "miou": 0.841, "dice": 0.911, "failure_rate": failure_rate}
        | dict(zip(names, difference, strict=True)),
    ]
    return pd.DataFrame(rows)


def strata(rates: tuple[float, ...]) -> pd.DataFrame:
    rows = [
        {"model": ADAPTED, "prompt": "box", "stratum": name, "miou": 0.8, "failure_rate": rate}
        for name, rate in zip(("small", "medium", "large"), rates, strict=True)
    ]
    return pd.DataFrame(rows)


def against(low: float, high: float) -> dict[str, object]:
    one = {"model": f"{ADAPTED}, box+core", "baseline": PRIOR_OFFSET, "difference": (low + high) / 2}
    return {"against_baselines": [one | {"difference_low": low, "difference_high": high}]}


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.05, 0.1), "better than"), ((-0.02, 0.1), "not to be told apart from"), ((-0.1, -0.05), "worse than")],
)
def test_each_comparison_is_said_as_its_interval_allows(interval: tuple[float, float], words: str) -> None:
    middle = sum(interval) / 2
    found = verdict(table((middle, *interval)), strata((0.1, 0.0, 0.0)), pd.DataFrame(), against(*interval))
    assert f"reaches 0.841 mean IoU (Dice 0.911), {words} the unadapted one, which reaches 0.765" in found[0]
    assert f"Given both boxes it is {words} what needs no network" in found[1]
    assert "On 5.0% of the images" in found[2]
    assert "most often among the small lesions (10.0%" in found[2]


def test_without_a_failure_or_a_baseline_nothing_is_made_up() -> None:
    found = verdict(table((0.07, 0.05, 0.1), 0.0), strata((0.0, 0.0, 0.0)), pd.DataFrame(), {"against_baselines": []})
    assert len(found) == 2
    assert found[1] == "No mask lies below an IoU of 0.65."


def label_free(coverage: tuple[float, float]) -> pd.DataFrame:
    """Per-image rows without masks; the coverage of the adapted model falls on image b alone."""
    rows = []
    for model, value in zip((ZERO_SHOT, ADAPTED), coverage, strict=True):
        for image in "abcdefgh":
            row = dict.fromkeys(LABEL_FREE_TITLES, 0.5) | {"model": model, "image_id": image, "prompt": "box"}
            rows.append(row | {"core_coverage": 8 * value - 7 if image == "b" else 1.0})
    return pd.DataFrame(rows)


def test_without_masks_a_measure_that_became_worse_names_the_images_to_look_at() -> None:
    plain = pd.DataFrame({"model": [ADAPTED], "prompt": ["box"], "consistency": [0.5]})
    (text,) = verdict(plain, pd.DataFrame(), label_free((1.0, 0.93)), {})
    assert text.startswith("Core covered fell from 1.00 to 0.93: look at b, ")
    (text,) = verdict(plain, pd.DataFrame(), label_free((0.93, 1.0)), {})
    assert text == "Core covered rose from 0.93 to 1.00."
    (text,) = verdict(plain, pd.DataFrame(), label_free((1.0, 0.99)), {})
    assert "only masks tell" in text
