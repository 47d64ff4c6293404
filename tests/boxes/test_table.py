"""The simulated annotator, the two-box CSV and its checks, the change of frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from segment_anything.utils.transforms import ResizeLongestSide

from helpers.tiny import is_inside
from lesionsam.boxes.annotator import annotate, simulate_boxes
from lesionsam.boxes.geometry import model_frame_size, to_model_frame
from lesionsam.boxes.table import COLUMNS, REQUIRED, read_boxes, write_boxes
from lesionsam.errors import UserError
from lesionsam.types import Frame

MARGIN, CORE, JITTER = (0.1, 0.2), (0.3, 0.5), 0.05
STYLES = ("blob", "fragments", "cut", "thin", "ring", "dot")


def draw_mask(style: str, rng: np.random.Generator) -> np.ndarray:
    """A random lesion of a style, (H, W) bool, never empty."""
    height, width = rng.integers(24, 90, 2)
    mask = np.zeros((height, width), bool)
    if style == "dot":
        mask[rng.integers(height), rng.integers(width)] = True
        return mask
    if style == "thin":
        row, column = rng.integers(height), rng.integers(width // 2)
        mask[row, column : column + rng.integers(3, width // 2)] = True
        return mask.T if rng.random() < 0.5 else mask
    field = ndimage.gaussian_filter(rng.normal(size=(height, width)), rng.uniform(2, 6))
    rows, columns = np.mgrid[:height, :width]
    centre = rng.uniform(0.3, 0.7, 2) if style != "cut" else rng.choice([0.0, 1.0], 2)
    away = np.hypot((rows / height - centre[0]) / 0.5, (columns / width - centre[1]) / 0.5)
    mask = field / field.std() + 2.5 * (0.5 - away) > (1.2 if style == "fragments" else 0)
    if style == "ring":
        mask = (away < 0.6) & (away > 0.4)
    if not mask.any():
        mask[height // 2, width // 2] = True
    return mask


def annotated(
    mask: np.ndarray, seed: int, *, min_area: int = 1, margin: tuple[float, float] = MARGIN, jitter: float = JITTER
) -> tuple[np.ndarray, np.ndarray]:
    boxes = simulate_boxes(
        mask, np.random.default_rng(seed), margin=margin, core=CORE, jitter=jitter, min_area=min_area
    )
    assert boxes is not None
    return boxes


@settings(max_examples=150)
@given(style=st.sampled_from(STYLES), seed=st.integers(0, 2**32 - 1), jitter=st.sampled_from([0.0, 0.05, 0.4]))
def test_the_small_box_lies_wholly_inside_the_lesion_and_the_big_box_holds_it(
    style: str, seed: int, jitter: float
) -> None:
    mask = draw_mask(style, np.random.default_rng(seed))
    big, small = annotated(mask, seed, jitter=jitter)
    assert is_inside(small, mask), (small, style)
    rows, columns = np.nonzero(mask)
    assert big[0] <= columns.min()
    assert big[1] <= rows.min()
    assert big[2] >= columns.max() + 1
    assert big[3] >= rows.max() + 1
    assert (big[:2] >= 0).all()
    assert big[2] <= mask.shape[1]
    assert big[3] <= mask.shape[0]
    assert (small[:2] >= big[:2]).all()
    assert (small[2:] <= big[2:]).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_containment_survives_the_two_decimals_of_the_csv(seed: int) -> None:
    mask = draw_mask("fragments", np.random.default_rng(seed))
    _, small = annotated(mask, seed)
    assert is_inside(np.array([float(f"{value:.2f}") for value in small]), mask)


def test_a_lesion_in_fragments_has_its_core_in_the_largest_one_and_specks_are_left_out() -> None:
    mask = np.zeros((100, 100), bool)
    mask[10:20, 10:20], mask[50:90, 40:80], mask[99, 99] = True, True, True
    big, small = annotated(mask, 0, min_area=4)
    assert small[0] >= 40
    assert small[1] >= 50
    assert (big <= np.array([10, 10, 99, 99])).all(), "the speck of one pixel is not annotated"
    assert big[2] >= 80
    big, _ = annotated(mask, 0, min_area=1)
    assert big[2] == 100, "a speck that counts widens the big box"


def test_a_lesion_cut_by_the_frame_keeps_its_core_off_the_edge() -> None:
    mask = np.zeros((60, 60), bool)
    mask[20:50, :25] = True
    for seed in range(20):
        big, small = annotated(mask, seed)
        assert big[0] == 0
        assert small[0] > 0


def test_margin_is_what_was_asked_for() -> None:
    mask = np.zeros((400, 400), bool)
    mask[150:250, 120:280] = True
    ratios = np.array(
        [(lambda b: [(b[2] - b[0]) / 160, (b[3] - b[1]) / 100])(annotated(mask, s, jitter=0.0)[0]) for s in range(60)]
    )
    assert ratios.min() >= 1.1
    assert ratios.max() <= 1.2
    assert abs(ratios.mean() - 1.15) < 0.015
    exact, _ = annotated(mask, 0, margin=(0.4, 0.4), jitter=0.0)
    assert exact == pytest.approx([120 - 32, 150 - 20, 280 + 32, 250 + 20])


def test_no_component_of_the_least_area_gives_nothing() -> None:
    mask = np.zeros((20, 20), bool)
    for value in (False, True):
        mask[3, 3] = value
        assert simulate_boxes(mask, np.random.default_rng(0), margin=MARGIN, core=CORE, jitter=0.0, min_area=2) is None


# ---- over an index -------------------------------------------------------------------------------------------------


def make_index(folder: Path, count: int) -> dict[str, dict[str, object]]:
    index: dict[str, dict[str, object]] = {}
    for k in range(count):
        mask = draw_mask("blob", np.random.default_rng(k))
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"mask{k}.png")
        index[f"image{k}"] = {
            "split": "train",
            "image_path": f"image{k}.jpg",
            "mask_path": f"mask{k}.png",
            "width": mask.shape[1],
            "height": mask.shape[0],
        }
    return index


def simulate(
    index: dict[str, dict[str, object]], folder: Path, seed: int = 0, min_area: int = 4
) -> dict[str, list[float]]:
    samples = annotate(index, root=folder, seed=seed, margin=MARGIN, core=CORE, jitter=JITTER, min_area=min_area)
    return {s.image_id: [*s.big_box, *s.small_box] for s in samples}


def test_boxes_depend_on_seed_and_id_alone(tmp_path: Path) -> None:
    index = make_index(tmp_path, 6)
    whole = simulate(index, tmp_path)
    backwards = simulate(dict(reversed(index.items())), tmp_path)
    alone = simulate({"image3": index["image3"]}, tmp_path)
    assert backwards == whole
    assert alone["image3"] == whole["image3"]
    other = simulate(index, tmp_path, seed=1)
    assert all(other[key] != whole[key] for key in whole)
    renamed = simulate({"another": index["image3"]}, tmp_path)
    assert renamed["another"] != whole["image3"]


def test_the_annotator_names_an_image_without_a_mask_and_an_empty_mask(tmp_path: Path) -> None:
    index = make_index(tmp_path, 2)
    index["image1"]["mask_path"] = ""
    with pytest.raises(UserError, match=r"image1\.jpg: has no mask.*boxes\.source: csv"):
        simulate(index, tmp_path)
    index["image1"]["mask_path"] = "mask1.png"
    Image.new("L", (int(str(index["image1"]["width"])), int(str(index["image1"]["height"])))).save(
        tmp_path / "mask1.png"
    )
    with pytest.raises(UserError, match=r"mask1\.png: no lesion of at least 4 pixels.*has 0 foreground"):
        simulate(index, tmp_path)


# ---- the CSV ---------------------------------------------------------------------------------------------------------

INDEX = {
    "a": {"split": "train", "image_path": "a.jpg", "mask_path": "a.png", "width": 100, "height": 80},
    "ISIC_007": {"split": "dev", "image_path": "b.jpg", "mask_path": "", "width": 60, "height": 90},
}
GOOD = {
    "image_id": "a",
    "lesion_id": "0",
    "split": "train",
    "width": "100",
    "height": "80",
    "big_x0": "10",
    "big_y0": "20",
    "big_x1": "70",
    "big_y1": "60",
    "small_x0": "30",
    "small_y0": "35",
    "small_x1": "40",
    "small_y1": "45",
}


def table(*rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> str:
    return "\n".join([",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]) + "\n"


def read(folder: Path, text: str | bytes) -> list[object]:
    path = folder / "boxes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_boxes(path, INDEX, root=folder))


def test_a_csv_comes_back_as_it_was_written(tmp_path: Path) -> None:
    index = make_index(tmp_path, 3)
    samples = annotate(index, root=tmp_path, seed=0, margin=MARGIN, core=CORE, jitter=JITTER, min_area=4)
    write_boxes(tmp_path / "out.csv", samples)
    again = read_boxes(tmp_path / "out.csv", index, root=tmp_path)
    assert [(s.image_id, s.lesion_id, s.split, s.width, s.height, s.image_path, s.mask_path) for s in again] == [
        (s.image_id, s.lesion_id, s.split, s.width, s.height, s.image_path, s.mask_path) for s in samples
    ]
    for old, new in zip(samples, again, strict=True):
        assert np.abs(old.big_box - new.big_box).max() <= 0.005 + 1e-9
        assert np.abs(old.small_box - new.small_box).max() <= 0.005 + 1e-9


def test_only_the_id_and_the_boxes_are_needed(tmp_path: Path) -> None:
    (sample,) = read_boxes_of(tmp_path, table(GOOD, columns=REQUIRED))
    assert sample.lesion_id == "0"
    assert sample.split == "train"
    assert sample.mask_path == tmp_path / "a.png"
    assert sample.big_box.tolist() == [10, 20, 70, 60]
    (sample,) = read_boxes_of(tmp_path, table(GOOD | {"image_id": "ISIC_007", "big_x1": "60"}, columns=REQUIRED))
    assert sample.mask_path is None


def read_boxes_of(folder: Path, text: str):
    (folder / "boxes.csv").write_text(text)
    return read_boxes(folder / "boxes.csv", INDEX, root=folder)


def test_several_lesions_of_an_image_and_windows_files_are_read(tmp_path: Path) -> None:
    text = table(GOOD, GOOD | {"lesion_id": "left"})
    assert len(read(tmp_path, text)) == 2
    assert len(read(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())) == 2
    assert len(read(tmp_path, text + "\n,,,,,,,,,,,,\n")) == 2


def test_half_a_pixel_beyond_the_frame_is_cut(tmp_path: Path) -> None:
    (sample,) = read_boxes_of(tmp_path, table(GOOD | {"big_x1": "100.4", "big_y0": "-0.3", "small_x1": "100.4"}))
    assert sample.big_box.tolist() == [10, 0, 100, 60]
    assert sample.small_box[2] == 100


ROWS: list[tuple[str, dict[str, str], str]] = [
    ("unknown id", {"image_id": "zz"}, r"line 2, image_id: 'zz' is not among the 2 images"),
    ("id without its leading part", {"image_id": "007"}, r"line 2, image_id: '007'.*leading part of 'ISIC_007'"),
    ("no id", {"image_id": ""}, r"line 2, image_id: ''"),
    ("not a number", {"big_x1": "wide"}, r"line 2, big_x1: expected a number of pixels, got 'wide'"),
    ("empty", {"small_y0": ""}, r"line 2, small_y0: expected a number of pixels, got ''"),
    ("nan", {"big_y0": "nan"}, r"line 2, big_y0: expected a finite number"),
    ("infinite", {"big_x1": "inf"}, r"line 2, big_x1: expected a finite number"),
    ("reversed", {"big_x0": "70", "big_x1": "10"}, r"line 2, big_x0, big_x1: expected big_x0 < big_x1, got 70 and 10"),
    ("without area", {"small_y1": "35"}, r"line 2, small_y0, small_y1: expected small_y0 < small_y1, got 35 and 35"),
    ("beyond the right edge", {"big_x1": "120"}, r"line 2, big_x1: 120 lies outside the image 'a' of 100x80 px"),
    ("beyond the top", {"big_y0": "-4"}, r"line 2, big_y0: -4 lies outside"),
    (
        "small beyond big",
        {"small_x1": "75"},
        r"line 2, small_x0\.\.small_y1: small box \[30, 35, 75, 45\] of 'a' leaves the "
        r"big box \[10, 20, 70, 60\] by 5\.0 px",
    ),
    ("other width", {"width": "640"}, r"line 2, width: got 640, but image 'a' is 100x80 px"),
    ("other height", {"height": "81"}, r"line 2, height: got 81"),
    ("other split", {"split": "test"}, r"line 2, split: got 'test', but image 'a' is in split 'train'"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_wrong_row_is_one_line_naming_line_and_column(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, table(GOOD | change))
    assert "boxes.csv: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_number_counts_empty_lines_and_further_faults_are_counted(tmp_path: Path) -> None:
    text = table(GOOD, GOOD | {"lesion_id": "1", "big_x0": "x"}, GOOD | {"lesion_id": "2", "big_x0": "x"})
    with pytest.raises(UserError, match=r"line 3, big_x0.*\(and 1 more faulty lines\)"):
        read(tmp_path, text)
    with pytest.raises(UserError, match=r"line 4, big_x0"):
        read(tmp_path, text.replace("\n", "\n\n", 1))


FILES: list[tuple[str, str | bytes, str]] = [
    ("empty", "", "empty; expected a header"),
    ("header only", table(), "no rows; expected one row per lesion"),
    ("missing column", table(GOOD, columns=tuple(c for c in COLUMNS if c != "small_x1")), "column small_x1 is missing"),
    ("unknown column", table(GOOD | {"note": "x"}, columns=(*COLUMNS, "note")), "unknown column 'note'"),
    ("column twice", table(GOOD, columns=(*COLUMNS, "big_x0")), "a column stands twice"),
    ("semicolons", table(GOOD).replace(",", ";"), "separated by ';'"),
    ("decimal commas", table(GOOD).replace("70", "70,5"), "line 2 has 14 fields; expected 13"),
    ("spreadsheet", b"PK\x03\x04\xff\xfe", "not UTF-8"),
    ("duplicate", table(GOOD, GOOD), r"line 3, image_id, lesion_id: 'a', '0' stands already in line 2"),
    ("two rows without lesion ids", table(GOOD, GOOD, columns=REQUIRED), r"line 3, image_id, lesion_id"),
]


@pytest.mark.parametrize(("text", "message"), [file[1:] for file in FILES], ids=[file[0] for file in FILES])
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        read_boxes(tmp_path / "nowhere.csv", INDEX, root=tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        read_boxes(tmp_path, INDEX, root=tmp_path)


# ---- the model frame -------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(width=st.integers(20, 5000), height=st.integers(20, 5000), side=st.sampled_from([96, 256, 1024]))
def test_the_model_frame_is_that_of_sams_own_transform(width: int, height: int, side: int) -> None:
    theirs = ResizeLongestSide(side)
    assert model_frame_size(width, height, Frame(side)) == theirs.get_preprocess_shape(height, width, side)
    box = np.array([0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height])
    assert to_model_frame(box, width, height, Frame(side)) == pytest.approx(
        theirs.apply_boxes(box[None], (height, width))[0]
    )
    assert to_model_frame(box[:2], width, height, Frame(side)) == pytest.approx(
        theirs.apply_coords(box[None, :2], (height, width))[0]
    )
