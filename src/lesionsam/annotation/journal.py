"""Append every change of every image to a file, one JSON line each, on disk before the table is replaced.

A line begins with the image's id and holds the image's whole state, so that the last line of an image is all that is
needed of it. `before` and `after` name the table's content around the change: a crash between journal and table is told
from a table that somebody edited by hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lesionsam.annotation.records import ImageState, state_from_dict
from lesionsam.errors import UserError
from lesionsam.utils.files import fsync_folder

CUT = ', "revision": '  # what follows the image's id in a line


class Journal:
    """The journal file of a table.

    Attributes:
        path: the file. tail: the lines of the last change of the table, parsed; empty where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_lines: dict[str, str] = {}
        self.tail: list[dict[str, Any]] = []
        self._size = 0
        self._read()

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]  # a line that a crash cut short was never acknowledged
        self._size = len(whole)
        lines = whole.decode("utf-8", "replace").split("\n")[:-1]
        for line in lines:
            name, cut, _ = line.partition(CUT)
            if cut:
                self._last_lines[name] = line
        for line in reversed(lines):
            _, entry = self._parse(line)
            if self.tail and entry.get("before") != self.tail[0].get("before"):
                break
            self.tail.insert(0, entry)

    def _parse(self, line: str) -> tuple[ImageState, dict[str, Any]]:
        """Return the state and all values of a line."""
        try:
            entry = json.loads(line)
            return state_from_dict(entry), entry
        except ValueError as error:
            reason = " ".join(str(error).splitlines()[:3])
            raise UserError(
                f"{self.path}: a line is damaged ({reason}): {line[:60]!r}; remove that line; the boxes themselves are "
                "in the table"
            ) from None

    def states(self) -> dict[str, ImageState]:
        """Return the last state of each image, in the order of its first change."""
        states = [self._parse(line)[0] for line in self._last_lines.values()]
        self._last_lines.clear()
        return {state.image_id: state for state in states}

    def append(self, states: Sequence[ImageState], before: str, after: str) -> int:
        """Write the new states of images and wait until they are on disk.

        Args:
            before, after: digest of the table before the change and after it.
        Returns:
            the file's size before, for `cut_back`.
        """
        lines = "".join(_line(state, {"before": before, "after": after}) for state in states).encode()
        size, is_new = self._size, not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # a buffer would be written again after a failure
            if file.tell() != size:
                file.truncate(size)  # what a crash or a full disk left of a line
            try:
                left = memoryview(lines)
                while left:
                    left = left[file.write(left) or 0 :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                error.filename = error.filename or str(self.path)
                raise
        if is_new:
            fsync_folder(self.path.parent)
        self._size = size + len(lines)
        return size

    def cut_back(self, size: int) -> None:
        """Remove what `append` wrote, as the table could not be replaced."""
        os.truncate(self.path, size)
        self._size = size


def _line(state: ImageState, digests: Mapping[str, str]) -> str:
    return json.dumps({**asdict(state), **digests}, ensure_ascii=False) + "\n"
