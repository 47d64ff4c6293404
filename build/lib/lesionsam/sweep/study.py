"""The study of a sweep: made once, made ready once, and refused where it searched something else."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from json import dumps, loads

import optuna
from optuna.storages import BaseStorage

from lesionsam.config.load import Config, flatten
from lesionsam.errors import UserError
from lesionsam.sweep.bench import Bench, zero_shot
from lesionsam.sweep.report import by_label_free
from lesionsam.sweep.space import Dimension, from_json, to_json
from lesionsam.sweep.storage import HOST, owner, wait_for
from lesionsam.tracking.tracker import NullTracker
from lesionsam.training.loop import OBJECTIVE

LOCAL_SECONDS, SERVER_SECONDS = 180.0, 30.0  # patience with MLflow's first answer: a file to be made, a server
CREATOR_SECONDS = 600.0  # patience with the machine that made the study, until it is ready
NAMELESS_SECONDS = 5.0  # between making a study and saying who did


def open_study(
    config: Config, space: Sequence[Dimension], fixed: dict[str, object], name: str, storage: BaseStorage
) -> tuple[optuna.Study, bool]:
    """The study, and whether this process is to make it ready. Call it with `ready.lock` of the place held.

    Raises:
        UserError: it is there, but searches another space or has other fixed values.
    """
    try:
        study, created = optuna.create_study(study_name=name, storage=storage, direction="maximize"), True
        study.set_user_attr("creator", owner())
        study.set_user_attr("uid", uuid.uuid4().hex)
    except optuna.exceptions.DuplicatedStudyError:
        study, created = optuna.load_study(study_name=name, storage=storage), False
    if not created and not is_ready(study):  # its maker is elsewhere, or ended early
        wait_for(lambda: "creator" in study.user_attrs, NAMELESS_SECONDS)
        if not made_here(study):
            print("waiting for the machine that made this study to make it ready", flush=True)
            wait_for(lambda: is_ready(study), CREATOR_SECONDS)
        created = not is_ready(study)
    if created:
        study.set_user_attr("creator", owner())
        study.set_user_attr("space", dumps(to_json(space)))
        study.set_user_attr("fixed", dumps(fixed))
        return study, True
    if study.user_attrs["space"] != dumps(to_json(space)):
        spaces = ", ".join(map(str, from_json(loads(study.user_attrs["space"]))))
        raise UserError(
            f"study {name}: its search space is another one ({spaces}); leave --study away or name a new one, or bring "
            "sweep.space back"
        )
    if study.user_attrs["start"] != (now := {d.key: flatten(config)[d.key] for d in space}):
        changed = [f"{key} {value}" for key, value in study.user_attrs["start"].items() if now[key] != value]
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
    return study, False


def is_ready(study: optuna.Study) -> bool:
    """Whether a study has all that `make_ready` gives it."""
    return "ready" in study.user_attrs


def made_here(study: optuna.Study) -> bool:
    """Whether a process of this machine made a study: its parent run and the closing comparison are at home here."""
    creator = study.user_attrs.get("creator")
    return creator is None or creator["host"] == HOST


def make_ready(
    study: optuna.Study, config: Config, bench: Bench, space: Sequence[Dimension], tracker: NullTracker
) -> None:
    """What a study is given once: params.yaml as its trial 0, the zero-shot figure, the parent run's local id."""
    start = {d.key: flatten(config)[d.key] for d in space}
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(start, user_attrs={"start": start})
    study.set_user_attr(
        "zero_shot", zero_shot(config, bench)["label_free" if by_label_free(config, bench) else OBJECTIVE]
    )
    if tracker.local_id is not None:
        study.set_user_attr("parent", tracker.local_id)
        if tracker.run_id(SERVER_SECONDS if config.tracking.uri else LOCAL_SECONDS) is None:
            print(
                "warning: MLflow does not answer; runs are kept on disk and sent later, under their one parent",
                file=sys.stderr,
            )
    study.set_user_attr("start", start)
    study.set_user_attr("ready", True)
