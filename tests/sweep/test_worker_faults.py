"""What a sweep survives: killed workers, Ctrl-C, a killed parent, a locked database, no MLflow; and PostgreSQL."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from helpers.postgres_server import postgres, postgres_server, why_not
from helpers.processes import is_running
from helpers.sweep_project import ROOT, only_study, prepare, set_params, tried
from lesionsam.errors import UserError
from lesionsam.sweep import closing as sweep_closing
from lesionsam.sweep import storage as sweep_storage
from lesionsam.sweep import trial as sweep_trial
from lesionsam.sweep import worker as sweep_worker
from lesionsam.sweep.search import Request, sweep
from lesionsam.sweep.study import is_finished, owner_path, state_name
from lesionsam.sweep.trial import StudyFolder
from lesionsam.tracking.spool import Spool, read_lines
from lesionsam.tracking.tracker import NullTracker, sync

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: nothing to track with")
WAIT_S = 240
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests copy it."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to sweep in, as the current folder."""
    folder = Path(shutil.copytree(prepared, tmp_path / "project"))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def wait_for(test: Callable[[], Any]) -> Any:
    """What a test says once it says something."""
    deadline = time.monotonic() + WAIT_S
    while not (found := test()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def study_when_there() -> optuna.Study:
    """The study that a sweep beside this thread is about to make."""
    wait_for(Path("sweeps/sweeps.db").exists)
    storage = wait_for(lambda: quiet(lambda: sweep_storage.open_storage("sqlite:///sweeps/sweeps.db")))
    return wait_for(lambda: quiet(lambda: optuna.load_study(study_name=None, storage=storage)))


def quiet(function: Callable[[], Any]) -> Any:
    """What a function returns, None where what it looks for is only being made."""
    try:
        return function()
    except (ValueError, KeyError, *sweep_storage.FAULTS):
        return None


@pytest.fixture
def helper() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Starts a function beside the test, and shows what went wrong in it."""
    started: list[threading.Thread] = []
    failures: list[BaseException] = []

    def start(function: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)
                raise

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        started.append(thread)
        return thread

    yield start
    for thread in started:
        thread.join(WAIT_S)
    assert not failures


def owner_lock(study: optuna.Study, trial: FrozenTrial) -> Path:
    """The lock file of a trial's worker."""
    return owner_path(StudyFolder.of(study.study_name).owners, trial.user_attrs["owner"])


def holder_of(path: Path) -> int:
    """The process that holds a lock, by the kernel's list; 0 for none."""
    inode = path.stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    found = [int(fields[4]) for fields in lines if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}")]
    return found[0] if found else 0


def own_store() -> Any:
    """The project's own MLflow store; its library warns about its own use of SQLAlchemy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def mlflow_runs() -> tuple[list[Any], list[Any]]:
    """Parents and children in the project's own store, all that waits sent before."""
    assert sync(Path.cwd()) == 0
    client = own_store()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [run for run in runs if run.data.tags.get("sweep.role") == "parent"]
    return parents, [run for run in runs if run not in parents]


@pytest.mark.pipeline
def test_a_killed_worker_and_ctrl_c_lose_nothing_and_repeat_nothing(
    project: Path, helper: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    """Two workers; one gets `kill -9` in mid-trial, then Ctrl-C; the same command goes on to the exact number."""
    set_params(tracking__enabled=True, tracking__system_metrics=False, train__epochs=8)
    request = Request(trials=4, workers=2)
    killed: list[FrozenTrial] = []

    def kill_one() -> None:
        study = study_when_there()

        def under_way() -> list[FrozenTrial]:
            return [t for t in study.get_trials(states=(TrialState.RUNNING,)) if t.intermediate_values]

        killed.append(wait_for(under_way)[0])
        os.kill(holder_of(owner_lock(study, killed[0])), signal.SIGKILL)
        values = killed[0].user_attrs["values"]
        wait_for(lambda: [t for t in under_way() if t.number > killed[0].number and t.user_attrs["values"] == values])
        os.kill(os.getpid(), signal.SIGINT)  # what a terminal does: the workers are in sessions of their own

    helper(kill_one)
    with pytest.raises(UserError, match=r"interrupted with \d of 4 trials finished; the same command") as caught:
        sweep(request)
    assert caught.value.exit_code == 130
    trials = only_study().get_trials()
    assert not [t for t in trials if t.state == TrialState.RUNNING]
    locks = [owner_lock(only_study(), t) for t in trials if "owner" in t.user_attrs]
    assert not [lock for lock in locks if holder_of(lock)], "orphans"
    (parent,), children = mlflow_runs()
    assert parent.info.status == "KILLED"
    assert "RUNNING" not in {run.info.status for run in children}

    sweep(Request(trials=4, workers=1))
    study = only_study()
    finished = [t for t in study.get_trials() if is_finished(t)]
    assert [state_name(t) for t in finished] == ["complete"] * 4
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    assert len({str(values) for values in tried(study)}) == 4, "no trial repeated"
    assert killed[0].user_attrs["values"] in tried(study)
    (again,), children = mlflow_runs()
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [(run.info.status, run.data.tags["sweep.state"]) for run in children] == [("FINISHED", "complete")] * 4
    numbers = sorted(int(run.data.tags["sweep.trial"]) for run in children)
    assert numbers == sorted(t.number for t in finished)
    assert sorted(int(run.info.run_name.split()[0]) for run in children) == numbers
    client = own_store()
    for run in children:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "dev/objective")]
        assert steps == sorted(set(steps))
        assert len(steps) == 8, "a resumed attempt goes on with the curve of the first"
    pictures = {Path(file.path).name.partition("+")[0] for file in client.list_artifacts(parent.info.run_id, "images")}
    assert pictures == {f"sweep_{name}" for name in ("history", "curves", "importance", "parallel")}
    assert not (StudyFolder.of(study.study_name).scratch / "trials").exists()


