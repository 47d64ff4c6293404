"""Activations on disk: one flat file of equal entries and an index, shared by runs, trials and processes.

A folder per space (whatever the values depend on beside the image: see `Store`), in it `entries.bin`, entry after
entry; `index.bin`, one record per entry, written after it; and `space.json`, what the values are. Nothing is trusted:
a record has a checksum of its own and one of its entry, looked at on every read, so that what a killed writer, a full
disk or a bad sector left behind is a miss and nothing worse. Several processes may read and write at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lesionsam.utils.files import free_disk_bytes, write_json_atomic
from lesionsam.utils.locks import lock_exclusive, lock_shared, unlock

VERSION = 1  # of the files' form: part of every space
ENTRIES, INDEX, SPACE, IN_USE = "entries.bin", "index.bin", "space.json", "in-use"
RECORD = struct.Struct("<16sIQI")  # key, slot of its entry, the entry's checksum, CRC of what precedes
GRANT = 64 << 20  # bytes written between two looks at the disk
RESERVE = 1 << 30  # bytes of the disk that are left to others
PAGE = 512  # 8-byte words that a checksum adds up


class Held(NamedTuple):
    """Where an entry lies and what it must add up to."""

    slot: int
    checksum: int


def checksum(data: np.ndarray) -> int:
    """Of bytes, (N,) uint8: a CRC over the sums of its 4 KiB pages, several times as fast as one over all of it.

    A damaged word, a lost page or a cut changes it; an exchange of words within a page does not.
    """
    words = data[: len(data) // 8 * 8].view(np.uint64)
    whole = len(words) // PAGE * PAGE
    sums = words[:whole].reshape(-1, PAGE).sum(axis=1, dtype=np.uint64)
    return zlib.crc32(data[whole * 8 :].data, zlib.crc32(sums.data))


def as_bytes(values: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, (N,) uint8, shared."""
    return values.detach().reshape(-1).view(torch.uint8).numpy()


