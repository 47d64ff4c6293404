"""Stage locks, exit with the parent, a signal that waits for a step to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.processes import is_running
from lesionsam.errors import Interrupted, UserError
from lesionsam.utils import locks, processes

SOURCE = str(Path(processes.__file__).parents[2])
# Says so when it has looked for its parents some times more after the terminal above them was closed.
STAGE = """
import os, time
from lesionsam.utils import processes
looks, sleep, processes.WATCH_SECONDS = [], time.sleep, 0.01
time.sleep = lambda seconds: (looks.append(seconds), sleep(seconds))
processes.exit_with_parent()
print(os.getpid(), flush=True)
terminal = int(os.environ["TERMINAL"])
while os.path.exists(f"/proc/{terminal}"):
    sleep(0.01)
before = len(looks)
while len(looks) < before + 5:
    sleep(0.01)
print("looked again", flush=True)
sleep(300)
"""
START = """
import os, subprocess, sys
os.environ.update({variables!r})
child = subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session={new_session})
print(child.pid, flush=True)
child.wait()
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": SOURCE},
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not is_running(pid):
            return True
        time.sleep(0.05)
    return False


@contextmanager
def family(stage: str, between: int = 0) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """Terminal -> DVC -> (shells) -> stage, with sleeping Pythons in the place of the first ones; ended afterwards.

    Yields:
        the terminal, the process of DVC, the process of the stage, which has printed a line.
    """
    code = stage
    for _ in range(between):
        code = START.format(variables={}, code=code, new_session=False)
    code = START.format(variables={"DVC_STAGE": "train"}, code=code, new_session=False)
    # As the real DVC: what it gives its child it has not itself.
    terminal = start(
        "import os\nos.environ['TERMINAL'] = str(os.getpid())\n"
        + START.format(variables={}, code=code, new_session=True)
    )
    pids = [int(first_line(terminal)) for _ in range(between + 2)]
    try:
        assert int(first_line(terminal)) == pids[-1], "the stage itself"
        yield terminal, pids[0], pids[-1]
    finally:
        for pid in reversed(pids):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        terminal.kill()
        terminal.wait()
        if terminal.stdout is not None:
            terminal.stdout.close()


@linux
@pytest.mark.parametrize("between", [0, 1], ids=["dvc", "dvc and a shell"])
def test_a_stage_ends_with_its_dvc_and_not_with_the_terminal_above_it(between: int) -> None:
    with family(STAGE, between=between) as (terminal, dvc, stage):
        terminal.send_signal(signal.SIGKILL)
        terminal.wait()
        assert terminal.stdout is not None
        assert terminal.stdout.readline().strip() == "looked again", "a closed terminal ended the training"
        os.kill(dvc, signal.SIGKILL)
        assert ends_within(stage, 30)


def test_a_stage_by_hand_is_watched_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    before = threading.active_count()
    processes.exit_with_parent()
    assert threading.active_count() == before


@linux
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            """
import os, time
from lesionsam.utils.processes import exit_with_parent
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
exit_with_parent()
time.sleep(300)
""",
            id="while it loaded its libraries",
        ),
        pytest.param(
            """
import os, time
from lesionsam.utils.processes import exit_without
exit_without(os.getppid())
print(os.getpid(), flush=True)
time.sleep(300)
""",
            id="a process beside a stage",
        ),
    ],
)
def test_what_a_dead_process_started_ends(stage: str) -> None:
    with family(stage) as (_, dvc, pid):
        os.kill(dvc, signal.SIGKILL)
        assert ends_within(pid, 30)


def test_a_stage_is_refused_while_another_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(locks, "HANDOVER_SECONDS", 0.0)
    ran: list[str] = []

    @processes.stage_lock("boxes")
    def inner() -> None:
        ran.append("inner")

    @processes.stage_lock("boxes")
    def outer() -> None:
        with pytest.raises(UserError, match=rf"the stage boxes is already running as pid {os.getpid()} since"):
            inner()
        processes.stage_lock("weights")(lambda: ran.append("another stage"))()

    outer()
    inner()
    assert ran == ["another stage", "inner"]


def test_a_first_signal_waits_for_the_step_and_a_second_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with processes.graceful_stop() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(Interrupted) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.exit_code == 130
    assert capfd.readouterr().err.count("ending after this step") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
