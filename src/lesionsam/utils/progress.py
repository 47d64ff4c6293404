"""Progress with the time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
LINE_SECONDS = 5.0  # between two lines in a log; shorter work prints none
_silenced: list[bool] = []
_bars: list[str] = []  # titles of the bars on the terminal
_last_line = [0.0]  # when `say` printed last


@contextmanager
def silent() -> Iterator[None]:
    """Print no bars and lines while the block runs; for long work that reports its own progress."""
    _silenced.append(True)
    try:
        yield
    finally:
        _silenced.pop()


def progress(items: Iterable[Item], *, total: int, title: str) -> Iterator[Item]:
    """Yield the items and print the progress and the time left on stderr."""
    if _silenced:
        yield from items
        return
    with Meter(title, total, in_bytes=False) as meter:
        for done, item in enumerate(items, 1):
            yield item
            meter.at(done)


@contextmanager
def working(title: str) -> Iterator[None]:
    """Print the title and the time so far on stderr while the block runs, after `LINE_SECONDS` without another line."""
    begun, ended = time.monotonic(), threading.Event()
    _last_line[0] = begun

    def beat() -> None:
        while not ended.wait(max(0.1, _last_line[0] + LINE_SECONDS - time.monotonic())):
            if not _silenced and not _bars and time.monotonic() - _last_line[0] >= LINE_SECONDS:
                say(f"{title}: {human_seconds(time.monotonic() - begun)} so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def say(line: str) -> None:
    """Print a line on stderr."""
    _last_line[0] = time.monotonic()
    print(line, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """Return a number of bytes with its unit: 1 kB = 1000 B."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Meter:
    """Show a progress with the time left, of bytes with their speed; a context manager.

    Args:
        title: what is done. total: items or bytes in all. begun_at: those that were there before.
    """

    def __init__(self, title: str, total: int, begun_at: int = 0, *, in_bytes: bool = True) -> None:
        self.title, self.total, self.begun_at, self.in_bytes = title, total, begun_at, in_bytes

    def __enter__(self) -> Meter:
        self.begun = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = [*progress.Progress.get_default_columns()]
            columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()] if self.in_bytes else []
            self.bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            _bars.append(self.title)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.begun_at)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            _bars.remove(self.title)

    def at(self, done: int) -> None:
        """Update with the items or bytes done so far, including those that were there before."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
            return
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS and self.begun_at < done < self.total:
            self.last = now
            speed = (done - self.begun_at) / (now - self.begun)
            of_bytes = f"{human_bytes(done)} of {human_bytes(self.total)}, {human_bytes(speed)}/s"
            amount = of_bytes if self.in_bytes else f"{done}/{self.total}"
            say(f"{self.title}: {amount}, {human_seconds((self.total - done) / speed)} left")
