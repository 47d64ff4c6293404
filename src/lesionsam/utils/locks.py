"""Locks between processes, on filelock: flock on POSIX, LockFileEx on Windows.

The system frees a lock when its process ends, however that happens, so none outlives a `kill -9`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout, lock_descriptor

from lesionsam.errors import UserError

try:
    import fcntl
except ImportError:  # Windows; filelock has no shared locks on descriptors
    fcntl = None

POLL_SECONDS = 0.02
HANDOVER_SECONDS = 5.0  # a holder that is ending gets this long to let go


@contextmanager
def file_lock(path: Path, what: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file that names its holder while the block runs.

    Args:
        path: lock file; its folder is made. what: named in the message.
        waiting: receives a line when another process holds the lock, and the call then waits without limit; None:
            wait `HANDOVER_SECONDS` at most.
    Raises:
        UserError: another process holds the lock: "already running as pid N since T".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False, poll_interval=POLL_SECONDS)
    try:
        lock.acquire(timeout=0 if waiting is not None else HANDOVER_SECONDS)
    except Timeout:
        if waiting is None:
            raise UserError(
                f"{what} is already running as {_holder(path)} ({path}); wait for it, or end that process"
            ) from None
        waiting(f"{what}: {_holder(path)} holds the lock ({path}); waiting")
        lock.acquire()
    try:
        if not isinstance(lock, SoftFileLock):  # whose file has a content of its own
            with suppress(OSError):  # Windows locks the file's first byte against writing, too
                path.write_text(f"pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Return what `file_lock` wrote about the holder."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


@contextmanager
def folder_lock(folder: Path, remedy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold an existing folder while the block runs, without leaving a lock file in it.

    Where a folder cannot be locked (Windows, NFS) the block runs without a lock.

    Args:
        remedy: last part of the message. shared: hold it beside others that do so, against those that do not.
    Raises:
        UserError: another process holds the folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        yield
        return
    try:
        try:
            is_free = (lock_shared if shared and fcntl else lock_exclusive)(descriptor, wait=False)
        except OSError:
            is_free = True
        if not is_free:
            raise UserError(f"{folder}: another process writes there; {remedy}")
        yield
    finally:
        os.close(descriptor)


def lock_exclusive(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file against all other locks; closing the file frees it.

    Returns:
        Whether the lock is held; always true with `wait`.
    """
    return lock_descriptor(descriptor, blocking=wait, poll_interval=POLL_SECONDS)


def lock_shared(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file beside other shared locks and against exclusive ones; closing the file frees it.

    Returns:
        Whether the lock is held; always true with `wait`.
    Raises:
        UserError: the system has no shared locks.
    """
    if fcntl is None:
        raise UserError("training and tracking need shared file locks, which this system lacks; use Linux or macOS")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
