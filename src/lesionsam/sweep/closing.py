"""Close a sweep: winner and start compared on unseen images, results kept in the sweep's folder and on its own run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import optuna

from lesionsam.config.load import Config
from lesionsam.experiment.tracked import open_tracker
from lesionsam.sweep.charts import draw_pictures
from lesionsam.sweep.prepared import PreparedData, zero_shot
from lesionsam.sweep.report import (
    Verdict,
    as_text,
    comparisons,
    judge,
    rank_correlation,
    score_name,
    scored_by,
    summary,
    table,
    write,
)
from lesionsam.sweep.space import Dimension
from lesionsam.sweep.study import best_trial, count_finished
from lesionsam.sweep.trial import BEST_NAME, StudyFolder, best_note
from lesionsam.sweep.worker import WorkerSpec
from lesionsam.sweep.workers import run_workers
from lesionsam.tracking.tracker import NullTracker

LOCAL_SECONDS, SERVER_SECONDS = 180.0, 30.0  # patience with MLflow's first answer: a file to be made, a server


@dataclass(frozen=True)
class Session:
    """A command's part in a sweep."""

    config: Config
    prepared: PreparedData
    space: Sequence[Dimension]
    folder: StudyFolder
    study: optuna.Study
    spec: WorkerSpec


def open_parent_run(config: Config, folder: StudyFolder, study: optuna.Study) -> NullTracker:
    """Open the sweep's own run, and note its local id in the study, so that trials find it before a server answers."""
    tracker = open_tracker(
        config,
        folder.scratch / "parent",
        study.study_name,
        {"sweep.study": study.study_name, "sweep.role": "parent"},
        local_id=study.user_attrs.get("parent"),
    )
    if tracker.local_id is not None:
        study.set_user_attr("parent", tracker.local_id)
    return tracker


def note_zero_shot(session: Session, tracker: NullTracker) -> None:
    """Note the zero-shot score in the study, and warn if MLflow does not answer; once in a study."""
    config, study = session.config, session.study
    if "zero_shot" in study.user_attrs:
        return
    patience = SERVER_SECONDS if config.tracking.uri else LOCAL_SECONDS
    if tracker.local_id is not None and tracker.run_id(patience) is None:
        print(
            "warning: MLflow does not answer; runs are kept on disk and sent later, under their one parent",
            file=sys.stderr,
        )
    scores = zero_shot(config, session.prepared)
    study.set_user_attr("zero_shot", scores[score_name(config, session.prepared)])


def compare_with_start(session: Session, *, trains: bool = True) -> Verdict | None:
    """Train winner and start with new seeds, and judge them on images that no trial saw; None with none to compare.

    Args:
        trains: False: judge by the trainings that are there already.
    """
    config, study, best = session.config, session.study, best_trial(session.study)
    if best is None or "start" in best.user_attrs or not session.prepared.held:
        return None
    trainings = comparisons(config, best.user_attrs["values"], study.user_attrs["start"])
    todo = [training for training in trainings if not training.path(session.folder).exists()]
    if todo and trains and not session.spec.is_past_deadline():
        title = f"comparing trial {best.number} with the start"
        print(f"{title}: {len(todo)} trainings of {config.train.epochs} epochs", flush=True)
        workers = min(session.spec.workers, len(todo))
        run_workers(replace(session.spec, trainings=tuple(map(asdict, todo)), workers=workers))
    return judge(config, session.folder, trainings)


def finish(session: Session, tracker: NullTracker, verdict: Verdict | None) -> None:
    """Print table and summary, and keep them and the pictures in the sweep's folder and on its own run."""
    config, study, folder = session.config, session.study, session.folder
    rows, lines = table(study, config, session.space), summary(study, config, session.prepared, verdict)
    print(f"\n{as_text(rows)}\n")
    print(*lines, f"kept in {folder.out}/", sep="\n", flush=True)
    step = count_finished(study)
    for path in write(folder, rows, lines):
        tracker.log_artifact(path)
    for name, path in draw_pictures(study, folder.out, session.space, scored_by(config, session.prepared)).items():
        tracker.log_picture(path, f"sweep_{name}", step)
    if not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        shutil.rmtree(folder.scratch / "trials", ignore_errors=True)  # of attempts that were not resumed
    best = best_trial(study)
    if best is None or best.value is None:
        return
    points = {"sweep/best": best.value, "sweep/zero_shot": study.user_attrs["zero_shot"], "sweep/trials": step}
    if (label_free := rank_correlation(study)) is not None:
        points["sweep/label_free_rank_correlation"] = label_free[0]
    if verdict is not None:
        points |= {
            "sweep/difference": verdict.difference,
            "sweep/difference_low": verdict.low,
            "sweep/difference_high": verdict.high,
        }
    tracker.log(points, step)
    tracker.set_tags(
        {"sweep.best_trial": best.number, **{f"sweep.best.{k}": v for k, v in best.user_attrs["values"].items()}}
    )
    if best_note(folder).get("values") == best.user_attrs["values"]:  # it may lie on another machine
        scores = {f"dev/{score_name(config, session.prepared)}": best.value}
        tracker.log_checkpoint(folder.out / BEST_NAME, "sweep-best", scores, step)
