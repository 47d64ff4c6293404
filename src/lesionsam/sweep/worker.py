"""A worker of a sweep: takes trials of the study until the study has as many finished ones as it shall have.

`python -m lesionsam.sweep.worker PARENT_PID` reads its `WorkerSpec` from standard input and ends with its parent; with
one worker the sweep calls `run` itself.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from filelock import Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, Trial, TrialState

from lesionsam.config.load import Config, validate
from lesionsam.errors import run_guarded
from lesionsam.sweep.prepared import open_prepared
from lesionsam.sweep.report import time_left
from lesionsam.sweep.samplers import build_pruner, build_sampler, draw
from lesionsam.sweep.space import Value, combinations, from_json, same
from lesionsam.sweep.storage import FAULTS, Database, LockLost, clear_errors, opened, study_lock, without_warnings
from lesionsam.sweep.study import Owner, best_trial, is_alive, is_finished, recover_lost_trials, state_name
from lesionsam.sweep.trial import TRIAL_ERRORS, FullTraining, StudyFolder, budget, keys_text, run_trial, trial_folder
from lesionsam.utils.processes import exit_without

POLL_SECONDS = 1.0  # between two looks at the study while others run its last trials
MAX_DUPLICATES = 30  # drawn in a row before the space counts as used up
PROGRESS_SECONDS = 60.0  # of silence in a long trial
END_SECONDS = 120.0  # patience with a worker that was interrupted


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs, as plain values.

    Attributes:
        values: nested parameters. space: its live dimensions. trials: finished ones the study shall have.
        deadline: seconds since the epoch, 0 = none. parent: local id of the sweep's own run.
        workers: how many share the work here. trainings: to do instead of trials.
    """

    values: dict[str, Any]
    space: list[dict[str, Any]]
    study: str
    url: str
    trials: int
    deadline: float
    parent: str | None
    workers: int = 1
    threads: int = 0
    device: str = ""
    trainings: tuple[dict[str, Any], ...] = ()

    def config(self) -> Config:
        """Return the parameters, with this worker's share of the machine."""
        share = {"num_threads": self.threads, "device": self.device}
        runtime = self.values["runtime"] | {key: value for key, value in share.items() if value}
        return validate({**self.values, "runtime": runtime})

    def is_past_deadline(self) -> bool:
        """Return whether the time is over."""
        return bool(self.deadline) and time.time() > self.deadline


class TrialReassigned(Exception):
    """This process did not answer, and its trial was given to another."""


def equal_values(one: dict[str, Value], other: dict[str, Value]) -> bool:
    """Return whether two trials have the same values."""
    return all(same(other[key], value) for key, value in one.items())


