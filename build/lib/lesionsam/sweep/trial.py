"""One training of a sweep: a trial (on the trial's budget, pruned by epoch), or one of those that follow the trials."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lesionsam.config.load import Config, flatten
from lesionsam.errors import UserError
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.run import Trained, train
from lesionsam.models.checkpoint import save_sam
from lesionsam.sweep.bench import Bench, score_held
from lesionsam.sweep.space import Value, configured
from lesionsam.sweep.storage import Lock
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tracker import NullTracker, Tracker
from lesionsam.training.loop import OBJECTIVE
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.progress import silent

BEST_NAME, BEST_NOTE = "best.safetensors", "best.json"
TRIAL_ERRORS = (UserError, RuntimeError, ValueError, MemoryError)  # fail one trial, not the sweep


@dataclass(frozen=True)
class Place:
    """Where a study's files lie on this machine.

    Attributes:
        scratch: states of trainings under way, locks. out: what is kept: table, pictures, best weights.
    """

    study: str
    scratch: Path
    out: Path

    @classmethod
    def of(cls, study: str) -> Place:
        """The folders of a study, by its name."""
        folder = "".join(c if c.isalnum() or c in "-_." else "_" for c in study)
        return cls(study, Path(".scratch/sweep") / folder, Path("sweeps") / folder)

    def lock(self, name: str = "lock", notice: str = "") -> Lock:
        """A lock between this machine's processes."""
        return Lock(self.scratch / name, notice)

    def adopt(self, uid: str, *, alone: bool) -> None:
        """Keep the folders for the study with this id: those of an earlier one by the same name are emptied.

        Raises:
            UserError: a process of this machine is at work for that other study.
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
    """Epochs of a trial."""
    return min(config.sweep.epochs or config.train.epochs, config.train.epochs)


def trial_config(config: Config, values: Mapping[str, Value]) -> Config:
    """params.yaml with a trial's values, its budget and the sweep's way of scoring."""
    changes: dict[str, Any] = {"train.epochs": budget(config), "train.select": config.sweep.objective, **values}
    return configured(config, changes, "trial")


def run_name(number: int, values: Mapping[str, Value]) -> str:
    """A run's name, by its values: "003 temperature=0.12 unfreeze_last_k=2"."""
    return " ".join([f"{number:03d}", *(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in values.items())])


def shown(value: object) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def open_tracker(
    config: Config,
    folder: Path,
    *,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    parent: str | None = None,
    local_id: str | None = None,
    system_metrics: bool = False,
) -> NullTracker:
    """A run of the sweep; without tracking only its metrics.jsonl. `parent` and `local_id` as in `Tracker.open`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not config.tracking.enabled:
        return NullTracker(folder)
    return Tracker.open(
        folder,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        root=repository_root(Path.cwd()),
        run_name=name,
        params=params,
        tags=tags,
        system_metrics=system_metrics,
        parent=parent,
        local_id=local_id,
    )


@dataclass
class Outcome:
    """What a finished trial is remembered by: its value, and the true and label-free scores of its best epoch."""

    value: float
    epoch: int
    scores: dict[str, float]


def run_trial(
    config: Config,
    bench: Bench,
    place: Place,
    *,
    number: int,
    values: Mapping[str, Value],
    parent: str | None,
    pruned: type[Exception],
    report: Callable[[float, int], bool],
    over: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train one trial, resumed where an earlier attempt stopped; its run is closed however it ends.

    Its folder stays until `forget` is called, once the study knows how it ended: a kill between the two is resumed.

    Args:
        report: receives (score, epoch) and says whether the trial is to stop; `pruned` is then raised.
        over: called when the training has ended, before its run is closed; see `processes.deferred_signals`.
    """
    own = trial_config(config, values)
    folder = trial_folder(config, bench, place, values)
    name = run_name(number, values)
    tags = {
        "mlflow.runName": name,  # a resumed attempt has another number
        "sweep.study": place.study,
        "sweep.trial": number,
        "method": own.method.name,
        "model": own.model.name,
        "data": own.data.source,
        "data.digest": bench.digest(),
    }
    tracker = open_tracker(own, folder / "run", name=name, parent=parent, tags=tags, params=flatten(own))
    history_path = folder / "epochs.json"
    history: dict[str, dict[str, float]] = json.loads(history_path.read_text()) if history_path.exists() else {}

    def log(point: Mapping[str, float], step: int) -> None:
        tracker.log(point, step)
        if "epoch" in point:
            epoch = int(point["epoch"])
            history[str(epoch)] = {
                name.removeprefix("dev_"): value for name, value in point.items() if name.startswith("dev_")
            }
            write_text_atomic(history_path, json.dumps(history))
            if report(point[f"dev_{OBJECTIVE}"], epoch):
                raise pruned(f"stopped after epoch {epoch}")

    status, state = "KILLED", "interrupted"
    try:
        with silent():
            trained = train(own, bench.data(own), bench.weights, folder=folder, log=log, say=lambda _: None)
        over()
        keep_best(trained, own, place, number, values)
        scores = dict(history[str(trained.progress.best_epoch)])
        if all(prompt in scores for prompt in OBJECTIVE_PROMPTS):
            scores["miou"] = sum(scores[prompt] for prompt in OBJECTIVE_PROMPTS) / len(OBJECTIVE_PROMPTS)
        status, state = "FINISHED", "complete"
        return Outcome(trained.progress.best_score, trained.progress.best_epoch, scores)
    except pruned:
        over()
        status, state = "FINISHED", "pruned"
        raise
    except TRIAL_ERRORS:
        over()
        status, state = "FAILED", "failed"
        raise
    finally:
        tracker.set_tags({"sweep.state": state})
        tracker.close(status)
        free_memory()


