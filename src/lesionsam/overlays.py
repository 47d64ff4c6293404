"""Drawing on pictures: outlines, boxes and prompt points, captions, a legend, contact sheets.

Lines are drawn several times larger and averaged down, each over a dark rim, so that they stay visible on pale and on
pigmented skin. Truth is blue and solid, prediction yellow and solid, the boxes white, dashed (big) and solid (small):
the blue-yellow axis and the dashes survive red-green blindness (colours: Okabe and Ito 2008, Color Universal Design).

Arrays are (H, W, 3) uint8 RGB, masks (H, W) bool, boxes (4,) XYXY half-open and points (N, 2) XY in pixels
of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lesionsam.utils.files import atomic_write
from lesionsam.utils.outlines import outline_rings

TRUTH = (86, 180, 233)
PREDICTION = (240, 228, 66)
BOX = (255, 255, 255)
FOREGROUND, BACKGROUND = (0, 158, 115), (213, 94, 0)  # prompt points of label 1 and 0
RIM = (15, 15, 15)
PAPER, TEXT, SWATCH = (255, 255, 255), (25, 25, 25), (196, 150, 128)
OVERSAMPLING = 3
MIN_SIDE = 160  # a smaller picture is enlarged to this longer side, or its lines would hide it
DASH, GAP = 6.0, 4.0  # of the big box, in line widths


def overlay(
    image: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
    big: np.ndarray | None = None,
    small: np.ndarray | None = None,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    caption: str | None = None,
    max_side: int = 512,
) -> np.ndarray:
    """Draw outlines, boxes and points on a picture, with a caption below it.

    Args:
        image: (H, W, 3) uint8 RGB. truth, prediction: (H, W) bool. points: (N, 2) XY.
        big, small: (4,) XYXY, or (N, 4) of several lesions.
        labels: (N,) of the points, 1 foreground (disc), 0 background (cross); all foreground if None.
        caption: lines of text below the picture, shortened to its width.
        max_side: the picture is scaled to this longer side, pixels, but never above its own (or `MIN_SIDE`).
    Returns:
        (h, w, 3) uint8; h includes the caption.
    """
    height, width = image.shape[:2]
    for name, mask in (("truth", truth), ("prediction", prediction)):
        if mask is not None and mask.shape != (height, width):
            raise ValueError(f"{name} {mask.shape} does not fit the image {(height, width)}")
    scale = min(max_side, max(height, width, MIN_SIDE)) / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    base = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    canvas = ImageDraw.Draw(layer)
    stretch = np.array(layer.size) / (width, height)  # canvas pixels per picture pixel, x and y
    line = OVERSAMPLING * max(1.6, max(size) / 260)
    for boxes, dashed in ((big, True), (small, False)):
        for corners in np.asarray([] if boxes is None else boxes, float).reshape(-1, 2, 2):
            _box(canvas, corners * stretch, line, layer.size, dashed=dashed)
    for mask, colour, thickness in ((truth, TRUTH, 1.35), (prediction, PREDICTION, 1.0)):
        if mask is not None:
            rings = [ring * stretch for ring in outline_rings(mask)]
            _lines(canvas, rings, line * thickness, colour)
    if points is not None:
        known = np.ones(len(points)) if labels is None else np.asarray(labels)
        for (x, y), label in zip(np.asarray(points, float) * stretch, known, strict=True):
            _point(canvas, x, y, line, foreground=bool(label))
    base.paste(lines := layer.resize(size, Image.Resampling.BOX), mask=lines)
    picture = np.asarray(base)
    return picture if caption is None else np.concatenate([picture, text_bar(caption, size[0])])


def _lines(
    canvas: ImageDraw.ImageDraw, paths: Sequence[np.ndarray], width: float, colour: tuple[int, int, int]
) -> None:
    """Draw open or closed paths (N, 2) over a dark rim."""
    for extra, paint in ((1.7, (*RIM, 150)), (1.0, (*colour, 255))):
        for path in paths:
            points = [(float(x), float(y)) for x, y in path]
            if points[0] == points[-1]:
                points.append(points[1])  # so that the joint at the start is closed too
            canvas.line(points, fill=paint, width=max(1, round(width * extra)), joint="curve")


def _box(canvas: ImageDraw.ImageDraw, corners: np.ndarray, line: float, size: tuple[int, int], *, dashed: bool) -> None:
    """Draw a rectangle from corners (2, 2), kept inside the canvas so that a box at the frame's rim is visible."""
    low = np.clip(corners[0], line / 2, np.array(size) - line / 2)
    high = np.clip(corners[1], low, np.array(size) - line / 2)
    ring = np.array([low, (high[0], low[1]), high, (low[0], high[1]), low])
    paths = [ring] if not dashed else list(_dashes(ring, DASH * line, GAP * line))
    _lines(canvas, paths, 0.9 * line, BOX)


def _dashes(ring: np.ndarray, dash: float, gap: float) -> Iterator[np.ndarray]:
    """Yield straight dashes along each edge of a ring; every edge begins and ends with one."""
    for start, end in pairwise(ring):
        length = float(np.hypot(*(end - start)))
        if length < 1:
            continue
        count = max(1, round((length + gap) / (dash + gap)))
        period = (length + gap) / count
        share = min(dash / (dash + gap) * period, length)
        for k in range(count):
            yield start + (end - start) * np.array([[k * period], [min(k * period + share, length)]]) / length


