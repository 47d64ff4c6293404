"""Storages of a sweep: what is refused before it is written to, faults that pass, lost trials, and the study's lock."""

from __future__ import annotations

import multiprocessing
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from helpers.postgres_server import PostgresServer, postgres_server, why_not
from lesionsam.errors import UserError
from lesionsam.sweep import storage as sweep_storage
from lesionsam.sweep import study as sweep_study
from lesionsam.sweep.storage import (
    Database,
    LockLost,
    clear_errors,
    open_storage,
    opened,
    printable_url,
    storage_url,
    study_lock,
    without_warnings,
)
from lesionsam.sweep.study import Owner, recover_lost_trials, state_name
from lesionsam.tracking.tracker import Tracker

needs_postgres = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def ask(study: optuna.Study) -> optuna.Trial:
    with without_warnings():
        return study.ask()


# ---- refused before anything is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.log", b"first line of my notes\nlast line, no newline"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epoch": 2}'),
        ("half.log", b'{"op_code"'),
        ("list.jsonl", b"[1, 2]\n"),
        ("binary.journal", bytes(range(256)) * 20),
    ],
)
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected an Optuna journal or a new file, got another file") as caught:
        open_storage(str(path))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == [name]
    (tmp_path / "folder.log").mkdir()
    with pytest.raises(UserError, match="expected a file, got a folder"):
        open_storage(str(tmp_path / "folder.log"))


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    optuna.create_study(study_name="one", storage=open_storage(str(path)))
    path.write_bytes(path.read_bytes() + b"no JSON\n" + path.read_bytes())
    with pytest.raises(UserError, match="the journal is damaged"):
        open_storage(str(path))


def test_a_torn_journal_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    study = optuna.create_study(study_name="one", storage=open_storage(str(path)))
    study.add_trial(optuna.trial.create_trial(value=1.0))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    study = optuna.load_study(study_name="one", storage=open_storage(str(path)))
    study.add_trial(optuna.trial.create_trial(value=2.0))
    assert [t.value for t in study.get_trials()] == [1.0, 2.0]
    assert path.read_bytes().startswith(whole)


def track(uri: str, folder: Path) -> None:
    Tracker.open(
        folder, uri=uri, experiment="e", root=folder, run_name="r", params={}, tags={}, system_metrics=False, send=False
    ).close("FINISHED")


