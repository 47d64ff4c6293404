"""One writer at a time, and the end of a stage whose parent is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lesionsam import guard
from lesionsam.errors import Interrupted, UserError

SOURCE = str(Path(guard.__file__).parents[1])
HOLDER = """
import sys, time
from pathlib import Path
from lesionsam.guard import only_one
with only_one(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(300)
"""
STAGE = """
import os, sys, time
from lesionsam.guard import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(300)
"""


def start(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": SOURCE},
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_alive(pid: int) -> bool:
    """Not gone and not a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_second_writer_is_refused_with_the_firsts_pid_and_may_start_after_its_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "TAKE_OVER_SECONDS", 0.2)
    lock = tmp_path / "scratch" / "lock"
    holder = start(HOLDER, str(lock))
    try:
        assert first_line(holder) == "held"
        with (
            pytest.raises(UserError, match=rf"training is already running as pid {holder.pid} since \d{{4}}-"),
            guard.only_one(lock, "training"),
        ):
            pytest.fail("two at once")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with guard.only_one(lock, "training"):
        assert lock.read_text().startswith(f"pid {os.getpid()} since ")


def test_the_lock_is_free_again_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), guard.only_one(tmp_path / "lock", "training"):
        raise ZeroDivisionError
    with guard.only_one(tmp_path / "lock", "training"), guard.only_one(tmp_path / "another", "evaluation"):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("under_dvc", [True, False], ids=["under dvc", "by hand"])
def test_a_stage_ends_with_its_parent_under_dvc_only(under_dvc: bool) -> None:
    # DVC -> shell -> stage, with a sleeping Python in DVC's place.
    shell = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STAGE!r}])
child.wait()
"""
    parent = start(shell, **({"DVC_STAGE": "train"} if under_dvc else {}))
    stage = int(first_line(parent))
    try:
        assert is_alive(stage)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert ends_within(stage, 30 if under_dvc else 2) is under_dvc
    finally:
        if is_alive(stage):
            os.kill(stage, signal.SIGKILL)
        if parent.stdout is not None:
            parent.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_stage_ends_when_only_dvc_above_the_shell_is_killed() -> None:
    between = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {STAGE!r}]).wait()
"""
    dvc = start(
        f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {between!r}])
print(child.pid, flush=True)
child.wait()
""",
        DVC_STAGE="train",
    )
    shell, stage = int(first_line(dvc)), int(first_line(dvc))
    try:
        time.sleep(2 * guard.WATCH_SECONDS)
        assert is_alive(stage), "nothing has happened yet"
        dvc.send_signal(signal.SIGKILL)
        dvc.wait()
        assert ends_within(stage, 30)
    finally:
        for pid in (stage, shell):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        if dvc.stdout is not None:
            dvc.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_stage_whose_parent_died_while_it_loaded_its_libraries_ends() -> None:
    late = """
import os, time
from lesionsam.guard import end_with_parent
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
end_with_parent()
time.sleep(300)
"""
    dvc = start(f"""
import os, subprocess, sys, time
os.setsid()
subprocess.Popen([sys.executable, "-c", {late!r}], stderr=subprocess.DEVNULL)
time.sleep(300)
""", DVC_STAGE="train")
    stage = int(first_line(dvc))
    try:
        dvc.send_signal(signal.SIGKILL)
        dvc.wait()
        assert ends_within(stage, 30)
    finally:
        if is_alive(stage):
            os.kill(stage, signal.SIGKILL)
        if dvc.stdout is not None:
            dvc.stdout.close()


def test_a_stage_is_refused_while_another_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(guard, "TAKE_OVER_SECONDS", 0.0)
    ran: list[str] = []

    @guard.the_only("boxes")
    def inner() -> None:
        ran.append("inner")

    @guard.the_only("boxes")
    def outer() -> None:
        with pytest.raises(UserError, match=rf"the stage boxes is already running as pid {os.getpid()} since"):
            inner()
        guard.the_only("weights")(lambda: ran.append("another stage"))()

    outer()
    inner()
    assert ran == ["another stage", "inner"]


def test_a_first_signal_waits_for_the_step_and_a_second_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with guard.finishing_first() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(Interrupted) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.exit_code == 130
    assert capfd.readouterr().err.count("ending after this step") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parents are taken over by another process there")
def test_a_process_beside_a_stage_ends_with_it() -> None:
    beside = STAGE.replace("end_with_parent()", "end_with(os.getppid())").replace("end_with_parent", "end_with")
    parent = start(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {beside!r}]).wait()")
    pid = int(first_line(parent))
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert ends_within(pid, 30)
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
        if parent.stdout is not None:
            parent.stdout.close()


def test_what_has_begun_to_end_is_not_interrupted_but_by_a_second_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []

    def block(*, begins: bool, signals: int) -> None:
        with guard.holding() as begin:
            if begins:
                begin()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
            said.append("whole")

    block(begins=True, signals=0)
    assert said == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        block(begins=True, signals=1)
    assert said == ["whole"] * 2
    for cut in ({"begins": False, "signals": 1}, {"begins": True, "signals": 2}):
        with pytest.raises(KeyboardInterrupt):
            block(**cut)
    assert said == ["whole"] * 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
