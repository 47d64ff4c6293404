"""A PostgreSQL server of a test's own: Debian's binaries on a temporary folder, a unix socket and a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=8MB", "max_connections=20")


def why_not() -> str:
    """Why there can be no server here; empty where there can."""
    if not BINARIES and shutil.which("initdb") is None:
        return "needs PostgreSQL's server: apt-get install --no-install-recommends postgresql"
    if os.geteuid() == 0 and _user() is None:
        return "needs a user that is not root, whom PostgreSQL refuses"
    return ""


def _user() -> str | None:
    """Whom root starts the server as; None where this user can."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None) if os.geteuid() == 0 else None


@contextmanager
def postgres() -> Iterator[str]:
    """URL of an empty database `sweep`; the server ends with the block."""
    binaries = BINARIES[-1] if BINARIES else Path(shutil.which("initdb") or "").parent
    user, folder = _user(), Path(tempfile.mkdtemp(prefix="postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        subprocess.run([str(binaries / program), *arguments], cwd=folder, user=user, check=True, capture_output=True)

    options = " ".join([f"-p {port}", "-h 127.0.0.1", f"-k {folder}", *(f"-c {setting}" for setting in FAST)])
    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "-U", "lesionsam", "-A", "trust", "-N", "--no-locale", "-E", "UTF8")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "lesionsam", "sweep")
            yield f"postgresql://lesionsam@127.0.0.1:{port}/sweep"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
