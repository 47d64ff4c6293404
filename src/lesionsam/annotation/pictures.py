"""Decode images to small copies for display, encode them as JPEG, and cache both."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image

from lesionsam.annotation.catalogue import Entry
from lesionsam.errors import UserError
from lesionsam.utils.images import image_size, read_reduced

LEVELS = {"thumb": 160, "view": 1600, "full": 4800}  # longer side, pixels
QUALITY = 92
CACHE_BYTES = 256 << 20
AT_ONCE = {"thumb": 1, "view": 2, "full": 1}  # decoders at work: previews of masks must not wait for thumbnails
LARGE_PIXELS = 16_000_000  # from here on one image is decoded at a time: 95 megapixels take 0.8 GB

Stamp = tuple[int, ...]  # of a file: modification time, size, inode, change time


class Cache:
    """A thread-safe LRU cache bounded in bytes; concurrent requests for one key compute its value once."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._making: dict[Any, threading.Event] = {}
        self._lock = threading.Lock()

    def peek(self, key: Any) -> Any | None:
        """Return the cached value, or None."""
        with self._lock:
            return self._held[key][0] if key in self._held else None

    def get(self, key: Any, make: Callable[[], tuple[Any, int]]) -> Any:
        """Return the cached value, or that of `make() -> (value, bytes)`."""
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
    """The images of a catalogue as JPEGs of three sizes and as small arrays, and their sizes."""

    def __init__(self) -> None:
        self._jpegs = Cache(CACHE_BYTES)
        self._arrays = Cache(CACHE_BYTES // 4)
        self._sizes: dict[str, tuple[Stamp, tuple[int, int]]] = {}
        self._turns = {level: threading.Semaphore(count) for level, count in AT_ONCE.items()}
        self._large = threading.Lock()

    def stamp(self, entry: Entry) -> Stamp:
        """Return what changes with a file: a copy that keeps time and size still has another inode or change time.

        Raises:
            UserError: the file is gone or cannot be read.
        """
        try:
            found = os.stat(entry.path)
        except OSError as error:
            raise UserError(f"{entry.path.name}: cannot be read: {error.strerror}; was it moved or renamed?") from None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def size(self, entry: Entry) -> tuple[int, int]:
        """Return (width, height) after EXIF transpose, read from the header and cached."""
        stamp = self.stamp(entry)
        known = self._sizes.get(entry.key)
        if known is None or known[0] != stamp:
            self._sizes[entry.key] = known = stamp, image_size(entry.path)
        return known[1]

    def jpeg(self, entry: Entry, level: str) -> bytes:
        """Return the picture at a level of `LEVELS` as JPEG.

        Raises:
            UserError: a file that is no image, damaged, or too large.
        """

        def make() -> tuple[bytes, int]:
            with self._turns[level]:
                pixels = self._reduced(entry, LEVELS[level])
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY if level != "thumb" else 80, subsampling=0)
            data = buffer.getvalue()
            return data, len(data)

        return self._jpegs.get((entry.key, level, self.stamp(entry)), make)

    def small(self, entry: Entry, longest: int) -> np.ndarray:
        """Return a copy, (h, w, 3) uint8 RGB, whose longer side is at most `longest`."""

        def make() -> tuple[np.ndarray, int]:
            pixels = self._reduced(entry, longest)
            return pixels, pixels.nbytes

        return self._arrays.get((entry.key, longest, self.stamp(entry)), make)

    def _reduced(self, entry: Entry, longest: int) -> np.ndarray:
        width, height = self.size(entry)
        with self._large if width * height > LARGE_PIXELS else nullcontext():
            return read_reduced(entry.path, longest)[0]
