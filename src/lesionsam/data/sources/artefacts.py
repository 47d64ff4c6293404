"""Draw artefacts of dermoscopic photographs: hair, gel bubbles, glints, rulers, ink, stickers, the lens.

Every function takes the picture so far, (H, W, 3) float32 RGB in about 0..1, draws on it with the generator it is
given, and returns a new picture of the same shape. Lengths are shares of the longer side. None of them moves the
lesion, so none changes its mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLING = 2  # strokes are drawn this many times larger and averaged down: soft edges
HAIR_COLOURS = np.array(
    [[0.10, 0.07, 0.06], [0.20, 0.13, 0.09], [0.32, 0.22, 0.14], [0.62, 0.52, 0.40], [0.66, 0.64, 0.62]]
)
HAIR_ODDS = np.array([0.36, 0.30, 0.18, 0.10, 0.06])
INKS = np.array([[0.27, 0.14, 0.50], [0.20, 0.22, 0.60], [0.10, 0.12, 0.25]])
STICKERS = np.array(
    [[0.98, 0.62, 0.16], [0.45, 0.76, 0.73], [0.95, 0.42, 0.36], [0.25, 0.45, 0.80], [0.55, 0.75, 0.30]]
)


def coverage(shape: tuple[int, int], draw: Callable[[ImageDraw.ImageDraw, float], None]) -> np.ndarray:
    """(H, W) float32 in 0..1 of what `draw(canvas, pixels per unit length)` paints, with soft edges."""
    height, width = shape
    canvas = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw(ImageDraw.Draw(canvas), float(max(shape) * OVERSAMPLING))
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255


def blend(picture: np.ndarray, colour: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mix one colour (3,) into the picture with weights (H, W)."""
    return picture + weight[..., None] * (colour.astype(np.float32) - picture)


