"""The page: every figure from a file, everything inside, with and without masks."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.report import NUM_IMAGES, Page, lay_out
from lesionsam.errors import UserError
from lesionsam.overlays import write_png
from lesionsam.report import page as report


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
