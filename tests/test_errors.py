"""What a stage or command ends in: one line and an exit status that says why."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lesionsam.errors import Interrupted, UserError, run_guarded


def fails_with(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("SIGTERM did nothing")


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    pytest.fail("SIGINT did nothing")


@pytest.mark.parametrize(
    ("main", "status", "says"),
    [
        (fails_with(UserError("a\n b")), 2, "error: a b"),
        (fails_with(UserError("c", exit_code=3)), 3, "error: c"),
        (interrupted, 130, "interrupted; the same command goes on"),
        (terminated, 143, "interrupted; the same command goes on"),
        (fails_with(Interrupted(signal.SIGTERM)), 143, "interrupted"),
        (lambda: np.zeros(2**60, np.uint8), 2, "error: out of memory; .* lower train.batch_size"),
        (lambda: torch.zeros(2**60, dtype=torch.uint8), 2, r"error: out of memory \(.*allocate memory.* lower train"),
        (
            fails_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore")),
            2,
            r"error: out of memory \(CUDA .* GPU 0 has\); end other programs, or lower .* evaluate.batch_size",
        ),
        *(
            (fails_with(OSError(number, os.strerror(number), "there")), 2, f"cannot write there: {words}.*free space")
            for number, words in (
                (errno.ENOSPC, "No space left on device"),
                (errno.EDQUOT, "Disk quota exceeded"),
                (errno.EROFS, "Read-only file system"),
                (errno.EACCES, "Permission denied"),
                (errno.EFBIG, "File too large"),
                (errno.EIO, "Input/output error"),
            )
        ),
        (fails_with(OSError(errno.ENOTDIR, "Not a directory", "a/b")), 2, "error: a/b: Not a directory; expected the"),
    ],
)
def test_one_line(main: Callable[[], object], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_guarded(main)
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line), line
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "and nothing of the handling is left"


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), OSError(errno.EBADF, "x"), ZeroDivisionError()])
def test_a_fault_of_our_own_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_guarded(fails_with(error))


def test_whoever_handles_sigterm_goes_on_to_do_so() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        run_guarded(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
