"""A PostgreSQL server of a test's own: Debian's binaries on a temporary folder, a unix socket and a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=8MB", "max_connections=20")


def why_not() -> str:
    """Return why there can be no server here; empty where there can."""
    if not BINARIES and shutil.which("initdb") is None:
        return "needs PostgreSQL's server: apt-get install --no-install-recommends postgresql"
    if os.geteuid() == 0 and _user() is None:
        return "needs a user that is not root, whom PostgreSQL refuses"
    return ""


def _user() -> str | None:
    """Return whom root starts the server as; None where this user can."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None) if os.geteuid() == 0 else None


@dataclass
class PostgresServer:
    """A running server."""

    folder: Path
    port: int

    def call(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        binaries = BINARIES[-1] if BINARIES else Path(shutil.which("initdb") or "").parent
        command = [str(binaries / program), *arguments]
        subprocess.run(command, cwd=self.folder, user=_user(), check=True, capture_output=True)

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} " + " ".join(f"-c {setting}" for setting in FAST)
        self.call("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def stop(self) -> None:
        """Stop the server, whoever is connected."""
        self.call("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")

    def restart(self, seconds: float) -> None:
        """Stop the server, and start it again after so many seconds."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def create(self, name: str) -> str:
        """Create an empty database, and return its URL."""
        self.call("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "lesionsam", name)
        return f"postgresql://lesionsam@127.0.0.1:{self.port}/{name}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run an empty server for the block."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if (user := _user()) is not None:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = PostgresServer(folder, port)
    try:
        server.call("initdb", "-D", "data", "-U", "lesionsam", "-A", "trust", "-N", "--no-locale", "-E", "UTF8")
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres() -> Iterator[str]:
    """Run a server for the block, and yield the URL of its empty database."""
    with postgres_server() as server:
        yield server.create("sweep")