class Budget:
    """How much all spaces of a folder may hold together; the space that was used least recently goes first.

    A space that some process has open is never removed: of what is in use, the last comers are not kept.

    Args:
        root: folder of the spaces. limit: bytes. say: receives a line when there is something to tell.
    """

    def __init__(self, root: Path, limit: int, say: Callable[[str], None]) -> None:
        self.root, self.limit, self.say = root, limit, say
        self._granted, self._said = 0, set()

    def grant(self, size: int) -> bool:
        """Whether `size` bytes more may be written."""
        if self._granted < size:
            self._granted = self._look(size)
        if self._granted < size:
            self._granted = 0
            return False
        self._granted -= size
        return True

    def _look(self, size: int) -> int:
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
            self.tell(f"activation cache: {reason}; what is not in it is computed in every epoch")
        return min(left, max(GRANT, size))

    def tell(self, line: str) -> None:
        """Say a line, once."""
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
        self._held: dict[bytes, Held] = {}
        self._read_to, self._slots = 0, 0
        self._files: tuple[int, int, int] | None = None  # of entries, index and use
        self._lock = threading.RLock()
        with self._faults("opened"):
            self._open_existing()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def entry_bytes(self) -> int:
        """Size of an entry; 0 while there is none."""
        return 0 if self.shape is None or self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    # ---- reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take notice of what other processes have added."""
        with self._lock, self._faults("read"):
            self._open_existing()
            if self._files is not None:
                self._read_index()

    def read(self, key: bytes, into: torch.Tensor) -> bool:
        """Copy an entry.

        Args:
            key: 16 bytes, see `activations.image_key`. into: contiguous tensor on the CPU, of the entries' shape.
        Returns:
            Whether it was there, whole and undamaged; if not, `into` holds nothing of use.
        """
        held = self._held.get(key)
        if held is None or self._files is None:
            return False
        data = as_bytes(into)
        try:
            done = os.preadv(self._files[0], [data.data], held.slot * self.entry_bytes)
        except OSError:  # a sector that cannot be read
            done = 0
        if done == len(data) and checksum(data) == held.checksum:
            return True
        with self._lock:
            if self._held.get(key) == held:  # not merely rewritten meanwhile
                del self._held[key]
        self.budget.tell(f"activation cache: {self.folder / ENTRIES} is damaged; what is bad in it is computed again")
        return False

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, keys: Sequence[bytes], values: torch.Tensor) -> None:
        """Add entries that are not there yet; what does not fit is left out, and a disk that fails is left alone.

        Args:
            values: (n, *shape) contiguous tensor on the CPU.
        """
        if not self.writable:
            return
        with self._lock, self._faults("written"):
            self._open_existing()
            if self._files is None or (self.shape, self.dtype) != (tuple(values.shape[1:]), values.dtype):
                self._create(tuple(values.shape[1:]), values.dtype)
            if self._files is None:
                return
            entries, index, _ = self._files
            with locked(index):
                self._read_index()
                os.ftruncate(index, self._read_to)  # a record that a killed writer left half
                for key, value in zip(keys, values, strict=True):
                    if key in self._held:
                        continue
                    if not self.budget.grant(self.entry_bytes):
                        break
                    data = as_bytes(value)
                    write_at(entries, data.data, self._slots * self.entry_bytes)
                    body = RECORD.pack(key, self._slots, checksum(data), 0)[:-4]
                    write_at(index, body + struct.pack("<I", zlib.crc32(body)), self._read_to)
                    self._read_index()

    def close(self) -> None:
        """Let go of the files; the space may be removed then."""
        with self._lock:
            for descriptor in self._files or ():
                os.close(descriptor)
            self._files, self._held = None, {}

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _open_existing(self) -> None:
        if self._files is not None or not (self.folder / SPACE).exists():
            return
        use = hold(self.folder)
        if use is None:
            return
        try:
            note = json.loads((self.folder / SPACE).read_text())
            if note["space"] != self.space:
                raise ValueError("another space")
            self.shape, self.dtype = tuple(note["shape"]), getattr(torch, note["dtype"])
            self._open_files(use)
        except (ValueError, KeyError, TypeError, AttributeError):  # not whole, or of something else: build it anew
            os.close(use)
            remove_space(self.folder)

    def _open_files(self, use: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._files = (os.open(self.folder / ENTRIES, flags, 0o666), os.open(self.folder / INDEX, flags, 0o666), use)
        self._held, self._read_to, self._slots = {}, 0, 0
        os.utime(self.folder)
        self._read_index()

    def _create(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.close()
        if (self.folder / SPACE).exists() and not remove_space(self.folder):  # of another shape, and in use
            self.writable = False
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape, self.dtype = shape, dtype
        note = {"space": self.space, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        write_json_atomic(self.folder / SPACE, note)
        use = hold(self.folder)
        if use is not None:
            self._open_files(use)

    def _read_index(self) -> None:
        if self._files is None:
            return
        index = self._files[1]
        size = os.fstat(index).st_size // RECORD.size * RECORD.size
        if size < self._read_to:  # cut by something else
            self._held, self._read_to, self._slots = {}, 0, 0
        data = os.pread(index, size - self._read_to, self._read_to)
        for start in range(0, len(data) // RECORD.size * RECORD.size, RECORD.size):
            key, slot, total, crc = RECORD.unpack_from(data, start)
            self._slots += 1  # one record, one slot, whether it can be read or not
            if zlib.crc32(data[start : start + RECORD.size - 4]) == crc:
                self._held[key] = Held(slot, total)
        self._read_to += len(data)

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """A disk that fails ends the cache, never the training."""
        try:
            yield
        except OSError as error:
            self.writable = False
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk is full" if full else error.strerror or str(error)
            self.budget.tell(
                f"activation cache: {self.folder} cannot be {what} ({reason}); training goes on without it"
                + (", or free some space" if full else "")
            )


# ---- the files of a space --------------------------------------------------------------------------------------------


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold a file against other processes."""
    lock_exclusive(descriptor)
    try:
        yield
    finally:
        unlock(descriptor)


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of the bytes, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def hold(folder: Path) -> int | None:
    """Mark a space as in use: a descriptor that frees it when closed; None where it was just removed."""
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
    """Delete a space unless a process has it open (`force`: even then; what that process has open stays readable)."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if force or lock_exclusive(descriptor, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
    return not folder.exists()


def space_folders(root: Path) -> list[Path]:
    """The folders that hold a space."""
    return [path for path in root.iterdir() if (path / ENTRIES).exists()] if root.is_dir() else []


def used_at(folder: Path) -> float:
    """When a space was last opened, seconds since the epoch."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def stored_bytes(folder: Path) -> int:
    """Bytes of a space's files."""
    total = 0
    for name in (ENTRIES, INDEX):
        with suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total
