"""Run one training of a sweep: a trial (on its budget, pruned by epoch), or one of full length after the trials."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock

from lesionsam.config.load import Config
from lesionsam.errors import UserError
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.run import Trained, selection_key, train
from lesionsam.experiment.tracked import grouped, open_tracker
from lesionsam.models.checkpoint import save_sam
from lesionsam.sweep.prepared import PreparedData, score_held
from lesionsam.sweep.space import Value, configured
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.progress import silent

BEST_NAME, BEST_NOTE = "best.safetensors", "best.json"
TRIAL_ERRORS = (UserError, RuntimeError, ValueError, MemoryError)  # fail one trial, not the sweep


@dataclass(frozen=True)
class StudyFolder:
    """The folders of a study in the project's folder.

    Attributes:
        scratch: states of trainings under way, locks. out: results: table, pictures, best weights.
    """

    study: str
    scratch: Path
    out: Path

    @classmethod
    def of(cls, study: str) -> StudyFolder:
        """Return the folders of a study by its name."""
        folder = "".join(c if c.isalnum() or c in "-_." else "_" for c in study)
        return cls(study, Path(".scratch/sweep") / folder, Path("sweeps") / folder)

    @property
    def owners(self) -> Path:
        """Lock files of the workers that ran here, see `study.Owner`."""
        return self.scratch / "owners"

    def lock(self, name: str) -> FileLock:
        """Return a lock between all processes that work in this folder."""
        path = self.scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def adopt(self, uid: str, *, alone: bool) -> None:
        """Use the folders for the study with this id; remove what an earlier study of the same name left.

        Args:
            alone: no other process works for a study of this name here.

        Raises:
            UserError: another process works for that earlier study.
        """
        note = self.scratch / "uid"
        held = note.read_text("utf-8") if note.exists() else ""
        if held and held != uid:
            if not alone:
                raise UserError(
                    f"study {self.study}: another sweep of this name, in another storage, runs in this folder; wait "
                    "for it, or name another --study"
                )
            for folder in ("trials", "confirm", "parent"):
                shutil.rmtree(self.scratch / folder, ignore_errors=True)
            for name in (BEST_NAME, BEST_NOTE):
                (self.out / name).unlink(missing_ok=True)
        if held != uid:
            write_text_atomic(note, uid)


def budget(config: Config) -> int:
    """Return the epochs of a trial."""
    return min(config.sweep.epochs or config.train.epochs, config.train.epochs)


def trial_config(config: Config, values: Mapping[str, Value]) -> Config:
    """Return params.yaml with a trial's values, its budget and the sweep's way of scoring."""
    changes: dict[str, Any] = {"train.epochs": budget(config), "train.select": config.sweep.objective, **values}
    return configured(config, changes, "trial")


def keys_text(values: Mapping[str, Value]) -> str:
    """Return a trial's values in short: "temperature=0.12 unfreeze_last_k=2"."""
    return " ".join(f"{key.rpartition('.')[2]}={printable(value)}" for key, value in values.items())


def printable(value: object) -> str:
    """Return a value as tables and lines show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Outcome:
    """A complete trial's value, and the true and label-free scores of its best epoch."""

    value: float
    epoch: int
    scores: dict[str, float]


