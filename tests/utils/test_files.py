"""Atomic writing, hashing and copying: what a crash, a full disk or an exception may leave behind."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lesionsam.utils.files import (
    atomic_write,
    copy_atomic,
    free_disk_bytes,
    remove_leftovers,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)


def test_written_file_is_complete_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    with path.open("rb") as reader:
        write_text_atomic(path, "ä\r\nb")
        assert reader.read() == b"abc"  # replaced, not written over: who reads meanwhile sees one whole version
    assert path.read_bytes() == "ä\r\nb".encode()
    write_bytes_atomic(path, b"")
    assert path.read_bytes() == b""
    write_json_atomic(path, {"b": [1, 2.5], "a": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5], "a": "é"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def fail() -> None:
        with atomic_write(path, "w") as file:
            file.write("new")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "a.txt", "w") as file, open("/dev/full", "w") as full:
            full.write("x" * 100_000)
            file.write("never")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_wrong_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'w' or 'wb'"), atomic_write(tmp_path / "a", "a"):
        pass


def test_kill_in_the_middle_never_leaves_a_half_file(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom lesionsam.utils.files import atomic_write\n"
        "n = 0\nwhile True:\n"
        "    with atomic_write(Path(sys.argv[1])) as file:\n"
        "        for _ in range(64):\n            file.write(bytes([n % 256]) * 4096)\n    n += 1\n"
    )
    path = tmp_path / "target.bin"
    source = str(Path(__file__).parent.parent.parent / "src")
    for attempt in range(4):
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": source})
        deadline = time.monotonic() + 20
        before = path.stat().st_mtime_ns if path.exists() else 0
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        content = path.read_bytes()
        assert len(content) == 64 * 4096
        assert len(set(content)) == 1


def test_leftovers_are_removed_where_they_may_be_and_not_while_they_are_written(tmp_path: Path) -> None:
    for folder in ("", "masks/a", "a neighbour's"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".a.png.0123456789abcdef.tmp").touch()
    (tmp_path / ".a.png.1.tmp").touch()
    with atomic_write(tmp_path / "b") as file:
        file.write(b"whole")
        remove_leftovers(tmp_path, "masks")
    assert (tmp_path / "b").read_bytes() == b"whole"
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*.tmp"))
    assert left == [".a.png.1.tmp", "a neighbour's/.a.png.0123456789abcdef.tmp"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_another_process_s_file_is_a_leftover_once_that_process_is_gone(tmp_path: Path, is_killed: bool) -> None:
    """Whatever its number: in another container the same one may be ours."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lesionsam.utils.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    print('writing', flush=True)\n    time.sleep(300)\n"
    )
    source = str(Path(__file__).parent.parent.parent / "src")
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    if is_killed:
        child.kill()
        child.wait()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == (0 if is_killed else 1)
    child.kill()
    child.wait()
    child.stdout.close()


def test_copy_and_link(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    copy_atomic(source, tmp_path / "out" / "copy")
    copy_atomic(source, tmp_path / "out" / "link", link=True)
    copy_atomic(source, tmp_path / "out" / "link", link=True)  # again: the target is already the same file
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["copy", "link"]
    assert (tmp_path / "out" / "link").stat().st_ino == source.stat().st_ino
    assert (tmp_path / "out" / "copy").stat().st_ino != source.stat().st_ino
    assert (tmp_path / "out" / "copy").read_bytes() == b"weights"


def test_sha256_and_its_progress(tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    (tmp_path / "a").write_bytes(data)
    told: list[int] = []
    assert sha256_file(tmp_path / "a", told.append) == hashlib.sha256(data).hexdigest()
    assert told == [1 << 20, 2 << 20, 2_500_000]


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = free_disk_bytes(tmp_path / "a" / "b")
    assert 0 < free <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