def curve(start: np.ndarray, middle: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return 14 points, (14, 2), of the quadratic Bezier curve with these control points, each (2,) XY."""
    t = np.linspace(0, 1, 14)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


def hair(picture: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Long hairs with a common direction, or shaved stubble; `amount` in 0..1 goes from one hair to a thicket."""
    shape = picture.shape[:2]
    extent = np.array([shape[1], shape[0]]) / max(shape)
    stubble = rng.random() < 0.3
    count = int(1 + amount * rng.uniform(14, 60 if stubble else 34))
    direction, spread = rng.uniform(0, np.pi), rng.uniform(0.15, 1.0)
    thickness = rng.uniform(0.0025, 0.0055)
    strokes = []
    for _ in range(count):
        angle = direction + rng.normal(0, spread)
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        length = rng.uniform(0.02, 0.06) if stubble else rng.uniform(0.25, 1.1)
        centre = rng.uniform(-0.1, 1.1, 2) * extent
        bend = 0.0 if stubble else rng.normal(0, 0.22)
        points = curve(centre - along * length / 2, centre + across * bend * length, centre + along * length / 2)
        strokes.append((points, thickness * rng.uniform(0.6, 1.2)))

    def draw(canvas: ImageDraw.ImageDraw, unit: float) -> None:
        for points, width in strokes:
            canvas.line([tuple(p) for p in points * unit], fill=255, width=max(1, round(width * unit)), joint="curve")

    colour = HAIR_COLOURS[rng.choice(len(HAIR_COLOURS), p=HAIR_ODDS)]
    return blend(picture, colour, coverage(shape, draw) * rng.uniform(0.55, 0.92))


def bubbles(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bubbles in the gel: a thin dark ring, bright on the side of the light."""
    shape = picture.shape[:2]
    side = max(shape)
    picture = picture.copy()
    light = rng.uniform(0, 2 * np.pi)
    cluster = rng.random(2)
    for _ in range(rng.integers(2, 14)):
        radius = side * rng.uniform(0.004, 0.024)
        x, y = (cluster + rng.normal(0, 0.15, 2) if rng.random() < 0.6 else rng.random(2)) * (shape[1], shape[0])
        x0, y0 = max(0, int(x - 1.6 * radius)), max(0, int(y - 1.6 * radius))
        x1, y1 = min(shape[1], int(x + 1.6 * radius) + 2), min(shape[0], int(y + 1.6 * radius) + 2)
        if x1 <= x0 or y1 <= y0:
            continue
        v, u = np.mgrid[y0:y1, x0:x1] - np.array([y, x]).reshape(2, 1, 1)
        ring = np.exp(-(((np.hypot(u, v) - radius) / max(0.9, 0.16 * radius)) ** 2))
        towards = np.cos(np.arctan2(v, u) - light)
        change = ring * np.where(towards > 0, 0.24 * towards, 0.16 * towards)
        spark = 0.3 * np.exp(-((u - 0.5 * radius * np.cos(light)) ** 2 + (v - 0.5 * radius * np.sin(light)) ** 2) / 1.2)
        picture[y0:y1, x0:x1] += (change + spark)[..., None].astype(np.float32)
    return picture


def glints(picture: np.ndarray, rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Specular points over the lesion: centre (2,) XY and radius in shares of the longer side."""
    points = centre + rng.normal(0, radius * 0.7, (rng.integers(5, 45), 2))
    sizes = rng.uniform(0.0012, 0.004, len(points))

    def draw(canvas: ImageDraw.ImageDraw, unit: float) -> None:
        for (x, y), size in zip(points, sizes, strict=True):
            canvas.ellipse([(x - size) * unit, (y - size) * unit, (x + size) * unit, (y + size) * unit], fill=255)

    white = np.array([0.97, 0.97, 1.0])
    return blend(picture, white, coverage(picture.shape[:2], draw) * rng.uniform(0.4, 0.85))


def ruler(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A straight scale with millimetre ticks, longer at every fifth, near the rim of the frame."""
    shape = picture.shape[:2]
    extent = np.array([shape[1], shape[0]]) / max(shape)
    angle = rng.choice([rng.normal(-0.1, 0.12), rng.normal(1.2, 0.15)])
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([np.sin(angle), -np.cos(angle)])
    centre = extent * (
        np.array([rng.uniform(0.35, 0.65), rng.uniform(0.84, 0.96)])
        if abs(angle) < 0.6
        else np.array([rng.uniform(0.84, 0.96), rng.uniform(0.4, 0.6)])
    )
    step, tick = rng.uniform(0.018, 0.045), rng.uniform(0.014, 0.026)
    count = int(rng.uniform(0.35, 0.75) / step)

    def draw(canvas: ImageDraw.ImageDraw, unit: float) -> None:
        width = max(1, round(0.0022 * unit))
        start, end = centre - along * step * count / 2, centre + along * step * count / 2
        canvas.line([*(start * unit), *(end * unit)], fill=255, width=width)
        for i in range(count + 1):
            foot = start + along * step * i
            top = foot + across * tick * (1.6 if i % 5 == 0 else 1.0)
            canvas.line([*(foot * unit), *(top * unit)], fill=255, width=width)

    colour = np.array([0.12, 0.11, 0.12])
    return blend(picture, colour, coverage(shape, draw) * rng.uniform(0.4, 0.85))


def ink(picture: np.ndarray, rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Marks of a surgeon's pen on a circle around the lesion: short scribbles, or a dotted arc."""
    shape = picture.shape[:2]
    distance = radius * rng.uniform(1.45, 2.1) + 0.04
    strokes: list[np.ndarray] = []
    if rng.random() < 0.6:
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(1, 6)):
            spot = centre + distance * np.array([np.cos(angle), np.sin(angle)])
            strokes.append(spot + np.cumsum(rng.normal(0, 0.010, (rng.integers(12, 34), 2)), axis=0))
    else:
        first, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 2.6)
        for angle in np.arange(first, first + reach, 0.028 / distance):
            spot = centre + distance * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.003, 2)
            strokes.append(spot + rng.normal(0, 0.004, (5, 2)))

    def draw(canvas: ImageDraw.ImageDraw, unit: float) -> None:
        for points in strokes:
            canvas.line([tuple(p) for p in points * unit], fill=255, width=max(2, round(0.006 * unit)), joint="curve")

    weight = coverage(shape, draw) * rng.uniform(0.55, 0.9)
    return picture * (1 - weight[..., None] * (1 - INKS[rng.choice(len(INKS))].astype(np.float32)))


def sticker(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A round coloured sticker of fabric, mostly beyond the left or right rim of the frame."""
    height, width = picture.shape[:2]
    side = max(height, width)
    radius = side * rng.uniform(0.16, 0.28)
    beyond = radius * rng.uniform(0.25, 0.7)
    x, y = (width + beyond if rng.random() < 0.5 else -beyond), height * rng.uniform(0.1, 0.9)
    rows, columns = np.ogrid[:height, :width]
    weight = np.clip(radius - np.hypot(columns - x, rows - y), 0, 1).astype(np.float32)
    weave = 1 + 0.05 * rng.standard_normal((height, width, 1), dtype=np.float32)
    colour = STICKERS[rng.choice(len(STICKERS))].astype(np.float32) * rng.uniform(0.8, 1.0) * weave
    return picture + weight[..., None] * (colour - picture)


def dermoscope(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32, the share of light that the round opening of the lens lets through: 1 inside, about 0 beyond."""
    height, width = shape
    radius = rng.uniform(0.52, 0.62) * (max(shape) if rng.random() < 0.75 else np.sqrt(height * width) * 1.04)
    x, y = width / 2 + max(shape) * rng.normal(0, 0.02), height / 2 + max(shape) * rng.normal(0, 0.02)
    rows, columns = np.ogrid[:height, :width]
    edge = max(shape) * rng.uniform(0.004, 0.016)
    beyond = (np.hypot(columns - x, rows - y) - radius) / edge
    return (1 / (1 + np.exp(np.clip(beyond, -30, 30)))).astype(np.float32)
