"""Run a sweep: space, study, workers, comparison of winner and start, best values written into params.yaml.

The winner is the best trial; the start is params.yaml as it stood when the study was made, trial 0.

Modules: `space` (what is searched), `prepared` (what trials share), `storage` and `study` (what has been tried),
`worker` and `workers` (who takes trials), `trial` (one training), `closing` (comparison), `report` and `charts`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from json import dumps
from pathlib import Path

import optuna
from filelock import Timeout
from optuna.storages import BaseStorage

from lesionsam.config.edit import difference, edit_text
from lesionsam.config.load import Config, load_config, parse_yaml, read_text, to_values, validate
from lesionsam.errors import UserError, listed
from lesionsam.sweep.closing import Session, compare_with_start, finish, note_zero_shot, open_parent_run
from lesionsam.sweep.prepared import PreparedData, fixed_values, num_blocks, open_prepared
from lesionsam.sweep.report import Verdict, as_text, score_name, scored_by, shown_trials, table
from lesionsam.sweep.space import Dimension, combinations, configured, dead_keys, foreign_keys, read_space, to_json
from lesionsam.sweep.storage import clear_errors, opened, printable_url, storage_url, study_lock
from lesionsam.sweep.study import Owner, best_trial, count_finished, open_study, owner_path, recover_lost_trials
from lesionsam.sweep.trial import StudyFolder, budget
from lesionsam.sweep.worker import WorkerSpec
from lesionsam.sweep.workers import run_workers
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tracker import NullTracker, sync
from lesionsam.utils.files import write_text_atomic

DEFAULT_TRIALS = 20
SYNC_SECONDS = 60.0  # patience with MLflow after the last trial


@dataclass(frozen=True)
class Request:
    """The options of the command line; see `src/tune.py`."""

    trials: int | None = None
    timeout_minutes: float = 0.0
    workers: int = 1
    study: str = ""
    storage: str = ""
    apply: bool = False
    anyway: bool = False
    dry_run: bool = False
    params: Path = Path("params.yaml")

    @property
    def is_closing(self) -> bool:
        """Return whether the study is closed as it stands, without further trials."""
        return self.apply and self.trials is None and not self.timeout_minutes

    @property
    def num_trials(self) -> int:
        """Return how many finished trials the study is to have."""
        return DEFAULT_TRIALS if self.trials is None else self.trials


def sweep(request: Request) -> None:
    """Search, compare, and with `apply` write the best values into params.yaml.

    Raises:
        UserError: an invalid configuration, space or storage; Ctrl-C (exit 130); fewer trials finished than requested.
    """
    config = load_config(request.params)
    url, space = storage_url(request.storage), read_space(config)
    prepared = open_prepared(config)
    space = live_space(config, prepared, space)
    fixed = fixed_values(config, space, prepared)
    name = request.study or f"sweep-{sha256(dumps([to_json(space), fixed], sort_keys=True).encode()).hexdigest()[:8]}"
    if not request.is_closing:
        print(*announce(config, prepared, space, name, url, request), sep="\n", flush=True)
    if request.dry_run:
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR + 10)
    with clear_errors(url):
        _search(request, config, prepared, space, fixed, name, url)


def live_space(config: Config, prepared: PreparedData, space: Sequence[Dimension]) -> list[Dimension]:
    """Return the space without the keys that change nothing, and print each of those with its reason.

    Raises:
        UserError: no key is left, or one asks for more encoder blocks than there are.
    """
    last = next((d for d in space if d.key == "model.unfreeze_last_k"), None)
    if last is not None:
        blocks, most = num_blocks(config, prepared), max((int(v) for v in last.choices), default=int(last.high))
        if most > blocks:
            raise UserError(f"sweep.space: {last.key}: expected at most {blocks}, the encoder's blocks, got {most}")
    dead = foreign_keys(config) | dead_keys(config, space)
    for key, why in dead.items():
        print(f"{key} changes nothing now and is left out: {why}", flush=True)
    live = [d for d in space if d.key not in dead]
    if not live:
        raise UserError(
            f"sweep.space: every key changes nothing under this configuration ({', '.join(dead)}); search others, or "
            "switch on what reads them"
        )
    return live


def announce(
    config: Config, prepared: PreparedData, space: Sequence[Dimension], name: str, url: str, request: Request
) -> list[str]:
    """Return what is going to happen, in lines."""
    s, scored = config.sweep, sum(one.split == "dev" for one in prepared.seen)
    points = combinations(space)
    trials = request.num_trials if points is None else min(request.num_trials, len(points))
    by = scored_by(config, prepared)
    if s.objective != score_name(config, prepared):
        by += " (there are no masks, whatever sweep.objective says)"
    lines = [
        f"study {name} in {printable_url(url)}: up to {request.num_trials} trials, "
        f"{s.sampler} sampler, {s.pruner} pruner",
        *(f"  {dimension}" for dimension in space),
        f"  scored by {by} on {scored} development images; {len(prepared.held)} more stay unseen for the comparison",
        f"  {budget(config)} of {config.train.epochs} epochs a trial; trial 0 is {request.params.name} as it stands",
    ]
    if prepared.held and s.confirm_seeds:
        lines.append(
            f"  then winner and start anew, {s.confirm_seeds} seeds each: {2 * s.confirm_seeds} trainings of "
            f"{config.train.epochs} epochs (together {2 * s.confirm_seeds * config.train.epochs}, the trials at most "
            f"{trials * budget(config)})"
        )
    if trials < request.num_trials:
        lines.append(f"  the space has only {trials} points: {trials} trials")
    if any(d.key == "method.num_points" for d in space):
        lines.append("  note: method.num_points is also the number of ring points that trials are scored with")
    return lines


def _search(
    request: Request,
    config: Config,
    prepared: PreparedData,
    space: list[Dimension],
    fixed: dict[str, object],
    name: str,
    url: str,
) -> None:
    """Run trials in workers, then compare winner and start, and apply the best values.

    Several commands may work on one study. The comparison is made by the command that created it, or by any command
    once all trials are finished; `final_lock` admits one per folder.
    """
    folder = StudyFolder.of(name)
    final_lock = folder.lock("parent.lock")
    owner, points = Owner(folder.owners), combinations(space)
    prepared.data(config)  # decoded before the study's lock is taken
    spec = WorkerSpec(
        values=to_values(config),
        space=to_json(space),
        study=name,
        url=url,
        trials=request.num_trials if points is None else min(request.num_trials, len(points)),
        deadline=time.time() + 60 * request.timeout_minutes if request.timeout_minutes else 0.0,
        parent=None,
        workers=request.workers,
    )
    tracker, status, verdict, study = NullTracker(None), "FAILED", None, None
    with opened(url) as storage:
        try:
            if request.is_closing:
                check_study(storage, name)
            with study_lock(storage, url, name):
                study = open_study(config, space, fixed, name, storage, owner)
                with suppress(Timeout):
                    final_lock.acquire(timeout=0)
                folder.adopt(study.user_attrs["uid"], alone=final_lock.is_locked)
                is_creator = owner_path(folder.owners, study.user_attrs["creator"]).exists()
                if request.is_closing:
                    spec = replace(spec, trials=count_finished(study))
                compares = final_lock.is_locked and (is_creator or count_finished(study) >= spec.trials)
                if compares:
                    tracker = open_parent_run(config, folder, study)
            spec = replace(spec, parent=study.user_attrs.get("parent"))
            session = Session(config, prepared, space, folder, study, spec)
            if compares:
                note_zero_shot(session, tracker)
            if not request.is_closing:
                run_workers(spec)
            if compares:
                verdict = compare_with_start(session, trains=not (request.is_closing and request.anyway))
                finish(session, tracker, verdict)
            else:
                print(f"\n{as_text(table(study, config, space))}\n", flush=True)
                print("winner and start are compared by the command that made this study", flush=True)
            status = "FINISHED"
        except KeyboardInterrupt:
            status, done = "KILLED", 0
            if study is not None:
                with study_lock(storage, url, name):  # release trials of workers that died
                    recover_lost_trials(study, storage, folder.owners)
                done = count_finished(study)
            raise UserError(
                f"interrupted with {done} of {spec.trials} trials finished; the same command goes on from here",
                exit_code=130,
            ) from None
        finally:
            tracker.close(status)
            final_lock.release()
            owner.release()
        if config.tracking.enabled:
            sync(repository_root(Path.cwd()), timeout=SYNC_SECONDS)  # ends the MLflow runs of killed workers
        if (best := best_trial(study)) is None:
            reasons = [t.user_attrs["error"] for t in shown_trials(study) if "error" in t.user_attrs]
            raise UserError(
                f"no trial finished{f'; the first failed with: {reasons[0]}' if reasons else ''}", exit_code=1
            )
        if request.apply:
            apply_best(request, best, verdict)
        if (done := count_finished(study)) < spec.trials and not spec.is_past_deadline():
            raise UserError(f"{done} of {spec.trials} trials finished; the same command goes on", exit_code=1)


def check_study(storage: BaseStorage, name: str) -> None:
    """Raise UserError unless the storage has the study and a trial of it has finished."""
    names = optuna.get_all_study_names(storage)
    if name not in names or not count_finished(optuna.load_study(study_name=name, storage=storage)):
        known = f"; --study names another one: {listed(sorted(names))}" if set(names) - {name} else ""
        raise UserError(f"study {name}: no trial has finished, nothing to apply; give --trials to search{known}")


def apply_best(request: Request, best: optuna.trial.FrozenTrial, verdict: Verdict | None) -> None:
    """Write the winner's values into params.yaml as it is now, comments kept, and print the difference.

    Raises:
        UserError: they are not shown to be better than the start on images that no trial saw, without `anyway`.
    """
    name = request.params.name
    if "start" in best.user_attrs:
        print(f"{name} stays as it is: the start is the best trial")
        return
    if not request.anyway and (verdict is None or verdict.low <= 0):
        why = "is not compared with the start on images that no trial saw"
        if verdict is not None:
            found = f"{verdict.difference:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]"
            why = (
                f"{'is worse' if verdict.high < 0 else 'is not surely better'} than the start on unseen images: {found}"
            )
        raise UserError(f"{name} stays as it is: trial {best.number} {why}; --apply --anyway applies it", exit_code=1)
    before = read_text(request.params)  # read again: keep what the user edited during the sweep
    config = validate(parse_yaml(before, name), name)
    new = edit_text(before, to_values(configured(config, best.user_attrs["values"])), name)
    lines = difference(before, new, name)
    if not lines:
        print(f"{name} holds the best values already")
        return
    write_text_atomic(request.params, new)
    print("\n".join(lines))
    print("`dvc repro` trains with these values")
