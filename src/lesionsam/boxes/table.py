"""The CSV of two boxes per lesion, and its checks.

The CSV holds one row per (image_id, lesion_id) in the original frame: pixels after EXIF transpose, XYXY, half-open.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lesionsam.errors import UserError
from lesionsam.types import Sample
from lesionsam.utils.files import atomic_write, decimal_number

BIG = ("big_x0", "big_y0", "big_x1", "big_y1")
SMALL = ("small_x0", "small_y0", "small_x1", "small_y1")
COLUMNS = ("image_id", "lesion_id", "split", "width", "height", *BIG, *SMALL)
REQUIRED = ("image_id", *BIG, *SMALL)
TOLERANCE = 0.5  # pixels by which a hand-drawn box may stick out before it counts as wrong; it is cut there


def header(with_split: bool = True) -> list[str]:
    """Return the columns of a two-box CSV, with or without `split`."""
    return [name for name in COLUMNS if with_split or name != "split"]


def row_of(
    image_id: str, lesion_id: str, split: str | None, size: tuple[int, int], *boxes: Iterable[float]
) -> list[str]:
    """Return a row of a two-box CSV, coordinates to a hundredth of a pixel.

    Args:
        split: None where the table has no such column. size: (width, height). boxes: the big and the small one, XYXY.
    """
    split_field = [] if split is None else [split]
    return [image_id, lesion_id, *split_field, *map(str, size), *(f"{value:.2f}" for box in boxes for value in box)]


def write_boxes(path: Path, samples: Iterable[Sample]) -> None:
    """Write the two-box CSV atomically, one row per sample."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header())
        for s in samples:
            writer.writerow(row_of(s.image_id, s.lesion_id, s.split, (s.width, s.height), s.big_box, s.small_box))


def read_boxes(path: Path, index: Mapping[str, Mapping[str, object]], *, root: Path) -> list[Sample]:
    """Read and check a two-box CSV.

    Args:
        path: CSV with the columns image_id and the eight of the boxes; lesion_id (default "0" if each image has one
            row), split, width and height may be there and must then agree with the index.
        index: image_id -> row of data/raw/index.csv (split, image_path, mask_path, width, height).
        root: folder that relative paths of the index start from.
    Returns:
        Samples in the order of the file.
    Raises:
        UserError: the first faulty row, with line number, column, expected and got, and how many more there are.
    """
    samples, problems = scan_boxes(path, index, root=root)
    if problems:
        more = f" (and {len(problems) - 1} more faulty lines)" if len(problems) > 1 else ""
        raise UserError(f"{path}: {problems[0]}{more}")
    if not samples:
        raise UserError(f"{path}: no rows; expected one row per lesion with the columns {', '.join(REQUIRED)}")
    return samples


def scan_boxes(path: Path, index: Mapping[str, Mapping[str, object]], *, root: Path) -> tuple[list[Sample], list[str]]:
    """Return the valid rows of a two-box CSV, and one line of text per faulty row; see `read_boxes`."""
    samples, problems = [], []
    seen: dict[tuple[str, str], int] = {}
    for line, row in read_rows(path):
        try:
            sample = _parse_row(row, index, root)
            key = (sample.image_id, sample.lesion_id)
            if key in seen:
                raise ValueError(
                    f"image_id, lesion_id: {key[0]!r}, {key[1]!r} stands already in line {seen[key]}; "
                    "give each lesion of an image its own lesion_id"
                )
        except ValueError as error:
            problems.append(f"line {line}, {error}")
            continue
        seen[key] = line
        samples.append(sample)
    return samples, problems


def read_rows(
    path: Path, required: Sequence[str] = REQUIRED, *, columns: Sequence[str] = COLUMNS, what: str = "two-box CSV"
) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, column -> text) of every row of a CSV, see `iter_rows`."""
    return list(iter_rows(path, required, columns=columns, what=what))


def iter_rows(
    path: Path, required: Sequence[str] = REQUIRED, *, columns: Sequence[str] = COLUMNS, what: str = "two-box CSV"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> text) of every row of a CSV; checks its columns, not its values.

    Args:
        required: columns that must be there. columns: those that may be. what: the file is, for messages.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a {what} file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the table as CSV UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected a header with {', '.join(required)} and a row per lesion")
    if "\0" in text:
        raise UserError(
            f"{path}: line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a null character, which no "
            "text does; save the table as CSV UTF-8"
        )
    first = text.splitlines()[0]
    for mark, name in ((";", "';'"), ("\t", "tabs")):
        if mark in first and "," not in first:
            raise UserError(f"{path}: columns are separated by {name}; expected ',' (and '.' as the decimal mark)")
    records = _records(path, text)
    header = [name.strip() for name in next(records)[1]]
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing (of {', '.join(required)}); found {', '.join(header)}")
    unknown = [name for name in header if name not in columns]
    if unknown:
        raise UserError(f"{path}: unknown column {unknown[0]!r}; expected {', '.join(columns)}")
    if len(set(header)) != len(header):
        raise UserError(f"{path}: a column stands twice in the header: {', '.join(header)}")
    for line, values in records:
        if not values or not any(value.strip() for value in values):
            continue
        if len(values) != len(header):
            raise UserError(f"{path}: line {line} has {len(values)} fields; expected {len(header)} as the header")
        yield line, dict(zip(header, (value.strip() for value in values), strict=True))


def _records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of each row of a CSV."""
    reader = csv.reader(text.splitlines(), strict=True)
    line = 1
    try:
        for values in reader:
            yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        why = "a quote is opened and not closed" if "unexpected end" in str(error) else str(error)
        raise UserError(f"{path}: line {line}: {why}; expected fields separated by ','") from None


