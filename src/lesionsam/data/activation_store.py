"""Store activations on disk: a file per entry, shared by runs, trials and processes.

There is a folder per space (everything that the values depend on beside the image: see `Store`). It holds the entries,
`<key>.bin`, each the bytes of its values and their checksum, and `space.json`, which describes them. An entry is
written beside its place and renamed, and its checksum is verified on every read, so that what a killed writer, a full
disk or a bad sector left behind is a cache miss. Several processes may read and write at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.utils.files import free_disk_bytes, write_json_atomic
from lesionsam.utils.locks import lock_exclusive, lock_shared

VERSION = 2  # of the files' form: part of every space
SUFFIX, SPACE, IN_USE = ".bin", "space.json", "in-use"
TOTAL = struct.Struct("<I")  # the checksum, behind the values
GRANT = 256 << 20  # bytes written between two checks of the disk
RESERVE = 1 << 30  # bytes of the disk that are left to others
PAGE = 512  # 8-byte words that a checksum adds up


def checksum(data: np.ndarray) -> int:
    """Return a CRC over the sums of the 4 KiB pages of (N,) uint8, several times as fast as one over all bytes.

    A damaged word, a lost page or a cut changes it; an exchange of words within a page does not.
    """
    words = data[: len(data) // 8 * 8].view(np.uint64)
    whole = len(words) // PAGE * PAGE
    sums = words[:whole].reshape(-1, PAGE).sum(axis=1, dtype=np.uint64)
    return zlib.crc32(data[whole * 8 :].data, zlib.crc32(sums.data))


def byte_view(values: torch.Tensor) -> np.ndarray:
    """Return the memory of a contiguous tensor on the CPU as (N,) uint8; no copy."""
    return values.detach().reshape(-1).view(torch.uint8).numpy()


class Budget:
    """Limit of the bytes that all spaces of a folder hold together; the least recently used space is removed first.

    A space that a process has open is never removed; where those fill the limit, new entries are not stored.

    Args:
        root: folder of the spaces. limit: bytes. say: called with a line of text on a fault.
    """

    def __init__(self, root: Path, limit: int, say: Callable[[str], None]) -> None:
        self.root, self.limit, self.say = root, limit, say
        self._granted, self._said = 0, set()

    def grant(self, size: int) -> bool:
        """Return whether `size` more bytes may be written."""
        if self._granted < size:
            self._granted = self._make_room(size)
        if self._granted < size:
            self._granted = 0
            return False
        self._granted -= size
        return True

    def _make_room(self, size: int) -> int:
        """Remove old spaces and return how many bytes may be written, at least `size` if there is room."""
        spaces = sorted(space_folders(self.root), key=used_at)
        held = {folder: stored_bytes(folder) for folder in spaces}
        for folder in spaces:
            if sum(held.values()) + size <= self.limit:
                break
            if remove_space(folder):
                del held[folder]
        free = free_disk_bytes(self.root) - RESERVE
        left = min(self.limit - sum(held.values()), free)
        if left < size:
            reason = (
                f"the disk of {self.root} is nearly full"
                if free < size
                else f"{self.root} holds as much as it may, {self.limit / 1e9:.1f} GB (runtime.cache_gb)"
            )
            self.warn_once(f"activation cache: {reason}; what is not in it is computed in every epoch")
        return min(left, max(GRANT, size))

    def warn_once(self, line: str) -> None:
        """Report a line, the first time only."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)