def _point(canvas: ImageDraw.ImageDraw, x: float, y: float, line: float, *, foreground: bool) -> None:
    """Draw a disc with a white rim for foreground, a cross for background."""
    if foreground:
        for radius, paint in ((2.7, RIM), (2.3, BOX), (1.6, FOREGROUND)):
            reach = radius * line
            canvas.ellipse([x - reach, y - reach, x + reach, y + reach], fill=(*paint, 255))
        return
    reach = 2.2 * line
    for width, paint in ((2.4, BOX), (1.2, BACKGROUND)):
        for rise in (reach, -reach):
            canvas.line([x - reach, y - rise, x + reach, y + rise], fill=(*paint, 255), width=round(width * line))


def text_bar(text: str, width: int, *, font_size: int | None = None) -> np.ndarray:
    """Return lines of text on a white bar, (h, width, 3) uint8; lines that do not fit end with an ellipsis."""
    size = font_size or round(min(20, max(11, width / 22)))
    font = ImageFont.load_default(size)
    pad = round(size * 0.4)
    lines = [_fit(line, font, width - 2 * pad) for line in text.splitlines() or [""]]
    step = round(size * 1.3)
    bar = Image.new("RGB", (width, step * len(lines) + 2 * pad), PAPER)
    canvas = ImageDraw.Draw(bar)
    for k, line in enumerate(lines):
        canvas.text((pad, pad + k * step), line, fill=TEXT, font=font)
    return np.asarray(bar)


def _fit(line: str, font: Any, width: int) -> str:
    """Return the line, or its beginning and "..." if it is wider than `width` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def legend(width: int, *, prediction: bool = True, points: bool = False) -> np.ndarray:
    """Return the legend of the lines, (h, width, 3) uint8, wrapped to the width."""
    size = round(min(18, max(12, width / 45)))
    font = ImageFont.load_default(size)
    entries = [
        (name, style)
        for name, style, shown in (
            ("expert's outline", "truth", True),
            ("prediction", "prediction", prediction),
            ("big box", "big", True),
            ("small box", "small", True),
            ("foreground point", "point", points),
            ("background point", "cross", points),
        )
        if shown
    ]
    swatch, pad, step = 2.2 * size, 0.6 * size, 1.9 * size
    places, x, row = [], pad, 0
    for name, _ in entries:
        need = swatch + pad + font.getlength(name) + 2 * pad
        if x > pad and x + need > width:
            x, row = pad, row + 1
        places.append((x, row))
        x += need
    height = round(step * (row + 1) + pad)
    bar = Image.new("RGB", (width, height), PAPER)
    layer = Image.new("RGBA", (width * OVERSAMPLING, height * OVERSAMPLING))
    text, canvas = ImageDraw.Draw(bar), ImageDraw.Draw(layer)
    k, line = OVERSAMPLING, OVERSAMPLING * size / 7
    for (name, style), (x, row) in zip(entries, places, strict=True):
        top = pad / 2 + row * step
        bottom, middle = top + step - pad / 2, top + (step - pad / 2) / 2
        corners = [x * k, top * k, (x + swatch) * k, bottom * k]
        canvas.rounded_rectangle(corners, radius=0.25 * size * k, fill=(*SWATCH, 255))
        inset = np.array([[x + 0.3 * size, top + 0.3 * size], [x + swatch - 0.3 * size, bottom - 0.3 * size]]) * k
        if style in ("big", "small"):
            _box(canvas, inset, line, layer.size, dashed=style == "big")
        elif style in ("point", "cross"):
            _point(canvas, (x + swatch / 2) * k, middle * k, line, foreground=style == "point")
        else:
            stroke = np.array([[inset[0, 0], middle * k], [inset[1, 0], middle * k]])
            _lines(canvas, [stroke], line * 1.3, TRUTH if style == "truth" else PREDICTION)
        text.text((x + swatch + pad, middle), name, fill=TEXT, font=font, anchor="lm")
    bar.paste(swatches := layer.resize((width, height), Image.Resampling.BOX), mask=swatches)
    return np.asarray(bar)


def sheet(
    pictures: Sequence[np.ndarray],
    columns: int,
    title: str,
    *,
    key: bool = True,
    points: bool = False,
    prediction: bool = True,
) -> np.ndarray:
    """Arrange pictures of any size on one white page: a title, rows of `columns`, and the legend at the foot.

    Args:
        pictures: (h, w, 3) uint8 each, as `overlay` returns them; each stands in the middle of its column, rows are as
            high as their highest picture.
        columns: pictures per row, at least 1. title: text at the head.
        key: whether the legend is drawn. points, prediction: whether it explains them.
    Returns:
        (H, W, 3) uint8.
    """
    if not pictures or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, got {len(pictures)} pictures in {columns} columns")
    columns = min(columns, len(pictures))
    cell = max(picture.shape[1] for picture in pictures)
    gap = max(6, round(cell * 0.03))
    width = columns * (cell + gap) + gap
    parts = [text_bar(title, width, font_size=round(min(28, max(14, width / 48))))]
    for first in range(0, len(pictures), columns):
        row = pictures[first : first + columns]
        strip = np.full((max(picture.shape[0] for picture in row) + gap, width, 3), PAPER, np.uint8)
        for k, picture in enumerate(row):
            left = gap + k * (cell + gap) + (cell - picture.shape[1]) // 2
            strip[: picture.shape[0], left : left + picture.shape[1]] = picture
        parts.append(strip)
    if key:
        parts.append(legend(width, points=points, prediction=prediction))
    return np.concatenate(parts)


def write_png(path: Path, array: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) uint8 as a PNG; complete or not at all. Makes the folder where it is missing."""
    with atomic_write(path) as file:
        Image.fromarray(array).save(file, "PNG")