def run_trial(
    config: Config,
    prepared: PreparedData,
    study_folder: StudyFolder,
    *,
    number: int,
    values: Mapping[str, Value],
    parent: str | None,
    report: Callable[[float, int], None],
) -> Outcome:
    """Train one trial, resumed where an earlier attempt stopped; its run is closed however it ends.

    Its folder stays for the caller to remove once the study knows how it ended: a kill between the two is resumed.

    Args:
        report: receives (score, epoch); raises `optuna.TrialPruned` where the trial is to stop.
    """
    own = trial_config(config, values)
    folder = trial_folder(config, prepared, study_folder, values)
    name = f"{number:03d} {keys_text(values)}"
    tags = {
        "mlflow.runName": name,  # a resumed attempt has another number
        "sweep.study": study_folder.study,
        "sweep.trial": number,
        "data.digest": prepared.digest(),
    }
    tracker = open_tracker(own, folder / "run", name, tags, parent=parent, system_metrics=False)
    history_path = folder / "epochs.json"
    history: dict[str, dict[str, float]] = json.loads(history_path.read_text()) if history_path.exists() else {}

    def log(point: Mapping[str, float], step: int) -> None:
        tracker.log(grouped(point), step)
        if "epoch" in point:
            epoch = int(point["epoch"])
            scores = {name.removeprefix("dev_"): value for name, value in point.items() if name.startswith("dev_")}
            history[str(epoch)] = scores
            write_text_atomic(history_path, json.dumps(history))
            report(scores[selection_key(own, data.dev)], epoch)

    status, state, reason = "KILLED", "interrupted", None
    try:
        data = prepared.data(own)
        with silent():
            trained = train(own, data, prepared.weights, folder=folder, log=log, say=lambda _: None)
        keep_best(trained, own, study_folder, number, values)
        scores = dict(history[str(trained.progress.best_epoch)])
        if all(prompt in scores for prompt in OBJECTIVE_PROMPTS):
            scores["miou"] = sum(scores[prompt] for prompt in OBJECTIVE_PROMPTS) / len(OBJECTIVE_PROMPTS)
        status, state = "FINISHED", "complete"
        return Outcome(trained.progress.best_score, trained.progress.best_epoch, scores)
    except optuna.TrialPruned:
        status, state = "FINISHED", "pruned"
        raise
    except TRIAL_ERRORS as error:
        status, state, reason = "FAILED", "failed", error
        raise
    finally:
        try:
            tracker.set_tags({"sweep.state": state})
        finally:
            tracker.close(status, reason)
            free_memory()


def trial_folder(
    config: Config, prepared: PreparedData, study_folder: StudyFolder, values: Mapping[str, Value]
) -> Path:
    """Return the scratch folder of a trial, by its values: another attempt at the same ones goes on there."""
    return study_folder.scratch / "trials" / prepared.run_key(trial_config(config, values))


def free_memory() -> None:
    """Free the memory of the last training."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_best(
    trained: Trained, config: Config, study_folder: StudyFolder, number: int, values: Mapping[str, Value]
) -> None:
    """Keep a trial's weights if they are the best so far in this folder."""
    score = trained.progress.best_score
    with study_folder.lock("best.lock"):
        before = best_note(study_folder)
        if not before or (score, -number) > (before["value"], -before["trial"]):
            study_folder.out.mkdir(parents=True, exist_ok=True)
            save_sam(trained.sam, study_folder.out / BEST_NAME, name=config.model.name, metadata={"trial": str(number)})
            note = {"trial": number, "value": score, "values": dict(values)}
            write_text_atomic(study_folder.out / BEST_NOTE, json.dumps(note))


def best_note(study_folder: StudyFolder) -> dict[str, Any]:
    """Return trial, value and values of the best weights in this folder; empty where there are none."""
    path = study_folder.out / BEST_NOTE
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


WINNER, START = "winner", "start"  # kinds of `FullTraining`


@dataclass(frozen=True)
class FullTraining:
    """A training of winner or start at the full number of epochs, for the comparison after the trials.

    Attributes:
        kind: `WINNER` or `START`. seed: of the training. values: of the search space.
    """

    kind: str
    seed: int
    values: dict[str, Value]

    def path(self, study_folder: StudyFolder) -> Path:
        """Return the file of its scores."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:8]
        return study_folder.scratch / "confirm" / f"{digest}-{self.seed}.csv"

    def run(self, config: Config, prepared: PreparedData, study_folder: StudyFolder) -> None:
        """Train, and write the scores on the images that no trial saw."""
        changes = {"train.select": config.sweep.objective, "train.seed": self.seed, **self.values}
        own = configured(config, changes, self.kind)
        folder = study_folder.scratch / "confirm" / prepared.run_key(own)
        with silent():
            trained = train(
                own, prepared.data(own), prepared.weights, folder=folder, log=lambda *_: None, say=lambda _: None
            )
            rows = score_held(own, prepared, trained.sam, model=self.kind, run=str(self.seed))
        write_text_atomic(self.path(study_folder), rows.to_csv(index=False))
        shutil.rmtree(folder, ignore_errors=True)
        free_memory()
