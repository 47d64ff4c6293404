"""Generate clips of a moving camera over a generated lesion, with the mask of every frame.

A picture of `synthetic` is the scene. The camera drifts, turns, comes nearer, sees the skin stretched a little and,
in some clips, loses a part of the lesion; light and white balance change, and every frame has noise of its own. A frame
depends on (seed, index, frame) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from lesionsam.boxes.geometry import largest_component_box
from lesionsam.data.sources.synthetic import generate

SCENE_SIDE = 2.4  # longer side of the scene over that of a frame
ASPECT = 0.75  # height over width of a frame
AREAS = (0.015, 0.09)  # share of the scene that its lesion takes: a tenth to a half of a frame
RIM = 0.2  # of the scene's sides that the lesion keeps clear of, so that the camera finds skin around it
NUM_CANDIDATES = 1000  # scenes of an index, of which the first with such a lesion is taken


@dataclass(frozen=True)
class Wave:
    """A slow change over a clip: amplitude, periods in the clip, phase in turns; 0 in the first frame."""

    amplitude: float
    periods: float
    phase: float

    def __call__(self, place: float) -> float:
        """Return the value at a place of the clip, 0 to 1."""
        start, turn = 2 * np.pi * self.phase, 2 * np.pi * (self.phase + self.periods * place)
        return float(self.amplitude * (np.sin(turn) - np.sin(start)))


class GeneratedClip:
    """Frames and masks of one clip, made when they are read.

    Args:
        seed, index: of the clip. num_frames: in it. side: width of its frames, pixels; the height is 3/4 of it.
        leaves: the camera moves so far that a part of the lesion leaves the frame.
    """

    def __init__(self, seed: int, index: int, *, num_frames: int = 60, side: int = 256, leaves: bool = False) -> None:
        self.num_frames, self.size = num_frames, (side, round(side * ASPECT))
        self._key = (seed, index)
        self._scene, self._mask = _scene(seed, index, round(side * SCENE_SIDE))
        rng = np.random.default_rng([seed, index, 1])
        rows, columns = np.nonzero(self._mask)
        self._centre = np.array([columns.mean(), rows.mean()]) + 0.5
        reach = side * (0.45 if leaves else 0.12)

        def wave(amplitude: float, periods: tuple[float, float] = (0.5, 1.5)) -> Wave:
            sign = rng.choice([-1.0, 1.0])
            return Wave(sign * amplitude * rng.uniform(0.6, 1.0), rng.uniform(*periods), rng.uniform(0, 1))

        angle = rng.uniform(0, 2 * np.pi)
        self._offset = rng.uniform(-0.06, 0.06, 2) * side
        path = wave(reach, (0.4, 0.6)) if leaves else wave(reach)
        self._path = (path, np.array([np.cos(angle), np.sin(angle)]))
        self._shake = [wave(0.015 * side, (4, 9)) for _ in range(2)]
        self._turn, self._zoom = wave(0.35), wave(0.14)
        self._stretch, self._stretch_angle = wave(0.03), rng.uniform(0, np.pi)
        self._light, self._balance = wave(0.10), [wave(0.04) for _ in range(3)]
        self._noise = rng.uniform(1.0, 4.0)

    def __len__(self) -> int:
        return self.num_frames

    def frame(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a frame, (H, W, 3) uint8 RGB, and its mask, (H, W) bool."""
        matrix = self.camera(number)
        picture = np.asarray(self._seen(Image.fromarray(self._scene), matrix), np.float32)
        mask = np.asarray(self._seen(Image.fromarray(self._mask.astype(np.uint8) * 255), matrix)) > 127
        place = number / max(self.num_frames - 1, 1)
        gain = np.exp(self._light(place) + np.array([wave(place) for wave in self._balance]))
        noise = np.random.default_rng([*self._key, 2, number]).normal(0, self._noise, picture.shape)
        return np.clip(picture * gain + noise + 0.5, 0, 255).astype(np.uint8), mask

    def camera(self, number: int) -> np.ndarray:
        """Return (2, 3), pixels of a frame -> pixels of the scene."""
        place = number / max(self.num_frames - 1, 1)
        path, direction = self._path
        middle = self._centre + self._offset + path(place) * direction + [wave(place) for wave in self._shake]
        turn, scale = self._turn(place), np.exp(self._zoom(place))
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        axis = np.array([np.cos(self._stretch_angle), np.sin(self._stretch_angle)])
        stretch = np.eye(2) + self._stretch(place) * np.outer(axis, axis)
        linear = scale * rotation @ stretch
        return np.concatenate([linear, (middle - linear @ (np.array(self.size) / 2))[:, None]], 1)

    def _seen(self, scene: Image.Image, matrix: np.ndarray) -> Image.Image:
        return scene.transform(
            self.size, Image.Transform.AFFINE, tuple(matrix.ravel().tolist()), Image.Resampling.BILINEAR
        )


