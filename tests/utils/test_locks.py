"""Locks between processes: refusal that names the holder, release after a kill, shared and exclusive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lesionsam.errors import UserError
from lesionsam.utils import locks

SOURCE = str(Path(locks.__file__).parents[2])
HOLD = """
import os, sys, time
from pathlib import Path
from lesionsam.utils import locks
kind, path = sys.argv[1], Path(sys.argv[2])
if kind == "shared":
    file = path.open("ab")
    locks.lock_shared(file.fileno())
    print("held", flush=True)
    time.sleep(300)
with locks.folder_lock(path, "") if kind == "folder" else locks.file_lock(path, "training"):
    print("held", flush=True)
    time.sleep(300)
"""


def hold(kind: str, path: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock, and return when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_second_writer_is_refused_with_the_first_ones_pid_and_starts_after_its_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HANDOVER_SECONDS", 0.2)
    path = tmp_path / "scratch" / "lock"
    holder = hold("file", path)
    try:
        for _ in range(2):  # a refused one leaves the holder's note as it was
            with (
                pytest.raises(UserError, match=rf"training is already running as pid {holder.pid} since \d{{4}}-"),
                locks.file_lock(path, "training"),
            ):
                pytest.fail("two at once")
    finally:
        kill(holder)
    with locks.file_lock(path, "training"):
        assert path.read_text().startswith(f"pid {os.getpid()} since ")


def test_a_waiting_writer_says_who_holds_the_lock_and_gets_it_after_the_kill(tmp_path: Path) -> None:
    holder, said = hold("file", tmp_path / "lock"), []
    timer = threading.Timer(0.3, kill, [holder])
    timer.start()
    with locks.file_lock(tmp_path / "lock", "decoding", waiting=said.append):
        pass
    timer.join()
    assert said == [line for line in said if f"decoding: pid {holder.pid} since" in line]
    assert len(said) == 1


def test_a_file_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.file_lock(tmp_path / "lock", "training"):
        raise ZeroDivisionError
    with locks.file_lock(tmp_path / "lock", "training"), locks.file_lock(tmp_path / "another", "evaluation"):
        pass


def test_a_folder_lock_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    holder = hold("folder", tmp_path)
    try:
        with (
            pytest.raises(UserError, match="another process writes there; choose another"),
            locks.folder_lock(tmp_path, "choose another"),
        ):
            pytest.fail("two at once")
    finally:
        kill(holder)
    with locks.folder_lock(tmp_path, ""):
        assert list(tmp_path.iterdir()) == []


def test_shared_locks_stand_beside_each_other_and_against_exclusive_ones(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = hold("shared", path)
    with path.open("ab") as file, path.open("ab") as other:
        try:
            assert locks.lock_shared(file.fileno(), wait=False)
            assert not locks.lock_exclusive(other.fileno(), wait=False)
            file.close()
            assert not locks.lock_exclusive(other.fileno(), wait=False), "the other process holds it still"
        finally:
            kill(holder)
        assert locks.lock_exclusive(other.fileno())
        with path.open("ab") as third:
            assert not locks.lock_shared(third.fileno(), wait=False)
