"""A command as a job: it is interrupted before the job's time limit, saves its state, and is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from submitit.helpers import DelayedSubmission

from lesionsam.errors import UserError

POLL_SECONDS = 0.5


class CommandFailed(RuntimeError):
    """Say that a command ended with a status other than 0; what it printed is in the job's log."""


class Command:
    """A command of `lesionsam` in the project's folder; submitit pickles it, calls it in the job, and calls
    `checkpoint` when Slurm announces the time limit.

    Args:
        arguments: of the process. folder: holds params.yaml; every node sees it.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments, self.folder = list(arguments), folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the command to its end.

        Raises:
            UserError: this node does not see the folder. CommandFailed: a status other than 0.
        """
        if not (self.folder / "params.yaml").is_file():
            raise UserError(
                f"{self.folder}: no params.yaml on this node; put the project into a folder all nodes share"
            )
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._process = subprocess.Popen(
            self.arguments,
            cwd=self.folder,
            env={**os.environ, "PATH": path},
            start_new_session=True,
            preexec_fn=_signals,
        )
        status = None
        while status is None:  # not one wait without end: `checkpoint` interrupts it
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(POLL_SECONDS)
        if status:
            raise CommandFailed(f"status {status}: {' '.join(self.arguments)}")

    def checkpoint(self) -> DelayedSubmission:
        """Interrupt the command as Ctrl-C does, wait until it has saved its state, and return it to be run again."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGINT)
            with suppress(ChildProcessError):  # not Popen.wait, whose lock the interrupted call may hold
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(self.arguments, self.folder))


def _signals() -> None:
    """Let the command receive Ctrl-C, and not the signal that is for the job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
