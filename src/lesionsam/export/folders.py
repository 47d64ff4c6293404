"""Manage the folders of exports: build beside the place, move when complete, clean up after a kill."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.utils.files import free_disk_bytes
from lesionsam.utils.locks import folder_lock


def prepare(out: Path, needed: int) -> None:
    """Make the folder of all exports and clean up after a killed export.

    Args:
        needed: bytes that will be written.
    Raises:
        UserError: it cannot be written to, or the disk is too full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror}); name a folder of your own") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written to (no permission); name a folder of your own")
    _clear_up(out)
    if (free := free_disk_bytes(out)) < needed:
        raise UserError(
            f"--out {out}: {needed / 1e6:,.0f} MB of disk are needed, {free / 1e6:,.0f} MB are free; free "
            "some, name another place, or export one format at a time"
        )


def _clear_up(out: Path) -> None:
    """Delete folders that a killed export was building; restore a folder that it had moved aside."""
    names = {match[1] for path in out.iterdir() if (match := re.fullmatch(r"\.(.+)\.(building|old)", path.name))}
    for name in names:
        folder, old = out / f".{name}.building", out / f".{name}.old"
        folder.mkdir(exist_ok=True)
        with suppress(UserError), folder_lock(folder, ""):  # one that is being built is locked
            if old.exists() and not (out / name).exists():
                os.replace(old, out / name)
            for left in (old, folder):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def building(out: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder beside a format's place, locked; it is deleted on exit if it is still there.

    Raises:
        UserError: another process builds it.
    """
    folder = out / f".{name}.building"
    folder.mkdir(exist_ok=True)
    with folder_lock(folder, "wait for it, or name another --out"):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Delete compiled files of the reload, and make the library's files readable to other users."""
    for compiled in list(folder.rglob("__pycache__")):
        shutil.rmtree(compiled)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o044)


def replace(folder: Path, place: Path) -> None:
    """Move a folder to its place. Between the two renames there is no folder, but never a partial one."""
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        os.replace(place, old)
    os.replace(folder, place)
    shutil.rmtree(old, ignore_errors=True)
