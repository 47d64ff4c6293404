"""Track lesions with a model for still images: SAM, MedSAM, the compact SAM, or any other without a memory.

The patch around the lesion is followed from the frame whose box was given (`motion`), so that errors do not add up. It
moves the outline that the model drew there, and this gives the next box, as much larger than the outline as the given
box was. The model decodes it on an enlarged crop. A lesion is lost when the patch no longer matches; it is then looked
for where the picture has its colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab

from lesionsam.boxes.geometry import box_slices, largest_component_box, pixels_inside
from lesionsam.boxes.prior import fisher_score, is_cut
from lesionsam.models.sam import Sam
from lesionsam.video.boxes import LesionBoxes
from lesionsam.video.crops import CropMask, decode_crop
from lesionsam.video.motion import Alignment, Patch, align, grey, take_patch
from lesionsam.video.tracker import Tracked

WORKING_SIDE = 1024  # longer side of the frames that are worked on, pixels; masks have the frame's own size
PATCH = 1.6  # side of the followed patch, in the big box's longer sides
FOLLOWED, FOUND = 0.5, 0.6  # correlation from which a patch counts as followed, and as found again
MIN_IN_VIEW = 0.15  # share of the lesion's outline inside the frame below which it is lost
SEARCH_SIDE = 128  # longer side of the picture in which colours are searched
SAMPLES = 200  # colours kept of core and band
NUM_CANDIDATES = 3  # places of the lesion's colours that are tried
AREA_RATIO = 4.0  # by which such a place may be larger or smaller than the lesion
MIN_PIXELS = 4  # of a place


@dataclass(frozen=True)
class Reference:
    """A lesion in the frame that it is followed from.

    Attributes:
        patch: around it. outline: (N, 2) XY of the mask's rim, in patch coordinates. margins: (2,) sides of the given
            box over those of the outline's box. shift: (2,) of the centres, in sides of the outline's box.
        is_cut: the box reached the frame's edge, beyond which the lesion may go on.
    """

    patch: Patch
    outline: np.ndarray
    margins: np.ndarray
    shift: np.ndarray
    is_cut: bool


@dataclass(frozen=True)
class Followed:
    """The state of one lesion.

    Attributes:
        reference: see there. place: (3, 3), its patch -> pixels of the last frame. speed: (3, 3) motion of that frame.
        mask: the last one. colours: (2, `SAMPLES`, 3) CIELAB of lesion and surroundings.
        beyond: (N, 2) XY of the last mask's rim in patch coordinates, where the given box was cut by the frame and the
            rim lies beyond that frame. lost: in the last frame.
    """

    reference: Reference
    place: np.ndarray
    speed: np.ndarray
    mask: CropMask
    colours: np.ndarray
    beyond: np.ndarray
    lost: bool = False


class Propagation:
    """A tracker for models without a memory; see `tracker.Tracker`.

    Args:
        sam: in eval mode. mask_prompt: give the last mask, moved along, as mask prompt beside the box.
    """

    def __init__(self, sam: Sam, *, mask_prompt: bool = False) -> None:
        self.sam, self.mask_prompt = sam, mask_prompt
        self.lesions: dict[str, Followed] = {}

    def step(self, image: np.ndarray, boxes: Mapping[str, LesionBoxes]) -> dict[str, Tracked]:
        """Return each lesion in the next frame; see `Tracker.step`."""
        working, scale = _reduced(image)
        picture = grey(working)
        found = {}
        for lesion_id in [*self.lesions, *(key for key in boxes if key not in self.lesions)]:
            if lesion_id in boxes:
                given = boxes[lesion_id]
                followed, score = self._start(working, picture, given.big * scale, given.small * scale), 1.0
            else:
                followed, score = self._follow(working, picture, self.lesions[lesion_id])
            self.lesions[lesion_id] = followed
            shape = (image.shape[0], image.shape[1])
            mask = np.zeros(shape, bool) if followed.lost else followed.mask.mask(shape, self.sam.frame, 1 / scale)
            found[lesion_id] = Tracked(mask, followed.lost, score)
        return found

    def _start(self, working: np.ndarray, picture: np.ndarray, big: np.ndarray, small: np.ndarray) -> Followed:
        """Decode a given box and take what the lesion is followed by."""
        decoded = decode_crop(self.sam, working, big)
        mask = decoded.mask(picture.shape, self.sam.frame) & pixels_inside(big, picture.shape)
        reference = _reference(picture, mask, big)
        lab = rgb2lab(working[_around(big, picture.shape)])
        colours = _colours(lab, big, small, picture.shape)
        return Followed(reference, reference.patch.matrix, np.eye(3), decoded, colours, np.zeros((0, 2)))

    def _follow(self, working: np.ndarray, picture: np.ndarray, last: Followed) -> tuple[Followed, float]:
        """Find a lesion in the next frame; return its state and the correlation of its patch."""
        patch = last.reference.patch
        found = align(patch, picture, last.place if last.lost else last.speed @ last.place)
        if found.correlation < FOLLOWED and not last.lost:
            found = max(found, align(patch, picture, last.place), key=lambda one: one.correlation)
        if found.correlation < (FOUND if last.lost else FOLLOWED):
            found = max([found, *self._search(working, picture, last)], key=lambda one: one.correlation)
            if found.correlation < FOUND:
                return replace(last, lost=True, speed=np.eye(3)), found.correlation
        box = self._box(found, picture.shape, last)
        if box is None:
            return replace(last, lost=True, speed=np.eye(3), place=found.matrix), found.correlation
        motion = found.matrix @ np.linalg.inv(last.place)
        decoded = decode_crop(self.sam, working, box, (last.mask, motion) if self.mask_prompt else None)
        speed = np.eye(3) if last.lost else motion
        now = replace(last, place=found.matrix, speed=speed, mask=decoded, lost=False)
        if last.reference.is_cut:
            beyond = self._beyond(now, decoded.mask(picture.shape, self.sam.frame), picture.shape)
            now = replace(now, beyond=beyond)
        return now, found.correlation

    def _box(self, found: Alignment, shape: tuple[int, int], last: Followed) -> np.ndarray | None:
        """Return the box to decode, (4,) XYXY cut at the frame; None where too little of the lesion is in view."""
        reference = last.reference
        outline = _moved(reference.outline, found.matrix)
        limits = np.array([shape[1], shape[0]], float)
        if ((outline >= 0) & (outline < limits)).all(1).mean() < MIN_IN_VIEW:
            return None
        outline = np.concatenate([outline, _moved(last.beyond, found.matrix)])
        low, high = outline.min(0), outline.max(0)
        centre = (low + high) / 2 + reference.shift * (high - low)
        half = (high - low) * reference.margins / 2
        box = np.concatenate([np.clip(centre - half, 0, limits), np.clip(centre + half, 0, limits)])
        return box if (box[2:] - box[:2]).min() >= 1 else None

    def _beyond(self, now: Followed, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Return the rim of a mask where the first frame did not reach, in patch coordinates; see `Followed.beyond`."""
        rim = _rim(mask)
        if rim is None:
            return np.zeros((0, 2))
        points = _moved(rim, np.linalg.inv(now.place))
        first = _moved(points, now.reference.patch.matrix)
        return points[((first < 0) | (first > shape[::-1])).any(1)]

    def _search(self, working: np.ndarray, picture: np.ndarray, last: Followed) -> Iterator[Alignment]:
        """Yield the alignments of a lesion's patch at the places that have its colours."""
        scale = min(1.0, SEARCH_SIDE / max(picture.shape))
        size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
        lab = rgb2lab(np.asarray(Image.fromarray(working).resize(size, Image.Resampling.BILINEAR)))
        pixels = np.concatenate([*last.colours, lab.reshape(-1, 3)])
        known = np.arange(len(pixels)) // SAMPLES
        score = fisher_score(pixels[None], (known == 0)[None], (known == 1)[None])[0, 2 * SAMPLES :]
        labels, count = ndimage.label(score.reshape(lab.shape[:2]) > 0)
        if not count:
            return
        outline = last.reference.outline @ last.place[:2, :2].T * scale
        area = np.prod(np.ptp(outline, axis=0))
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        fits = (areas >= max(MIN_PIXELS, area / AREA_RATIO / 2)) & (areas <= area * AREA_RATIO)
        chosen = [k for k in np.argsort(-areas, kind="stable") if fits[k]][:NUM_CANDIDATES]
        middle = outline.mean(0) / scale
        for row, column in ndimage.center_of_mass(labels > 0, labels, [k + 1 for k in chosen]):
            place = last.place.copy()
            place[:2, 2] = np.array([column + 0.5, row + 0.5]) / scale - middle
            yield align(last.reference.patch, picture, place)

    def state(self) -> dict[str, Any]:
        """Return the state; see `Tracker.state`."""
        return {lesion_id: _packed(followed) for lesion_id, followed in self.lesions.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.lesions = {lesion_id: _unpacked(values) for lesion_id, values in state.items()}


def _reduced(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a frame with a longer side of at most `WORKING_SIDE`, and its pixels per pixel of the frame."""
    scale = WORKING_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image, 1.0
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)), scale


def _reference(picture: np.ndarray, mask: np.ndarray, big: np.ndarray) -> Reference:
    """Return a lesion's reference from its mask; from the ellipse in its box where the mask is empty."""
    centre, side = (big[:2] + big[2:]) / 2, (big[2:] - big[:2]).max() * PATCH
    patch = take_patch(picture, np.concatenate([centre - side / 2, centre + side / 2]))
    rim = _rim(mask)
    if rim is None:
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        rim = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * (big[2:] - big[:2]) / 2
    low, high = rim.min(0), rim.max(0)
    extent = np.maximum(high - low, 1.0)
    return Reference(
        patch,
        _moved(rim, np.linalg.inv(patch.matrix)),
        np.maximum((big[2:] - big[:2]) / extent, 1.0),
        (centre - (low + high) / 2) / extent,
        is_cut(big, (picture.shape[0], picture.shape[1])),
    )


def _rim(mask: np.ndarray) -> np.ndarray | None:
    """Return the centres of the rim's pixels of a mask's largest component, (N, 2) XY; None for an empty mask."""
    box = largest_component_box(mask)
    if box is None:
        return None
    x0, y0, x1, y1 = box.astype(int).tolist()
    labels, _ = ndimage.label(mask[y0:y1, x0:x1])
    largest = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    rows, columns = np.nonzero(largest & ~ndimage.binary_erosion(largest))
    return np.stack([columns + 0.5, rows + 0.5], 1) + box[:2]


def _moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a (3, 3) affine matrix to (N, 2) XY."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def _around(big: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return (rows, columns) of a box and as much again around it."""
    half = (big[2:] - big[:2]) / 2
    return box_slices(np.concatenate([big[:2] - half, big[2:] + half]), (shape[0], shape[1]))


def _colours(lab: np.ndarray, big: np.ndarray, small: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `SAMPLES` colours of the core and as many around the big box; of the whole picture where it fills that.

    Args:
        lab: (h, w, 3) CIELAB of `_around` the big box.
    """
    rows, columns = _around(big, shape)
    core = pixels_inside(small, (shape[0], shape[1]))[rows, columns]
    band = ~pixels_inside(big, (shape[0], shape[1]))[rows, columns]
    chosen = []
    for region in (core, band):
        pixels = lab[region] if region.any() else lab.reshape(-1, 3)
        chosen.append(pixels[np.linspace(0, len(pixels) - 1, SAMPLES).astype(int)])
    return np.stack(chosen)


def _packed(followed: Followed) -> dict[str, Any]:
    """Return a lesion's state as tensors, numbers and lists."""
    reference, patch, mask = followed.reference, followed.reference.patch, followed.mask
    arrays = {
        "matrix": patch.matrix,
        "outline": reference.outline,
        "margins": reference.margins,
        "shift": reference.shift,
        "place": followed.place,
        "speed": followed.speed,
        "window": mask.window,
        "colours": followed.colours,
        "beyond": followed.beyond,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()} | {
        "values": [torch.from_numpy(np.ascontiguousarray(level)) for level in patch.values],
        "spread": patch.spread,
        "seen": [torch.from_numpy(np.ascontiguousarray(level)) for level in patch.seen],
        "is_cut": reference.is_cut,
        "logits": mask.logits.clone(),
        "input_size": list(mask.input_size),
        "predicted_iou": mask.predicted_iou,
        "lost": followed.lost,
    }


def _unpacked(values: Mapping[str, Any]) -> Followed:
    """Return the state that `_packed` gave."""
    v: dict[str, Any] = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }
    levels = [tuple(level.numpy() for level in v[name]) for name in ("values", "seen")]
    reference = Reference(Patch(v["matrix"], v["spread"], *levels), v["outline"], v["margins"], v["shift"], v["is_cut"])
    height, width = v["input_size"]
    mask = CropMask(v["window"], values["logits"], (height, width), v["predicted_iou"])
    return Followed(reference, v["place"], v["speed"], mask, v["colours"], v["beyond"], v["lost"])
