"""Send journals to MLflow while training goes on; runs as a process of its own.

`python -m lesionsam.tracking.sender OWNER_PID SPOOL` serves one run until its owner closes it or dies;
`python -m lesionsam.tracking.sender OWNER_PID --all ROOT` sends the waiting entries of all runs below a root and exits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lesionsam.tracking.mlflow_upload import Unreachable, Uploader, system_monitors
from lesionsam.tracking.spool import Appender, Spool, metrics_entry, read_lines
from lesionsam.utils.processes import exit_without

SEND_SECONDS = 2.0  # between two looks at the journal, while all goes well
MAX_DELAY_SECONDS = 30.0  # between two attempts, while it does not
LAST_DELAY_SECONDS = 0.5  # between the two attempts that are left once the owner waits
SAMPLE_SECONDS = 10.0  # between two samples of system metrics
# Errors of a spool that a disk fault or a person damaged; the other spools are still sent.
DAMAGE = (OSError, KeyError, TypeError, ValueError, AttributeError)


def catch_up(root: Path, but: Spool | None = None, stop: Callable[[], bool] = lambda: False) -> bool:
    """Send the waiting entries of runs below the root whose owners ended. Return False if a server was unreachable.

    Args:
        but: a spool to skip. stop: polled between two operations; True ends the catching up.
    """
    complete = True
    for spool in Spool.all(root):
        if but is not None and spool.local_id == but.local_id:
            continue
        if (lock := spool.lock("sender")) is None:
            continue
        try:
            _catch_up_one(spool, stop)
        except (Unreachable, *DAMAGE) as error:
            complete = False
            print(f"{spool.local_id}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        finally:
            lock.close()
    return complete


def _catch_up_one(spool: Spool, stop: Callable[[], bool]) -> None:
    """Send one spool's waiting entries; stop as soon as another process opens the run again.

    The owner's lock is not held meanwhile, so that a process that resumes the run does not have to wait.
    """
    if spool.has_owner() or (not spool.pending()[0] and spool.is_closed()):
        return
    uploader = Uploader(spool, replace_gone=False)
    while not stop():
        is_left = uploader.upload()
        if spool.has_owner():
            return
        if not is_left:
            uploader.mark_killed()
            return


class SystemSampler:
    """Sample system metrics and append them to the spool, so that a dead server loses none."""

    def __init__(self, spool: Spool) -> None:
        self._monitors = system_monitors()
        self._step = sum(1 for _ in read_lines(spool.path("system")))
        self._journal = Appender(spool.path("system"))
        self._due = time.monotonic()

    def sample(self) -> None:
        """Take a sample if one is due."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SAMPLE_SECONDS
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            for name, value in monitor.aggregate_metrics().items():
                values[f"system/{name}"] = float(value)
            monitor.clear_metrics()
        with suppress(OSError):  # kept until the disk takes it
            self._journal.append(metrics_entry(self._step, self._step, values))
        self._step += 1


def serve(spool: Spool) -> int:
    """Send one run's entries until its owner closes it. Return the exit status: 0, or 3 if entries are left."""
    lock = spool.lock("sender", wait=True)
    closing = spool.folder / "closing"
    try:
        uploader = Uploader(spool, replace_gone=True)
    except Unreachable as error:  # a database that this MLflow cannot use: waiting does not help
        print(error, file=sys.stderr)
        return 3
    sampler = SystemSampler(spool) if uploader.meta["system_metrics"] else None
    if sampler is not None:
        sampler.sample()
    failures, caught_up = 0, False
    while lock is not None:
        last = closing.exists()
        if sampler is not None and not last:
            sampler.sample()
        try:
            while uploader.upload():
                failures = 0
            if last:
                return 0
            if not caught_up:
                caught_up = True
                catch_up(spool.root, spool, closing.exists)
        except (Unreachable, OSError) as error:  # a server that does not answer; a full disk
            failures += 1
            with suppress(OSError):
                uploader.note(str(error))
            if last and failures > 1:
                return 3
        delay = LAST_DELAY_SECONDS if last else min(SEND_SECONDS * 2 ** min(failures, 10), MAX_DELAY_SECONDS)
        due = time.monotonic() + delay
        while time.monotonic() < due and closing.exists() == last:
            time.sleep(0.1)
            if sampler is not None and not last:
                sampler.sample()
    return 3


def main(arguments: list[str]) -> int:
    """Run the command of the module docstring and return its exit status."""
    exit_without(int(arguments[0]))  # the next start finds what was not sent
    os.nice(5)  # training goes first
    if arguments[1] == "--all":
        return 0 if catch_up(Path(arguments[2])) else 3
    return serve(Spool(Path(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
