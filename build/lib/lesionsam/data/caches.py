"""The project's caches as a whole: what they hold, and their removal. Whatever is removed is made again when needed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lesionsam.data.activation_store import INDEX, RECORD, SPACE, remove_space, space_folders, used_at
from lesionsam.data.frames import BUILDING, INDEX_NAME

FRAMES, ACTIVATIONS = "frames", "activations"
BUSY_SECONDS = 600.0  # a build whose files were written to so recently is under way


class Cached(NamedTuple):
    """One folder of a cache: what it holds in words, its bytes, and when it was last used (seconds since the epoch)."""

    folder: Path
    holds: str
    size: int
    used: float


def cached(root: Path) -> list[Cached]:
    """Everything under a cache folder, the most recently used first."""
    found = [Cached(folder, holds, folder_bytes(folder), used_at(folder)) for folder, holds in _folders(root)]
    return sorted(found, key=lambda item: item.used, reverse=True)


def _folders(root: Path) -> Iterator[tuple[Path, str]]:
    frames = root / FRAMES
    for folder in sorted(frames.iterdir()) if frames.is_dir() else ():
        if folder.name.startswith(BUILDING):
            yield folder, "images that are being decoded" if busy(folder) else "left by a decoding that was killed"
        elif (folder / INDEX_NAME).exists():
            note = read_note(folder / INDEX_NAME)
            yield folder, f"{note.get('count', '?')} decoded images, {note.get('side', '?')} px"
    for folder in sorted(space_folders(root / ACTIVATIONS)):
        space = read_note(folder / SPACE).get("space", {})
        count = (folder / INDEX).stat().st_size // RECORD.size if (folder / INDEX).exists() else 0
        part, side, precision = (space.get(name, "?") for name in ("part", "side", "precision"))
        yield folder, f"{count} activations of {part}, {side} px, {precision}"


def clear(root: Path) -> tuple[int, list[Path]]:
    """Remove everything but what is being decoded at this moment.

    Returns:
        bytes removed (of what a running training has open the disk gets them back when that ends), and what was left.
    """
    removed, left = 0, []
    for item in cached(root):
        if item.folder.name.startswith(BUILDING) and busy(item.folder):
            left.append(item.folder)
            continue
        if item.folder.parent.name == ACTIVATIONS:
            remove_space(item.folder, force=True)
        else:
            shutil.rmtree(item.folder, ignore_errors=True)
        if item.folder.exists():
            left.append(item.folder)
        else:
            removed += item.size
    for lock in root.glob(f".{FRAMES}-*.lock"):
        key = lock.stem.removeprefix(f".{FRAMES}-")
        if not (root / FRAMES / f"{BUILDING}{key}").exists():
            lock.unlink(missing_ok=True)
    return removed, left


def report(root: Path) -> list[str]:
    """The caches as lines for people."""
    items = cached(root)
    if not items:
        return [f"nothing is cached in {root}"]
    width = max(len(item.holds) for item in items)
    lines = [
        f"{item.holds:<{width}}  {in_words(item.size):>9}  "
        f"used {time.strftime('%Y-%m-%d %H:%M', time.localtime(item.used))}  {item.folder}"
        for item in items
    ]
    return [*lines, f"together {in_words(sum(item.size for item in items))}; `lesionsam cache clear` removes them"]


def in_words(size: int) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def busy(folder: Path) -> bool:
    """Whether a build's files were written to a short while ago."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return time.time() - max(times, default=folder.stat().st_mtime) < BUSY_SECONDS


def read_note(path: Path) -> dict:
    """A cache's own description; empty where it cannot be read."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
