"""The study of a sweep: its creation, the states of its trials, and lost trials queued again.

The study alone says what has been tried. A trial names its owner, a lock file that the worker holds as long as it
lives: a host name, a process number and a start time identify nothing in another container.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lesionsam.config.load import Config, flatten
from lesionsam.errors import UserError
from lesionsam.sweep.space import Dimension, Value, from_json, to_json
from lesionsam.sweep.storage import GRACE_SECONDS, Database, without_warnings

MAX_RETRIES = 3  # of a trial whose process was killed


class Owner:
    """A lock file in the study's scratch folder, held until this worker ends, however it ends.

    Attributes:
        name: of the file, as trials have it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = uuid.uuid4().hex
        self._lock = FileLock(owner_path(folder, self.name))
        self._lock.acquire(timeout=0)

    def release(self) -> None:
        """Release the lock, and so give up every trial that still runs under this name."""
        self._lock.release()


def owner_path(folder: Path, name: str) -> Path:
    """Return the lock file of an owner."""
    return folder / f"{name}.lock"


def is_alive(folder: Path, owner: object) -> bool | None:
    """Return whether the owner of a trial lives; None for one that works in another folder."""
    if not isinstance(owner, str) or not (path := owner_path(folder, owner)).exists():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


# ---- states ------------------------------------------------------------------------------------------------------


def is_finished(trial: FrozenTrial) -> bool:
    """Return whether a trial counts: complete, pruned, or failed by itself (not interrupted, no duplicate)."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and "error" in trial.user_attrs
    )


def is_lost(trial: FrozenTrial) -> bool:
    """Return whether a trial was interrupted or lost its worker."""
    return trial.state == TrialState.FAIL and not {"error", "duplicate_of"} & trial.user_attrs.keys()


def state_name(trial: FrozenTrial) -> str:
    """Return a trial's state as a word: complete, pruned, failed, lost, duplicate, running or waiting."""
    if trial.state != TrialState.FAIL:
        return trial.state.name.lower()
    return "lost" if is_lost(trial) else "failed" if "error" in trial.user_attrs else "duplicate"


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that came to their end with a value."""
    return [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]


def count_finished(study: optuna.Study) -> int:
    """Return the number of trials that count."""
    return sum(map(is_finished, study.get_trials(deepcopy=False)))


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the complete trial with the best value, the first of equals."""
    return max(complete_trials(study), key=lambda t: (t.value or 0.0, -t.number), default=None)


# ---- lost trials ---------------------------------------------------------------------------------------------------


def recover_lost_trials(study: optuna.Study, storage: BaseStorage, owners: Path) -> None:
    """Fail the running trials whose worker is gone, and queue every lost trial again. Call it with the study's lock.

    Args:
        owners: folder of the lock files of this folder's workers.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        alive = is_alive(owners, owner)
        if alive and isinstance(storage, Database):  # after a suspension its own heartbeat may be late
            storage.record_heartbeat(trial._trial_id)
        # Without an owner: killed as it took the trial, as owners are set while the lock is held.
        if owner is None or alive is False:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker was faster
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    # After the database was away no heartbeat is recent, those of the living neither.
    if not isinstance(storage, Database) or time.monotonic() - storage.last_fault > GRACE_SECONDS:
        with without_warnings():
            optuna.storages.fail_stale_trials(study)
    _queue_lost_again(study)


def _queue_lost_again(study: optuna.Study) -> None:
    """Queue the values of lost trials that no other trial has, with what the last attempt reported.

    Optuna's retry callback fails first and queues afterwards, so that a kill between the two loses the trial. Here the
    next call finds what is missing.
    """
    trials = study.get_trials(deepcopy=False)
    present = {_key(t) for t in trials if not is_lost(t) and "duplicate_of" not in t.user_attrs}
    num_killed = Counter(_key(t) for t in trials if is_lost(t) and "interrupted" not in t.user_attrs)
    for trial in reversed(trials):
        key = _key(trial)
        if not is_lost(trial) or not key or key in present or num_killed[key] > MAX_RETRIES:
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={name: trial.user_attrs[name] for name in ("start", "values") if name in trial.user_attrs},
                system_attrs=trial.system_attrs,
                intermediate_values=trial.intermediate_values,
            )
        )
        present.add(key)


def _key(trial: FrozenTrial) -> str:
    """Return a trial's values as text, empty for one that was lost before it had any."""
    values: dict[str, Value] | None = trial.user_attrs.get("values") or trial.user_attrs.get("start")
    return dumps(values, sort_keys=True) if values else ""


# ---- creation ------------------------------------------------------------------------------------------------------


def open_study(
    config: Config, space: Sequence[Dimension], fixed: dict[str, Any], name: str, storage: BaseStorage, creator: Owner
) -> optuna.Study:
    """Load the study, or create it with params.yaml as its trial 0. Call it with the study's lock.

    Raises:
        UserError: it is there, but searches another space or has other fixed values.
    """
    start = {d.key: flatten(config)[d.key] for d in space}
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    if "start" not in study.user_attrs:  # new, or its creator was killed
        study.set_user_attr("uid", uuid.uuid4().hex)
        study.set_user_attr("creator", creator.name)
        study.set_user_attr("space", dumps(to_json(space)))
        study.set_user_attr("fixed", dumps(fixed))
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(start, user_attrs={"start": start})
        study.set_user_attr("start", start)
        return study
    if study.user_attrs["space"] != dumps(to_json(space)):
        spaces = ", ".join(map(str, from_json(loads(study.user_attrs["space"]))))
        raise UserError(
            f"study {name}: its search space is another one ({spaces}); leave --study away or name a new one, or bring "
            "sweep.space back"
        )
    if study.user_attrs["start"] != start:
        changed = [f"{key} {value}" for key, value in study.user_attrs["start"].items() if start[key] != value]
        print(
            f"note: this study started from other values ({', '.join(changed)}); its trial 0 stays as it was",
            flush=True,
        )
    theirs = loads(study.user_attrs["fixed"])
    if changed := [key for key in {**theirs, **fixed} if theirs.get(key) != fixed.get(key)]:
        raise UserError(
            f"study {name}: its trials had other values of {', '.join(changed[:5])}; leave --study away or name a "
            "new one, or bring them back"
        )
    return study
