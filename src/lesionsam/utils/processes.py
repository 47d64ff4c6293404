"""Stage locks, exit with the parent process, and a signal that waits for a step to end.

A killed `dvc repro` leaves its stage alive, and the next one would start a second writer on the same outputs. So a
stage holds a lock and exits when the process that started it is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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

    def end() -> None:
        with suppress(OSError):  # the terminal may be gone as well
            os.write(2, b"the process that started this stage is gone; ending\n")
        os._exit(143)

    parents = _up_to_dvc()
    # DVC may have been killed while this process loaded its libraries: an orphan's new parent has another session.
    try:
        is_orphan = os.getsid(os.getppid()) != os.getsid(0)
    except ProcessLookupError:
        is_orphan = True
    if is_orphan:
        end()
    _watch(lambda: all(_parent_of(pid) == parent for pid, parent in parents.items()), end)


def exit_without(parent: int, end: Callable[[], None] = lambda: os._exit(143)) -> None:
    """Exit when the parent process is gone; for worker processes.

    Args:
        end: called instead of exiting with status 143, in a thread of its own.
    """
    _watch(lambda: os.getppid() == parent, end)


def start_python(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **streams: Any
) -> subprocess.Popen[Any]:
    """Start a module of this package in a session of its own, which Ctrl-C does not reach.

    Args:
        module: dotted name, for `python -m`; this process's number is its first argument.
        environment: additional variables. streams: further arguments of `subprocess.Popen`.
    """
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, str(os.getpid()), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        start_new_session=True,
        **streams,
    )


def _watch(is_alive: Callable[[], bool], end: Callable[[], None]) -> None:
    def watch() -> None:
        while is_alive():
            time.sleep(WATCH_SECONDS)
        end()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def graceful_stop(*, is_quiet: bool = False) -> Iterator[Callable[[], int]]:
    """Record a first Ctrl-C or SIGTERM while the block runs; a second one interrupts at once.

    Args:
        is_quiet: print no line at the first signal.

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
        if is_quiet:
            return
        # Not print: the signal may interrupt one.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"ending after this step, whose state is saved; once more ends at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
