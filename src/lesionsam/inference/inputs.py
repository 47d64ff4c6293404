"""Read and check the prompts of a prediction: boxes and points of a lesion, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesionsam.boxes.table import BIG, SMALL, check_box, check_size, check_small, parse_box, parse_boxes
from lesionsam.errors import UserError
from lesionsam.inference.prediction import NO_PROMPT, LesionPrompt
from lesionsam.prompts import KINDS, NONE, POINTS
from lesionsam.utils.files import decimal_number

HALF = 0.5  # probability at which SAM's masks are cut
Rows = tuple[tuple[int, dict[str, str]], ...]  # (line of the CSV, column -> text)


def needs_small(prompt: str) -> bool:
    """Return whether a prompt of this kind reads the small box."""
    return prompt != "box"


@dataclass(frozen=True)
class Source:
    """The source of the prompts.

    Attributes:
        kind: boxes | points (both of a CSV) | auto (none: the one lesion of an image) | everything (none: all masks).
        path: of the CSV, or None. prompt: made from the boxes, of `prompts.KINDS`.
    """

    kind: str
    path: Path | None = None
    prompt: str = "box"

    @property
    def decoded_as(self) -> str:
        """Return the kind of `DecodeOptions`: of the prompt for boxes, `points`, or `none`."""
        return {"boxes": self.prompt, "points": POINTS}.get(self.kind, NONE)

    @classmethod
    def of(
        cls, *, boxes: Path | bool | None, points: Path | bool | None, auto: bool, everything: bool, prompt: str
    ) -> Source:
        """Return the one source that is given; boxes and points that are True are numbers, not a CSV.

        Raises:
            UserError: none, or more than one; an unknown kind of prompt.
        """
        given = {"boxes": boxes, "points": points, "auto": auto, "everything": everything}
        chosen = [name for name, value in given.items() if value]
        if len(chosen) != 1:
            raise UserError(
                f"expected one of {', '.join(f'--{name}' for name in given)}, got "
                f"{' and '.join(f'--{name}' for name in chosen) or 'none of them'}"
            )
        if prompt not in KINDS:
            raise UserError(f"--prompt: expected one of {', '.join(KINDS)}, got {prompt!r}")
        if prompt != "box" and not boxes:
            raise UserError(
                f"--prompt {prompt}: is made from boxes, and there are none with --{chosen[0]}; leave one "
                "of the two out"
            )
        value = given[chosen[0]]
        return cls(chosen[0], value if isinstance(value, Path) else None, prompt)


def check_threshold(threshold: float) -> None:
    """Raise UserError unless the threshold is a probability strictly between 0 and 1."""
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")


def check_options(source: Source, *, threshold: float, ensemble: int, zoom: bool) -> None:
    """Check that these options go with prompts of this source, for `Predictor` and `predict_files` alike.

    Args:
        threshold: probability above which a pixel is lesion. ensemble: decodings of each box. zoom: whether the
            surroundings of each box are enlarged.
    Raises:
        UserError: a value out of range, or one that this source does not use.
    """
    check_threshold(threshold)
    if source.kind == "everything" and threshold != HALF:
        raise UserError(
            f"--threshold {threshold:g}: automatic masks are cut at {HALF:g}, where their stability is "
            "measured; leave it out, or ask with --boxes, --points or --auto"
        )
    if ensemble < 1 or (ensemble > 1 and source.kind != "boxes"):
        raise UserError(
            f"--ensemble: expected 1 (none) or more, with --boxes only, got {ensemble} with --{source.kind}"
        )
    if zoom and (source.kind != "boxes" or source.prompt != "box"):
        raise UserError(
            "--zoom: enlarges the surroundings of a big box, so it goes with --boxes and --prompt box; --prompt "
            "box+core and --auto zoom by themselves"
        )


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
