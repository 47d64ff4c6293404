"""Define annotations (lesions with two boxes, marks, author and time) and check what a page sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pydantic import TypeAdapter

from lesionsam.boxes.table import TOLERANCE
from lesionsam.errors import UserError

Box: TypeAlias = tuple[float, float, float, float]  # XYXY, half-open, pixels of the image after EXIF transpose

DRAWN, CORRECTED, ACCEPTED, AUTOMATIC = "drawn", "corrected", "accepted", "automatic"
SOURCES = (DRAWN, CORRECTED, ACCEPTED, AUTOMATIC)
NO_LESION, CANNOT_TELL, REJECTED = "no_lesion", "cannot_tell", "rejected"
MARKS = ("", NO_LESION, CANNOT_TELL, REJECTED)  # "": nobody has said anything of the image beside its boxes
OPEN, DONE, UNSEEN = "open", "done", "unseen"  # statuses of an image without a mark
MAX_LESIONS = 200  # of one image
MAX_NAME = 80  # characters of an annotator's name and of a lesion's id
MAX_SECONDS = 3600.0  # that one change may claim
MIN_SIDE = 1.0  # of a box, pixels


@dataclass(frozen=True)
class Lesion:
    """One annotated lesion.

    Attributes:
        lesion_id: unique within its image. big, small: the two boxes, to a hundredth of a pixel.
        source: of `SOURCES`. core: "drawn", or "suggested" while nobody has touched the core.
        proposed: the boxes that a model proposed, (big, small), where the lesion began as a proposal.
        model: which weights proposed, first 12 digits of their SHA-256. threshold: probability of the proposed mask.
        seconds: a person's time spent on it. made_by, made_at, changed_by, changed_at: who and when (UTC, ISO 8601).
    """

    lesion_id: str
    big: Box
    small: Box
    source: str = DRAWN
    core: str = "drawn"
    proposed: tuple[Box, Box] | None = None
    model: str = ""
    threshold: float | None = None
    seconds: float = 0.0
    made_by: str = ""
    made_at: str = ""
    changed_by: str = ""
    changed_at: str = ""

    @property
    def boxes(self) -> tuple[Box, Box]:
        """Return the big and the core."""
        return self.big, self.small


@dataclass(frozen=True)
class ImageState:
    """The annotations of one image.

    Attributes:
        revision: grows by one with every change; 0 = as the table was found. mark: of `MARKS`.
        seconds: a person's time spent on the image that belongs to no lesion of it.
        change: name that the page gave the last change, so that one sent twice counts once.
        shown: label of the model whose proposal was in sight when a person decided; empty where none ever was.
    """

    image_id: str
    revision: int = 0
    mark: str = ""
    lesions: tuple[Lesion, ...] = ()
    seconds: float = 0.0
    changed_by: str = ""
    changed_at: str = ""
    change: str = ""
    shown: str = ""

    @property
    def status(self) -> str:
        """Return done where there are lesions, unseen where no person has seen one; else the mark, else open."""
        if any(lesion.source == AUTOMATIC for lesion in self.lesions):
            return UNSEEN
        return DONE if self.lesions else self.mark or OPEN

    @property
    def all_seconds(self) -> float:
        """Return the seconds that annotators spent on the image and its lesions."""
        return self.seconds + sum(lesion.seconds for lesion in self.lesions)


def state_from_dict(values: Mapping[str, Any]) -> ImageState:
    """Read a state as `asdict` gives it, from JSON; unknown keys are ignored, ValueError if one is wrong."""
    return TypeAdapter(ImageState).validate_python(values)


def rounded(box: Sequence[float]) -> Box:
    """Round a box to a hundredth of a pixel, as the table holds it."""
    x0, y0, x1, y1 = (round(float(value), 2) + 0.0 for value in box)
    return x0, y0, x1, y1


def checked_boxes(big: Box, small: Box, width: int, height: int) -> tuple[Box, Box]:
    """Check two boxes that a page sent and clip them: the big one to the frame, the small one to the big one.

    Raises:
        UserError: what is wrong with them.
    """
    outer = _clipped("big box", big, (0.0, 0.0, float(width), float(height)), (width, height))
    over = max(outer[0] - small[0], outer[1] - small[1], small[2] - outer[2], small[3] - outer[3])
    if over > TOLERANCE:
        raise UserError(f"core: leaves the big box by {over:.1f} px; it must lie inside it")
    return outer, _clipped("core", small, outer, (width, height))


def _clipped(name: str, box: Box, frame: Box, size: tuple[int, int]) -> Box:
    x0, y0, x1, y1 = (*map(max, box[:2], frame[:2]), *map(min, box[2:], frame[2:]))
    if not (x1 - x0 >= MIN_SIDE - 0.01 and y1 - y0 >= MIN_SIDE - 0.01):  # also where one is not a number
        raise UserError(
            f"{name}: expected sides of at least {MIN_SIDE:g} px inside the image of {size[0]}x{size[1]} px, got "
            f"{[round(value, 2) for value in box]}"
        )
    return rounded((x0, y0, x1, y1))


def merged(old: Lesion | None, new: Lesion, who: str, when: str, seconds: float, *, automatic: bool = False) -> Lesion:
    """Merge a lesion that a page sent with its earlier record.

    Args:
        old: the same lesion as last seen, or None where it is new.
        new: boxes, core and, for a new one, its proposal; the source `accepted` says that a person agrees with an
            automatic lesion. who, when: of this change. seconds: spent on it.
        automatic: no person looked.
    """
    proposed = old.proposed if old is not None and old.proposed else new.proposed
    unseen = automatic or (old is not None and old.source == AUTOMATIC and new.source != ACCEPTED)
    if proposed is None:
        source = DRAWN
    elif new.boxes == proposed:
        source = AUTOMATIC if unseen else ACCEPTED
    else:
        source = CORRECTED
    base = old or replace(new, made_by=who, made_at=when)
    touched = old is None or (old.boxes, old.core) != (new.boxes, new.core)
    return replace(
        base,
        big=new.big,
        small=new.small,
        core=new.core,
        source=source,
        proposed=proposed,
        model=base.model or new.model,
        threshold=base.threshold if base.threshold is not None else new.threshold,
        seconds=round(base.seconds + seconds, 2) if old is not None else round(seconds, 2),
        changed_by=who if touched else base.changed_by,
        changed_at=when if touched else base.changed_at,
    )