def _parse_row(row: Mapping[str, str], index: Mapping[str, Mapping[str, object]], root: Path) -> Sample:
    image_id = row["image_id"]
    if image_id not in index:
        hint = next((known for known in index if image_id and known.endswith(image_id)), None)
        raise ValueError(
            f"image_id: {image_id!r} is not among the {len(index)} images"
            + (f"; did the leading part of {hint!r} get lost?" if hint else "; check the id or add the image")
        )
    entry = index[image_id]
    width, height = int(str(entry["width"])), int(str(entry["height"]))
    check_size(row, width, height)
    if row.get("split") and row["split"] != entry["split"]:
        raise ValueError(f"split: got {row['split']!r}, but image {image_id!r} is in split {entry['split']!r}")
    big, small = parse_boxes(row, width, height)
    own, lesion_id = entry.get("lesions"), row.get("lesion_id") or "0"
    if isinstance(own, Mapping) and lesion_id not in own:
        raise ValueError(
            f"lesion_id: {lesion_id!r} is no lesion of image {image_id!r}; it has {', '.join(own)} (see "
            "data/raw/lesions.csv)"
        )
    return sample_of(image_id, lesion_id, entry, root, big, small)


def check_size(row: Mapping[str, str], width: int, height: int) -> None:
    """Raise ValueError where a row states another size than its image has, pixels."""
    for name, known in (("width", width), ("height", height)):
        if row.get(name) and row[name] != str(known):
            raise ValueError(
                f"{name}: got {row[name]}, but image {row['image_id']!r} is {width}x{height} px after EXIF transpose"
            )


def sample_of(
    image_id: str, lesion_id: str, entry: Mapping[str, object], root: Path, big: np.ndarray, small: np.ndarray
) -> Sample:
    """Return a lesion with its boxes, (4,) XYXY each, from its image's row of the index."""
    mask_path, mask_sha256 = entry.get("mask_path"), entry.get("mask_sha256")
    own, hashes = entry.get("lesions"), entry.get("lesion_sha256")
    if isinstance(own, Mapping):
        mask_path, mask_sha256 = own[lesion_id], hashes[lesion_id] if isinstance(hashes, Mapping) else ""
    return Sample(
        image_id=image_id,
        lesion_id=lesion_id,
        split=str(entry["split"]),
        image_path=root / str(entry["image_path"]),
        mask_path=root / str(mask_path) if mask_path else None,
        width=int(str(entry["width"])),
        height=int(str(entry["height"])),
        big_box=big,
        small_box=small,
        own_mask=isinstance(own, Mapping),
        image_sha256=str(entry.get("sha256") or ""),
        mask_sha256=str(mask_sha256 or ""),
    )


def parse_boxes(row: Mapping[str, str], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the big and the small box of a row, each (4,) XYXY, cut at the frame and at the big box.

    Raises:
        ValueError: names the column, what was expected and what came.
    """
    big, small = parse_box(row, BIG, width, height), parse_box(row, SMALL, width, height)
    return big, check_small(big, small, row["image_id"])


def check_small(big: np.ndarray, small: np.ndarray, image_id: str) -> np.ndarray:
    """Return the small box (4,) cut at the big one; ValueError if it leaves that by more than `TOLERANCE`."""
    outside = np.maximum(big[:2] - small[:2], small[2:] - big[2:]).max()
    if outside > TOLERANCE:
        raise ValueError(
            f"small_x0..small_y1: small box {show_box(small)} of {image_id!r} leaves the big box "
            f"{show_box(big)} by {outside:.1f} px; the core must lie inside the rough extent (are the two "
            "exchanged?)"
        )
    return np.concatenate([np.maximum(small[:2], big[:2]), np.minimum(small[2:], big[2:])])


def parse_box(row: Mapping[str, str], names: Sequence[str], width: int, height: int) -> np.ndarray:
    """Return one box of a row, (4,) XYXY, cut at the frame; ValueError as of `parse_boxes`."""
    values = []
    for name in names:
        try:
            value = decimal_number(row[name])
        except ValueError:
            raise ValueError(f"{name}: expected a number of pixels, got {row[name]!r} ({row['image_id']!r})") from None
        values.append(value)
    return check_box(np.array(values), names, width, height, row["image_id"])


def check_box(box: np.ndarray, names: Sequence[str], width: int, height: int, image_id: str) -> np.ndarray:
    """Return a (4,) XYXY box cut at the frame; `names` are the columns that a ValueError names."""
    for name, value in zip(names, box, strict=True):
        if not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite number of pixels, got {value} ({image_id!r})")
    for low, high in ((0, 2), (1, 3)):
        if box[high] <= box[low]:
            raise ValueError(
                f"{names[low]}, {names[high]}: expected {names[low]} < {names[high]}, got {box[low]:g} and "
                f"{box[high]:g} ({image_id!r}); boxes are XYXY"
            )
    limits = np.array([width, height, width, height], float)
    excess = np.maximum(-box, box - limits)
    if excess.max() > TOLERANCE:
        name = names[int(excess.argmax())]
        raise ValueError(
            f"{name}: {box[int(excess.argmax())]:g} lies outside the image {image_id!r} of "
            f"{width}x{height} px; boxes are in original pixels"
        )
    return np.clip(box, 0, limits)


def show_box(box: Iterable[float]) -> str:
    """Format a box for a message."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