def table_names(url: str) -> set[str]:
    engine = sqlalchemy.create_engine(url)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def test_mlflow_and_optuna_refuse_to_share_a_database(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Both keep their version in `alembic_version`, so that either ends the other."""
    if kind == "sqlite":
        mlflows, optunas = f"sqlite:///{tmp_path / 'mlflow.db'}", f"sqlite:///{tmp_path / 'optuna.db'}"
    else:
        server = request.getfixturevalue("server")
        mlflows, optunas = server.create("mlflows"), server.create("optunas")
    engine = sqlalchemy.create_engine(mlflows)
    with engine.begin() as connection:  # the tables by which MLflow's database is known
        for name in ("experiments", "runs", "alembic_version"):
            connection.execute(sqlalchemy.text(f"create table {name} (a integer)"))
    engine.dispose()
    with pytest.raises(UserError, match="expected a database of the sweep's own, got one with the tables of MLflow"):
        open_storage(mlflows)
    assert table_names(mlflows) == {"experiments", "runs", "alembic_version"}

    with opened(optunas) as storage:
        optuna.create_study(study_name="one", storage=storage)
    before = table_names(optunas)
    with pytest.raises(UserError, match=r"tracking\.uri: expected a database of MLflow's own, got one with Optuna's"):
        track(optunas, tmp_path / "run")
    assert table_names(optunas) == before
    with opened(optunas) as storage:
        assert optuna.get_all_study_names(storage) == ["one"]


def test_storages_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_storage, "BUSY_SECONDS", 0.2)
    locked = tmp_path / "locked.db"
    holder = sqlite3.connect(locked)
    holder.execute("create table a (b)")
    holder.execute("begin exclusive")
    (tmp_path / "no.db").write_text("no database, but a text that is long enough to be looked at " * 30)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    cases = [
        (f"sqlite:///{locked}", "database is locked; another program holds it"),
        (f"sqlite:///{tmp_path / 'no.db'}", "not a database"),
        (f"postgresql://me:secret@127.0.0.1:{closed}/x", "choose another --storage"),
    ]
    for url, words in cases:
        with pytest.raises(UserError) as caught, clear_errors(url):
            open_storage(url)
        assert words in str(caught.value)
        assert "secret" not in str(caught.value)
        assert str(caught.value).startswith(f"storage {printable_url(url)}: ")
    holder.close()
    with pytest.raises(UserError, match="--storage: expected a database URL"):
        storage_url("somewhere")
    for url in ("sqlite://", "sqlite:///:memory:", "mysql://me:secret@host/x"):
        with pytest.raises(UserError, match="--storage: expected sqlite:///FILE") as caught:
            open_storage(url)
        assert "secret" not in str(caught.value)


# ---- faults that pass ------------------------------------------------------------------------------------------------


def test_a_locked_database_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer than SQLite itself waits; without patience the call fails."""
    monkeypatch.setattr(sweep_storage, "BUSY_SECONDS", 0.1)
    storage = open_storage(f"sqlite:///{tmp_path / 'a.db'}")
    assert isinstance(storage, Database)
    study = optuna.create_study(storage=storage)
    holder = sqlite3.connect(tmp_path / "a.db", check_same_thread=False, isolation_level=None)
    holder.execute("begin exclusive")
    storage.patience = 0.3
    begun = time.monotonic()
    with pytest.raises(sweep_storage.FAULTS, match=r"commit|locked"):
        study.set_user_attr("a", 1)
    assert time.monotonic() - begun < 10
    storage.patience = 60.0
    timer = threading.Timer(1.5, holder.rollback)
    timer.start()
    study.set_user_attr("a", 2)
    timer.join()
    holder.close()
    assert study.user_attrs["a"] == 2
    assert capsys.readouterr().out.count("database is locked; waiting up to") == 1


@needs_postgres
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # SQLAlchemy drops broken connections
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_dropped_connections_and_a_restart_are_survived(server: PostgresServer, scheme: str) -> None:
    """The server drops idle connections; then it is away for a while, as in an update."""
    url = server.create(scheme.replace("+", "_")).replace("postgresql", scheme, 1)
    with opened(url) as storage, opened(url) as other:
        assert isinstance(other, Database)
        study = optuna.create_study(study_name="one", storage=storage)
        with other.engine.connect() as connection:
            drop = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            connection.execute(sqlalchemy.text(f"{drop} and datname = current_database()"))
        study.set_user_attr("a", 1)
        restart = threading.Thread(target=server.restart, args=(2.0,))
        restart.start()
        for k in range(2, 12):
            study.set_user_attr("a", k)
            time.sleep(0.4)
        restart.join()
        study.set_user_attr("a", 12)
        assert optuna.load_study(study_name="one", storage=other).user_attrs["a"] == 12


# ---- lost trials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///a.db", "study.log"])
def test_a_running_trial_whose_worker_is_gone_is_queued_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage(url)
    study = optuna.create_study(storage=storage)
    mine, theirs, gone, unowned = (ask(study) for _ in range(4))
    here, ended = Owner(Path("owners")), Owner(Path("owners"))
    for trial, name in ((mine, here.name), (theirs, "elsewhere"), (gone, ended.name)):
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("owner", name)
        trial.set_user_attr("values", trial.params)
    gone.report(0.5, 1)
    ended.release()
    recover_lost_trials(study, storage, Path("owners"))
    assert [t.state.name for t in study.get_trials()] == ["RUNNING", "RUNNING", "FAIL", "FAIL", "WAITING"]
    assert unowned.number == 3, "killed before it had values: nothing to try again"
    recover_lost_trials(study, storage, Path("owners"))
    assert len(study.get_trials()) == 5, "queued once"
    again = ask(study)
    assert again.number == 4
    assert again.suggest_float("x", 0, 1) == gone.params["x"]
    assert study.get_trials()[4].intermediate_values == {1: 0.5}
    here.release()


def test_a_kill_between_failing_and_queueing_loses_no_trial(tmp_path: Path) -> None:
    """Above all not trial 0, whose values nobody draws again."""
    storage = open_storage(f"sqlite:///{tmp_path / 'a.db'}")
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 0.5}, user_attrs={"start": {"x": 0.5}})
    study.tell(ask(study), state=TrialState.FAIL)  # all that the killed process did
    recover_lost_trials(study, storage, tmp_path)
    again = ask(study)
    assert again.user_attrs["start"] == {"x": 0.5}
    assert again.suggest_float("x", 0, 1) == 0.5


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_trial_that_kills_its_process_every_time_is_given_up(tmp_path: Path, interrupted: bool) -> None:
    """An interrupted one is queued again as often as that happens."""
    storage = open_storage(str(tmp_path / "study.log"))
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 0.5}, user_attrs={"start": {"x": 0.5}})
    for _ in range(10):
        if not study.get_trials(states=(TrialState.WAITING,)):
            break
        trial = ask(study)
        if interrupted:
            trial.set_user_attr("interrupted", True)
        study.tell(trial, state=TrialState.FAIL)
        recover_lost_trials(study, storage, tmp_path)
    assert len(study.get_trials()) == (11 if interrupted else 1 + sweep_study.MAX_RETRIES)
    assert {state_name(t) for t in study.get_trials()} <= {"lost", "waiting"}


