"""Read the boxes that start a track: a two-box CSV with a column `frame`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesionsam.boxes.geometry import centre_core
from lesionsam.boxes.table import BIG, COLUMNS, SMALL, check_size, iter_rows, parse_box, parse_boxes
from lesionsam.errors import UserError
from lesionsam.utils.files import whole_number

Prompts = Mapping[int, Mapping[str, "LesionBoxes"]]  # frame -> lesion_id -> boxes


@dataclass(frozen=True)
class LesionBoxes:
    """The two boxes of a lesion, (4,) float64 XYXY, original pixels."""

    big: np.ndarray
    small: np.ndarray


def read_prompts(path: Path, name: str, size: tuple[int, int], num_frames: int) -> dict[int, dict[str, LesionBoxes]]:
    """Read the boxes of a clip's lesions.

    Args:
        path: CSV with big_x0 to big_y1 and, where wanted, frame (from 0; 0 if the column is missing), lesion_id and
            small_x0 to small_y1. name: of the clip. size: (width, height) of its frames.
    Raises:
        UserError: as of `iter_rows`; a frame that does not exist; boxes outside the frame; a lesion twice in a frame.
    """
    found: dict[int, dict[str, LesionBoxes]] = {}
    for line, row in iter_rows(path, BIG, columns=("frame", *COLUMNS), what="CSV of boxes with a column frame"):
        row = {"image_id": name, "lesion_id": "0", "frame": "0"} | row
        number = whole_number(row["frame"])
        if number is None:
            raise UserError(f"{path}: line {line}, frame: expected a number from 0 on, got {row['frame']!r}")
        if number >= num_frames:
            raise UserError(
                f"{path}: line {line}, frame: {number} does not exist; {name} has {num_frames} frames, 0 to "
                f"{num_frames - 1}"
            )
        try:
            check_size(row, *size)
            if SMALL[0] in row:
                boxes = LesionBoxes(*parse_boxes(row, *size))
            else:
                boxes = with_core(parse_box(row, BIG, *size))
        except ValueError as error:
            raise UserError(f"{path}: line {line}, {error}") from None
        except KeyError as error:
            raise UserError(f"{path}: column {error.args[0]} is missing (of {', '.join(SMALL)})") from None
        lesion_id = row["lesion_id"] or "0"
        if lesion_id in found.setdefault(number, {}):
            raise UserError(f"{path}: line {line}, lesion_id: {lesion_id!r} stands twice in frame {number}")
        found[number][lesion_id] = boxes
    if not found:
        raise UserError(f"{path}: expected a row for each lesion below the header, got none")
    return found


def with_core(big: np.ndarray) -> LesionBoxes:
    """Return a big box with a core at its centre."""
    return LesionBoxes(big, centre_core(big))
