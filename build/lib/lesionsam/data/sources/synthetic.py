"""Generated dermoscopy: pictures of skin lesions with their masks, for a demo and tests without any download.

Colour comes from two chromophores, as in real skin (Tsumura et al. 1999, independent components of skin colour;
Claridge et al. 2003, dermoscopy): a pixel reflects tissue x exp(-(melanin M + blood B)), with M and B maps over the
picture. The lesion is a smooth irregular level set; its pigment fades across a border whose width changes along the
outline, is patchy, may form a network, globules, a dark or a regressed part, or hardly differ from the skin. The mask
is what an annotator would draw: smooth, closed, without holes, a little outside the half-way point of the fade.

Nothing here is shared with `shapes`, the generator that the compact foundation is pretrained on: the two domains stay
apart. A picture depends on (seed, index, max_side) alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from lesionsam.data.sources import artefacts
from lesionsam.errors import UserError
from lesionsam.types import SPLITS
from lesionsam.utils.files import atomic_write
from lesionsam.utils.progress import progress

JPEG_QUALITY = 92
MIN_SIDE = 48  # the smallest `max_side` at which a lesion of 2 % still has some twenty pixels
MELANIN = np.array([0.52, 0.74, 1.00], np.float32)  # absorption per unit, R G B
BLOOD = np.array([0.20, 0.86, 0.74], np.float32)
TISSUE = np.array([0.97, 0.93, 0.89], np.float32)  # reflectance without either
VEIL = np.array([0.50, 0.55, 0.64], np.float32)  # pigment deep in the skin looks blue-grey
AREA_QUANTILES = np.array([0.025, 0.05, 0.09, 0.18, 0.36, 0.48, 0.56])  # of the frame, at equal steps of probability
ASPECTS = np.array([1.0, 4 / 3, 3 / 2, 1.25, 1.36, 3 / 4])
ASPECT_ODDS = np.array([0.14, 0.40, 0.20, 0.12, 0.08, 0.06])


@dataclass(frozen=True)
class Kind:
    """A kind of lesion: ranges from which one is drawn.

    Attributes:
        odds: relative frequency. melanin, blood: absorption added at full pigment, in the units of `MELANIN`, `BLOOD`.
        softness: width of the fade, share of the lesion's radius. roughness: irregularity of the outline, likewise.
        patchiness: unevenness of the pigment, 0 = flat. structure: strength of network or globules.
        veil, regression: probability of a blue-grey veil and of a part without pigment.
    """

    odds: float
    melanin: tuple[float, float]
    blood: tuple[float, float]
    softness: tuple[float, float]
    roughness: tuple[float, float]
    patchiness: tuple[float, float]
    structure: tuple[float, float]
    veil: float
    regression: float


KINDS = (
    Kind(0.29, (0.45, 1.30), (0.0, 0.25), (0.04, 0.16), (0.05, 0.15), (0.10, 0.35), (0.1, 0.6), 0.05, 0.08),  # naevus
    Kind(0.28, (0.50, 1.90), (0.0, 0.40), (0.04, 0.20), (0.12, 0.34), (0.35, 0.80), (0.1, 0.7), 0.35, 0.40),  # atypical
    Kind(0.13, (0.30, 0.80), (0.0, 0.20), (0.02, 0.08), (0.05, 0.16), (0.20, 0.50), (0.0, 0.4), 0.05, 0.10),  # warty
    Kind(0.10, (0.00, 0.25), (0.3, 0.85), (0.05, 0.20), (0.06, 0.20), (0.20, 0.50), (0.0, 0.2), 0.05, 0.10),  # vascular
    Kind(0.15, (0.06, 0.30), (0.0, 0.22), (0.04, 0.22), (0.08, 0.28), (0.25, 0.60), (0.0, 0.5), 0.02, 0.15),  # faint
    Kind(0.05, (0.80, 1.80), (0.0, 0.10), (0.04, 0.10), (0.04, 0.10), (0.05, 0.25), (0.0, 0.1), 0.90, 0.00),  # blue
)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: float, octaves: int = 1, gain: float = 0.5
) -> np.ndarray:
    """Smooth random field of about zero mean and unit variance.

    Args:
        shape: (H, W). cells: bumps along the longer side in the first octave; doubled in each further one.
        gain: amplitude of an octave over that of the one before.
    Returns:
        (H, W) float32.
    """
    height, width = shape
    field, power = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        count = min(cells * 2**octave, max(shape) / 2)
        step = max(shape) / count  # pixels per cell
        across, down = width / step, height / step
        grid = rng.standard_normal((int(down) + 5, int(across) + 5), dtype=np.float32)
        x, y = 1.5 + rng.random(2)
        part = (x, y, x + across, y + down)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=part)
        amplitude = gain**octave
        field += amplitude * np.asarray(layer)
        power += 0.62 * amplitude**2  # variance that bicubic interpolation leaves of a unit grid
    return field / np.float32(np.sqrt(power))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, safe for large arguments."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


@dataclass(frozen=True)
class Shape:
    """Where the lesion is: centre (2,) XY and radius in shares of the longer side; signed distance (H, W) from the
    annotator's outline in the same unit, about, negative inside; the mask (H, W) bool."""

    centre: np.ndarray
    radius: float
    distance: np.ndarray
    mask: np.ndarray


