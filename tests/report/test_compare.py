"""Runs side by side: the figures, what they share, where they are found, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from helpers.report import Page, lay_out
from lesionsam.errors import UserError
from lesionsam.evaluation.tables import ADAPTED, ZERO_SHOT, read_csv, write_csv
from lesionsam.report.comparison import compare, model_cells, setting_cells, shared_pictures, side_by_side, tabulated
from lesionsam.report.runs import EvaluatedRun, commit_of, in_folder, open_runs, short


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, Path]:
    """Two runs with the same draws, the second better by .1 everywhere and trained with another temperature."""
    folder = tmp_path_factory.mktemp("runs")
    for name, gain in (("first", 0.0), ("second", 0.1)):
        _, training = lay_out(folder / name, root, gain=gain)
        if gain:
            text = (training / "params.yaml").read_text()
            assert text.count("temperature: 0.1 ") == 1
            (training / "params.yaml").write_text(text.replace("temperature: 0.1 ", "temperature: 0.3 "))
    return folder / "first", folder / "second"


def runs_of(*folders: Path) -> list[EvaluatedRun]:
    return [in_folder(folder, folder.name) for folder in folders]


def test_a_constant_gain_is_found_with_a_closed_interval(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Nine paired differences of .1 exactly: the interval is the point, Wilcoxon's exact p is 2 / 2^9."""
    size = compare([str(folder) for folder in pair], tmp_path / "c.html", tmp_path)
    assert (tmp_path / "c.html").stat().st_size == size
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:image/") for address in page.addresses)
    start = page.words.index("Paired difference of IoU to first, with interval and Wilcoxon p")
    row = page.words.index("second", start)
    cells = [word for word in page.words[row + 1 : row + 20] if word]
    assert cells[:6] == ["+0.100", "[+0.100, +0.100]\np=.004"] * 3
    assert page.words.count("zero-shot") >= 2
    assert "zero-shot of first" not in text
    assert "method.temperature" in page.words
    row = page.words.index("Pretrained models")
    cells = [word for word in page.words[row + 1 : row + 80] if word.strip()]
    assert cells[:5] == ["pretrained model", "encoder", "Mean IoU of ring, centre, box: zero-shot", "adapted", "gain"]
    assert "+0.100" in page.words[page.words.index("second minus first") :]


def test_shared_models_stand_once_and_others_per_run(pair: tuple[Path, Path], tmp_path: Path, root: Path) -> None:
    assert list(side_by_side(runs_of(*pair))["model"].drop_duplicates()) == [
        "box prior + offset",
        ZERO_SHOT,
        "first",
        "second",
    ]
    lay_out(tmp_path / ZERO_SHOT, root, seed=1)
    models = list(side_by_side(runs_of(pair[0], tmp_path / ZERO_SHOT))["model"].drop_duplicates())
    assert models == [
        "box prior + offset of first",
        "box prior + offset of zero-shot",
        "zero-shot of first",
        "zero-shot of zero-shot",
        "first",
        "run zero-shot",
    ]