class Store:
    """The entries of one space.

    Args:
        root: folder of all spaces. space: everything that the values depend on beside the image and its orientation,
            plain JSON values; another value of any of them is another folder.
        budget: of the root.
    """

    def __init__(self, root: Path, space: Mapping[str, Any], budget: Budget) -> None:
        self.space = {"version": VERSION, **space}
        text = json.dumps(self.space, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.budget = budget
        self.shape: tuple[int, ...] | None = None  # of an entry, known once there is one
        self.dtype: torch.dtype | None = None
        self.writable = True
        self._use: int | None = None  # descriptor of `mark_in_use`
        self._lock = threading.RLock()
        self.refresh()

    def __len__(self) -> int:
        return num_entries(self.folder)

    @property
    def entry_bytes(self) -> int:
        """Size of an entry's file; 0 while there is none."""
        if self.shape is None or self.dtype is None:
            return 0
        return math.prod(self.shape) * self.dtype.itemsize + TOTAL.size

    def path(self, key: bytes) -> Path:
        """Return the file of an entry."""
        return self.folder / f"{key.hex()}{SUFFIX}"

    def refresh(self) -> None:
        """Open the space if another process has created it."""
        with self._lock, self._faults("read"):
            self._open_existing()

    def read(self, key: bytes, into: torch.Tensor) -> bool:
        """Copy an entry.

        Args:
            key: 16 bytes, see `activations.image_key`. into: contiguous tensor on the CPU, of the entries' shape.
        Returns:
            Whether it was there and undamaged; if not, the content of `into` is undefined.
        """
        data, total = byte_view(into), bytearray(TOTAL.size)
        try:
            with self.path(key).open("rb", buffering=0) as file:
                done = os.readv(file.fileno(), [data.data, total])
        except FileNotFoundError:
            return False
        except OSError:  # a sector that cannot be read
            done = 0
        if done == self.entry_bytes and TOTAL.pack(checksum(data)) == total:
            return True
        with suppress(OSError):
            self.path(key).unlink(missing_ok=True)
        self.budget.warn_once(f"activation cache: {self.folder} is damaged; what is bad in it is computed again")
        return False

    def write(self, keys: Sequence[bytes], values: torch.Tensor) -> None:
        """Add entries that are not stored yet; those that do not fit are left out, and a failing disk ends writing.

        Args:
            values: (n, *shape) contiguous tensor on the CPU.
        """
        if not self.writable:
            return
        with self._lock, self._faults("written"):
            self._open(tuple(values.shape[1:]), values.dtype)
            if self._use is None:
                return
            for key, value in zip(keys, values, strict=True):
                if not self.path(key).exists():
                    if not self.budget.grant(self.entry_bytes):
                        break
                    self._write_entry(self.path(key), byte_view(value))

    def close(self) -> None:
        """End the use of the space; it may be removed then."""
        with self._lock:
            if self._use is not None:
                os.close(self._use)
            self._use = None

    def _write_entry(self, path: Path, data: np.ndarray) -> None:
        temporary = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data.data)
                file.write(TOTAL.pack(checksum(data)))
            os.replace(temporary, path)  # without fsync: what a power cut leaves behind has another checksum
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _open_existing(self) -> None:
        there = (self.folder / SPACE).exists()
        if not there:  # never made, or removed by `lesionsam cache clear`
            self.close()
        if not there or self._use is not None:
            return
        use = mark_in_use(self.folder)
        if use is None:
            return
        try:
            note = json.loads((self.folder / SPACE).read_text())
            if note["space"] != self.space:
                raise ValueError("another space")
            self.shape, self.dtype = tuple(note["shape"]), getattr(torch, note["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or of another space: start anew
            os.close(use)
            remove_space(self.folder)
            return
        self._use = use
        os.utime(self.folder)

    def _open(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Open the space for entries of this shape and dtype; make it where there is none."""
        self._open_existing()
        if self._use is not None and (self.shape, self.dtype) != (shape, dtype):
            self.close()
            self.writable = remove_space(self.folder)  # unless another process uses it
        if self._use is None and self.writable:
            self.folder.mkdir(parents=True, exist_ok=True)
            note = {"space": self.space, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
            write_json_atomic(self.folder / SPACE, note)
            self._open_existing()

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turn a disk fault into a warning: it ends the cache, not the training."""
        try:
            yield
        except OSError as error:
            self.writable = False
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk is full" if full else error.strerror or str(error)
            self.budget.warn_once(
                f"activation cache: {self.folder} cannot be {what} ({reason}); training goes on without it"
                + (", or free some space" if full else "")
            )


def mark_in_use(folder: Path) -> int | None:
    """Mark a space as in use; return a descriptor that ends it when closed, None where the space was just removed."""
    path = folder / IN_USE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    lock_shared(descriptor)
    with suppress(FileNotFoundError):
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)
    return None


def remove_space(folder: Path, *, force: bool = False) -> bool:
    """Delete a space unless a process has it open (`force`: even then; that process computes its entries again)."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if force or lock_exclusive(descriptor, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
    return not folder.exists()


def space_folders(root: Path) -> list[Path]:
    """Return the folders of the spaces."""
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def num_entries(folder: Path) -> int:
    """Return the number of entries of a space."""
    return sum(1 for _ in folder.glob(f"*{SUFFIX}"))


def used_at(folder: Path) -> float:
    """Return when a space was last opened or added to, seconds since the epoch."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a space's files."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                total += file.stat().st_size
    return total