def draw_shape(rng: np.random.Generator, shape: tuple[int, int], kind: Kind, opening: np.ndarray | None) -> Shape:
    """An irregular blob of a drawn area, some cut by the frame. `opening`: (H, W), see `artefacts.dermoscope`."""
    side = max(shape)
    extent = np.array([shape[1], shape[0]]) / side
    area = float(np.interp(rng.random(), np.linspace(0, 1, len(AREA_QUANTILES)), AREA_QUANTILES))
    radius = float(np.sqrt(area * extent.prod() / np.pi))
    centre = extent * (0.5 + np.clip(rng.normal(0, 0.05, 2), -0.14, 0.14))
    if opening is None and rng.random() < 0.08:
        rim = rng.integers(4)
        centre[rim % 2] = extent[rim % 2] * (rim // 2) + (1 - 2 * (rim // 2)) * radius * rng.uniform(0.35, 0.95)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    x, y = (columns + 0.5) / side - np.float32(centre[0]), (rows + 0.5) / side - np.float32(centre[1])
    roughness = rng.uniform(*kind.roughness)
    bumps = min(0.9 / radius, 24)
    x = x + np.float32(radius * roughness * 0.9) * noise(rng, shape, bumps)
    y = y + np.float32(radius * roughness * 0.9) * noise(rng, shape, bumps)
    angle, stretch = rng.uniform(0, np.pi), np.exp(abs(rng.normal(0, 0.14)))
    if area > 0.25:  # a large lesion lies along the frame
        angle, stretch = angle * 0.1, np.sqrt(extent[0] / extent[1]) * np.exp(rng.normal(0, 0.05))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(u / stretch, v * stretch) - radius
    for _ in range(rng.integers(0, 3) if roughness > 0.16 else 0):  # lobes, joined smoothly
        turn, share = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.6)
        a, b = u - radius * 0.8 * np.cos(turn), v - radius * 0.8 * np.sin(turn)
        lobe = np.hypot(a, b) - radius * share
        bond = 0.25 * radius
        blend = np.clip(0.5 + (distance - lobe) / (2 * bond), 0, 1)
        distance = distance + blend * (lobe - distance) - bond * blend * (1 - blend)
    distance = distance + np.float32(radius * roughness * 0.35) * noise(rng, shape, min(3 / radius, 60), 3, 0.6)
    hidden = None if opening is None else opening < 0.5
    visible = distance if hidden is None else distance[~hidden]
    distance = (distance - np.quantile(visible, area)).astype(np.float32)
    drawn = ndimage.gaussian_filter(distance, side * rng.uniform(0.003, 0.014), truncate=3) < 0
    if hidden is not None:
        drawn &= ~hidden
    labels, count = ndimage.label(drawn)
    if count > 1:
        drawn = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    return Shape(centre, radius, distance, ndimage.binary_fill_holes(drawn))


