"""Stage locks, exit with the parent process, and signals that wait for a step to end.

A killed `dvc repro` leaves its stage alive, and the next one would start a second writer on the same outputs. So a
stage holds a lock and exits when the process that started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lesionsam.errors import Interrupted
from lesionsam.utils.locks import file_lock

WATCH_SECONDS = 0.5
SCRATCH = Path(".scratch")


@contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Hold the lock of a stage of `dvc.yaml` while the block runs; exit with the `dvc repro` that started it.

    Raises:
        UserError: another process runs this stage here.
    """
    exit_with_parent()
    with file_lock(SCRATCH / f"{stage}.lock", f"the stage {stage}"):
        yield


def is_alive(pid: int, since: str = "") -> bool:
    """Return whether a process with this number exists on this machine, whoever owns it.

    Args:
        since: `start_time` of the process that is meant: another process with the same number, or a zombie, is not it.
    """
    if since:
        return start_time(pid) == since
    if sys.platform == "win32":  # os.kill would end the process
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def is_abandoned(pid: int) -> bool:
    """Return whether a file named after this process is left over: the process is gone, or it is the current one.

    In a container every run may get the same number; the caller knows which files it is writing itself.
    """
    return pid == os.getpid() or not is_alive(pid)


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; empty for no process, a zombie, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _parent_of(pid: int) -> int | None:
    """Return the number of the parent process; None if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])


def _is_below_dvc(pid: int) -> bool:
    """Return whether a process has the environment variable that DVC sets for a stage, and does not have itself."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(b"DVC_STAGE=") for variable in variables)


def _up_to_dvc() -> dict[int, int]:
    """Return process -> parent from this process up to DVC, and no further: a terminal above it may be closed."""
    pid, parents = os.getpid(), {}
    while parent := _parent_of(pid):
        parents[pid] = parent
        if not _is_below_dvc(parent):
            break
        pid = parent
    return parents


def exit_with_parent() -> None:
    """Exit when DVC (or a shell between) is gone; do nothing outside DVC or without /proc."""
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

    # DVC may have been killed while this process loaded its libraries: an orphan's new parent has another session.
    parent = os.getppid()
    if parent and _session_of(parent) != os.getsid(0):
        end()
    threading.Thread(target=watch, daemon=True).start()


def _session_of(pid: int) -> int | None:
    """Return the session of a process; None if the process is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def exit_without(parent: int) -> None:
    """Exit when the parent process is gone; for worker processes of a stage."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Delay a first Ctrl-C, SIGTERM or SIGHUP to the end of the block; a second one interrupts at once.

    Yields:
        a function that starts the delay.
    Raises:
        KeyboardInterrupt: at the end of the block, if a signal was delayed.
    """
    received: list[int] = []
    before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    def begin() -> None:
        if before or threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)

    try:
        yield begin
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            raise KeyboardInterrupt


@contextmanager
def graceful_stop() -> Iterator[Callable[[], int]]:
    """Record a first Ctrl-C or SIGTERM while the block runs; a second one interrupts at once.

    Yields:
        a function that returns the number of the recorded signal, or 0; a loop calls it where it can stop.
    Raises:
        Interrupted: at a second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)
        # Not print: the signal may interrupt one.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"ending after this step, whose state is saved; once more ends at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