def test_each_run_names_its_pretrained_model_with_both_figures(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model, seed, gain in (("a", "compact", 0, 0.0), ("b", "some/sam2", 1, 0.1)):
        _, training = lay_out(tmp_path / name, root, seed=seed, gain=gain)
        text = (training / "params.yaml").read_text()
        (training / "params.yaml").write_text(text.replace("name: compact", f"name: {model}", 1))
    runs = runs_of(tmp_path / "a", tmp_path / "b")
    rows = side_by_side(runs)
    table = tabulated(rows, "a", {"num_bootstrap": 100, "confidence": 0.95})
    _, *cells = model_cells(runs, table)
    assert [row[:3] for row in cells] == [["a", "compact", "blocks"], ["b", "some/sam2", "blocks"]]
    for name, (*_, zero_shot, adapted, gain) in zip("ab", cells, strict=True):
        own = rows[rows["prompt"].isin(["ring", "centre", "box"])]
        for model, shown in ((f"zero-shot of {name}", zero_shot), (name, adapted)):
            of_images = own[own["model"] == model].groupby(["prompt", "image_id"])["iou"].mean()
            assert float(shown) == pytest.approx(of_images.groupby("prompt").mean().mean(), abs=6e-4)
        assert float(gain) == pytest.approx(float(adapted) - float(zero_shot), abs=1.1e-3)
    compare([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "c.html", tmp_path)
    assert "some/sam2" in capsys.readouterr().out


def test_only_lesions_that_all_have_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "fewer")
    path = tmp_path / "fewer" / "results" / "per_image.csv"
    rows = read_csv(path)
    write_csv(path, rows[~rows["image_id"].isin(["<b>0", "<b>3"])])
    both = side_by_side(runs_of(pair[0], tmp_path / "fewer"))
    assert set(both.groupby("model")["image_id"].nunique()) == {7}
    compare([str(pair[0]), str(tmp_path / "fewer")], tmp_path / "c.html", tmp_path)
    assert "Left out, since not every run has them: 2 lesions of first, 2 lesions of fewer." in (
        tmp_path / "c.html"
    ).read_text(encoding="utf-8")


def test_lesions_pictured_in_every_run_stand_side_by_side(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "other")
    overlays = tmp_path / "other" / "results" / "overlays"
    (overlays / "best_1_a.png").unlink()
    (overlays / "best_10_b.png").rename(overlays / "median_1_b.png")
    (cases,) = shared_pictures(runs_of(pair[0], tmp_path / "other"))
    assert [picture["name"] for picture in cases["pictures"]] == ["d", "c", "b", "e"]  # pyright: ignore
    shutil.rmtree(overlays)
    assert shared_pictures(runs_of(pair[0], tmp_path / "other")) == []


def test_settings_that_differ_and_no_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert setting_cells(runs_of(*pair)) == [["", "first", "second"], ["method.temperature", "0.1", "0.3"]]
    shutil.copytree(pair[1] / "results", tmp_path / "alone")
    bare = in_folder(tmp_path / "alone", "alone")
    assert bare.params is None
    assert setting_cells([runs_of(pair[0])[0], bare])[1][2] == "not known"


def test_without_masks_agreement_is_compared(tmp_path: Path, root: Path, pair: tuple[Path, Path]) -> None:
    for name in ("a", "b"):
        lay_out(tmp_path / name, root, masks=False)
    compare([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "c.html", tmp_path)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "agreement between prompts" in page
    assert "Mean IoU" not in page
    with pytest.raises(UserError, match="first was evaluated against masks and a without"):
        side_by_side(runs_of(pair[0], tmp_path / "a"))


def test_what_cannot_be_compared_is_one_clear_line(pair: tuple[Path, Path], tmp_path: Path, root: Path) -> None:
    first = str(pair[0])
    shutil.copytree(pair[0], tmp_path / "x" / "first")
    (tmp_path / "empty").mkdir()
    for texts, message in (
        ([first], "expected two runs or more, got 1"),
        ([first, str(tmp_path / "x" / "first")], "'first' names two of them"),
        ([first, f"{first}/results"], "first and .*first/results are one evaluation, that in .*; a run stands once"),
        ([first, str(tmp_path / "empty")], "empty: no evaluation in it, .* run `dvc repro evaluate` there"),
        ([first, "no-such-run"], "no-such-run: no such folder, commit or experiment; expected a folder with results/"),
        ([first, "--upload-pack=x"], "no such folder, commit or experiment"),
    ):
        with pytest.raises(UserError, match=message), open_runs(texts, tmp_path):
            pass
    part = tmp_path / "part"
    shutil.copytree(pair[0], part)
    (part / "results" / "per_image.csv").unlink()
    with (
        pytest.raises(UserError, match=r"part: its evaluation is not whole, without per_image.csv"),
        open_runs([first, str(part)], tmp_path),
    ):
        pass
    for content, message in (("", "expected a CSV"), ("a,b\n1,2\n", "expected a column 'model'")):
        (part / "results" / "per_image.csv").write_text(content)
        with pytest.raises(UserError, match=f"per_image.csv: {message}.* run `dvc repro evaluate` again"):
            side_by_side(runs_of(pair[0], part))
    other = lay_out(tmp_path / "other", root)[0] / "per_image.csv"
    write_csv(other, read_csv(other).assign(image_id="elsewhere"))
    with pytest.raises(UserError, match="first, other: no test lesion in common"):
        side_by_side(runs_of(pair[0], tmp_path / "other"))


def test_names() -> None:
    assert [short("0123456789abcdef0123456789abcdef"), short("runs:/" + 32 * "a"), short("exp-1")] == [
        "01234567",
        "aaaaaaaa",
        "exp-1",
    ]


def test_experiments_and_commits_come_out_of_dvc(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A repository whose one stage copies prepared results: the commit has the first, the experiment the second."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "dvc.yaml").write_text(
        "stages:\n  evaluate:\n    cmd: python prepare.py\n    params: [which]\n    outs: [results, models/adapted]\n"
    )
    (repository / "params.yaml").write_text("which: 0\n")
    (repository / "prepare.py").write_text(
        f"import shutil\nwhich = int(open('params.yaml').read().split(':')[1])\nfolder = {[*map(str, pair)]!r}[which]\n"
        "for name in ('results', 'models/adapted'):\n    shutil.copytree(f'{folder}/{name}', name)\n"
    )
    environment = {
        **os.environ,
        "DVC_NO_ANALYTICS": "true",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    dvc = [sys.executable, "-P", "-m", "dvc"]
    for command in (
        ["git", "init", "-q", "-b", "main"],
        ["git", "commit", "-q", "--allow-empty", "-m", "empty"],
        [*dvc, "init", "-q"],
        [*dvc, "repro", "-q"],
        ["git", "add", "-A"],
        ["git", "commit", "-q", "-m", "one"],
        [*dvc, "exp", "run", "-q", "-n", "warmer", "-S", "which=1"],
    ):
        subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True)
    assert commit_of("warmer", repository) not in (None, commit_of("main", repository))
    with open_runs(["main", "warmer"], repository) as runs:
        for run, folder in zip(runs, pair, strict=True):
            pd.testing.assert_frame_equal(
                read_csv(run.results / "per_image.csv"), read_csv(folder / "results" / "per_image.csv")
            )
        rows = side_by_side(runs)
        assert setting_cells(runs)[1:] == [["method.temperature", "0.1", "0.3"]]
    means = rows.groupby("model")["iou"].mean()
    assert means["warmer"] - means["main"] == pytest.approx(0.1, abs=1e-5)
    assert ADAPTED not in means
    missed = pytest.raises(UserError, match=r"main~1: DVC does not give its results \(.*`dvc repro` in that commit")
    with missed as told, open_runs(["main~1", str(pair[0])], repository):
        pass
    assert "results" in str(told.value).partition("(")[2].partition(")")[0]  # what DVC misses
    assert "help" not in str(told.value)