class Worker:
    """One process's part in a study."""

    def __init__(self, spec: WorkerSpec, storage: BaseStorage) -> None:
        self.spec, self.storage, self.config, self.space = spec, storage, spec.config(), from_json(spec.space)
        if self.config.runtime.num_threads:
            torch.set_num_threads(self.config.runtime.num_threads)
        self.folder, self.prepared = StudyFolder.of(spec.study), open_prepared(self.config)
        self.owner = Owner(self.folder.owners)
        self.begun = self.last_line = time.monotonic()
        self.study = optuna.load_study(study_name=spec.study, storage=storage, pruner=build_pruner(self.config))
        self.points, self.num_duplicates, self.has_explained = combinations(self.space), 0, False

    def run_trials(self) -> None:
        """Run trials until there are enough, the time is over or the space is used up."""
        while not self.spec.is_past_deadline():
            trial: Trial | None = None
            try:
                with study_lock(self.storage, self.spec.url, self.spec.study):
                    recover_lost_trials(self.study, self.storage, self.folder.owners)
                    trials = self.study.get_trials(deepcopy=False)
                    num_finished = sum(map(is_finished, trials))
                    num_running = sum(t.state == TrialState.RUNNING for t in trials)
                    if num_finished >= self.spec.trials or self.num_duplicates >= MAX_DUPLICATES:
                        return
                    if num_finished + num_running < self.spec.trials:
                        trial = self.take_trial()
                if trial is not None:
                    self._run(trial)
                else:
                    self._explain_waiting(trials)
                    time.sleep(POLL_SECONDS)
            except (TrialReassigned, UpdateFinishedTrialError):
                name = "a trial" if trial is None else f"trial {trial.number}"
                print(f"{name}: given to another worker, as this one did not answer", flush=True)
            except LockLost:
                if trial is not None:
                    self._hand_back(trial)
            except (KeyboardInterrupt, OSError, *FAULTS):  # a full disk is no fault of the trial's
                if isinstance(self.storage, Database):
                    self.storage.patience = 0.0
                if trial is not None:
                    self._hand_back(trial)
                raise

    def take_trial(self) -> Trial | None:
        """Return a trial with new values, or None where the space is used up. Call it with the study's lock held."""
        sweep = self.config.sweep
        while self.num_duplicates < MAX_DUPLICATES:
            kind = "random" if self.num_duplicates else sweep.sampler
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = build_sampler(kind, sweep.seed, number, self.spec.trials)
            with without_warnings():
                trial = self.study.ask()
            if isinstance(self.storage, Database):
                self.storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("owner", self.owner.name)
            values = trial.user_attrs.get("values")
            if values is None:
                drawn = draw(trial, self.space)
                values = trial.user_attrs.get("start") or drawn
                trial.set_user_attr("values", values)
            others = [
                t
                for t in self.study.get_trials(deepcopy=False)
                if t.number != trial.number
                and t.user_attrs.get("values")
                and (is_finished(t) or t.state in (TrialState.RUNNING, TrialState.WAITING))
            ]
            twin = next((t for t in others if equal_values(values, t.user_attrs["values"])), None)
            if twin is None:
                self.num_duplicates = 0
                return trial
            self.num_duplicates += 1
            trial.set_user_attr("duplicate_of", twin.number)
            self.study.tell(trial, state=TrialState.FAIL)
            self._queue_untried(trial.number, [t.user_attrs["values"] for t in others])
        return None

    def _queue_untried(self, number: int, tried: Sequence[dict[str, Value]]) -> None:
        """Queue an untried point of a finite space: drawing at random may take long to meet the last ones."""
        if self.points is None:
            return
        left = [point for point in self.points if not any(equal_values(point, values) for values in tried)]
        if left:
            self.study.enqueue_trial(random.Random(f"{self.config.sweep.seed} {number}").choice(left))  # noqa: S311  # nosec B311
        else:
            self.num_duplicates = MAX_DUPLICATES

    def _run(self, trial: Trial) -> None:
        """Train a trial and write down how it ended."""
        begun = time.monotonic()
        values = trial.user_attrs["values"]
        with get_heartbeat_thread(trial._trial_id, self.storage):
            state, value = self._train(trial, values)
            with suppress(UpdateFinishedTrialError):  # where the answer to a repeated call was lost
                self.study.tell(trial, value, state, skip_if_finished=True)
            frozen = self._frozen(trial)
            if frozen.state != state:
                raise TrialReassigned
            shutil.rmtree(trial_folder(self.config, self.prepared, self.folder, values), ignore_errors=True)
        self._print_result(frozen, time.monotonic() - begun)

    def _train(self, trial: Trial, values: dict[str, Value]) -> tuple[TrialState, float | None]:
        """Train a trial, and return its state and value."""
        reported = set(self._frozen(trial).intermediate_values)

        def report(score: float, epoch: int) -> None:
            try:
                if epoch not in reported:
                    trial.report(score, epoch)
            except UpdateFinishedTrialError:
                raise TrialReassigned from None
            if time.monotonic() - self.last_line > PROGRESS_SECONDS:
                self.last_line = time.monotonic()
                print(f"trial {trial.number}: epoch {epoch} of {budget(self.config)}, {score:.4f}", flush=True)
            # After the last epoch there is nothing left to save.
            if epoch < budget(self.config) and "start" not in trial.user_attrs and trial.should_prune():
                raise optuna.TrialPruned(f"stopped after epoch {epoch}")

        try:
            outcome = run_trial(
                self.config,
                self.prepared,
                self.folder,
                number=trial.number,
                values=values,
                parent=self.spec.parent,
                report=report,
            )
            if not math.isfinite(outcome.value):
                raise ValueError(f"its value is {outcome.value}")
        except optuna.TrialPruned:
            return TrialState.PRUNED, None
        except TRIAL_ERRORS as error:
            trial.set_user_attr("error", (str(error).strip() or type(error).__name__).splitlines()[0][:300])
            return TrialState.FAIL, None
        trial.set_user_attr("epoch", outcome.epoch)
        trial.set_user_attr("scores", outcome.scores)
        return TrialState.COMPLETE, outcome.value

    def _hand_back(self, trial: Trial) -> None:
        """Fail an interrupted trial, so that it is queued again; without a database, its free lock does that later."""
        with suppress(UpdateFinishedTrialError, OSError, *FAULTS):
            if self._frozen(trial).state == TrialState.RUNNING:
                trial.set_user_attr("interrupted", True)
                self.study.tell(trial, state=TrialState.FAIL)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _explain_waiting(self, trials: Sequence[FrozenTrial]) -> None:
        """Say once that a trial of another folder is waited for, where nothing would tell that its worker is gone."""
        if self.has_explained or isinstance(self.storage, Database):
            return
        if any(
            t.state == TrialState.RUNNING and is_alive(self.folder.owners, t.user_attrs.get("owner")) is None
            for t in trials
        ):
            self.has_explained = True
            print("waiting for a worker of another folder; a journal file does not show if it is gone", flush=True)

    def _print_result(self, trial: FrozenTrial, seconds: float) -> None:
        """Print what a trial came to, how far the study is and how long it will take."""
        finished = [t for t in self.study.get_trials(deepcopy=False) if is_finished(t)]
        best = best_trial(self.study)
        value = trial.user_attrs.get("error", "" if trial.value is None else f"{trial.value:.4f}")
        progress = [
            f"{len(finished)}/{self.spec.trials} done",
            *([f"best {best.value:.4f}"] if best is not None else []),
            *time_left(finished, self.config, self.spec.trials, self.spec.workers, compares=bool(self.prepared.held)),
        ]
        self.last_line = time.monotonic()
        print(
            f"trial {trial.number}: {state_name(trial)} {value} | {keys_text(trial.user_attrs['values'])} | "
            f"{seconds:.0f} s | {', '.join(progress)}",
            flush=True,
        )

    def run_trainings(self) -> None:
        """Do the trainings after the trials that no other process has begun or finished."""
        trainings = [FullTraining(**held) for held in self.spec.trainings]
        for training in trainings:
            lock = self.folder.lock(f"confirm/{training.path(self.folder).stem}.lock")
            with suppress(Timeout), lock.acquire(timeout=0):
                if training.path(self.folder).exists():
                    continue
                begun = time.monotonic()
                training.run(self.config, self.prepared, self.folder)
                done = sum(other.path(self.folder).exists() for other in trainings)
                left = (time.monotonic() - self.begun) / done * (len(trainings) - done)
                print(
                    f"{training.kind}, seed {training.seed}: {time.monotonic() - begun:.0f} s | "
                    f"{done}/{len(trainings)} done" + (f", about {left / 60:.0f} min left" if left > 90 else ""),
                    flush=True,
                )


def run(spec: WorkerSpec) -> None:
    """Do a worker's part in this process.

    Raises:
        UserError: the storage fails, nothing is prepared. KeyboardInterrupt: after the trial was handed back.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR + 10)
    with clear_errors(spec.url), opened(spec.url) as storage:
        worker = Worker(spec, storage)
        try:
            worker.run_trainings() if spec.trainings else worker.run_trials()
        finally:
            worker.owner.release()


def _end() -> None:
    """Interrupt this process in good order; exit if it does not end."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(130)


def main() -> None:
    """Run a worker process, given its parent's id; it ends with 130 when it was interrupted."""
    exit_without(int(sys.argv[1]), _end)
    try:
        spec = json.loads(sys.stdin.read())
        run(WorkerSpec(**{**spec, "trainings": tuple(spec["trainings"])}))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_guarded(main)
