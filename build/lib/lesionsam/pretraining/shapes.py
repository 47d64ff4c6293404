"""Generated shapes: what the compact SAM is pretrained on. Generic objects on varied backgrounds, batched and seeded.

Nothing here knows of lesions or skin: colours, sizes, borders and clutter are drawn from wide, neutral ranges. Every
object is an implicit function f, roughly the distance to its outline in sides of the image, negative inside.
All arrays are (B, channels, row, column); x runs along columns; coordinates are shares of the side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_OBJECTS = 2  # drawn per image, the second over the first
MIN_AREA = 0.01  # an object that shows less of the frame, or
MIN_VISIBLE = 0.6  # less of itself, is nobody's target
EXTENT = 0.5  # the outline lies this many border widths outside the half-way colour: the visible extent


@dataclass(frozen=True)
class Shapes:
    """B generated images with their objects.

    Attributes:
        images: (B, 3, S, S) uint8 RGB.
        masks: (B, K, S, S) bool, the visible part of each object; they do not overlap.
        usable: (B, K) bool, whether the object shows enough to be asked for.
    """

    images: Tensor
    masks: Tensor
    usable: Tensor


def generate_shapes(num: int, side: int, generator: torch.Generator) -> Shapes:
    """Draw `num` images of `side` pixels. The same generator state gives the same images."""
    draw = _Draw(num, side, generator)
    image = _background(draw)
    masks: list[Tensor] = []
    usable: list[Tensor] = []
    for index in range(NUM_OBJECTS):
        present = draw.chance(1.0 if index == 0 else 0.6)
        outline = torch.where(present, _outline(draw, smaller=index > 0), torch.ones(()))
        image, mask = _paint(draw, image, outline)
        full = mask.flatten(1).sum(1)
        usable = [
            u & ((m & ~mask).flatten(1).sum(1) >= MIN_VISIBLE * m.flatten(1).sum(1))
            for u, m in zip(usable, masks, strict=True)
        ]
        usable.append((full >= MIN_AREA * side * side) & (full <= 0.85 * side * side))
        masks = [m & ~mask for m in masks] + [mask]
    image = _clutter(draw, image)
    image, hidden = _camera(draw, image)
    stacked = torch.stack(masks, 1) & ~hidden[:, None]
    enough = stacked.flatten(2).sum(2) >= MIN_AREA * side * side
    return Shapes((image.clamp(0, 1) * 255).round().to(torch.uint8), stacked, torch.stack(usable, 1) & enough)


class _Draw:
    """Random quantities of one batch: scalars per image are (B, 1, 1), fields are (B, C, S, S)."""

    def __init__(self, num: int, side: int, generator: torch.Generator) -> None:
        self.num, self.side, self.generator = num, side, generator
        axis = (torch.arange(side) + 0.5) / side
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape), (B, 1, 1) when no shape is given."""
        return torch.rand(self.num, *(shape or (1, 1)), generator=self.generator) * (high - low) + low

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.num, *(shape or (1, 1)), generator=self.generator)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Bool of the same shapes as `uniform`."""
        return self.uniform(0, 1, *shape) < probability

    def field(self, channels: int, cells: int) -> Tensor:
        """Smooth noise of about unit variance with `cells` bumps a side."""
        coarse = self.normal(channels, cells, cells)
        return F.interpolate(coarse, size=(self.side, self.side), mode="bicubic", align_corners=False)

    def fractal(self, channels: int, cells: tuple[int, ...], falloff: float = 0.6) -> Tensor:
        """Sum of smooth noises, each finer one `falloff` times as strong."""
        total = torch.zeros(())
        for octave, count in enumerate(cells):
            total = total + falloff**octave * self.field(channels, count)
        return total

    def mottling(self, cells: tuple[int, ...], falloff: float = 0.6) -> Tensor:
        """(B, 3, S, S) fractal noise, more of lightness than of colour."""
        return self.fractal(1, cells, falloff) + 0.45 * self.fractal(3, cells, falloff)

    def colour(self) -> Tensor:
        """(B, 3, 1, 1): grey level with a saturation that is low more often than high."""
        grey = self.uniform(0.04, 0.96, 1, 1, 1)
        tint = self.normal(3, 1, 1)
        return (grey + self.uniform(0, 1, 1, 1, 1) ** 2 * 0.25 * tint).clamp(0.02, 0.98)

    def texture(self) -> Tensor:
        """(B, 1, S, S) in about -1 to 1: stripes, grids or speckle, each image its own; many have none."""
        angle, frequency = self.uniform(0, math.pi), self.log_uniform(5, 28)
        bend = self.fractal(2, (4, 9)) * self.uniform(0, 0.03, 1, 1, 1)
        x, y = self.x + bend[:, 0], self.y + bend[:, 1]
        phase = 2 * math.pi * frequency
        first = torch.sin(phase * (torch.cos(angle) * x + torch.sin(angle) * y))
        second = torch.sin(phase * (torch.cos(angle) * y - torch.sin(angle) * x))
        kind = self.uniform(0, 1)
        speckle = self.fractal(1, (self.side // 6, self.side // 3))[:, 0]
        pattern = torch.where(kind < 0.25, first, torch.where(kind < 0.5, first * second, speckle))
        return (pattern * self.chance(0.5))[:, None]


def _background(draw: _Draw) -> Tensor:
    """(B, 3, S, S): a colour with gradients, mottling, texture and sometimes a second region."""
    image = draw.colour() + draw.uniform(0, 0.25, 1, 1, 1) ** 2 * draw.mottling((2, 5, 12, 30))
    image = image + draw.uniform(0, 0.15, 1, 1, 1) * draw.field(1, 2)
    image = image + draw.uniform(0, 0.1, 1, 1, 1) * draw.texture()
    region = torch.sigmoid(draw.log_uniform(3, 40, 1, 1, 1) * (draw.field(1, 3) - draw.uniform(0, 1.2, 1, 1, 1)))
    share = region * draw.chance(0.3, 1, 1, 1) * draw.uniform(0.1, 0.6, 1, 1, 1)
    return image * (1 - share) + draw.colour() * share


def _outline(draw: _Draw, smaller: bool) -> Tensor:
    """(B, S, S): implicit function of one object per image, of one of five families."""
    radius = draw.log_uniform(0.06, 0.5) * (0.6 if smaller else 1.0)
    spread = draw.uniform(0, 1) ** 0.7  # near the middle more often than at the frame
    centre_x = 0.5 + 0.5 * spread * draw.uniform(-1, 1)
    centre_y = 0.5 + 0.5 * spread * draw.uniform(-1, 1)
    stretch, angle = draw.uniform(-0.45, 0.45).exp(), draw.uniform(0, 2 * math.pi)
    warp = draw.fractal(2, (4, 8, 16), 0.5) * draw.uniform(0, 0.035, 1, 1, 1) * draw.chance(0.7, 1, 1, 1)
    x, y = draw.x - centre_x + warp[:, 0], draw.y - centre_y + warp[:, 1]
    u = (torch.cos(angle) * x + torch.sin(angle) * y) / stretch
    v = (torch.cos(angle) * y - torch.sin(angle) * x) * stretch
    r, theta = torch.hypot(u, v) + 1e-6, torch.atan2(v, u)

    rough = draw.uniform(0, 0.35)
    factor = torch.ones(())
    for harmonic in range(2, 8):
        factor = factor + rough * draw.normal() / harmonic * torch.cos(harmonic * theta + draw.uniform(0, 2 * math.pi))
    star = r - radius * factor.clamp(0.35, 1.7)

    sector = 2 * math.pi / torch.randint(3, 8, (draw.num, 1, 1), generator=draw.generator)
    polygon = r * torch.cos(torch.remainder(theta, sector) - sector / 2) - radius * torch.cos(sector / 2) * 1.15

    power = draw.log_uniform(1.2, 6)
    superellipse = (u.abs() ** power + v.abs() ** power + 1e-9) ** (1 / power) - radius

    blob = r - radius * (1 + draw.uniform(0.1, 0.5) * draw.fractal(1, (5, 9, 17))[:, 0]).clamp(0.3, 1.8)

    lumps = torch.zeros(())
    for _ in range(4):
        at_u, at_v = 0.75 * radius * draw.normal(), 0.75 * radius * draw.normal()
        size = radius * draw.uniform(0.35, 0.9)
        lumps = lumps + torch.exp(-(torch.hypot(u - at_u, v - at_v) - size) * 4 / radius)
    union = -(lumps + 1e-9).log() * radius / 4

    family = draw.uniform(0, 1)
    outline = star
    for threshold, other in ((0.7, blob), (0.5, union), (0.3, superellipse), (0.15, polygon)):
        outline = torch.where(family < threshold, other, outline)
    return outline


def _paint(draw: _Draw, image: Tensor, outline: Tensor) -> tuple[Tensor, Tensor]:
    """Lay one object over the image; (B, 3, S, S) and its (B, S, S) bool mask, the visible extent."""
    inside = torch.sigmoid(-outline * 200)[:, None]
    weight = inside / inside.sum((2, 3), keepdim=True).clamp(min=1)
    under = (image * weight).sum((2, 3), keepdim=True)
    step = draw.normal(3, 1, 1)
    step = 0.5 * step + step.mean(1, keepdim=True)  # colour differences are mostly differences of lightness
    step = step / step.norm(dim=1, keepdim=True) * draw.log_uniform(0.08, 0.9, 1, 1, 1)
    flipped = ((under + step).mean(1, keepdim=True) - 0.5).abs() > 0.5
    colour = (under + torch.where(flipped, -step, step)).clamp(0, 1)
    mottling = draw.uniform(0, 0.35, 1, 1, 1) ** 2 * draw.mottling((3, 7, 15, 30), 0.7)
    fill = colour + mottling + draw.uniform(0, 0.12, 1, 1, 1) * draw.texture()

    # Several colours in one object: patches shifted along the same step, or to a colour of their own.
    for probability in (0.5, 0.25):
        slope, noise = draw.log_uniform(2, 25, 1, 1, 1), draw.fractal(1, (4, 9))
        patch = torch.sigmoid(slope * (noise - draw.uniform(-0.3, 1.2, 1, 1, 1))) * draw.chance(probability, 1, 1, 1)
        shifted = colour + (colour - under) * draw.uniform(-0.7, 1.2, 1, 1, 1) + 0.08 * draw.normal(3, 1, 1)
        other = torch.where(draw.chance(0.25, 1, 1, 1), draw.colour(), shifted)
        fill = fill * (1 - patch) + other.clamp(0, 1) * patch

    # A profile from the outline inwards (darker or lighter centre), and a rim.
    depth = (-outline / (-outline).flatten(1).amax(1).clamp(min=0.02)[:, None, None]).clamp(0, 1)[:, None]
    fill = fill + (colour - under) * draw.uniform(-0.6, 0.6, 1, 1, 1) * (depth - 0.3)
    rim = torch.exp(-(((depth - 0.08) / 0.07) ** 2)) * draw.chance(0.15, 1, 1, 1) * draw.uniform(0.2, 0.9, 1, 1, 1)
    fill = fill * (1 - rim) + draw.colour() * rim

    # Border width: sharp to very soft, the same all round or varying along the outline.
    width = draw.log_uniform(0.002, 0.07)
    width = width * (1 + draw.uniform(0, 0.7) * draw.field(1, 4)[:, 0]).clamp(0.3, 2.5)
    room = (-outline).flatten(1).amax(1)[:, None, None].clamp(min=0.01)
    width = torch.minimum(width, 0.35 * room)
    opacity = torch.sigmoid(-outline / width * 1.5)[:, None] * draw.uniform(0.75, 1, 1, 1, 1)
    # A halo around some objects, which belongs to the background.
    halo = torch.exp(-((outline.clamp(min=0) / draw.uniform(0.03, 0.15)) ** 2))[:, None]
    halo = halo * draw.chance(0.25, 1, 1, 1) * draw.uniform(-0.12, 0.12, 1, 1, 1)
    image = (image + halo * draw.uniform(0.4, 1, 3, 1, 1)) * (1 - opacity) + fill * opacity
    return image, outline < EXTENT * width / 1.5


def _clutter(draw: _Draw, image: Tensor) -> Tensor:
    """Thin curves, straight lines, dots and highlights over everything; none is ever a target."""
    count = torch.randint(1, 10, (draw.num, 1, 1), generator=draw.generator) * draw.chance(0.4)
    angle, colour = draw.uniform(0, math.pi), draw.colour()
    cover = torch.zeros(draw.num, draw.side, draw.side)
    for index in range(9):
        turn = angle + 0.6 * draw.normal()
        along = torch.cos(turn) * (draw.x - 0.5) + torch.sin(turn) * (draw.y - 0.5)
        across = torch.cos(turn) * (draw.y - 0.5) - torch.sin(turn) * (draw.x - 0.5)
        bend = draw.uniform(-0.8, 0.8) * (along - draw.uniform(-0.4, 0.4)) ** 2
        distance = (across - draw.uniform(-0.55, 0.55) - bend).abs() / draw.log_uniform(0.003, 0.012)
        reach = (along - draw.uniform(-0.5, 0.5)).abs() < draw.uniform(0.15, 0.9)
        cover = torch.maximum(cover, torch.exp(-(distance**2)) * (reach & (index < count)))
    cover = (cover * draw.uniform(0.4, 1))[:, None]
    image = image * (1 - cover) + colour * cover
    for _ in range(3):
        distance = torch.hypot(draw.x - draw.uniform(0, 1), draw.y - draw.uniform(0, 1))
        dot = torch.sigmoid((draw.log_uniform(0.006, 0.04) - distance) / draw.log_uniform(0.002, 0.01))
        dot = (dot * draw.chance(0.25) * draw.uniform(0.3, 1))[:, None]
        image = image * (1 - dot) + draw.colour() * dot
    return image


def _camera(draw: _Draw, image: Tensor) -> tuple[Tensor, Tensor]:
    """Uneven light, vignette, dark or bright frames, blur, block compression and noise.

    Returns the image and (B, S, S) bool, what a frame hides.
    """
    image = image * (
        1
        + draw.uniform(-0.2, 0.2, 1, 1, 1) * (draw.x - 0.5) * 2
        + draw.uniform(-0.2, 0.2, 1, 1, 1) * (draw.y - 0.5) * 2
    )
    radius = torch.hypot(draw.x - 0.5 - draw.uniform(-0.06, 0.06), draw.y - 0.5 - draw.uniform(-0.06, 0.06))
    image = image * (1 - draw.uniform(0, 0.9) * draw.chance(0.4) * radius**2)[:, None]
    aperture = torch.sigmoid((radius - draw.uniform(0.44, 0.68)) * draw.log_uniform(20, 200)) * draw.chance(0.25)
    band = torch.maximum((draw.x - 0.5).abs(), (draw.y - 0.5).abs())
    frame = torch.sigmoid((band - draw.uniform(0.42, 0.49)) * 300) * draw.chance(0.08)
    cover = torch.maximum(aperture, frame)[:, None]
    shade = torch.where(draw.chance(0.8, 1, 1, 1), draw.uniform(0, 0.08, 1, 1, 1), draw.uniform(0, 1, 1, 1, 1))
    image = image * (1 - cover) + shade * cover

    image = image * draw.uniform(0.75, 1.2, 1, 1, 1) + draw.uniform(-0.08, 0.08, 1, 1, 1)
    blurred = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), _gaussian(1.0).expand(3, 1, 5, 5), groups=3)
    image = torch.where(draw.chance(0.35, 1, 1, 1), blurred, image)
    compressed, step = draw.chance(0.25, 1, 1, 1), draw.log_uniform(0.02, 0.25, 1, 1, 1)
    image = torch.where(compressed, _block_compress(image, step), image)
    image = image + draw.log_uniform(0.001, 0.05, 1, 1, 1) * draw.normal(3, draw.side, draw.side)
    return image, cover[:, 0] > 0.5


def _gaussian(sigma: float) -> Tensor:
    """(1, 1, 5, 5) kernel of sum 1."""
    line = torch.exp(-((torch.arange(5) - 2.0) ** 2) / (2 * sigma**2))
    return (line[:, None] * line / line.sum() ** 2)[None, None]


def _block_compress(image: Tensor, step: Tensor) -> Tensor:
    """JPEG-like: round the cosine coefficients of 8 x 8 blocks, higher frequencies more coarsely.

    image (B, 3, S, S) in 0 to 1; step (B, 1, 1, 1), the coarsest rounding, of the orthonormal coefficients.
    Sides that 8 does not divide are left as they are.
    """
    num, channels, side, _ = image.shape
    if side % 8:
        return image
    frequency = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (frequency[None] + 0.5) * frequency[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    blocks = image.view(num, channels, side // 8, 8, side // 8, 8).permute(0, 1, 2, 4, 3, 5)
    scale = step[..., None, None] * (1 + frequency[:, None] + frequency)
    coefficients = ((basis @ blocks @ basis.T) / scale).round() * scale
    return (basis.T @ coefficients @ basis).permute(0, 1, 2, 4, 3, 5).reshape(image.shape)
