"""The index of a data set, data/raw/index.csv: one row per image with its split, files, size and hashes.

Splits are train, dev (to select on) and test (read by nothing but the last evaluation). Every source ends in this one
table, and everything after the download stage starts from it. The hashes are of the files' contents: whatever asks
later whether an image or a mask is still the same compares these.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lesionsam.errors import UserError
from lesionsam.types import SPLITS
from lesionsam.utils.files import atomic_write, sha256_file, whole_number

COLUMNS = ("image_id", "split", "image_path", "mask_path", "width", "height", "sha256", "mask_sha256")
LESIONS = "lesions.csv"  # beside index.csv where the source has a mask for each of several lesions
LESION_COLUMNS = ("image_id", "lesion_id", "mask_path", "annotation_id", "category", "area", "mask_sha256")
NUM_THREADS = 4  # that hash files
Row = dict[str, Any]


def dev_ids(image_ids: Iterable[str], fraction: float) -> set[str]:
    """The round(fraction * n) ids with the smallest SHA-256: the same ones whenever, wherever and in whatever order."""
    ids = sorted(set(image_ids), key=id_hash)
    return set(ids[: round(fraction * len(ids))])


def id_hash(image_id: str) -> str:
    """SHA-256 of an image id, as hex: an order that has nothing to do with when a picture was taken."""
    return hashlib.sha256(image_id.encode()).hexdigest()


def check_rows(rows: Sequence[Row], source: str) -> None:
    """Refuse a data set that would make a wrong number later.

    Args:
        rows: of `COLUMNS`. source: what to name in the message.
    Raises:
        UserError: a split without images, an id twice, or the same image file (by its bytes) in two splits.
    """
    counts = Counter(row["split"] for row in rows)
    for split in SPLITS:
        if not counts[split]:
            raise UserError(
                f"{source}: no images in split {split}; got {summary(rows)}; add images, or raise data.dev_fraction"
            )
    by_id: dict[str, Row] = {}
    by_hash: dict[str, Row] = {}
    for row in rows:
        if (other := by_id.setdefault(row["image_id"], row)) is not row:
            raise UserError(
                f"{source}: image id {row['image_id']!r} stands for {other['image_path']} and "
                f"{row['image_path']}; rename one, as boxes are found by id"
            )
        other = by_hash.setdefault(row["sha256"], row)
        if other["split"] != row["split"]:
            raise UserError(
                f"{row['image_path']}: same bytes as {other['image_path']}, but one is in split "
                f"{row['split']} and one in {other['split']}; remove one, or results would be flattered"
            )


def summary(rows: Sequence[Row]) -> str:
    """Images per split and how many have masks, in words."""
    counts = Counter(row["split"] for row in rows)
    masks = sum(1 for row in rows if row["mask_path"])
    return ", ".join(f"{split} {counts[split]}" for split in SPLITS) + f"; {masks} of {len(rows)} images with a mask"


def with_mask_hashes(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with `mask_sha256`, of the mask's contents, added where it is missing; empty without a mask."""

    def hashed(row: Row) -> Row:
        if "mask_sha256" in row:
            return row
        return {**row, "mask_sha256": sha256_file(row["mask_path"]) if row["mask_path"] else ""}

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(hashed, rows))


def write_index(path: Path, rows: Iterable[Row]) -> None:
    """Write index.csv atomically, by split and id; masks are read once, for their hashes."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(with_mask_hashes(rows), key=lambda row: (SPLITS.index(row["split"]), row["image_id"])):
            writer.writerow([row[name] for name in COLUMNS])


def read_index(path: Path) -> dict[str, Row]:
    """image_id -> row of index.csv, in its order; width and height are ints, mask_path is "" where there is none.

    Where lesions.csv lies beside it, rows also have "lesions": lesion_id -> path of that lesion's own mask,
    and "lesion_sha256": lesion_id -> hash of it.

    Raises:
        UserError: missing, or not such a table; names line and column.
    """
    rows: dict[str, Row] = {}
    for place, row in _read(path, COLUMNS):
        if row["image_id"] in rows or not row["image_id"]:
            raise UserError(f"{place}, image_id: expected a new id, got {row['image_id']!r}")
        if row["split"] not in SPLITS:
            raise UserError(f"{place}, split: expected {', '.join(SPLITS)}, got {row['split']!r}")
        sizes = {}
        for name in ("width", "height"):
            sizes[name] = whole_number(row[name])
            if not sizes[name]:
                raise UserError(f"{place}, {name}: expected a whole number of pixels, got {row[name][:20]!r}")
        rows[row["image_id"]] = {**row, **sizes}
    if not rows:
        raise UserError(f"{path}: no rows; run `dvc repro -f download`")
    for image_id, lesions in _read_lesions(path.with_name(LESIONS)).items():
        if image_id not in rows:
            raise UserError(
                f"{path.with_name(LESIONS)}: image {image_id!r} is not in {path.name}; run `dvc repro -f download`"
            )
        rows[image_id]["lesions"] = {lesion_id: row["mask_path"] for lesion_id, row in lesions.items()}
        rows[image_id]["lesion_sha256"] = {lesion_id: row["mask_sha256"] for lesion_id, row in lesions.items()}
    return rows


def _read_lesions(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Return image_id -> lesion_id -> row of lesions.csv; empty where there is no such file."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for _, row in _read(path, LESION_COLUMNS):
        found.setdefault(row["image_id"], {})[row["lesion_id"]] = row
    return found


def _read(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place of each row of a table of the first stage, for messages, and the row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro download`") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; run `dvc repro -f download`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); run `dvc repro -f download`") from None
    reader = csv.DictReader(text.splitlines())
    try:
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise UserError(
                f"{path}: expected the columns {', '.join(columns)}, got "
                f"{', '.join(reader.fieldnames or ())}; run `dvc repro -f download`"
            )
        for row in reader:
            place = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: expected {len(columns)} fields as in the header")
            yield place, row
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num + 1}: {error}; run `dvc repro -f download`") from None
