"""One writer at a time, an end for processes whose parent has died, and an end that waits for the step to be over.

A killed `dvc repro` leaves its stage alive and the next one starts a second writer on the same outputs. So a stage
holds a lock of its own, and ends when the process that started it is gone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lesionsam.errors import Interrupted, UserError

WATCH_SECONDS = 0.5
TAKE_OVER_SECONDS = 5.0  # how long a dying holder may take to let go
SCRATCH = Path(".scratch")


@contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Hold the lock of a stage of `dvc.yaml` while the block runs; end with the `dvc repro` that started it.

    Raises:
        UserError: another process runs this stage here.
    """
    exit_with_parent()
    with file_lock(SCRATCH / f"{stage}.lock", f"the stage {stage}"):
        yield


@contextmanager
def file_lock(path: Path, what: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file while the block runs; the system frees it however the process ends.

    Args:
        path: lock file; its folder is made. what: named in the message.
        waiting: told where another process holds it, and this one then waits for as long as that takes; None: it
            does not wait, but for a holder that is ending.
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
                if waiting is not None:
                    waiting(f"{what}: another process is at it; waiting")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    break
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"{what} is already running as {file.read().strip() or 'another process'} ({path}); wait for "
                        "it, or end that process"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"pid {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


@contextmanager
def folder_lock(folder: Path, remedy: str) -> Iterator[None]:
    """Hold a folder itself while the block runs, so that no lock file is left in what a user keeps.

    Args:
        folder: it exists. remedy: of the message.
    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process writes there; {remedy}") from None
    except OSError:  # NFS locks no folders: as it was without
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def is_alive(pid: int, since: str = "") -> bool:
    """Whether there is a process of this number on this machine, whoever owns it; with `since` (what `started` told)
    whether it is that one still, not another that was given its number, and not a dead one that nobody waited for."""
    if since:
        return started(pid) == since
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def is_left_by(pid: int) -> bool:
    """Whether what a process of this number was making is left over: it is gone, or it is this very process.

    In a container every process may have had this one's number; who asks knows what it is making itself.
    """
    return pid == os.getpid() or not is_alive(pid)


def started(pid: int) -> str:
    """When a process began, as the kernel tells it; empty where there is none or nothing tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _parent_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])


def _is_below_dvc(pid: int) -> bool:
    """Whether a process has what DVC gives to the stage that it starts and has not itself."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(b"DVC_STAGE=") for variable in variables)


def _up_to_dvc() -> dict[int, int]:
    """Process -> its parent, from this one up to DVC. Above DVC nothing matters: a terminal may be closed."""
    pid, parents = os.getpid(), {}
    while parent := _parent_of(pid):
        parents[pid] = parent
        if not _is_below_dvc(parent):
            break
        pid = parent
    return parents


def exit_with_parent() -> None:
    """Under DVC, end this process when DVC (or the shell between) is gone; elsewhere do nothing."""
    if "DVC_STAGE" not in os.environ or not sys.platform.startswith("linux"):
        return
    parents = _up_to_dvc()

    def end() -> None:
        with suppress(OSError):  # the terminal may be gone as well
            os.write(2, b"the process that started this stage is gone; ending\n")
        os._exit(143)

    def watch() -> None:
        while all(_parent_of(pid) == parent for pid, parent in parents.items()):
            time.sleep(WATCH_SECONDS)
        end()

    # Killed while this process was loading its libraries: whoever takes orphans over belongs to another session.
    parent = os.getppid()
    if parent and _session_of(parent) != os.getsid(0):
        end()
    threading.Thread(target=watch, daemon=True).start()


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def end_with(parent: int) -> None:
    """End this process as soon as that one, which started it, is gone; for processes that decode beside a stage."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def holding() -> Iterator[Callable[[], None]]:
    """Once the block calls what is yielded, a Ctrl-C, SIGTERM or SIGHUP waits for its end; a second one does not.

    Raises:
        KeyboardInterrupt: after the block, where one has waited.
    """
    asked: list[int] = []
    before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def begin() -> None:
        if before or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)

    try:
        yield begin
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            raise KeyboardInterrupt


@contextmanager
def graceful_stop() -> Iterator[Callable[[], int]]:
    """While the block runs, a first Ctrl-C or SIGTERM is only noted, and a second one ends at once.

    Yields:
        what a loop asks at places where it may end: the signal's number, 0 while none came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise Interrupted(number)
        asked.append(number)
        # Not print: the signal may have come in the middle of one.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"ending after this step, whose state is saved; once more ends at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
