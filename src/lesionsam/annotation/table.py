"""Read and write the page's two-box CSV; unchanged rows keep their text, also those of images not given.

What is written is what `boxes.source: csv` and `lesionsam predict` read: see `lesionsam.boxes`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lesionsam.annotation.records import Box, Lesion, rounded
from lesionsam.boxes.table import TOLERANCE, header, parse_boxes, read_rows, row_of
from lesionsam.errors import UserError
from lesionsam.utils.files import whole_number


@dataclass
class Table:
    """The rows of the CSV.

    Attributes:
        with_split: whether there is a column `split`.
        lines: image_id -> its rows as CSV lines, in the order of the file.
        boxes: image_id -> lesion_id -> (big, small), to a hundredth of a pixel. splits: image_id -> split.
    """

    with_split: bool = False
    lines: dict[str, list[str]] = field(default_factory=dict)
    boxes: dict[str, dict[str, tuple[Box, Box]]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the text of the file."""
        head = ",".join(header(self.with_split))
        return "\n".join([head, *(line for lines in self.lines.values() for line in lines)]) + "\n"

    def with_image(self, image_id: str, lesions: Sequence[Lesion], size: tuple[int, int]) -> Table:
        """Return the table with these lesions as the rows of one image; rows with unchanged boxes keep their text.

        Args:
            size: (width, height) of the image.
        """
        known = dict(zip(self.boxes.get(image_id, ()), self.lines.get(image_id, ()), strict=True))
        before = self.boxes.get(image_id, {})
        lines = []
        for lesion in lesions:
            kept = known.get(lesion.lesion_id) if before.get(lesion.lesion_id) == lesion.boxes else None
            lines.append(kept or self._line(image_id, lesion, size))
        new = Table(self.with_split, dict(self.lines), dict(self.boxes), self.splits)
        if lines:
            new.lines[image_id] = lines
            new.boxes[image_id] = {lesion.lesion_id: lesion.boxes for lesion in lesions}
        else:
            new.lines.pop(image_id, None)
            new.boxes.pop(image_id, None)
        return new

    def _line(self, image_id: str, lesion: Lesion, size: tuple[int, int]) -> str:
        split = self.splits.get(image_id, "") if self.with_split else None
        return _csv_line(row_of(image_id, lesion.lesion_id, split, size, *lesion.boxes))


def _csv_line(values: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def digest_of(data: bytes) -> str:
    """Return a hash of the table's content, as the journal records it."""
    return hashlib.sha256(data).hexdigest()


def read_table(path: Path) -> Table:
    """Read a two-box CSV, whose images need not be at hand.

    Returns:
        the rows; none for an empty file, which a page fills with its first change.
    Raises:
        UserError: not such a table, or a faulty row: line, column, expected and got. Sizes of images are not known
            here; what lies outside its image is noticed when the image is opened.
    """
    if path.is_file() and not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip():
        return Table()
    rows = read_rows(path)
    table = Table(with_split=bool(rows) and "split" in rows[0][1])
    names = header(table.with_split)
    for line, row in rows:
        image_id, lesion_id = row["image_id"], row.get("lesion_id") or "0"
        lesions = table.boxes.setdefault(image_id, {})
        if lesion_id in lesions:
            raise UserError(
                f"{path}: line {line}, image_id, lesion_id: {image_id!r}, {lesion_id!r} stands there "
                "already; give each lesion of an image its own lesion_id"
            )
        lesions[lesion_id] = _boxes(path, line, row)
        if table.with_split and row["split"]:
            table.splits[image_id] = row["split"]
        values = {**row, "lesion_id": lesion_id}
        table.lines.setdefault(image_id, []).append(_csv_line([values.get(name, "") for name in names]))
    return table


def _boxes(path: Path, line: int, row: Mapping[str, str]) -> tuple[Box, Box]:
    """Return the boxes of a row, clipped as `boxes.table` clips them."""
    sizes = [whole_number(row.get(name, "")) or 10**6 for name in ("width", "height")]
    try:
        big, small = parse_boxes(row, *sizes)
    except ValueError as error:
        raise UserError(f"{path}: line {line}, {error}") from None
    return rounded(big.tolist()), rounded(small.tolist())


def outside(boxes: tuple[Box, Box], width: int, height: int) -> bool:
    """Return whether a lesion's big box leaves its image by more than rounding."""
    x0, y0, x1, y1 = boxes[0]
    return min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE
