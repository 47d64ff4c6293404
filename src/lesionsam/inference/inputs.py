"""Read and check the prompts of a prediction: boxes and points of a lesion, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lesionsam.boxes.table import BIG, SMALL, check_box, check_size, check_small, parse_box, parse_boxes
from lesionsam.inference.arguments import Source, needs_small
from lesionsam.inference.prediction import NO_PROMPT, LesionPrompt
from lesionsam.utils.files import decimal_number

Rows = tuple[tuple[int, dict[str, str]], ...]  # (line of the CSV, column -> text)


@dataclass(frozen=True)
class Lesion:
    """One lesion to segment, with its prompt not yet checked: that needs the image's size.

    Attributes:
        lesion_id: as written, or counted from 0 within the image where the file has no such column.
        file_name: of the mask and of the files drawn from it, without ending.
        rows: of the CSV, if the prompt comes from one. given: the prompt as numbers, if not.
    """

    lesion_id: str
    file_name: str
    rows: Rows = ()
    given: LesionPrompt = NO_PROMPT

    def prompt(self, width: int, height: int, source: Source) -> LesionPrompt:
        """Return the prompt, checked against the size of its image.

        Raises:
            ValueError: names line and column, expected and got.
        """
        if not self.rows:
            return check_prompt(self.given, width, height, use_small=needs_small(source.prompt))
        parts = []
        for line, row in self.rows:
            try:
                check_size(row, width, height)
                if source.kind == "points":
                    parts.append(_parse_point(row, width, height))
                elif needs_small(source.prompt):
                    return LesionPrompt(*parse_boxes(row, width, height))
                else:
                    big = parse_box(row, BIG, width, height)
                    return LesionPrompt(big, big)
            except ValueError as error:
                raise ValueError(f"line {line}, {error}") from None
        labels = np.array([label for _, _, label in parts], np.int64)
        if not labels.any():
            line, row = self.rows[0]
            raise ValueError(
                f"line {line}, label: lesion {self.lesion_id!r} of {row['image_id']!r} has no point of label 1; "
                "give one that lies on it"
            )
        return LesionPrompt(points=np.array([(x, y) for x, y, _ in parts]), labels=labels)


def check_prompt(prompt: LesionPrompt, width: int, height: int, *, use_small: bool) -> LesionPrompt:
    """Return a prompt of numbers with its boxes cut at the image and at each other.

    Args:
        use_small: whether the small box is part of the prompt; else the big box takes its place.
    Raises:
        ValueError: coordinates outside the image, boxes without area, labels other than 0 and 1, or all 0.
    """
    if prompt.big_box is not None and prompt.small_box is not None:
        big = check_box(prompt.big_box, BIG, width, height, "image")
        if not use_small:
            return LesionPrompt(big, big)
        return LesionPrompt(big, check_small(big, check_box(prompt.small_box, SMALL, width, height, "image"), "image"))
    if prompt.points is None or prompt.labels is None:
        return prompt
    for point in prompt.points.tolist():
        for name, value, limit in zip("xy", point, (width, height), strict=True):
            _check_coordinate(name, value, limit, f"'image' of {width}x{height} px")
    wrong = [label for label in prompt.labels.tolist() if label not in (0, 1)]
    if wrong:
        raise ValueError(f"label: expected 1 (lesion) or 0 (not), got '{wrong[0]:g}'")
    if not prompt.labels.any():
        raise ValueError("label: no point has label 1; give one that lies on the lesion")
    return LesionPrompt(points=prompt.points, labels=prompt.labels.astype(np.int64))


def _check_coordinate(name: str, value: float, limit: int, image: str) -> None:
    """Raise ValueError unless a coordinate is finite and inside the image."""
    if not np.isfinite(value):
        raise ValueError(f"{name}: expected a finite number of pixels, got {value}")
    if not 0 <= value <= limit:
        raise ValueError(f"{name}: {value:g} lies outside the image {image}; points are in original pixels")


def _parse_point(row: dict[str, str], width: int, height: int) -> tuple[float, float, int]:
    values = []
    for name, limit in (("x", width), ("y", height)):
        try:
            value = decimal_number(row[name])
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise ValueError(f"{name}: expected a number of pixels, got {row[name]!r} ({row['image_id']!r})")
        _check_coordinate(name, value, limit, f"{row['image_id']!r} of {width}x{height} px")
        values.append(value)
    if (label := row.get("label") or "1") not in ("0", "1"):
        raise ValueError(f"label: expected 1 (lesion) or 0 (not), got {label!r} ({row['image_id']!r})")
    return values[0], values[1], int(label)
