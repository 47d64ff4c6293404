"""Exceptions for user errors and interruptions, and the guard that prints them as one line."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
REMEDY = "end other programs, or lower train.batch_size, evaluate.batch_size, runtime.num_workers or model.image_size"
SHOWN = 5  # names that a message lists
NO_PATH = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(Exception):
    """Error that the user can fix, printed as one line without a traceback.

    Args:
        message: names the file, row or key, what was expected, what came and the remedy.
        exit_code: process exit status; 2 unless a caller needs another.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list as text, and the number of the others."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; `exit_code` is 130 or 143."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.exit_code = 128 + number


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, numpy or torch says that memory ran out, of a CPU or a GPU."""
    # torch raises no MemoryError: "can't allocate memory" on a CPU, "CUDA out of memory. Tried to allocate" on a GPU.
    words = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


def run_guarded(main: Callable[[], object]) -> None:
    """Run a stage or command; print an error that the user can fix as one line on stderr and exit non-zero.

    These are `UserError`, a full disk, an unwritable path and too little memory. SIGTERM ends the process as Ctrl-C
    does.
    """
    try:
        with _ended_like_ctrl_c():
            main()
    except UserError as error:
        _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt as error:
        _end("interrupted; the same command goes on from the last saved state", getattr(error, "exit_code", 130))
    except MemoryError:
        _end(f"error: out of memory; {REMEDY}", 2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _end(f"error: out of memory ({str(error).splitlines()[0][:160]}); {REMEDY}", 2)
    except OSError as error:
        if error.errno in NO_PLACE:
            _end(
                f"error: cannot write {error.filename or 'output'}: {error.strerror}; free space or choose another "
                "place",
                2,
            )
        if error.errno in NO_PATH:
            _end(f"error: {error.filename}: {error.strerror}; expected the path of a file or folder", 2)
        raise


def _end(line: str, exit_code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(exit_code)


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Raise `Interrupted` on SIGTERM inside the block, unless SIGTERM already has a handler or is ignored."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
