"""Open the storage of a study: SQLite, PostgreSQL or a journal file. Nothing is written before it was looked at."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from lesionsam.errors import UserError
from lesionsam.tracking.store import table_names

DEFAULT_DATABASE = Path("sweeps/sweeps.db")
JOURNAL_SUFFIXES = (".log", ".journal", ".jsonl")
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # after the last heartbeat, before a trial counts as lost
PATIENCE_SECONDS = 600.0  # how long a locked database or a restarting server is waited for
RETRY_SECONDS = 0.5
BUSY_SECONDS = 5.0  # SQLite's own waiting for a lock, during which Ctrl-C has no effect
CONNECT_SECONDS = 10  # of PostgreSQL
NUM_CONNECTS = 5  # attempts, where other processes create the tables at the same moment
MAX_LOCK_SECONDS = 120  # after which PostgreSQL takes the study's lock from a machine that does not answer
FAULTS = (SQLAlchemyError, StorageInternalError)

Result = TypeVar("Result")


class LockLost(Exception):
    """PostgreSQL took the study's lock back, or was restarted, before the block ended: others may have been in it."""


class Database(RDBStorage):
    """Optuna's database storage, with calls that are repeated while the database is locked or its server restarts.

    Attributes:
        patience: seconds for which a call is repeated. last_fault: `time.monotonic()` of the last fault.
    """

    patience = 0.0
    last_fault = -math.inf

    def wait_out(self, call: Callable[[], Result]) -> Result:
        """Return the result of a call, repeated until the database answers or the patience is used up."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return call()
            except FAULTS as error:
                now = time.monotonic()
                if not is_passing(error) or now > deadline:
                    raise
                if now - self.last_fault > GRACE_SECONDS:
                    print(f"storage: {root_cause(error)}; waiting up to {self.patience / 60:.0f} min", flush=True)
                self.last_fault = now
            time.sleep(RETRY_SECONDS)

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat if the database answers; the next one follows soon."""
        with contextlib.suppress(*FAULTS):
            super().record_heartbeat(trial_id)


def _repeated(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: Database, *args: Any, **keywords: Any) -> Any:
        return self.wait_out(lambda: method(self, *args, **keywords))

    return call


# The public calls, and those that Optuna's cache in front of a database makes instead of them.
for _name in (
    *BaseStorage.__abstractmethods__,
    "_create_new_trial",
    "_set_trial_param",
    "_get_trials",
    "_get_best_trial_id",
    "_get_stale_trial_ids",
):
    setattr(Database, _name, _repeated(_name))


def is_passing(error: BaseException) -> bool:
    """Return whether a fault can end by itself: a lock, a lost connection, a server that starts."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return False
    if isinstance(cause.orig, sqlite3.Error):
        return "locked" in str(cause.orig)
    return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)


def root_cause(error: BaseException) -> str:
    """Return the first line of the database's own message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def storage_url(text: str) -> str:
    """Return the database URL or journal path that `--storage` means.

    Raises:
        UserError: neither of them.
    """
    if not text:
        return f"sqlite:///{DEFAULT_DATABASE}"
    if "://" in text or Path(text).suffix in JOURNAL_SUFFIXES:
        return text
    raise UserError(
        f"--storage: expected a database URL (sqlite:///FILE, postgresql://USER@HOST/NAME) or a journal "
        f"file that ends in {', '.join(JOURNAL_SUFFIXES)}, got {text}"
    )


def printable_url(url: str) -> str:
    """Return a storage without its password."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url else url


@contextlib.contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Turn faults of the database into one line.

    Raises:
        UserError: locked, unreachable, not a database.
    """
    try:
        yield
    except FAULTS as error:
        words = root_cause(error)
        if "locked" in words:
            hint = "another program holds it: end that, or choose another --storage"
        else:
            hint = "check that it is there and takes connections, or choose another --storage; nothing in it is lost"
        raise UserError(f"storage {printable_url(url)}: {words}; {hint}") from error


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence Optuna's notes that heartbeat and journal are experimental and that `ask` does not beat by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        yield


