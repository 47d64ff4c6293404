"""Manage the folders of exports: build beside the place, move when complete, clean up after a kill."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.utils.files import free_disk_bytes
from lesionsam.utils.processes import is_abandoned


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
    for path in out.glob(".*-*"):
        match = re.fullmatch(r"\.(.+)\.(building|old)-(\d+)", path.name)
        if match is None or not is_abandoned(int(match[3])):  # this process has not begun to build
            continue
        if match[2] == "old" and not (out / match[1]).exists():
            os.replace(path, out / match[1])
        else:
            shutil.rmtree(path)


@contextmanager
def building(out: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder beside a format's place; it is deleted on exit if it is still there."""
    folder = out / f".{name}.building-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
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
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    if place.exists():
        os.replace(place, old)
    os.replace(folder, place)
    shutil.rmtree(old, ignore_errors=True)
