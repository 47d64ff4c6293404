"""A worker of a sweep: takes trials of the study until it has as many finished ones as it shall have.

`python -m lesionsam.sweep_worker PARENT_PID` reads its plan from standard input and ends with its parent; with one
worker the sweep calls `run` itself.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from lesionsam.config.load import Config, validate
from lesionsam.errors import run_guarded
from lesionsam.sweep.bench import open_bench
from lesionsam.sweep.samplers import NumberedSampler, build_pruner
from lesionsam.sweep.space import Dimension, Value, combinations, from_json, same
from lesionsam.sweep.storage import HOST, clear_errors, fault_behind, opened, owner, queue_again, repair
from lesionsam.sweep.trial import TRIAL_ERRORS, Job, Place, budget, do, forget, run_trial, shown
from lesionsam.utils.processes import deferred_signals

WAIT_SECONDS = 1.0  # between two looks at the study while others run its last trials
MAX_DUPLICATES = 30  # drawn in a row before the space counts as used up
SAY_SECONDS = 60.0  # of silence in a long trial
END_SECONDS = 120.0  # patience with a worker that was interrupted
SET_ASIDE = {"duplicate_of": "duplicate", "surplus": "surplus"}  # attributes of trials that were not trained


@dataclass(frozen=True)
class Plan:
    """All that a worker needs, as plain values.

    Attributes:
        values: nested parameters. space: its live dimensions. trials: finished ones the study shall have.
        deadline: seconds since the epoch, 0 = none. parent: local id of the sweep's own run.
        workers: how many share the plan here. jobs: trainings to do instead of trials.
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
    jobs: tuple[dict[str, Any], ...] = ()

    def config(self) -> Config:
        """The parameters, with this worker's share of the machine."""
        runtime = {
            **self.values["runtime"],
            **({"num_threads": self.threads} if self.threads else {}),
            **({"device": self.device} if self.device else {}),
        }
        return validate({**self.values, "runtime": runtime})


class Duplicate(Exception):
    """These values were tried before."""


class Taken(Exception):
    """This process was taken for dead, and its trial given to another."""


class Surplus(Exception):
    """Other machines began the last trials at the same moment."""


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: complete, pruned, or failed for a reason of its own (not interrupted or a duplicate)."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and "error" in trial.user_attrs
    )


def draw(trial: Trial, space: Sequence[Dimension]) -> dict[str, Value]:
    """A value for every key of the space, as it will be tried and written."""
    values: dict[str, Value] = {}
    for d in space:
        if d.choices:
            drawn = trial.suggest_categorical(d.key, d.choices)
        elif d.whole:
            drawn = trial.suggest_int(d.key, int(d.low), int(d.high), step=int(d.step), log=d.log)
        else:
            drawn = trial.suggest_float(d.key, d.low, d.high, step=d.step or None, log=d.log)
        values[d.key] = d.rounded(drawn)
    return values


