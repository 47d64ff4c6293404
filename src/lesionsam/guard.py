"""One writer at a time: a lock that names its holder, and an end for stages whose parent has died.

A killed `dvc repro` leaves its stage alive and the next one starts a second writer on the same outputs. So a stage
holds a lock on its scratch folder, and ends when the process that started it is gone.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lesionsam.errors import UserError

WATCH_SECONDS = 0.5
TAKE_OVER_SECONDS = 5.0  # how long a dying holder may take to let go


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file while the block runs; the system frees it however the process ends.

    Args:
        path: lock file; its folder is made. what: named in the message.
    Raises:
        UserError: another process holds it: "already running as pid N since T".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"{what} is already running as {file.read().strip() or 'another process'} ({path}); wait for "
                        "it, "
                        "or end that process"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _parent_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])


def end_with_parent() -> None:
    """Under DVC, end this process when DVC (or the shell between) is gone; elsewhere do nothing."""
    if "DVC_STAGE" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    grandparent = _parent_of(parent)

    def watch() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if os.getppid() != parent or _parent_of(parent) != grandparent:
                print("the process that started this stage is gone; ending", file=sys.stderr, flush=True)
                os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
