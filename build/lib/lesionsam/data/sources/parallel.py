"""Many files read at once, the faulty ones told together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lesionsam.errors import UserError
from lesionsam.utils.progress import progress

Result = TypeVar("Result")
NUM_THREADS = 4  # Pillow decodes outside Python's lock


def run_jobs(
    jobs: Sequence[Callable[[], Result]], *, title: str = "reading images", fault: str = "faulty files"
) -> list[Result]:
    """Results in the order of the jobs.

    Args:
        fault: what is counted in the message.
    Raises:
        UserError: the first fault, and how many more there are.
    """
    done = list(outcomes(jobs, title=title))
    problems = [item for item in done if isinstance(item, UserError)]
    if problems:
        more = f" (and {len(problems) - 1} more {fault})" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")
    return [item for item in done if not isinstance(item, UserError)]


def outcomes(
    jobs: Sequence[Callable[[], Result]], *, title: str, num_threads: int = NUM_THREADS
) -> Iterator[Result | UserError]:
    """What each job gives, or the fault it ends in, in order, with a progress bar."""

    def guarded(job: Callable[[], Result]) -> Result | UserError:
        try:
            return job()
        except UserError as error:
            return error

    with ThreadPoolExecutor(num_threads) as pool:
        yield from progress(pool.map(guarded, jobs), total=len(jobs), title=title)
