"""Drawing: the right colours at the right places, at any size, without touching what was handed in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.draw import disk

from lesionsam import overlays
from lesionsam.overlays import legend, overlay, sheet, text_bar, write_png
from lesionsam.utils.outlines import outline_rings

SKIN = (196, 150, 128)


def canvas(height: int = 240, width: int = 320) -> np.ndarray:
    return np.full((height, width, 3), SKIN, np.uint8)


def round_mask(column: float = 160, radius: float = 60) -> np.ndarray:
    mask = np.zeros((240, 320), bool)
    mask[disk((120, column), radius, shape=mask.shape)] = True
    return mask


def close_to(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return np.abs(picture.astype(int) - np.array(colour)).max(2) <= tolerance


@pytest.mark.parametrize(("name", "colour"), [("truth", overlays.TRUTH), ("prediction", overlays.PREDICTION)])
def test_an_outline_follows_its_mask(name: str, colour: tuple[int, int, int]) -> None:
    picture = overlay(canvas(), **{name: round_mask()})  # type: ignore[arg-type]
    rows, columns = np.nonzero(close_to(picture, colour))
    radius = np.hypot(rows - 120, columns - 160)
    around = np.histogram(np.arctan2(rows - 120, columns - 160), bins=72, range=(-np.pi, np.pi))[0]
    assert (around > 0).mean() > 0.9  # all the way round
    assert np.abs(radius - 60).max() < 4
    assert (picture[120, 160] == SKIN).all()
    assert (picture[5, 5] == SKIN).all()


def test_lines_are_antialiased() -> None:
    picture = overlay(canvas(), prediction=round_mask())
    colours = np.unique(picture.reshape(-1, 3), axis=0)
    assert len(colours) > 20  # skin, rim and yellow would be three


def white_extent(picture: np.ndarray) -> list[int]:
    """XYXY of what is drawn in the boxes' colour."""
    rows, columns = np.nonzero(close_to(picture, overlays.BOX, 60))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_big_box_is_dashed_and_the_small_one_is_not() -> None:
    big = overlay(canvas(), big=np.array([40.0, 30.0, 280.0, 210.0]))
    small = overlay(canvas(), small=np.array([40.0, 30.0, 280.0, 210.0]))
    along = slice(50, 270)
    white = [close_to(p, overlays.BOX, 60)[28:33, along].any(0) for p in (big, small)]
    assert 0.4 < white[0].mean() < 0.85
    assert white[1].all()
    for picture in (big, small):
        assert white_extent(picture) == pytest.approx([40, 30, 280, 210], abs=2)


def test_boxes_scale_with_the_picture() -> None:
    picture = overlay(canvas(480, 640), small=np.array([100.0, 60.0, 500.0, 420.0]), max_side=320)
    assert picture.shape == (240, 320, 3)
    assert white_extent(picture) == pytest.approx([50, 30, 250, 210], abs=2)


def test_a_box_at_or_beyond_the_frame_stays_visible() -> None:
    picture = overlay(canvas(), small=np.array([-20.0, -20.0, 330.0, 260.0]))
    white = close_to(picture, overlays.BOX, 90)
    assert white[0:2].any(0).mean() > 0.9
    assert white[-2:].any(0).mean() > 0.9
    assert white[:, 0:2].any(1).mean() > 0.9
    assert white[:, -2:].any(1).mean() > 0.9


def test_points_carry_their_label() -> None:
    points = np.array([[60.0, 50.0], [250.0, 180.0]])
    picture = overlay(canvas(), points=points, labels=np.array([1, 0]))
    assert close_to(picture, overlays.FOREGROUND)[50, 60]
    assert not close_to(picture, overlays.FOREGROUND)[150:].any()
    assert close_to(picture, overlays.BACKGROUND)[180, 250]
    assert not close_to(picture, overlays.BACKGROUND)[:100].any()