def honeycomb(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> np.ndarray:
    """(H, W) float32 in 0..1, the lines of a warped hexagonal net with `cells` meshes along the longer side."""
    side = max(shape)
    warp = np.float32(0.30 * side / cells)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    x, y = columns + warp * noise(rng, shape, cells / 2), rows + warp * noise(rng, shape, cells / 2)
    turn = rng.uniform(0, np.pi)
    total, frequency = np.zeros(shape, np.float32), 2 * np.pi * cells / side
    for k in range(3):
        angle = turn + k * np.pi / 3
        total += np.cos(x * np.float32(frequency * np.cos(angle)) + y * np.float32(frequency * np.sin(angle)))
    return np.clip((1.2 - total) / 2.2, 0, 1)  # a sum of three waves has round bright holes: the lines are what is left


def draw_lesion(rng: np.random.Generator, lesion: Shape, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Melanin, blood and veil that the lesion adds: three (H, W) float32 maps."""
    shape, radius = lesion.mask.shape, lesion.radius
    softness = radius * rng.uniform(*kind.softness)
    local = softness * np.exp(0.5 * noise(rng, shape, min(0.6 / radius, 12)))
    generosity = softness * rng.uniform(0.5, 1.4) + 0.003  # the annotator draws this far outside the half-way point
    presence = sigmoid(-(lesion.distance + generosity) / (0.45 * local + 1e-3))
    depth = np.clip(-lesion.distance / radius, 0, 1)
    patches = noise(rng, shape, min(rng.uniform(0.7, 1.6) / radius, 30), 3, 0.6)
    patchiness = rng.uniform(*kind.patchiness)
    profile = np.clip(1 + rng.uniform(-0.25, 0.6) * (depth - 0.35) + patchiness * patches, 0.2, 2.2)
    structure = rng.uniform(*kind.structure)
    meshes = min(rng.uniform(5, 12) / radius, 75)
    if structure > 0.05:
        if rng.random() < 0.6:
            texture = honeycomb(rng, shape, meshes) - 0.45
        else:  # globules
            texture = sigmoid(5 * (noise(rng, shape, 1.6 * meshes) - 1.0)) - 0.2
        where = sigmoid(2 * noise(rng, shape, 1 / radius) + 1)
        profile = np.clip(profile * (1 + structure * texture * where), 0.05, None)
    pigment = presence * profile
    veil = np.zeros(shape, np.float32)
    if rng.random() < kind.veil:
        where = sigmoid(4 * (noise(rng, shape, min(1 / radius, 20), 2) + depth - 0.3))
        veil = presence * rng.uniform(0.3, 0.75) * where
    if rng.random() < kind.regression:
        where = sigmoid(5 * (noise(rng, shape, min(0.9 / radius, 20), 2) - rng.uniform(0.2, 0.9)))
        scar = presence * rng.uniform(0.4, 0.9) * where
        pigment = pigment * (1 - scar)
        veil = np.maximum(veil, 0.35 * scar)
    melanin, blood = rng.uniform(*kind.melanin), rng.uniform(*kind.blood)
    flush = noise(rng, shape, min(0.8 / radius, 20), 2)
    return melanin * pigment, blood * presence * np.clip(1 + 0.35 * flush, 0.1, None), veil


def draw_skin(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Melanin and blood of the skin around: two (H, W) float32 maps. Light to dark, mottled, freckled, flushed."""
    tone = rng.beta(0.9, 3.6)  # most published dermoscopy shows light skin; the tail reaches dark brown
    mottling = rng.uniform(0.008, 0.035) + (rng.uniform(0.03, 0.12) if rng.random() < 0.25 else 0)
    melanin = 0.02 + 0.95 * tone + mottling * noise(rng, shape, rng.uniform(4, 12), 4, 0.7)
    blood = rng.beta(1.2, 2.2) * 0.28 + rng.uniform(0.01, 0.05) * noise(rng, shape, rng.uniform(2, 8), 4, 0.7)
    if rng.random() < 0.35:  # flushed areas
        blood = blood + rng.uniform(0.08, 0.35) * sigmoid(3 * (noise(rng, shape, rng.uniform(1.5, 4), 2) - 0.5))
    if rng.random() < 0.3:  # freckles and lentigines
        blots = noise(rng, shape, rng.uniform(6, 16), 2)
        melanin = melanin + rng.uniform(0.1, 0.35) * sigmoid(3 * (blots - rng.uniform(1.2, 1.9)))
    if rng.random() < 0.5:  # lines of the skin's relief
        lines = np.abs(noise(rng, shape, rng.uniform(14, 34), 2))
        melanin = melanin - rng.uniform(0.02, 0.09) * np.exp(-((lines / 0.16) ** 2))
    if rng.random() < 0.25:  # small vessels
        vessels = np.abs(noise(rng, shape, rng.uniform(6, 14), 2))
        blood = blood + rng.uniform(0.08, 0.25) * np.exp(-((vessels / 0.06) ** 2)) * sigmoid(3 * noise(rng, shape, 3))
    return melanin, blood


def satellites(rng: np.random.Generator, lesion: Shape) -> np.ndarray:
    """(H, W) float32 in 0..1: one to four small moles outside the lesion, no part of its mask."""
    shape = lesion.mask.shape
    side = max(shape)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    spots = np.zeros(shape, np.float32)
    wobble = noise(rng, shape, 14)
    for _ in range(rng.integers(1, 5)):
        x, y, size = rng.random() * shape[1], rng.random() * shape[0], rng.uniform(0.008, 0.045)
        away = np.hypot(columns - x, rows - y) / side + size * 0.25 * wobble
        spots = np.maximum(spots, rng.uniform(0.4, 1.0) * sigmoid((size - away) / (0.18 * size)))
    return spots * sigmoid((lesion.distance - 0.02) / 0.006)


def generate(seed: int, index: int, max_side: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture and the mask of its lesion.

    Args:
        seed: of the data set. index: of the picture within it; the result depends on no other picture.
        max_side: upper bound of width and height, pixels; the longer side is 78 to 100 % of it.
    Returns:
        image: (H, W, 3) uint8 RGB. mask: (H, W) bool, one component without holes, 2 to 60 % of the frame.
    """
    rng = np.random.default_rng([seed, index])
    side, aspect = round(max_side * rng.uniform(0.78, 1.0)), rng.choice(ASPECTS, p=ASPECT_ODDS)
    shape = (round(side / aspect), side) if aspect >= 1 else (side, round(side * aspect))
    kind = KINDS[rng.choice(len(KINDS), p=[k.odds for k in KINDS])]
    opening = artefacts.dermoscope(shape, rng) if rng.random() < 0.18 else None
    lesion = draw_shape(rng, shape, kind, opening)

    skin_melanin, skin_blood = draw_skin(rng, shape)
    melanin, blood, veil = draw_lesion(rng, lesion, kind)
    if rng.random() < 0.3:
        melanin = melanin + rng.uniform(0.2, 0.8) * satellites(rng, lesion)
    if rng.random() < 0.3:  # a halo of flushed or tanned skin around the lesion, which the annotator leaves out
        halo = np.exp(-((np.maximum(lesion.distance, 0) / (lesion.radius * rng.uniform(0.2, 0.8))) ** 2))
        blood = blood + rng.uniform(0.05, 0.25) * halo
        melanin = melanin + rng.uniform(0.0, 0.12) * halo
    absorbed = (skin_melanin + melanin)[..., None] * MELANIN + (skin_blood + blood)[..., None] * BLOOD
    grain = np.float32(rng.uniform(0.004, 0.018)) * noise(rng, shape, max(shape) / 3, 2, 0.9)
    picture = TISSUE * np.exp(-absorbed + grain[..., None])
    picture += veil[..., None] * (VEIL * picture.mean(2, keepdims=True) / VEIL.mean() * 0.75 + 0.25 * VEIL - picture)
    picture = picture.astype(np.float32)

    if rng.random() < 0.25:
        picture = artefacts.ink(picture, rng, lesion.centre, lesion.radius)
    if rng.random() < 0.12 and not lesion.mask[:, [0, -1]].any():
        picture = artefacts.sticker(picture, rng)
    if rng.random() < 0.6:
        picture = artefacts.hair(picture, rng, rng.random() ** 1.5)
    if rng.random() < 0.3:
        picture = artefacts.bubbles(picture, rng)
    if rng.random() < 0.3:
        picture = artefacts.glints(picture, rng, lesion.centre, lesion.radius)
    if rng.random() < 0.2:
        picture = artefacts.ruler(picture, rng)
    picture = light_and_camera(rng, picture)
    if opening is not None:
        picture = picture * opening[..., None] + rng.uniform(0, 0.06) * (1 - opening[..., None])
    picture += rng.uniform(0.004, 0.016) * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), lesion.mask


def light_and_camera(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Uneven light, falling off to the corners, then exposure, white balance, contrast and focus."""
    height, width = picture.shape[:2]
    side = max(height, width)
    rows, columns = np.ogrid[:height, :width]
    v, u = (rows - height / 2) / side, (columns - width / 2) / side
    slope = rng.normal(0, 0.10, 2)
    falloff = rng.uniform(0, 0.55) if rng.random() < 0.6 else 0.0
    light = (1 + slope[0] * u + slope[1] * v) * (1 - falloff * (u**2 + v**2) * 1.6)
    balance = np.exp(rng.normal([-0.02, 0.01, 0.03], [0.04, 0.03, 0.07]))
    exposure = balance * rng.uniform(0.84, 1.10)
    picture = picture * light[..., None].astype(np.float32) * exposure.astype(np.float32)
    contrast, pivot = rng.uniform(0.85, 1.15), np.float32(0.55)
    picture = (picture - pivot) * np.float32(contrast) + pivot
    blur = rng.uniform(0, 0.0035) * side
    return ndimage.gaussian_filter(picture, (blur, blur, 0), truncate=2.5) if blur > 0.35 else picture


def write_dataset(out_dir: Path, *, seed: int, counts: Mapping[str, int], max_side: int) -> list[dict[str, str | int]]:
    """Write images/SPLIT/syn_XXXXXX.jpg and masks/SPLIT/syn_XXXXXX.png below a folder.

    Args:
        out_dir: folder, made where missing. counts: pictures per split; indices run on from split to split in the order
            train, dev, test, from 0, 100000 and 200000, so that no count changes another split's pictures.
        max_side: see `generate`.
    Returns:
        One row of index.csv per picture: image_id, split, image_path, mask_path (below `out_dir`, joined to it),
        width, height, sha256 of the image file.
    """
    if max_side < MIN_SIDE:
        raise UserError(f"data.max_side: expected at least {MIN_SIDE} px, got {max_side}; raise it in params.yaml")
    jobs = [(split, SPLITS.index(split) * 100_000 + i) for split in SPLITS for i in range(counts.get(split, 0))]
    rows: list[dict[str, str | int]] = []
    for split, index in progress(jobs, total=len(jobs), title="generating pictures"):
        image, mask = generate(seed, index, max_side)
        image_id = f"syn_{index:06d}"
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "JPEG", quality=JPEG_QUALITY)
        image_path = out_dir / "images" / split / f"{image_id}.jpg"
        mask_path = out_dir / "masks" / split / f"{image_id}.png"
        with atomic_write(image_path) as file:
            file.write(encoded.getvalue())
        with atomic_write(mask_path) as file:
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
        rows.append(
            {
                "image_id": image_id,
                "split": split,
                "image_path": image_path.as_posix(),
                "mask_path": mask_path.as_posix(),
                "width": image.shape[1],
                "height": image.shape[0],
                "sha256": hashlib.sha256(encoded.getvalue()).hexdigest(),
            }
        )
    return rows
