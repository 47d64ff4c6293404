"""The page: every figure from a file, everything inside, with and without masks."""

from __future__ import annotations

import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lesionsam import report
from lesionsam.errors import UserError
from lesionsam.evaluation import JITTER_COLUMNS, PRIOR_OFFSET, Evaluation
from lesionsam.evaluation_results import write_results
from lesionsam.files import write_json_atomic
from lesionsam.overlays import write_png

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
        "objective": [0.5, 0.6, 0.7],
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


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, Path]:
    return lay_out(tmp_path_factory.mktemp("run"), root)


@pytest.fixture(scope="module")
def text(laid_out: tuple[Path, Path]) -> str:
    output = laid_out[0].parent / "index.html"
    size = report.build_report(laid_out[0], laid_out[1], output, commit="0123abc")
    assert output.stat().st_size == size
    return output.read_text(encoding="utf-8")


def test_every_cell_of_the_main_table_is_the_file_s(text, laid_out):
    words = Page(text).words
    table = pd.read_csv(laid_out[0] / "table.csv")
    for value in [*table["miou"], *table["failure_rate"], *table["difference"].dropna()]:
        assert any(word.lstrip("+") == f"{value:.3f}" for word in words), value


def test_page_is_whole_and_fetches_nothing(text):
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) >= 9
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", text)


def test_sections_name_their_files_and_the_settings(text):
    for name in (
        "results/per_image.csv",
        "results/strata.csv",
        "results/jitter.csv",
        "results/calibration.csv",
        "adapted/history.csv",
        "git checkout 0123abc",
        "dvc repro",
        "teacher_prompt",
        "two boxes per lesion",
    ):
        assert name in text, name


def test_disputed_lesions_are_those_on_which_the_answers_agree_and_the_mask_does_not(text, laid_out):
    """The answers agree by .85 everywhere; disputed are lesions whose best IoU, of three prompts, is below .75."""
    rows = pd.read_csv(laid_out[0] / "per_image.csv")
    best = rows[rows["model"] == "adapted"].groupby("image_id")["iou"].max()
    wanted = best[best < 0.75].sort_values()
    assert 0 < len(wanted) < NUM_IMAGES
    words = Page(text).words
    start = words.index("Worth a second look at the label")
    found = [word for word in words[start:] if word.startswith("<b>")]
    assert found == list(wanted.index)
    assert 'aria-label="disputed-1-e, enlarge"' in text


def test_gate_time_and_memory(text):
    words = Page(text).words
    assert "What the gate let through" in words
    assert {"1.5 min", "1.50 s", "0.50 GB", "a <CPU>, 2 CPU thread(s), torch 2"} <= set(words)


def test_a_thousand_images_are_quick_and_small(tmp_path, root):
    """With as many pictures as the page takes, of noise, which compresses worst. Seconds of the processor."""
    results, training = lay_out(tmp_path, root, num_images=1000)
    noise = np.random.default_rng(0).integers(0, 255, (420, 420, 3), dtype=np.uint8)
    write_png(tmp_path / "noise.png", noise)
    for group in ("best", "median", "worst", "disputed"):
        for k in range(1, report.MAX_PICTURES + 2):
            shutil.copy(tmp_path / "noise.png", results / "overlays" / f"{group}_{k}_x.png")
    begun = time.process_time()
    size = report.build_report(results, training, tmp_path / "index.html")
    assert time.process_time() - begun < 30
    assert size < 15e6
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('aria-label="worst') == report.MAX_PICTURES


def test_a_page_that_cannot_be_written_is_one_clear_line(laid_out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"index.html: cannot be written \(.*\); name another place"):
        report.build_report(laid_out[0], laid_out[1], tmp_path / "file" / "index.html")


def test_cases_come_in_order_of_rank(text):
    places = [
        text.index(f'aria-label="{name}, enlarge"') for name in ("best-1-a", "best-2-c", "best-10-b", "worst-1-d")
    ]
    assert places == sorted(places)


def test_without_masks_the_page_says_so_and_shows_what_there_is(tmp_path, root):
    results, training = lay_out(tmp_path, root, masks=False)
    report.build_report(results, training, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "have no masks" in page
    assert "Core covered" in page
    assert "Mean IoU" not in page
    assert "Calibration" not in page


def test_no_evaluation_is_one_clear_line(tmp_path):
    for content, message in (
        (None, "run `dvc repro evaluate` first"),
        ("{", "run `dvc repro evaluate` again"),
        ("{}", r"params.yaml: no such file; run `dvc repro train` first"),
    ):
        if content is not None:
            (tmp_path / "summary.json").write_text(content)
        with pytest.raises(UserError, match=message):
            report.build_report(tmp_path, tmp_path, tmp_path / "index.html")


def test_a_page_too_large_is_refused_and_nothing_written(laid_out, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match=r"at most 0 MB; lower evaluate\.overlays"):
        report.build_report(laid_out[0], laid_out[1], tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()