def test_ctrl_c_after_a_training_costs_no_second_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training is over, its run is just being closed: the same command takes the trial up at its last epoch."""
    tags, logged = NullTracker.set_tags, []

    def interrupted(self: NullTracker, values: dict[str, Any]) -> None:
        tags(self, values)
        if values.get("sweep.state") == "complete":
            monkeypatch.setattr(NullTracker, "set_tags", tags)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(NullTracker, "set_tags", interrupted)
    with pytest.raises(UserError, match="interrupted with 0 of 1 trials finished"):
        sweep(Request(trials=1, workers=1))
    log = NullTracker.log
    monkeypatch.setattr(NullTracker, "log", lambda self, values, step: (logged.append(values), log(self, values, step)))
    sweep(Request(trials=1, workers=1))
    assert logged, "the run was taken up"
    assert not [values for values in logged if "loss" in values], "nothing was trained again"
    first, again = only_study().get_trials()
    assert (state_name(first), state_name(again)) == ("lost", "complete")
    assert again.user_attrs["values"] == first.user_attrs["values"] == first.user_attrs["start"]
    assert again.value == again.intermediate_values[again.user_attrs["epoch"]]
    assert not any((StudyFolder.of(only_study().study_name).scratch / "trials").glob("*"))


def test_processes_that_make_a_database_at_once_all_get_it(tmp_path: Path) -> None:
    """None sees the tables that another is making as a fault."""
    url, found = f"sqlite:///{tmp_path / 'one.db'}", []
    begin = threading.Barrier(6)

    def connect() -> None:
        begin.wait()
        with sweep_storage.opened(url) as storage:
            found.append(optuna.get_all_study_names(storage))

    threads = [threading.Thread(target=connect) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [[]] * 6


def test_a_worker_whose_parent_is_killed_while_it_starts_ends(project: Path) -> None:
    """The parent dies long before the worker has loaded its libraries."""
    launcher = (
        "import os, signal, subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-m', 'lesionsam.sweep.worker', str(os.getpid())],\n"
        "                          stdin=sys.stdin, start_new_session=True)\n"
        "print(worker.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    reader, writer = os.pipe()  # kept open: the worker must not end for want of its plan
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", launcher], stdin=reader, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not is_running(int(done.stdout)))
    os.close(reader)
    os.close(writer)


def lock_in_trial(
    monkeypatch: pytest.MonkeyPatch, number: int, release_after: float | None
) -> Callable[[], sqlite3.Connection]:
    """Lock sweeps.db before the second epoch of a trial is reported, and release it after so many seconds, if any."""
    holder = sqlite3.connect("sweeps.db", check_same_thread=False, isolation_level=None)
    real, locked = sweep_worker.run_trial, []

    def locking(*args: Any, report: Callable[[float, int], None], **keywords: Any) -> Any:
        def lock_first(score: float, epoch: int) -> None:
            if keywords["number"] == number and epoch == 2 and not locked:
                locked.append(True)
                holder.execute("begin exclusive")
                if release_after is not None:
                    threading.Timer(release_after, holder.rollback).start()
            report(score, epoch)

        return real(*args, report=lock_first, **keywords)

    monkeypatch.setattr(sweep_worker, "run_trial", locking)
    return lambda: holder


@pytest.mark.parametrize("number", [0, 1])
def test_a_trial_goes_on_after_a_database_was_locked(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Locked for longer than SQLite waits: no trial is lost, above all not trial 0."""
    monkeypatch.setattr(sweep_storage, "BUSY_SECONDS", 0.2)
    lock_in_trial(monkeypatch, number, 2.0)
    sweep(Request(trials=2, storage="sqlite:///sweeps.db"))
    assert [state_name(t) for t in only_study("sqlite:///sweeps.db").get_trials()] == ["complete"] * 2