def test_masks_that_are_empty_full_or_in_pieces() -> None:
    empty, full = np.zeros((240, 320), bool), np.ones((240, 320), bool)
    assert np.array_equal(overlay(canvas(), prediction=empty), canvas())
    assert close_to(overlay(canvas(), truth=full), overlays.TRUTH, 90)[:3].any(0).mean() > 0.9  # drawn along the frame
    two = round_mask(radius=20, column=60) | round_mask(radius=20, column=250)
    drawn = close_to(overlay(canvas(), truth=two), overlays.TRUTH)
    assert drawn[:, :160].any()
    assert drawn[:, 160:].any()
    ring = round_mask(radius=60) & ~round_mask(radius=20)
    assert len(outline_rings(ring)) == 2
    assert len(outline_rings(empty)) == 0
    single = empty.copy()
    single[100, 100] = True
    assert close_to(overlay(canvas(), truth=single), overlays.TRUTH, 90).any()


def test_the_input_is_not_changed_and_nothing_to_draw_draws_nothing() -> None:
    image = canvas()
    overlay(image, truth=round_mask(), big=np.array([1.0, 1, 50, 50]), caption="x")
    assert np.array_equal(image, canvas())
    assert np.array_equal(overlay(image), image)


def test_sizes() -> None:
    assert overlay(canvas(1000, 1500), max_side=512).shape == (341, 512, 3)
    assert overlay(canvas(240, 320), max_side=512).shape == (240, 320, 3)  # not enlarged
    assert overlay(canvas(20, 40), max_side=512).shape == (80, 160, 3)  # but a thumbnail is
    assert overlay(canvas(1, 900), max_side=300).shape == (1, 300, 3)
    with pytest.raises(ValueError, match=r"truth \(5, 5\) does not fit"):
        overlay(canvas(), truth=np.zeros((5, 5), bool))


def test_a_caption_stands_below_and_is_cut_to_the_width() -> None:
    plain, captioned = overlay(canvas()), overlay(canvas(), caption="IoU 0.873\nbig box")
    assert captioned.shape[1] == 320
    assert captioned.shape[0] > plain.shape[0] + 20
    assert np.array_equal(captioned[: plain.shape[0]], plain)
    bar = captioned[plain.shape[0] :]
    assert (bar == 255).mean() > 0.7
    assert (bar < 80).any()
    long = text_bar("a very long name " * 20, 200)
    assert long.shape[1] == 200
    assert (long[:, -3:] == 255).all()
    assert text_bar("two\nlines", 200).shape[0] > text_bar("one", 200).shape[0]


def test_the_legend_shows_what_is_asked_and_wraps() -> None:
    whole, short = legend(1000, points=True), legend(1000, prediction=False)
    assert whole.shape[1] == short.shape[1] == 1000
    assert close_to(whole, overlays.PREDICTION).any()
    assert not close_to(short, overlays.PREDICTION).any()
    assert close_to(whole, overlays.BACKGROUND).any()
    assert close_to(short, overlays.TRUTH).any()
    assert legend(260).shape[0] > legend(1000).shape[0]


def test_a_sheet_holds_every_picture_whole() -> None:
    rng = np.random.default_rng(0)
    sizes = ((60, 80), (90, 50), (40, 80), (70, 70), (30, 30))
    pictures = [rng.integers(0, 250, (*size, 3), dtype=np.uint8) for size in sizes]
    page = sheet(pictures, 2, "Five pictures", key=False)
    for picture in pictures:
        height, width = picture.shape[:2]
        found = any(
            np.array_equal(page[y : y + height, x : x + width], picture)
            for y in range(page.shape[0] - height + 1)
            for x in range(page.shape[1] - width + 1)
            if (page[y, x] == picture[0, 0]).all()
        )
        assert found
    assert sheet(pictures, 2, "Five pictures").shape[0] > page.shape[0]  # the legend
    assert sheet(pictures[:1], 4, "One").shape[1] < 120  # no empty columns
    with pytest.raises(ValueError, match="0 pictures in 2 columns"):
        sheet([], 2, "none")


def test_write_png_is_complete_or_nothing(tmp_path: Path) -> None:
    picture = overlay(canvas(), truth=round_mask())
    path = tmp_path / "new" / "overlay.png"
    write_png(path, picture)
    with Image.open(path) as stored:
        assert np.array_equal(np.asarray(stored), picture)
    with pytest.raises(TypeError):
        write_png(path, np.zeros((4, 4, 7), np.uint8))
    with Image.open(path) as stored:
        assert np.array_equal(np.asarray(stored), picture)  # the former file is untouched
    assert [p.name for p in path.parent.iterdir()] == ["overlay.png"]
