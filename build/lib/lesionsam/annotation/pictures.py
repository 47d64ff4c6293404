"""Pictures for the page: images decoded small, kept for a while, encoded as JPEG; for looking at, not for measuring."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lesionsam.annotation.catalogue import Entry
from lesionsam.errors import UserError
from lesionsam.utils.images import read_reduced

LEVELS = {"thumb": 160, "view": 1600, "full": 4800}  # longer side, pixels
QUALITY = 92
CACHE_BYTES = 256 << 20
AT_ONCE = {"thumb": 1, "view": 2, "full": 1}  # decoders at work: previews of masks must not wait for thumbnails


class Cache:
    """Values by key, the oldest thrown out above a number of bytes; a value is made once, however many ask for it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._making: dict[Any, threading.Event] = {}
        self._lock = threading.Lock()

    def peek(self, key: Any) -> Any | None:
        """The value, or None where it is not there."""
        with self._lock:
            return self._held[key][0] if key in self._held else None

    def get(self, key: Any, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value, made by `make() -> (value, bytes)` where it is not there."""
        while True:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key][0]
                event = self._making.get(key)
                if event is None:
                    self._making[key] = threading.Event()
                    break
            event.wait()
        try:
            value, size = make()
            with self._lock:
                self._held[key] = value, size
                self._bytes += size
                while self._bytes > self.max_bytes and len(self._held) > 1:
                    self._bytes -= self._held.popitem(last=False)[1][1]
            return value
        finally:
            with self._lock:
                self._making.pop(key).set()


class Pictures:
    """The images of a catalogue as JPEGs of three sizes, as small arrays, and their sizes."""

    def __init__(self) -> None:
        self._jpegs = Cache(CACHE_BYTES)
        self._arrays = Cache(CACHE_BYTES // 4)
        self._sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._turns = {level: threading.Semaphore(count) for level, count in AT_ONCE.items()}

    def stamp(self, entry: Entry) -> tuple[int, int]:
        """What tells that a file has changed.

        Raises:
            UserError: the file is gone or cannot be read.
        """
        try:
            found = os.stat(entry.path)
        except OSError as error:
            raise UserError(f"{entry.path.name}: cannot be read: {error.strerror}; was it moved or renamed?") from None
        return found.st_mtime_ns, found.st_size

    def size(self, entry: Entry) -> tuple[int, int]:
        """(width, height) after EXIF transpose, from the header; read once."""
        from lesionsam.utils.images import image_size

        stamp = self.stamp(entry)
        known = self._sizes.get(entry.key)
        if known is None or known[0] != stamp:
            self._sizes[entry.key] = known = stamp, image_size(entry.path)
        return known[1]

    def jpeg(self, entry: Entry, level: str) -> bytes:
        """The picture at a level of `LEVELS`, as JPEG.

        Raises:
            UserError: a file that is no image, damaged, or too large.
        """

        def make() -> tuple[bytes, int]:
            with self._turns[level]:
                pixels, _ = read_reduced(entry.path, LEVELS[level])
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY if level != "thumb" else 80, subsampling=0)
            data = buffer.getvalue()
            return data, len(data)

        return self._jpegs.get((entry.key, level, self.stamp(entry)), make)

    def small(self, entry: Entry, longest: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB with its longer side at most `longest`."""

        def make() -> tuple[np.ndarray, int]:
            pixels, _ = read_reduced(entry.path, longest)
            return pixels, pixels.nbytes

        return self._arrays.get((entry.key, longest, self.stamp(entry)), make)
