"""Progress with the time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
QUIET_SECONDS = 5.0  # shorter work prints nothing in a log
LINE_SECONDS = 15.0
_silenced: list[bool] = []


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
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            for item in items:
                yield item
                bar.advance(task)
        return
    begun = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - begun > QUIET_SECONDS and now - last > LINE_SECONDS and done < total:
            last = now
            print(
                f"{title}: {done}/{total}, {(now - begun) / done * (total - done):.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def say(line: str) -> None:
    """Print a line on stderr."""
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
    """Show the progress of bytes with speed and time left; a context manager.

    Args:
        title: what is transferred. total: bytes in all. begun_at: bytes that were there before.
    """

    def __init__(self, title: str, total: int, begun_at: int = 0) -> None:
        self.title, self.total, self.begun_at = title, total, begun_at

    def __enter__(self) -> Meter:
        self.begun = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.begun_at)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def at(self, done: int) -> None:
        """Update with the bytes done so far, including those that were there before."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
            return
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS and done > self.begun_at:
            self.last = now
            speed = (done - self.begun_at) / (now - self.begun)
            say(
                f"{self.title}: {human_bytes(done)} of {human_bytes(self.total)}, {human_bytes(speed)}/s, "
                f"{human_seconds((self.total - done) / speed)} left"
            )
