"""Write files so that a crash leaves no half file; hash them; parse the numbers of a table."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lesionsam.utils.locks import lock_exclusive

CHUNK = 1 << 20


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when it is complete and on disk.

    It is written beside the target, flushed, fsynced and renamed over it, and the folder is fsynced; it is removed if
    the block raises. Missing parent folders are made.

    Args:
        path: the final path. mode: "wb" or "w" (UTF-8, line ends as written).
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: expected 'w' or 'wb', got {mode!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") if mode == "wb" else temporary.open("x", encoding="utf-8", newline="") as file:
            with suppress(OSError):  # a file system without locks
                lock_exclusive(file.fileno(), wait=False)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # which renames no open file
                os.replace(temporary, path)  # while it is locked still
        if sys.platform == "win32":
            os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.filename is None or error.filename == str(temporary):
            error.filename = str(path)  # a failed write() names no file
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_leftovers(folder: Path, *below: str, of: Container[Path] | None = None) -> None:
    """Remove the temporary files of killed processes from a folder, and from the folders `below` it at any depth.

    A file that is being written is locked, so that none of another process, container or machine is taken for a
    leftover. Other folders below are not searched: they may be another program's, or hold millions of files.

    Args:
        of: only those that would have become one of these paths; None: all.
    """
    for path in [*folder.glob(".*.tmp"), *(path for name in below for path in (folder / name).rglob(".*.tmp"))]:
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", path.name)
        if match and (of is None or path.with_name(match[1]) in of):
            with suppress(OSError):  # gone meanwhile; a file system without locks
                with path.open("rb") as file:
                    is_free = lock_exclusive(file.fileno(), wait=False)
                if is_free:  # Windows deletes no open file
                    path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new entry in `folder` survive a power cut; Windows offers no such call."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path | str, data: bytes) -> None:
    """Write bytes so that `path` is never half a file."""
    with atomic_write(path) as file:
        file.write(data)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write UTF-8 text so that `path` is never half a file."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json_atomic(path: Path | str, value: object) -> None:
    """Write indented JSON so that `path` is never half a file.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_atomic(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy a file so that `target` is never half a file; with `link`, hard-link it where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        temporary = _temporary(target)
        try:
            os.link(source, temporary)
            os.replace(temporary, target)
            fsync_folder(target.parent)
            return
        except OSError:  # another file system, or one without hard links: copy instead
            pass
        finally:
            with suppress(FileNotFoundError):  # replacing a link by a link to the same file leaves the first one
                temporary.unlink()
    with source.open("rb") as reader, atomic_write(target) as writer:
        shutil.copyfileobj(reader, writer, CHUNK)


def sha256_file(path: Path | str, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as hex; `progress` receives the number of bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def free_disk_bytes(path: Path | str) -> int:
    """Return the free bytes of the disk where `path` is, or will be."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def whole_number(text: str) -> int | None:
    """Return a count of at most nine digits 0 to 9; None for anything else, such as "4\u00b2"."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def decimal_number(text: str) -> float:
    """Return a number of a table.

    Raises:
        ValueError: no number, or one that only Python accepts, such as "1_0" or "\u0664".
    """
    if "_" in text or not text.isascii():
        raise ValueError(f"expected a number, got {text!r}")
    return float(text)