def _scene(seed: int, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first picture of an index whose lesion has the size and place that a clip needs, and its mask."""
    for candidate in range(NUM_CANDIDATES):
        picture, mask = generate(seed, index * NUM_CANDIDATES + candidate, side)
        height, width = mask.shape
        box = largest_component_box(mask)
        rims = [] if box is None else [*box[:2] / (width, height), *(1 - box[2:] / (width, height))]
        if rims and min(rims) > RIM and AREAS[0] <= mask.mean() <= AREAS[1]:
            return picture, mask
    raise ValueError(f"index {index}: none of {NUM_CANDIDATES} scenes suits")


def generate_pair(
    seed: int, index: int, *, side: int = 384, growth: float = 1.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Generate two pictures of one lesion, the second turned, shifted, in other light and with the lesion grown.

    The skin around is that of the first picture; close to the lesion it gives way smoothly.

    Args:
        growth: of the lesion's lengths; its area grows by about the square.
    Returns:
        two of (H, W, 3) uint8 RGB and (H, W) bool. The true change of area is that of the masks.
    """
    scene, mask = _scene(seed, index, round(side * SCENE_SIDE))
    rows, columns = np.nonzero(mask)
    centre = np.array([columns.mean(), rows.mean()])
    grid = np.stack(np.meshgrid(np.arange(mask.shape[1]), np.arange(mask.shape[0])), -1).astype(np.float64)
    reach = ndimage.distance_transform_edt(~mask) / np.sqrt(mask.sum())
    strength = np.exp(-((reach / 0.5) ** 2))[..., None]
    places = centre + (grid - centre) * (1 + (1 / growth - 1) * strength)
    moved = [places[..., 1], places[..., 0]]
    channels = [ndimage.map_coordinates(scene[..., k], moved, order=1, mode="nearest") for k in range(3)]
    grown = np.stack(channels, -1), ndimage.map_coordinates(mask.astype(np.float32), moved, order=1) > 0.5
    rng = np.random.default_rng([seed, index, 3])
    size, pictures = (side, round(side * ASPECT)), []
    for number, (picture, lesion) in enumerate(((scene, mask), grown)):
        turn, shift = (rng.uniform(-0.2, 0.2), rng.uniform(-0.06, 0.06, 2) * side) if number else (0.0, np.zeros(2))
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = np.concatenate([linear, (centre + shift - linear @ (np.array(size) / 2))[:, None]], 1)
        values = tuple(matrix.ravel().tolist())
        seen = [
            np.asarray(Image.fromarray(one).transform(size, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR))
            for one in (picture, lesion.astype(np.uint8) * 255)
        ]
        light = np.exp(rng.uniform(-0.08, 0.08, 3)) if number else np.ones(3)
        noisy = seen[0] * light + rng.normal(0, 2, seen[0].shape)
        pictures.append((np.clip(noisy + 0.5, 0, 255).astype(np.uint8), seen[1] > 127))
    return pictures
