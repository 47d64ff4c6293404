"""The one exception a user's mistake ends in, and the guard that prints it as one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """What was expected, what came, where, and what to do: one line, no traceback.

    Args:
        message: names the file, row or key, what was expected, what came and the remedy.
        exit_code: process exit status; 2 unless a caller needs another.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def run_guarded(main: Callable[[], object]) -> None:
    """Run a stage or command: a `UserError` or a full disk becomes one line on stderr and a non-zero exit."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved state", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            print(
                f"error: cannot write {error.filename or 'output'}: {error.strerror}; free space or choose another"
                f" place",
                file=sys.stderr,
            )
            sys.exit(2)
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            print(f"error: {error.filename}: {error.strerror}; expected the path of a file or folder", file=sys.stderr)
            sys.exit(2)
        raise
