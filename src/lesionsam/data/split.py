"""Split a folder of images into train, val and test, so that images of one group, such as a patient, stay together."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from lesionsam.errors import UserError, listed
from lesionsam.utils.images import IMAGE_SUFFIXES

SPLITS = ("test", "val", "train")  # in the order in which they are filled


def split_folder(
    folder: Path, out: Path, *, by: Path | None, column: str, val: float, test: float, seed: int, copy: bool
) -> dict[str, list[Path]]:
    """Put each image of a folder, and of those in it, into out/train, out/val or out/test.

    Groups are taken in an order drawn from the seed, until test, then val, have their share of the images.

    Args:
        by: CSV with the columns image_id (the file's name, with or without ending) and `column`, the group; None: each
            image is a group of its own. column: empty = the only other column. val, test: shares of the images.
        copy: copy the files; otherwise hard links, and copies where the file system has none.
    Returns:
        split -> the images as they lie in the folder.
    Raises:
        UserError: no images, names that repeat, an image without a group, too few groups, an output that exists.
    """
    if not (0 < val < 1 and 0 < test < 1 and val + test < 1):
        raise UserError(f"--val, --test: expected shares above 0 that leave some for train, got {val:g} and {test:g}")
    images = find_all(folder, out)
    groups: dict[str, list[Path]] = {}
    group_of = read_groups(by, column) if by is not None else {}
    missing = []
    for path in images:
        name = group_of.get(path.stem, group_of.get(path.name)) if by is not None else path.stem
        if name is None:
            missing.append(path.name)
        else:
            groups.setdefault(name, []).append(path)
    if missing:
        raise UserError(f"{by}: expected a row for each image, got none for {listed(missing)}; add them")
    chosen = assign(groups, val=val, test=test, seed=seed)
    for name in SPLITS:
        if (out / name).is_dir() and any((out / name).iterdir()):
            raise UserError(f"{out / name}: holds files already; empty it, or choose another --out")
    for name, paths in chosen.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            place(path, out / name / path.name, copy=copy)
    return chosen


def find_all(folder: Path, out: Path) -> list[Path]:
    """Return the images of a folder and of those in it, sorted, without those below `out`; each name once."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with images")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_relative_to(out)
    ]
    if not found:
        raise UserError(f"{folder}: no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    known: dict[str, Path] = {}
    for path in found:
        if (other := known.setdefault(path.stem, path)) != path:
            raise UserError(f"{path}: has the name of {other}, and names identify images; rename one of them")
    return found


def read_groups(path: Path, column: str) -> dict[str, str]:
    """Return image_id -> group of a CSV.

    Raises:
        UserError: no such file or column, an empty field, an image with two groups.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [name for name in reader.fieldnames or () if name != "image_id"]
            column = column or (names[0] if len(names) == 1 else "")
            if "image_id" not in (reader.fieldnames or ()) or column not in names:
                raise UserError(
                    f"{path}: expected the columns image_id and {column or 'one other, or its name in --column'}, got "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}"
                )
            groups: dict[str, str] = {}
            for line, row in enumerate(reader, 2):
                image_id, group = (row["image_id"] or "").strip(), (row[column] or "").strip()
                if not image_id or not group:
                    raise UserError(f"{path}: line {line}: expected an image_id and a {column}, got an empty field")
                if groups.setdefault(image_id, group) != group:
                    raise UserError(f"{path}: line {line}: {image_id!r} is of {groups[image_id]!r} and of {group!r}")
            return groups
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); expected image_id and a group") from None


def assign(groups: Mapping[str, Sequence[Path]], *, val: float, test: float, seed: int) -> dict[str, list[Path]]:
    """Return split -> images; whole groups, none of the splits empty."""
    if len(groups) < len(SPLITS):
        raise UserError(f"{len(groups)} groups: expected at least {len(SPLITS)}, one each for train, val and test")
    left = sorted(groups, key=lambda name: sha256(f"{seed}|{name}".encode()).digest())
    total = sum(map(len, groups.values()))
    chosen: dict[str, list[Path]] = {name: [] for name in reversed(SPLITS)}
    for k, (name, share) in enumerate(zip(SPLITS, (test, val, 1.0), strict=True)):
        keep = len(SPLITS) - 1 - k  # groups for the splits that come
        while len(left) > keep and (not chosen[name] or len(chosen[name]) < share * total):
            size = len(groups[left[0]])
            if chosen[name] and len(chosen[name]) + size / 2 > share * total:  # nearer to the share without it
                break
            chosen[name] += groups[left.pop(0)]
    chosen["train"] += [path for name in left for path in groups[name]]
    return chosen


def place(source: Path, target: Path, *, copy: bool) -> None:
    """Copy a file, or link it where the file system can."""
    if not copy:
        try:
            os.link(source.resolve(), target)
        except OSError:
            pass
        else:
            return
    shutil.copy2(source, target)