def test_a_live_worker_keeps_its_trials_however_late_its_heart_beats(tmp_path: Path) -> None:
    """After a suspension, or after the database was away, heartbeats are stale and workers live."""
    storage = open_storage(f"sqlite:///{tmp_path / 'a.db'}")
    assert isinstance(storage, Database)
    study = optuna.create_study(storage=storage)
    mine, theirs = ask(study), ask(study)
    here = Owner(tmp_path)

    def make_stale() -> None:
        with sqlite3.connect(tmp_path / "a.db") as database:
            database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")
        database.close()

    for trial, name in ((mine, here.name), (theirs, "elsewhere")):
        trial.set_user_attr("owner", name)
        trial.set_user_attr("values", {"x": trial.number})
        storage.record_heartbeat(trial._trial_id)
    make_stale()
    storage.last_fault = time.monotonic()
    recover_lost_trials(study, storage, tmp_path)
    assert [t.state.name for t in study.get_trials()] == ["RUNNING", "RUNNING"], "the database has just been away"
    make_stale()
    storage.last_fault = -1e9
    recover_lost_trials(study, storage, tmp_path)
    assert [t.state.name for t in study.get_trials()] == ["RUNNING", "FAIL", "WAITING"]
    here.release()


# ---- the study's lock ----------------------------------------------------------------------------------------------


def add_one(url: str, path: Path) -> None:
    """Read, wait and write a number: without a lock, additions get lost."""
    with opened(url) as storage, study_lock(storage, url, "one"):
        count = int(path.read_text())
        time.sleep(0.2)
        path.write_text(str(count + 1))


@pytest.mark.parametrize("kind", ["sqlite", "journal", pytest.param("postgresql", marks=needs_postgres)])
def test_one_process_at_a_time_holds_the_lock(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    urls = {"sqlite": f"sqlite:///{tmp_path / 'a.db'}", "journal": str(tmp_path / "a.log")}
    url = urls[kind] if kind in urls else request.getfixturevalue("server").create("locks")
    path = tmp_path / "count"
    path.write_text("0")
    with opened(url):
        pass
    spawn: Any = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=add_one, args=(url, path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    assert path.read_text() == "3"


@needs_postgres
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # SQLAlchemy drops broken connections
def test_a_lock_that_a_restart_took_is_noticed(server: PostgresServer) -> None:
    url = server.create("restarted")
    with opened(url) as storage, pytest.raises(LockLost), study_lock(storage, url, "one"):
        server.restart(0.5)
    with opened(url) as storage, study_lock(storage, url, "one"):
        assert "alembic_version" in table_names(url)
