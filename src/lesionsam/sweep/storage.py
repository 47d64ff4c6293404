"""Where a study lives (SQLite, PostgreSQL, a journal file), and its repair after a kill.

A trial that is RUNNING names its owner: host, process and the process's start. One whose owner is gone on this machine
is failed and queued again at once; those of other machines show by their heartbeat (databases only).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from lesionsam.errors import UserError
from lesionsam.utils.processes import is_alive, start_time

DEFAULT = Path("sweeps/sweeps.db")
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
OWNERLESS_SECONDS = 60  # a trial without an owner for so long lost it between two calls
MAX_RETRIES = 3
HOST = socket.gethostname()
NUM_CONNECTS = 5  # attempts, where others make the tables at the same moment
LOCK_SECONDS = 60  # patience with an SQLite file that somebody else holds
JOURNALS = (".log", ".journal", ".jsonl")
DRIVERS = ("psycopg2", "psycopg", "pg8000")
FAULTS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


def storage_url(text: str) -> str:
    """What --storage means: a database URL, or the absolute path of a journal file."""
    if not text:
        return f"sqlite:///{DEFAULT}"
    if "://" in text:
        return text
    if Path(text).suffix in JOURNALS:
        return text
    raise UserError(
        f"--storage: expected a database URL (sqlite:///FILE, postgresql://USER@HOST/NAME) or a journal "
        f"file that ends in {', '.join(JOURNALS)}, got {text}"
    )


def shown_url(url: str) -> str:
    """A storage as it may be printed: without its password."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url else url


@contextlib.contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Faults of the database as one line.

    Raises:
        UserError: locked, unreachable, not a database, or no driver for it.
    """
    try:
        yield
    except FAULTS as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        cause = getattr(cause, "orig", None) or cause
        words = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        if "locked" in words:
            hint = "another program holds it: end that, or choose another --storage"
        else:
            hint = "check that it is there and takes connections, or choose another --storage; nothing in it is lost"
        raise UserError(f"storage {shown_url(url)}: {words}; {hint}") from error


def fault_behind(error: BaseException) -> BaseException | None:
    """The fault of the database in whose handling an error arose, None where there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, FAULTS):
        found = found.__context__
    return found


def open_storage(url: str) -> BaseStorage:
    """Connect, making file and tables where they are missing; see `clear_errors`."""
    if "://" not in url:
        return _open_journal(Path(url))
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UserError(f"--storage: expected a database URL, got {url.split('@')[-1]}") from None
    arguments: dict[str, Any] = {}
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).resolve().parent.mkdir(parents=True, exist_ok=True)
        arguments = {"connect_args": {"timeout": LOCK_SECONDS}}
    elif parsed.drivername == "postgresql":
        parsed = parsed.set(drivername=f"postgresql+{_postgresql_driver()}")
        arguments = {"pool_pre_ping": True}
    connect = partial(
        Database,
        parsed.render_as_string(hide_password=False),
        engine_kwargs=arguments,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=retry,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for left in reversed(range(NUM_CONNECTS)):
            try:
                return connect()
            except (ProgrammingError, IntegrityError, OperationalError) as error:
                # Another process made the tables at the same moment; SQLite calls that an operational error.
                if not left or (isinstance(error, OperationalError) and "already exists" not in str(error)):
                    raise
                time.sleep(0.2)
            except (ImportError, RuntimeError) as error:  # no driver; tables of another Optuna
                raise UserError(f"storage {shown_url(url)}: {error}") from error
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    """`open_storage`, with its connections closed when the block ends."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


class Database(RDBStorage):
    """Optuna's, for trials that may be suspended: a machine that slept has late heartbeats and live processes."""

    def record_heartbeat(self, trial_id: int) -> None:
        """One beat may fail: there is another soon, and where the database is gone the trial itself will say so."""
        with contextlib.suppress(*FAULTS):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Without those whose owner, a process of this machine, lives."""
        return [k for k in super()._get_stale_trial_ids(study_id) if not self._lives(k)]

    def _lives(self, trial_id: int) -> bool:
        held = self.get_trial(trial_id).user_attrs.get("owner")
        return held is not None and held["host"] == HOST and not is_gone(held)


def _postgresql_driver() -> str:
    from importlib.util import find_spec

    found = [name for name in DRIVERS if find_spec(name)]
    if not found:
        raise UserError(
            "storage: expected a driver for PostgreSQL (one of " + ", ".join(DRIVERS) + "), found none; install psycopg"
        )
    return found[0]


def _open_journal(path: Path) -> JournalStorage:
    """A journal file; a line that a kill tore off its end is cut away, as no reader would get past it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    if path.exists():
        lock.acquire()
        try:
            with path.open("r+b") as file:
                content = file.read()
                if content and not content.endswith(b"\n"):
                    file.truncate(content.rfind(b"\n") + 1)
        finally:
            lock.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


# ---- owners and retries ------------------------------------------------------------------------------------------


def owner() -> dict[str, Any]:
    """This process, as a trial's owner."""
    return {"host": HOST, "pid": os.getpid(), "started": start_time(os.getpid())}


def lost_its_owner(trial: FrozenTrial, seen: dict[int, float]) -> bool:
    """Whether the process of a running trial ended on this machine.

    Args:
        seen: number of a trial without an owner -> when this process first saw it so (other machines' clocks differ).
    """
    held = trial.user_attrs.get("owner")
    if held is None:
        return time.monotonic() - seen.setdefault(trial.number, time.monotonic()) > OWNERLESS_SECONDS
    return is_gone(held)


def is_gone(held: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine that ended; those of other machines cannot be told."""
    return held["host"] == HOST and not is_alive(held["pid"], held["started"])


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again that lost its process, with its values and what it reported, a few times at most."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES, inherit_intermediate_values=True)(study, trial)


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again that somebody interrupted, as often as that happens."""
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )


def repair(study: optuna.Study, seen: dict[int, float]) -> int:
    """Fail and queue again what lost its process; returns how many. Call it with the sweep's lock held.

    Args:
        seen: see `lost_its_owner`; the same one in every call of a process.
    """
    found = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not lost_its_owner(trial, seen):
            continue
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # another machine was faster
            study.tell(trial.number, state=TrialState.FAIL)
            retry(study, trial)
            found += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    return found


class Lock:
    """A lock file between the processes of one machine; the system frees it however a process ends.

    notice: printed where a `with` has to wait for it.
    """

    def __init__(self, path: Path, notice: str = "") -> None:
        self.path = path
        self.notice = notice
        self._file: IO[str] | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take it; without `wait` say whether that went."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Let go; nothing where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Lock:
        if not self.acquire(wait=False):
            if self.notice:
                print(self.notice, flush=True)
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def wait_for(test: Callable[[], bool], seconds: float) -> bool:
    """Whether a test comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
