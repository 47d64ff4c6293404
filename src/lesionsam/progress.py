"""Progress with ETA: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
QUIET_SECONDS = 5.0  # whatever ends sooner prints nothing in a log
LINE_SECONDS = 15.0
_silenced: list[bool] = []


@contextmanager
def silent() -> Iterator[None]:
    """Without bars and lines while the block runs: of something large that tells its own progress."""
    _silenced.append(True)
    try:
        yield
    finally:
        _silenced.pop()


def progress(items: Iterable[Item], *, total: int, title: str) -> Iterator[Item]:
    """Yield the items, telling on stderr how far it is and how long it will take."""
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
