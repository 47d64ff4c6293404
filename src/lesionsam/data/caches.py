"""List and clear the project's caches. Removed entries are computed again when needed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lesionsam.data.activation_store import SPACE, num_entries, remove_space, space_folders, used_at
from lesionsam.data.frames import BUILDING, INDEX_NAME

FRAMES, ACTIVATIONS = "frames", "activations"
BUSY_SECONDS = 600.0  # a build whose files were written to so recently is under way


class Cached(NamedTuple):
    """A cache folder: a description of its content, its bytes, and when it was last used (seconds since the epoch)."""

    folder: Path
    holds: str
    size: int
    used: float


def cached(root: Path) -> list[Cached]:
    """Return the folders of a cache, the most recently used first."""
    found = [Cached(folder, holds, folder_bytes(folder), used_at(folder)) for folder, holds in _folders(root)]
    return sorted(found, key=lambda item: item.used, reverse=True)


def _folders(root: Path) -> Iterator[tuple[Path, str]]:
    frames = root / FRAMES
    for folder in sorted(frames.iterdir()) if frames.is_dir() else ():
        if folder.name.startswith(BUILDING):
            yield (
                folder,
                "images that are being decoded" if is_building(folder) else "left by a decoding that was killed",
            )
        elif (folder / INDEX_NAME).exists():
            note = read_note(folder / INDEX_NAME)
            yield folder, f"{note.get('count', '?')} decoded images, {note.get('side', '?')} px"
    for folder in sorted(space_folders(root / ACTIVATIONS)):
        space = read_note(folder / SPACE).get("space", {})
        part, side, precision = (space.get(name, "?") for name in ("part", "side", "precision"))
        yield folder, f"{num_entries(folder)} activations of {part}, {side} px, {precision}"


def clear(root: Path) -> tuple[int, list[Path]]:
    """Remove all cache folders except those being decoded right now.

    Returns:
        bytes removed (the disk frees files that a running training has open when it ends), and the folders left.
    """
    removed, left = 0, []
    for item in cached(root):
        if item.folder.name.startswith(BUILDING) and is_building(item.folder):
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
    """Return a table of the caches, a line each."""
    items = cached(root)
    if not items:
        return [f"nothing is cached in {root}"]
    width = max(len(item.holds) for item in items)
    lines = [
        f"{item.holds:<{width}}  {format_bytes(item.size):>9}  "
        f"used {time.strftime('%Y-%m-%d %H:%M', time.localtime(item.used))}  {item.folder}"
        for item in items
    ]
    return [*lines, f"together {format_bytes(sum(item.size for item in items))}; `lesionsam cache clear` removes them"]


def format_bytes(size: int) -> str:
    """Return a number of bytes as text in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_building(folder: Path) -> bool:
    """Return whether a build's files were written to within `BUSY_SECONDS`."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return time.time() - max(times, default=folder.stat().st_mtime) < BUSY_SECONDS


def read_note(path: Path) -> dict:
    """Return a cache's JSON description; empty where it cannot be read."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