def test_a_database_that_stays_locked_in_mid_trial(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; nothing of what was done is lost; the same command goes on once the lock is gone."""
    monkeypatch.setattr(sweep_storage, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(sweep_storage, "PATIENCE_SECONDS", 0.5)
    holder = lock_in_trial(monkeypatch, 0, None)()
    request = Request(trials=2, storage="sqlite:///sweeps.db")
    with pytest.raises(UserError, match=r"database is locked; another program holds it: end that, or choose another"):
        sweep(request)
    holder.rollback()
    holder.close()
    sweep(request)
    trials = only_study("sqlite:///sweeps.db").get_trials()
    assert [state_name(t) for t in trials] == ["lost", "complete", "complete"]
    assert trials[1].user_attrs["values"] == trials[0].user_attrs["start"], "params.yaml as it stands is tried again"
    assert sorted(trials[1].intermediate_values) == [1, 2]


def test_a_disk_that_is_full_in_a_trial_loses_no_trial(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all not the first one, params.yaml as it stands."""
    real, full = sweep_worker.run_trial, [True]

    def run_trial(*args: Any, **keywords: Any) -> Any:
        if full:
            raise OSError(full.pop() and errno.ENOSPC, "No space left on device")
        return real(*args, **keywords)

    monkeypatch.setattr(sweep_worker, "run_trial", run_trial)
    with pytest.raises(OSError, match="No space left"):
        sweep(Request(trials=1))
    sweep(Request(trials=1))
    first, second = only_study().get_trials()
    assert (state_name(first), state_name(second)) == ("lost", "complete")
    assert second.user_attrs["values"] == second.user_attrs["start"] == first.user_attrs["start"]


def test_without_an_mlflow_server_no_trial_is_lost(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs wait on disk, each with its one parent (tests/tracking/test_tracker.py sends such runs)."""
    monkeypatch.setattr(sweep_closing, "SERVER_SECONDS", 0.5)
    monkeypatch.setattr("lesionsam.sweep.search.SYNC_SECONDS", 0.5)
    set_params(tracking__enabled=True, tracking__system_metrics=False, tracking__uri="http://127.0.0.1:9")
    sweep(Request(trials=2))
    assert "warning: MLflow does not answer; runs are kept on disk and sent later, under their one parent" in (
        capsys.readouterr().err
    )
    study = only_study()
    assert [state_name(t) for t in study.get_trials()] == ["complete"] * 2
    spools = {spool.local_id: spool for spool in Spool.all(Path.cwd())}
    parent = spools.pop(study.user_attrs["parent"])
    assert [spool.read_json("meta.json")["parent"] for spool in spools.values()] == [parent.local_id] * 2
    for spool in (parent, *spools.values()):
        assert spool.pending()[0] > 0
        assert [e["status"] for e, _ in read_lines(spool.path("journal")) if e and e["kind"] == "status"][-1:] == [
            "FINISHED"
        ]


def test_runs_say_why_a_trial_failed_and_what_scored_the_best(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the journals, as sent to MLflow later; the label-free score is not called `objective`, the mean IoU."""
    real = sweep_trial.train

    def failing(config: Any, *args: Any, **keywords: Any) -> Any:
        if config.model.unfreeze_last_k == 1:
            raise RuntimeError("out of memory: made up")
        return real(config, *args, **keywords)

    monkeypatch.setattr(sweep_trial, "train", failing)
    monkeypatch.setattr(sweep_closing, "SERVER_SECONDS", 0.5)
    monkeypatch.setattr("lesionsam.sweep.search.SYNC_SECONDS", 0.5)
    space = {"model.unfreeze_last_k": {"low": 0, "high": 2}}
    set_params(sweep__space=space, sweep__objective="label_free", train__epochs=1, tracking__enabled=True)
    set_params(tracking__system_metrics=False, tracking__uri="http://127.0.0.1:9")
    sweep(Request(trials=3))
    reasons, scores, points = [], [], set()
    for spool in Spool.all(Path.cwd()):
        entries = [entry for entry, _ in read_lines(spool.path("journal")) if entry]
        tags = {name: value for entry in entries if entry["kind"] == "tags" for name, value in entry["values"].items()}
        reasons += [(tags["sweep.state"], tags.get("lesionsam.failure"))] if "sweep.state" in tags else []
        scores += [set(entry["values"]) for entry in entries if entry["kind"] == "checkpoint"]
        points |= {name for entry in entries if entry["kind"] == "metrics" for name in entry["values"]}
    assert sorted(reasons) == [("complete", None)] * 2 + [("failed", "RuntimeError: out of memory: made up")]
    assert scores == [{"dev/label_free"}]
    assert "dev/label_free" in points
    assert "dev/objective" not in points


@pytest.mark.pipeline
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_postgresql_gives_what_sqlite_gives(project: Path) -> None:
    """Two commands started at once on one empty database share the trials; values and results are those of SQLite."""
    set_params(sweep__seed=3)
    command = [sys.executable, str(ROOT / "src" / "tune.py"), "--trials", "5", "--study", "one"]
    sweep(Request(trials=5, study="one"))
    local = only_study()
    with postgres() as url, sweep_storage.opened(url) as storage:
        command += ["--storage", url]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: "one" in optuna.get_all_study_names(storage))
        sweep(Request(trials=5, study="one", storage=url))
        said = other.communicate(timeout=WAIT_S)[0]
        assert other.returncode == 0, said
        shared = optuna.load_study(study_name="one", storage=storage)
        trials = shared.get_trials()
        assert [state_name(t) for t in trials] == ["complete"] * 5
        assert len({t.user_attrs["owner"] for t in trials}) == 2, "both took part"
        results = {str(t.user_attrs["values"]): t.value for t in trials}
        expected = {str(t.user_attrs["values"]): t.value for t in local.get_trials()}
        assert results == pytest.approx(expected, abs=1e-6)


@pytest.mark.pipeline
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # SQLAlchemy drops broken connections
def test_a_server_that_restarts_in_mid_trial_loses_no_trial(
    project: Path, helper: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    """The server is away for a few seconds, as in an update."""
    set_params(train__epochs=8)
    with postgres_server() as server:
        url = server.create("sweep")

        def restart() -> None:
            with sweep_storage.opened(url) as storage:
                wait_for(lambda: "one" in optuna.get_all_study_names(storage))
                study = optuna.load_study(study_name="one", storage=storage)
                wait_for(lambda: study.get_trials() and study.get_trials()[0].intermediate_values)
            server.restart(3.0)

        thread = helper(restart)
        sweep(Request(trials=2, study="one", storage=url))
        thread.join(WAIT_S)
        with sweep_storage.opened(url) as storage:
            study = optuna.load_study(study_name="one", storage=storage)
            assert [state_name(t) for t in study.get_trials()] == ["complete"] * 2
            assert sorted(study.get_trials()[0].intermediate_values) == list(range(1, 9))


NAMESPACES = ["unshare", "--pid", "--uts", "--fork", "--mount-proc"]


def no_namespaces() -> str:
    """Why there can be no PID and UTS namespaces here; empty where there can."""
    try:
        done = subprocess.run([*NAMESPACES, "hostname", "box"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"needs unshare: {error}"
    return f"needs PID and UTS namespaces: {done.stderr.strip()}" if done.returncode else ""


@pytest.mark.pipeline
@pytest.mark.parametrize(
    "kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.skipif(bool(why_not()), reason=why_not()))]
)
@pytest.mark.parametrize("shared_folder", [False, True])
def test_two_containers_of_one_name_share_a_study(
    project: Path, tmp_path: Path, kind: str, shared_folder: bool
) -> None:
    """Host name and process numbers are the same in both: each trial is run once all the same, and none too many."""
    if reason := no_namespaces():
        pytest.skip(reason)
    set_params(train__epochs=6)
    other = project if shared_folder else Path(shutil.copytree(project, tmp_path / "other"))
    program = f"hostname box && exec {sys.executable} {ROOT / 'src' / 'tune.py'} --trials 6 --study one --storage "

    def share(url: str) -> None:
        processes = [
            subprocess.Popen(
                [*NAMESPACES, "sh", "-c", program + url],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for folder in (project, other)
        ]
        for process in processes:
            said = process.communicate(timeout=2 * WAIT_S)[0]
            assert process.returncode == 0, said
            assert "given to another" not in said
        with sweep_storage.opened(url) as storage:
            trials = optuna.load_study(study_name="one", storage=storage).get_trials()
        assert {state_name(t) for t in trials} <= {"complete", "duplicate"}, "no live trial was taken for lost"
        finished = [t for t in trials if is_finished(t)]
        assert len(finished) == 6
        assert len({str(t.user_attrs["values"]) for t in finished}) == 6
        assert len({t.user_attrs["owner"] for t in finished}) == 2, "both took part"

    if kind == "sqlite":
        share(f"sqlite:///{tmp_path / 'shared.db'}")
    else:
        with postgres() as url:
            share(url)
