"""The contact sheet, areas in mm2, marks of the annotator, separate parts, and arguments that are refused at once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from lesionsam.boxes.marks import journal_path, marked_images
from lesionsam.inference.files import predict_files
from lesionsam.inference.outputs import COLUMN_GUIDE, COLUMNS, EARLIER_COLUMNS, Row, read_table
from lesionsam.inference.parts import num_parts
from lesionsam.inference.prediction import NO_PROMPT, LesionPrompt, review_reasons
from lesionsam.inference.sheet import PAGE_ROWS, write_sheet
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture

TINY = CompactArchitecture(image_size=64, patch_size=8, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=64)


class Page(HTMLParser):
    """What a browser would load from a page, its links, and the names under its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src" and value is not None:
                self.sources.append(value)
            elif name == "href" and value is not None:
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def row(k: int, reasons: str = "") -> Row:
    values = dict.fromkeys(COLUMNS, "") | {"image_id": f"<i>{k}", "lesion_id": "0", "mask": f"masks/im {k}.png"}
    return values | {"area": str(k), "predicted_iou": "0.9", "review_reasons": reasons}


def test_doubtful_masks_come_first_and_pages_are_linked(tmp_path: Path) -> None:
    rows = [row(k, "empty" if k in (3, PAGE_ROWS + 1) else "") for k in range(PAGE_ROWS + 2)]
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "im 3.png").touch()
    (tmp_path / "index-3.html").touch()
    (tmp_path / "index-notes.html").touch()
    write_sheet(tmp_path, lambda: rows)
    first, second = Page(tmp_path / "index.html"), Page(tmp_path / "index-2.html")
    assert [unquote(source) for source in first.sources[:3]] == [
        "overlays/im 3.png",
        f"masks/im {PAGE_ROWS + 1}.png",
        "masks/im 0.png",
    ], "a mask takes the place of a picture that is not there"
    assert len(first.sources) == PAGE_ROWS
    assert len(second.sources) == 2
    assert "index-2.html" in first.links
    assert "index.html" in second.links
    assert "<i>3" in first.text, "names are escaped"
    assert f"{PAGE_ROWS + 2} masks, 2 of them to review" in first.text
    assert all(name in first.text for name in COLUMNS)
    assert not [source for source in first.sources + first.links if "//" in source], "nothing is loaded from a network"
    assert not (tmp_path / "index-3.html").exists(), "pages of an earlier, larger prediction go"
    assert (tmp_path / "index-notes.html").exists()


