"""Stage train: two boxes and a pretrained SAM -> models/adapted/, resumable, tracked."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config, flatten, load_config
from lesionsam.data.index import read_index
from lesionsam.errors import run_guarded
from lesionsam.experiment.build import strategy_of, trained_prompts
from lesionsam.experiment.pictures import draw_epoch
from lesionsam.experiment.resources import cost
from lesionsam.experiment.resume import begin, finish, origin_of, run_key
from lesionsam.experiment.run import (
    SELECTION_SEED,
    Trained,
    input_side,
    open_data,
    pretrained_weights,
    selection_key,
    train,
)
from lesionsam.models.checkpoint import read_weights, save_sam
from lesionsam.models.finetuned import save_tuned
from lesionsam.models.sam import Sam
from lesionsam.prompts import TRAINED_WITH
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tensorboard import Board
from lesionsam.tracking.tracker import NullTracker, Tracker
from lesionsam.training.loop import OBJECTIVE
from lesionsam.training.state import save_head
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import atomic_write, sha256_file, write_json_atomic
from lesionsam.utils.locks import file_lock
from lesionsam.utils.processes import exit_with_parent, graceful_stop

ROOT = Path.cwd()
OUT, SCRATCH, CACHE = Path("models/adapted"), Path(".scratch/train"), Path(".cache/frames")
BOARDS = Path("tensorboard")


def main() -> None:
    """Train in a scratch folder keyed by parameters, data and weights; move the result into place when it is whole."""
    config = load_config()
    exit_with_parent()
    index, boxes = Path("data/raw/index.csv"), Path("data/boxes.csv")
    weights = pretrained_weights(Path("models/pretrained"))
    samples = read_boxes(boxes, read_index(index), root=ROOT)
    folder = SCRATCH / run_key(config, boxes, weights)
    with file_lock(SCRATCH / "lock", "training"):
        masks = [sample.mask_path for sample in samples if sample.split != "test" and sample.mask_path]
        begin(folder, origin_of(config, index, boxes, weights, masks))
        data = open_data(config, samples, side=input_side(config, weights), cache=CACHE)
        board = Board(BOARDS / folder.name) if config.tracking.tensorboard else None
        tracker = open_tracker(config, folder / "run")
        for split, dataset in (("train", data.train), ("dev", data.dev)):
            tracker.log_dataset(f"{config.data.source}-{split}", sha256_file(boxes)[:16], str(boxes), split)
            print(f"{split}: {len(dataset)} lesions")
        scored = selection_key(config, data.dev)  # `objective`, a mean IoU, or `label_free`
        history: list[dict[str, float]] = read_history(folder / "history.csv")

        def log(values: Mapping[str, float], step: int) -> None:
            if scored != OBJECTIVE:  # logged as dev_label_free already; it is no mean IoU
                values = {name: value for name, value in values.items() if name != f"dev_{OBJECTIVE}"}
            tracker.log(values, step)
            if board is not None:
                board.log(values, step)
            if "epoch" in values:
                history[int(values["epoch"]) - 1 :] = [
                    {"epoch": int(values["epoch"]), "step": step}
                    | {
                        name.removeprefix("train_").removeprefix("dev_"): value
                        for name, value in values.items()
                        if name != "epoch"
                    }
                ]
                write_history(folder / "history.csv", history)

        def after_epoch(sam: Sam, epoch: int) -> None:
            if config.train.overlays:
                path = folder / "overlays" / f"epoch_{epoch:04d}.png"
                draw_epoch(
                    path,
                    sam,
                    data.dev,
                    count=config.train.overlays,
                    num_points=config.method.num_points,
                    seed=SELECTION_SEED,
                    epoch=epoch,
                )
                tracker.log_picture(path, "dev_overlays", epoch)

        status = "FAILED"
        try:
            shutil.rmtree(folder / "out", ignore_errors=True)
            with graceful_stop() as stop_requested:
                trained = train(
                    config,
                    data,
                    weights,
                    folder=folder,
                    log=log,
                    say=lambda line: print(line, flush=True),
                    after_epoch=after_epoch,
                    save_last=lambda sam: save_sam(sam, folder / "out" / "last.safetensors", name=config.model.name),
                    stop_requested=stop_requested,
                )
            write_outputs(folder / "out", folder, config, trained, weights)
            tracker.log_artifact(Path("params.yaml"), "config")
            tracker.log_checkpoint(
                folder / "out" / "best.safetensors",
                "lesionsam",
                {scored: trained.progress.best_score},
                trained.progress.step,
            )
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.close(status, sys.exc_info()[1])
            if board is not None:
                board.close()
        for name in ("run.json", "metrics.jsonl"):
            if (folder / "run" / name).exists():
                shutil.copy2(folder / "run" / name, folder / "out" / name)
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "out", OUT)
        finish(folder)
    print(f"best {scored} {trained.progress.best_score:.4f} at epoch {trained.progress.best_epoch}; weights in {OUT}/")


def open_tracker(config: Config, folder: Path) -> NullTracker:
    """The run's tracker; without tracking, only metrics.jsonl is written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not config.tracking.enabled:
        return NullTracker(folder)
    tags = {
        "method": config.method.name,
        "model": config.model.name,
        "data": config.data.source,
        "data.digest": sha256_file(Path("data/boxes.csv"))[:16],
    }
    return Tracker.open(
        folder,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        root=repository_root(ROOT),
        run_name=f"{config.method.name}-{config.model.name}-{config.data.source}",
        params=flatten(config),
        tags=tags,
        system_metrics=config.tracking.system_metrics,
    )


def write_outputs(out: Path, folder: Path, config: Config, trained: Trained, weights: Path) -> None:
    """What models/adapted/ holds beside the last epoch's weights, the run's record and its points.

    `tuned.safetensors` is the small file of what was trained, beside `weights`, where the encoder's own were not.
    """
    notes = {"method": config.method.name, "best_epoch": str(trained.progress.best_epoch)}
    notes[TRAINED_WITH] = trained_prompts(config)
    save_sam(trained.sam, out / "best.safetensors", name=config.model.name, metadata=notes)
    if (strategy := strategy_of(config)).encoder != "blocks":
        save_tuned(
            trained.sam,
            out / "tuned.safetensors",
            name=config.model.name,
            strategy=strategy,
            base=weights,
            base_state=read_weights(weights)[0],
        )
    save_head(trained.method, out / "head.safetensors")
    write_json_atomic(out / "cost.json", cost(trained.progress, torch_device(config.runtime.device)))
    shutil.copy2("params.yaml", out / "params.yaml")
    shutil.copy2(folder / "history.csv", out / "history.csv")
    if (folder / "overlays").exists():
        shutil.copytree(folder / "overlays", out / "overlays")


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of a resumed run's history; none for a new one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Whole numbers stay whole, so that a resumed run writes the same text as an uninterrupted one.
    return [{k: int(v) if v.isdigit() else float(v) for k, v in row.items() if v} for row in rows]


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """One row per epoch, atomically."""
    names = list(dict.fromkeys([*(name for row in rows for name in row), OBJECTIVE]))  # the plot of dvc.yaml reads it
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_guarded(main)