def trial_folder(config: Config, bench: Bench, place: Place, values: Mapping[str, Value]) -> Path:
    """Scratch of a trial, by its values: another attempt at the same ones goes on there."""
    return place.scratch / "trials" / bench.run_key(trial_config(config, values))


def forget(config: Config, bench: Bench, place: Place, values: Mapping[str, Value]) -> None:
    """Remove what a trial that ended left in scratch; its best weights, if they are the best of all, are kept."""
    shutil.rmtree(trial_folder(config, bench, place, values), ignore_errors=True)


def free_memory() -> None:
    """Give back what the last training held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_best(trained: Trained, config: Config, place: Place, number: int, values: Mapping[str, Value]) -> None:
    """Keep a trial's weights where they are the best so far on this machine; there is one file of them."""
    score = trained.progress.best_score
    with place.lock("best.lock"):
        before = best_note(place)
        if not before or (score, -number) > (before["value"], -before["trial"]):
            place.out.mkdir(parents=True, exist_ok=True)
            save_sam(trained.sam, place.out / BEST_NAME, name=config.model.name, metadata={"trial": str(number)})
            note = {"trial": number, "value": score, "values": dict(values)}
            write_text_atomic(place.out / BEST_NOTE, json.dumps(note))


def best_note(place: Place) -> dict[str, Any]:
    """Trial, value and values of the weights that are kept on this machine; empty where there are none."""
    path = place.out / BEST_NOTE
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


WINNER, START, FULL = "winner", "start", "full"  # kinds of `Job`


@dataclass(frozen=True)
class Job:
    """A training at the full number of epochs, after the trials.

    Attributes:
        which: winner or start, trained anew for the comparison; full, a trial again, to see how well its budget ranks.
        seed: of the training. values: of the search space.
    """

    which: str
    seed: int
    values: dict[str, Value]

    def path(self, place: Place) -> Path:
        """Its figures."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:8]
        return place.scratch / "confirm" / f"{digest}-{FULL if self.which == FULL else self.seed}.csv"


def do(config: Config, bench: Bench, place: Place, job: Job) -> None:
    """Train a job's values, and write its figures: of a comparison on unseen images, of a trial's as the trial had."""
    own = configured(config, {"train.select": config.sweep.objective, "train.seed": job.seed, **job.values}, job.which)
    folder = place.scratch / "confirm" / bench.run_key(own)
    with silent():
        trained = train(own, bench.data(own), bench.weights, folder=folder, log=lambda *_: None, say=lambda _: None)
        if job.which == FULL:
            rows = pd.DataFrame({"value": [trained.progress.best_score]})
        else:
            rows = score_held(own, bench, trained.sam, model=job.which, run=str(job.seed))
    write_text_atomic(job.path(place), rows.to_csv(index=False))
    shutil.rmtree(folder, ignore_errors=True)
    free_memory()