class Worker:
    """One process's part in a study."""

    def __init__(self, plan: Plan, storage: BaseStorage) -> None:
        self.plan, self.config, self.space = plan, plan.config(), from_json(plan.space)
        if self.config.runtime.num_threads:
            torch.set_num_threads(self.config.runtime.num_threads)
        self.place, self.bench = Place.of(plan.study), open_bench(self.config)
        self.lock, self.begun, self.said = self.place.lock(), time.monotonic(), time.monotonic()
        self.ownerless: dict[int, float] = {}
        self.sampler = NumberedSampler(self.config.sweep.sampler, self.config.sweep.seed, plan.trials)
        self.study = optuna.load_study(
            study_name=plan.study, storage=storage, sampler=self.sampler, pruner=build_pruner(self.config)
        )
        self.listed, self.duplicates, self.waiting = combinations(self.space), 0, False

    def work(self) -> None:
        """Trials until there are enough, the time is over or the space is used up."""
        while not self.plan.deadline or time.time() < self.plan.deadline:
            self.lock.acquire()
            try:
                repair(self.study, self.ownerless)
                trials = self.study.get_trials(deepcopy=False)
                num_finished = sum(map(is_finished, trials))
                num_running = sum(t.state == TrialState.RUNNING for t in trials)
                if num_finished >= self.plan.trials or self.duplicates >= MAX_DUPLICATES:
                    return
                if num_finished + num_running < self.plan.trials:
                    self._one()
                    continue
                self._explain_waiting(trials)
            finally:
                self.lock.release()
            time.sleep(WAIT_SECONDS)

    def _explain_waiting(self, trials: Sequence[FrozenTrial]) -> None:
        """Say once whose trials are waited for, where nothing would tell that the machine they run on is gone."""
        if self.waiting or "://" in self.plan.url:
            return
        held = [t.user_attrs["owner"] for t in trials if t.state == TrialState.RUNNING and "owner" in t.user_attrs]
        if hosts := {one["host"] for one in held} - {HOST}:
            self.waiting = True
            print(f"waiting for {', '.join(sorted(hosts))}; a journal file does not show if that is gone", flush=True)

    def _one(self) -> None:
        """One trial; the lock is given back as soon as its values are drawn."""
        begun = time.monotonic()
        current: list[Trial] = []

        def objective(trial: Trial) -> float:
            current.append(trial)
            try:
                values = self._values(trial)
            finally:
                self.lock.release()
            return self._train(trial, values, over)

        try:
            with deferred_signals() as over:  # a training that has ended is told to the study, whoever interrupts then
                self.study.optimize(objective, n_trials=1, catch=(*TRIAL_ERRORS, Duplicate, Surplus))
        except (KeyboardInterrupt, OSError):  # a full disk is no fault of the trial's
            self._hand_back(current)
            raise
        except ValueError:  # Optuna's, after `Taken`
            if not (current and self._frozen(current[0]).state.is_finished()):
                raise
            print(f"trial {current[0].number}: given to another, as this machine did not answer", flush=True)
            return
        except UnboundLocalError as error:  # Optuna's own, where the storage fails as it notes how a trial ended
            if (fault := fault_behind(error)) is None:
                raise
            raise fault from fault.__cause__
        frozen = self._frozen(current[0])
        if is_finished(frozen):
            forget(self.config, self.bench, self.place, frozen.user_attrs["values"])
            self._say(frozen, time.monotonic() - begun)

    def _hand_back(self, interrupted: Sequence[Trial]) -> None:
        """Queue again what was interrupted, unless it had come to its end."""
        for trial in interrupted:
            if self._frozen(trial).state == TrialState.RUNNING:
                self.study.tell(trial, state=TrialState.FAIL)
            frozen = self._frozen(trial)
            if frozen.state == TrialState.FAIL and state_of(frozen) == "lost":
                queue_again(self.study, frozen)
            elif is_finished(frozen):
                forget(self.config, self.bench, self.place, frozen.user_attrs["values"])

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _values(self, trial: Trial) -> dict[str, Value]:
        """Values of a trial: drawn now, or those of an attempt that was cut short. This process becomes its owner."""
        trial.set_user_attr("owner", owner())
        values = trial.user_attrs.get("values")
        if values is None:
            drawn = draw(trial, self.space)
            values = trial.user_attrs.get("start") or drawn
            trial.set_user_attr("values", values)
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.number != trial.number]
        before = [t for t in trials if t.number < trial.number and (is_finished(t) or t.state == TrialState.RUNNING)]
        if len(before) >= self.plan.trials:
            trial.set_user_attr("surplus", True)
            raise Surplus
        # Written first and compared then: of two machines with the same values one sees the other, or both step back.
        taken = [
            t
            for t in trials
            if t.user_attrs.get("values") and (is_finished(t) or t.state in (TrialState.RUNNING, TrialState.WAITING))
        ]
        twin = next(
            (t for t in taken if all(same(t.user_attrs["values"][key], value) for key, value in values.items())), None
        )
        if twin is not None:
            self.duplicates += 1
            self.sampler.at_random = True
            trial.set_user_attr("duplicate_of", twin.number)
            self._queue_unseen(trial.number, [t.user_attrs["values"] for t in taken])
            raise Duplicate(f"trial {twin.number} has these values")
        self.duplicates, self.sampler.at_random = 0, False
        return values

    def _queue_unseen(self, number: int, taken: Sequence[dict[str, Value]]) -> None:
        """In a finite space, queue a point that nobody tried: drawing at random may take long to meet the last ones."""
        if self.listed is None:
            return
        left = [
            point for point in self.listed if not any(all(same(t[key], v) for key, v in point.items()) for t in taken)
        ]
        if left:
            self.study.enqueue_trial(random.Random(f"{self.config.sweep.seed} {number}").choice(left))  # noqa: S311  # nosec B311
        else:
            self.duplicates = MAX_DUPLICATES

    def _train(self, trial: Trial, values: dict[str, Value], over: Callable[[], None]) -> float:
        reported = set(self._frozen(trial).intermediate_values)

        def report(score: float, epoch: int) -> bool:
            try:
                if epoch not in reported:
                    trial.report(score, epoch)
            except optuna.exceptions.UpdateFinishedTrialError:
                raise Taken from None
            if time.monotonic() - self.said > SAY_SECONDS:
                self.said = time.monotonic()
                print(f"trial {trial.number}: epoch {epoch} of {budget(self.config)}, {score:.4f}", flush=True)
            if epoch >= budget(self.config):  # nothing left to save
                return False
            return "start" not in trial.user_attrs and trial.should_prune()

        try:
            outcome = run_trial(
                self.config,
                self.bench,
                self.place,
                number=trial.number,
                values=values,
                parent=self.plan.parent,
                pruned=optuna.TrialPruned,
                report=report,
                over=over,
            )
            if not math.isfinite(outcome.value):
                raise ValueError(f"its value is {outcome.value}")
        except TRIAL_ERRORS as error:
            trial.set_user_attr("error", (str(error).strip() or type(error).__name__).splitlines()[0][:300])
            raise
        trial.set_user_attr("epoch", outcome.epoch)
        trial.set_user_attr("scores", outcome.scores)
        return outcome.value

    def _say(self, trial: FrozenTrial, seconds: float) -> None:
        """A line about a trial that ended: what it got, how far the study is and how long it will take."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if is_finished(t)]
        best = max((t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None), default=None)
        value = trial.user_attrs.get("error", "" if trial.value is None else f"{trial.value:.4f}")
        keys = " ".join(f"{key.rpartition('.')[2]}={shown(v)}" for key, v in trial.user_attrs.get("values", {}).items())
        progress = [
            f"{len(trials)}/{self.plan.trials} done",
            *([f"best {best:.4f}"] if best is not None else []),
            *time_left(trials, self.plan, self.config, 2 * self.config.sweep.confirm_seeds if self.bench.held else 0),
        ]
        self.said = time.monotonic()
        print(
            f"trial {trial.number}: {state_of(trial)} {value} | {keys} | {seconds:.0f} s | {', '.join(progress)}",
            flush=True,
        )

    def do_jobs(self) -> None:
        """The trainings after the trials that no other process has begun or finished."""
        jobs = [Job(**held) for held in self.plan.jobs]
        for job in jobs:
            lock = self.place.lock(f"confirm/{job.path(self.place).stem}.lock")
            if not lock.acquire(wait=False):
                continue
            try:
                if job.path(self.place).exists():
                    continue
                begun = time.monotonic()
                do(self.config, self.bench, self.place, job)
                done = sum(other.path(self.place).exists() for other in jobs)
                left = (time.monotonic() - self.begun) / done * (len(jobs) - done)
                print(
                    f"{job.which}, seed {job.seed}: {time.monotonic() - begun:.0f} s | {done}/{len(jobs)} done"
                    + (f", about {left / 60:.0f} min left" if left > 90 else ""),
                    flush=True,
                )
            finally:
                lock.release()


def time_left(trials: Sequence[FrozenTrial], plan: Plan, config: Config, num_after: int) -> list[str]:
    """What is left, in words, by the time that the finished trials took: their rest, and the trainings after them."""
    seconds = [t.duration.total_seconds() for t in trials if t.duration is not None]
    epochs = sum(max(t.intermediate_values, default=0) for t in trials)
    if not epochs or not seconds:
        return []
    rest = sum(seconds) / len(seconds) * max(0, plan.trials - len(trials)) / plan.workers
    after = sum(seconds) / epochs * config.train.epochs * num_after / plan.workers
    found = [f"about {rest / 60:.0f} min left"] if rest > 90 else []
    return found + ([f"then about {after / 60:.0f} min to compare"] if after > 90 else [])


def state_of(trial: FrozenTrial) -> str:
    """A trial's state in a word."""
    if trial.state == TrialState.FAIL and "error" not in trial.user_attrs:
        return next((word for mark, word in SET_ASIDE.items() if mark in trial.user_attrs), "lost")
    return {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())


def run(plan: Plan) -> None:
    """Do what a plan says, in this process.

    Raises:
        UserError: the storage fails, nothing is prepared. KeyboardInterrupt: after the trial was closed and queued.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR + 10)
    with clear_errors(plan.url), opened(plan.url) as storage:
        worker = Worker(plan, storage)
        worker.do_jobs() if plan.jobs else worker.work()


def to_text(plan: Plan) -> str:
    """A plan for another process."""
    return json.dumps(asdict(plan))


def _end_with(parent: int) -> None:
    """Interrupt this process in good order when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(130)


def interrupt(*_: object) -> None:
    """Handler of SIGTERM and SIGHUP: end as after Ctrl-C."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of a worker process, given its parent's id; ends with 130 when it was interrupted."""
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    try:
        plan = json.loads(sys.stdin.read())
        run(Plan(**{**plan, "jobs": tuple(plan["jobs"])}))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_guarded(main)