def test_memory_does_not_grow_with_the_number_of_masks(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        def rows() -> Iterator[Row]:
            return (row(k, "empty" if k % 3 == 0 else "") for k in range(count))

        tracemalloc.start()
        write_sheet(tmp_path, rows)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small = peak(600)
    assert peak(4_800) < small + 1_000_000, "4800 rows held at once are 3 MB"
    assert len(list(tmp_path.glob("index*.html"))) == 4_800 // PAGE_ROWS


def test_every_column_is_explained() -> None:
    assert tuple(COLUMN_GUIDE) == COLUMNS
    assert all(COLUMN_GUIDE.values())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_sam(build_sam("compact", architecture=TINY), path, name="compact")
    return path


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Two images, and a box for the first alone."""
    for k, name in enumerate(("one", "two")):
        pixels = np.random.default_rng(k).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\none,10,10,70,50\n")
    return tmp_path


def predict(case: Path, weights: Path, **options: object) -> int:
    arguments: dict = {"boxes": case / "boxes.csv", "model": weights, "out": case / "out"} | options
    return predict_files([str(case / "images")], **arguments)


def mark(case: Path, *states: dict[str, object]) -> None:
    lines = "".join(json.dumps({"revision": 1, "lesions": [], **state}) + "\n" for state in states)
    journal_path(case / "boxes.csv").write_text(lines, encoding="utf-8")


def test_images_marked_as_without_lesion_are_no_fault(
    case: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(case, weights) == 1
    assert "no row of" in capsys.readouterr().err
    mark(case, {"image_id": "two", "mark": "no_lesion"})
    assert predict(case, weights) == 0
    told = capsys.readouterr().err
    assert "note: 1 images are annotated `no lesion`: no mask of them" in told
    assert "error" not in told
    mark(case, {"image_id": "two", "mark": "no_lesion"}, {"image_id": "two", "mark": "cannot_tell"})
    assert predict(case, weights) == 0
    assert "`cannot tell`" in capsys.readouterr().err
    mark(case, {"image_id": "two", "mark": "no_lesion"}, {"image_id": "two", "mark": ""})
    assert predict(case, weights) == 1, "the mark was taken back"


def test_the_last_line_of_an_image_counts_and_damage_is_skipped(case: Path) -> None:
    mark(case, {"image_id": "a", "mark": "no_lesion"}, {"image_id": "b", "mark": "no_lesion", "lesions": [{}]})
    with journal_path(case / "boxes.csv").open("a", encoding="utf-8") as file:
        file.write('{"image_id": "c", "mark": "cannot_tell", "lesions": []}\n[1]\n{"image_id": "a"')
    assert marked_images(case / "boxes.csv") == {"a": "no_lesion", "c": "cannot_tell"}
    assert marked_images(case / "none.csv") == {}


def test_areas_in_mm2_where_the_scale_is_given(case: Path, weights: Path) -> None:
    predict(case, weights)
    before = read_table(case / "out" / "predictions.csv")["one", "0"]
    assert before["area_mm2"] == ""
    predict(case, weights, mm_per_pixel=0.05)
    after = read_table(case / "out" / "predictions.csv")["one", "0"]
    assert float(after["area_mm2"]) == pytest.approx(int(before["area"]) * 0.05**2, rel=1e-3)
    assert "mm" in Page(case / "out" / "index.html").text
    predict(case, weights)
    assert read_table(case / "out" / "predictions.csv")["one", "0"]["area_mm2"] == "", "no scale, no area of before"


def test_a_table_of_an_earlier_version_is_gone_on_with(case: Path, weights: Path) -> None:
    predict(case, weights)
    path, mask = case / "out" / "predictions.csv", case / "out" / "masks" / "one.png"
    rows = list(read_table(path).values())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, EARLIER_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stamp = mask.stat().st_mtime_ns
    predict(case, weights)
    assert mask.stat().st_mtime_ns == stamp, "its mask is kept"
    assert list(read_table(path).values()) == rows


def discs(*circles: tuple[int, int, int], bridge: int = 0) -> np.ndarray:
    """A (300, 400) mask of discs (x, y, radius), joined by a bar of that height."""
    y, x = np.mgrid[:300, :400]
    mask = np.zeros((300, 400), bool)
    for cx, cy, radius in circles:
        mask |= (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    return mask | ((abs(y - 150) < bridge / 2) & (x > circles[0][0]) & (x < circles[-1][0]))


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (discs((200, 150, 80)), 1),
        (discs((200, 150, 80), (20, 20, 8)), 1),
        (discs((0, 150, 100)), 1),
        (discs((100, 150, 60), (300, 150, 50)), 2),
        (discs((100, 150, 60), (300, 150, 50), bridge=20), 2),
        (discs((130, 150, 70), (265, 150, 70)), 2),
        (discs((60, 150, 40), (200, 150, 40), (340, 150, 40), bridge=10), 3),
        (np.zeros((9, 9), bool), 0),
        (np.ones((9, 9), bool), 1),
    ],
)
def test_parts_are_counted(mask: np.ndarray, count: int) -> None:
    assert num_parts(mask) == count
    assert num_parts(mask.T) == count


def test_two_lesions_in_one_automatic_mask_are_flagged() -> None:
    both = discs((100, 150, 60), (300, 150, 50), bridge=20)
    assert review_reasons(both, NO_PROMPT, 0.9, 0.9, 0.9) == (
        "2 separate parts, perhaps as many lesions; give each its box",
    )
    assert review_reasons(discs((200, 150, 80)), NO_PROMPT, 0.9, 0.9, 0.9) == ()
    box = np.array([0.0, 0.0, 400.0, 300.0])
    assert review_reasons(both, LesionPrompt(box, box), 0.9, 0.9, 0.9) == (), "a box says which lesion is wanted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["images"], "expected one of --boxes"),
        (["images", "--auto", "--threshold", "2"], "--threshold: expected a probability"),
        (["images", "--auto", "--batch-size", "0"], "--batch-size: expected at least 1"),
        (["images", "--auto", "--ensemble", "3"], "--ensemble: expected 1"),
        (["images", "--auto", "--mm-per-pixel", "-1"], "--mm-per-pixel: expected a number above 0"),
        (["nowhere", "--auto"], "nowhere: no such image file"),
        (["--auto"], "no images given"),
    ],
)
def test_faulty_arguments_are_refused_before_torch_is_imported(case: Path, arguments: list[str], words: str) -> None:
    program = (
        "import sys\nfrom lesionsam.cli.app import main\ntry:\n    main()\nfinally:\n"
        "    print(*sorted({'torch', 'transformers', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "predict", *arguments]
    done = subprocess.run(command, cwd=case, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout.strip() == "", "no slow library was imported"
