"""The images to annotate: found by name alone, so that a folder of any size opens at once; headers are read later."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.utils.images import IMAGE_SUFFIXES

MASKS = "masks"  # folders of this name, or ending in .masks, hold no images to annotate


@dataclass(frozen=True)
class Entry:
    """One image file.

    Attributes:
        image_id: the file's name without its ending. key: stands for it in addresses, which hold no name and no path.
        fault: why it cannot be annotated, empty where it can.
    """

    image_id: str
    key: str
    path: Path
    fault: str = ""


def key_of(image_id: str) -> str:
    """16 hex digits that stand for an image id: the same whenever the page is opened."""
    return hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Catalogue:
    """Image files by id and key, in the order of their names.

    Args:
        arguments: folders (with all folders in them), files, or patterns.
    Raises:
        UserError: one of them gives no image.
    """

    def __init__(self, arguments: Sequence[str | Path]) -> None:
        if not arguments:
            raise UserError("no images given; name a folder, files or a quoted pattern")
        self.entries: list[Entry] = []
        self.by_id: dict[str, Entry] = {}
        self.by_key: dict[str, Entry] = {}
        seen: set[str] = set()
        for argument in arguments:
            paths = list(_find(str(argument)))
            if not paths:
                raise UserError(
                    f"{argument}: no images; expected a folder, a file or a pattern of files ending in "
                    f"{', '.join(IMAGE_SUFFIXES)}"
                )
            for path in paths:
                if path not in seen:
                    seen.add(path)
                    self._add(path)

    def __len__(self) -> int:
        return len(self.entries)

    def _add(self, path: str) -> None:
        name = os.path.basename(path)
        image_id = os.path.splitext(name)[0]
        fault = name_fault(image_id)
        if not fault and (other := self.by_id.get(image_id)) is not None:
            fault = (
                f"{name}: {os.path.basename(other.path)} has the same name apart from folder or ending, and boxes "
                "are found by name; rename one of them"
            )
        key = key_of(path if fault else image_id)
        entry = Entry(image_id, key, Path(path), fault)
        self.entries.append(entry)
        self.by_key[key] = entry
        if not fault:
            self.by_id[image_id] = entry


def name_fault(image_id: str) -> str:
    """Why an image of this name cannot stand in the table of boxes, or nothing."""
    shown = ascii(image_id)
    try:
        image_id.encode()
    except UnicodeEncodeError:
        return f"{shown}: the file's name is not UTF-8; rename it"
    if len(image_id.splitlines()) > 1 or "\0" in image_id:
        return f"{shown}: the file's name holds a line break; rename it"
    if image_id != image_id.strip():
        return f"{shown}: the file's name begins or ends with a space; rename it"
    return ""


def _find(argument: str) -> Iterator[str]:
    if os.path.isdir(argument):
        yield from _walk(argument)
    elif os.path.isfile(argument):
        yield argument
    else:
        yield from (
            path
            for path in sorted(glob.glob(argument, recursive=True))
            if _is_image(os.path.basename(path)) and os.path.isfile(path)
        )


def _walk(folder: str) -> Iterator[str]:
    """Image files of a folder and the folders in it, by name; links to folders are not followed."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name == MASKS or entry.name.endswith(f".{MASKS}"):
                continue  # they are answers, not images
            yield from _walk(entry.path)
        elif _is_image(entry.name) and entry.is_file():
            yield entry.path


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
