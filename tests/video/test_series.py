"""A series of one lesion: registration beside the drawn motion, change of area beside the drawn growth."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.clips import box_of
from lesionsam.boxes.table import BIG
from lesionsam.data.sources.clips import generate_pair
from lesionsam.errors import UserError
from lesionsam.models.checkpoint import load_sam
from lesionsam.video.registration import register
from lesionsam.video.series import Measured, area_change, compare_series, measure

FOUNDATION = Path(__file__).resolve().parents[2] / "foundation" / "compact.safetensors"


def transformed(
    image: np.ndarray, angle: float, shift: tuple[float, float], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned about its middle, with the (3, 3) from the new picture's pixels to the old one's."""
    height, width = image.shape[:2]
    turn, middle = np.radians(angle), np.array([width, height]) / 2
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, middle + shift - linear @ middle
    values = tuple(matrix[:2].ravel().tolist())
    moved = Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, values, Image.Resampling.BICUBIC)
    return np.asarray(moved), matrix


@pytest.mark.parametrize(("angle", "shift", "scale"), [(8.0, (10, -6), 1.0), (-15.0, (-12, 9), 1.2)])
def test_pictures_are_registered_to_a_pixel(angle: float, shift: tuple[float, float], scale: float) -> None:
    """Oracle: the motion that was drawn."""
    (image, mask), _ = generate_pair(0, 2)
    later, matrix = transformed(image, angle, shift, scale)
    moved, _ = transformed(mask.astype(np.uint8) * 255, angle, shift, scale)
    found = register(image, later, (mask, moved > 127), any_scale=scale != 1)
    assert found is not None
    corners = np.array(
        [[0, 0, 1], [image.shape[1], 0, 1], [image.shape[1], image.shape[0], 1], [0, image.shape[0], 1]]
    ).T
    assert np.abs((found.matrix - matrix) @ corners).max() < 2.0  # pixels, at the corners
    assert found.angle == pytest.approx(angle, abs=0.5)
    assert found.scale == pytest.approx(scale, abs=0.01)


def test_pictures_of_other_skin_are_not_registered() -> None:
    (image, mask), _ = generate_pair(0, 2)
    (other, its_mask), _ = generate_pair(0, 4)
    assert register(image, other, (mask, its_mask)) is None


def test_the_change_of_area_and_its_limits_are_ratios_of_areas() -> None:
    """Closed form: 120/100 - 1, the extremes 110/105 and 130/95 cut at the quantiles of a single pair each."""
    empty = np.zeros((2, 2), bool)
    change = area_change(Measured(empty, np.array([100.0] * 4)), Measured(empty, np.array([120.0] * 4)))
    assert (change.value, change.low, change.high) == pytest.approx((0.2, 0.2, 0.2))
    change = area_change(Measured(empty, np.array([100.0, 95, 105])), Measured(empty, np.array([120.0, 110, 130])), 2.0)
    assert change.value == pytest.approx(4 * 1.2 - 1)
    assert 4 * 110 / 105 - 1 <= change.low < change.value < change.high <= 4 * 130 / 95 - 1
    assert np.isnan(area_change(Measured(empty, np.zeros(2)), Measured(empty, np.ones(2))).value)


def test_growth_is_seen_where_it_was_drawn() -> None:
    sam = load_sam(None, FOUNDATION)
    errors, signs = [], []
    for index in (0, 2, 4):
        for growth in (0.85, 1.2):
            (first, mask), (later, grown) = generate_pair(0, index, growth=growth)
            true = grown.sum() / mask.sum() - 1
            measured = [measure(sam, image, box_of(one), str(index)) for image, one in ((first, mask), (later, grown))]
            change = area_change(measured[0], measured[1])
            errors.append(abs(change.value - true))
            signs.append(np.sign(change.value) == np.sign(true))
            assert change.low <= change.value <= change.high
    assert all(signs)
    assert np.mean(errors) < 0.12  # of the area; growth changes it by 28 to 44 %


def test_files_name_each_picture_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = generate_pair(0, 4, growth=1.2)
    rows = ["image_id," + ",".join(BIG)]
    for name, (image, mask) in zip(("january", "june"), pair, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        rows.append(f"{name}," + ",".join(f"{value:.1f}" for value in box_of(mask)))
    table = tmp_path / "boxes.csv"
    table.write_text("\n".join(rows) + "\n")
    paths = [tmp_path / "january.png", tmp_path / "june.png"]
    options: dict[str, Any] = {"boxes": table, "model": FOUNDATION, "out": tmp_path / "out"}
    assert compare_series(paths, **options) == 0
    with (tmp_path / "out" / "series.csv").open() as file:
        first, later = csv.DictReader(file)
    assert (first["image_id"], later["image_id"], later["registered"]) == ("january", "june", "1")
    assert float(later["change_low"]) <= float(later["change"]) <= float(later["change_high"])
    assert (tmp_path / "out" / "june.png").is_file()
    assert "no diagnosis" in capsys.readouterr().out
    with pytest.raises(UserError, match="at least two pictures"):
        compare_series(paths[:1], **options)
    table.write_text("\n".join(rows[:2]) + "\n")
    with pytest.raises(UserError, match="june"):
        compare_series(paths, **options)