@contextlib.contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    """Open a storage as `open_storage` does, and close its connections when the block ends."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def open_storage(url: str) -> BaseStorage:
    """Connect to a storage, and create file and tables where they are missing. Later calls wait for a database.

    Raises:
        UserError: the file or database belongs to another program. Of SQLAlchemy: see `clear_errors`.
    """
    if "://" not in url:
        return _open_journal(Path(url))
    parsed, arguments = _parse(url)
    with without_warnings():
        for attempts_left in reversed(range(NUM_CONNECTS)):
            try:
                _refuse_foreign_tables(url, parsed, arguments)
                storage = Database(
                    parsed.render_as_string(hide_password=False),
                    engine_kwargs=dict(arguments),
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
                storage.patience = PATIENCE_SECONDS
                return storage
            except (ProgrammingError, IntegrityError, OperationalError) as error:
                # Another process created the tables at the same moment; SQLite calls that an operational error.
                if not attempts_left or (isinstance(error, OperationalError) and "already exists" not in str(error)):
                    raise
                time.sleep(0.2)
            except (ImportError, RuntimeError) as error:  # no driver; tables of another Optuna
                raise UserError(f"storage {printable_url(url)}: {error}") from error
    raise AssertionError("the last attempt returns or raises")


def _parse(url: str) -> tuple[URL, dict[str, Any]]:
    """Return the parsed URL and the arguments for its engine."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UserError(f"--storage: expected a database URL, got {url.split('@')[-1]}") from None
    backend, database = parsed.get_backend_name(), parsed.database or ""
    if backend == "postgresql":
        limit = {"connect_args": {"connect_timeout": CONNECT_SECONDS}} if "psycopg" in parsed.get_driver_name() else {}
        return parsed, {"pool_pre_ping": True, **limit}
    if backend != "sqlite" or not database or database.startswith((":", "file:")):
        raise UserError(
            "--storage: expected sqlite:///FILE, postgresql://USER@HOST/NAME or a journal file, got "
            f"{printable_url(url)}"
        )
    Path(database).resolve().parent.mkdir(parents=True, exist_ok=True)
    return parsed, {"connect_args": {"timeout": BUSY_SECONDS}}


def _refuse_foreign_tables(url: str, parsed: URL, arguments: dict[str, Any]) -> None:
    """Refuse a database with MLflow's tables: both programs keep their version in a table `alembic_version`."""
    tables = table_names(parsed, **arguments)
    if {"experiments", "runs"} <= tables or ("alembic_version" in tables and "studies" not in tables):
        raise UserError(
            f"--storage {printable_url(url)}: expected a database of the sweep's own, got one with the tables of "
            "MLflow or another program; name another database"
        )


def _open_journal(path: Path) -> JournalStorage:
    """Open a journal file, and remove a last line that a killed process left unfinished: no reader gets past it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    if path.exists():
        _refuse_other_file(path)
        lock.acquire()
        try:
            with path.open("r+b") as file:
                content = file.read()
                if content and not content.endswith(b"\n"):
                    file.truncate(content.rfind(b"\n") + 1)
        finally:
            lock.release()
    try:
        with without_warnings():
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--storage {path}: the journal is damaged ({error}); name another file") from error


def _refuse_other_file(path: Path) -> None:
    """Refuse a file that does not begin like an Optuna journal."""
    if not path.is_file():
        raise UserError(f"--storage {path}: expected a file, got a folder or device; name another file")
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        entry = json.loads(line)
        is_journal = isinstance(entry, dict) and {"op_code", "worker_id"} <= entry.keys()
    except ValueError:
        is_journal = not line or (line.startswith(b'{"op_code":') and not line.endswith(b"\n"))
    if not is_journal:
        raise UserError(
            f"--storage {path}: expected an Optuna journal or a new file, got another file; it stays as it is, name "
            "another one"
        )


@contextlib.contextmanager
def study_lock(storage: BaseStorage, url: str, study: str) -> Iterator[None]:
    """Hold the lock of a study while the block runs, against every other worker on any machine.

    It is a file beside an SQLite database or journal, and an advisory lock in PostgreSQL.

    Raises:
        LockLost: after the block.
    """
    if not isinstance(storage, Database) or storage.engine.dialect.name == "sqlite":
        path = make_url(url).database if isinstance(storage, Database) else url
        with FileLock(f"{path}.sweep.lock"):
            yield
        return
    key = int.from_bytes(hashlib.sha256(f"lesionsam sweep {study}".encode()).digest()[:8], "big", signed=True)
    while (connection := storage.wait_out(lambda: _try_lock(storage, key))) is None:
        time.sleep(RETRY_SECONDS)
    with connection:
        yield
        try:
            connection.commit()
        except FAULTS as error:
            raise LockLost from error


def _try_lock(storage: Database, key: int) -> Connection | None:
    """Return a connection whose transaction holds the advisory lock, or None while another one does."""
    connection = storage.engine.connect()
    try:
        connection.execute(text(f"set local idle_in_transaction_session_timeout = '{MAX_LOCK_SECONDS}s'"))
        if connection.scalar(text("select pg_try_advisory_xact_lock(:key)"), {"key": key}):
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None
