"""Step train: two boxes and a pretrained SAM -> models/adapted/, resumable, tracked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config, config_digest
from lesionsam.data.index import read_index
from lesionsam.experiment.build import strategy_of
from lesionsam.experiment.history import History
from lesionsam.experiment.launch import check_agreement, is_joining, joined, launch, num_processes
from lesionsam.experiment.pictures import draw_epoch
from lesionsam.experiment.resources import cost
from lesionsam.experiment.resume import begin, finish, origin_of, run_key, training_digest
from lesionsam.experiment.run import (
    SELECTION_SEED,
    Data,
    Trained,
    input_frame,
    open_data,
    selection_key,
    train,
    use_notes,
)
from lesionsam.experiment.tracked import grouped, open_training
from lesionsam.models.checkpoint import ORIGIN, read_weights, save_sam, weights_metadata
from lesionsam.models.finetuned import save_tuned
from lesionsam.models.sam import Sam
from lesionsam.parallel.collectives import barrier, is_main, world_size
from lesionsam.pipeline.paths import ADAPTED, BOARDS, BOXES, CACHE, INDEX, SCRATCH, pretrained_weights
from lesionsam.tracking.lineage import lineage_tags, repository_root
from lesionsam.tracking.naming import reproduction
from lesionsam.tracking.tensorboard import Board
from lesionsam.tracking.tracker import DESCRIPTION_TAG, NullTracker
from lesionsam.training.state import save_head
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import sha256_file, write_json_atomic
from lesionsam.utils.locks import file_lock
from lesionsam.utils.processes import exit_with_parent, graceful_stop
from lesionsam.utils.progress import silent

PARAMS = Path("params.yaml")


def train_model(config: Config) -> None:
    """Train in a scratch folder keyed by parameters, data and weights; move the result into place when it is whole.

    A call that was cut short is resumed by the next one under the same parameters, data and code. Several processes
    train together where `runtime.devices` or `runtime.nodes` says so, or where torchrun or Slurm has started them.

    Args:
        config: what params.yaml of the current folder holds.
    """
    if is_joining():
        with joined(config):
            if is_main():
                _train_main(config)
            else:
                with silent():
                    _train_beside(config)
            barrier()
        return
    exit_with_parent()
    if num_processes(config) > 1:
        launch(config)
    else:
        _train_main(config)


def _agree(config: Config, folder: Path) -> None:
    """Check that all processes train the same: the first one has prepared the run's folder before."""
    if world_size() > 1:
        sections = ("model", "method", "train", "data", "evaluate")
        check_agreement(
            {"params.yaml": config_digest(config, sections), "code": training_digest(), "data or weights": folder.name}
        )


def _inputs(config: Config) -> tuple[Path, list[Sample], Path]:
    """Return the pretrained weights, the samples of both splits, and the scratch folder of their run."""
    weights = pretrained_weights()
    samples = [s for s in read_boxes(BOXES, read_index(INDEX), root=Path.cwd()) if s.split != "test"]
    return weights, samples, SCRATCH / "train" / run_key(config, samples, weights)


def _train_beside(config: Config) -> None:
    """Train as one of several processes that is not the first: compute, write nothing."""
    weights, samples, folder = _inputs(config)
    _agree(config, folder)
    barrier()  # the first process has decoded the images
    data = open_data(config, samples, frame=input_frame(config, weights), cache=CACHE)
    with graceful_stop(is_quiet=True) as stop_requested:
        train(
            config,
            data,
            weights,
            folder=folder,
            log=lambda values, step: None,
            say=lambda line: None,
            stop_requested=stop_requested,
        )


def _train_main(config: Config) -> None:
    """Train, write what models/adapted holds and track the run."""
    weights, samples, folder = _inputs(config)
    with file_lock(folder.with_name("lock"), "training"):
        begin(folder, origin_of(config, samples, weights))
        _agree(config, folder)
        data = open_data(config, samples, frame=input_frame(config, weights), cache=CACHE)
        barrier()
        score = selection_key(config, data.dev)  # `objective`, a mean IoU, or `label_free`
        with open_training(config, folder / "run", {"data.digest": sha256_file(BOXES)[:16]}) as tracker:
            trained = _train(config, data, weights, folder, tracker)
        for name in ("run.json", "metrics.jsonl"):
            if (folder / "run" / name).exists():
                shutil.copy2(folder / "run" / name, folder / "out" / name)
        shutil.rmtree(ADAPTED, ignore_errors=True)
        ADAPTED.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "out", ADAPTED)
        finish(folder)
    progress = trained.progress
    print(f"best {score} {progress.best_score:.4f} at epoch {progress.best_epoch}; weights in {ADAPTED}/")


def _train(config: Config, data: Data, weights: Path, folder: Path, tracker: NullTracker) -> Trained:
    """Train, and leave everything that models/adapted will hold in `folder`/out."""
    out, history, score = folder / "out", History(folder / "history.csv"), selection_key(config, data.dev)
    for split, dataset in (("train", data.train), ("dev", data.dev)):
        tracker.log_dataset(f"{config.data.source}-{split}", sha256_file(BOXES)[:16], str(BOXES), split)
        print(f"{split}: {len(dataset)} lesions")

    def draw(sam: Sam, epoch: int) -> None:
        path = folder / "overlays" / f"epoch_{epoch:04d}.png"
        how = {"count": config.train.overlays, "num_points": config.method.num_points, "seed": SELECTION_SEED}
        draw_epoch(path, sam, data.dev, **how, epoch=epoch)
        tracker.log_picture(path, "dev_overlays", epoch)

    shutil.rmtree(out, ignore_errors=True)
    with ExitStack() as stack:
        logs = [lambda values, step: tracker.log(grouped(values), step), history.log]
        if config.tracking.tensorboard:
            board = Board(BOARDS / folder.name)
            stack.callback(board.close)
            logs.append(board.log)

        def log(values: Mapping[str, float], step: int) -> None:
            for each in logs:
                each(values, step)

        stop_requested = stack.enter_context(graceful_stop())
        trained = train(
            config,
            data,
            weights,
            folder=folder,
            log=log,
            say=lambda line: print(line, flush=True),
            after_epoch=draw if config.train.overlays else None,
            save_last=lambda sam: save_sam(sam, out / "last.safetensors", name=config.model.name),
            stop_requested=stop_requested,
        )
    _write_outputs(out, folder, config, trained, weights)
    tracker.log_artifact(PARAMS, "config")
    tracker.set_tags({DESCRIPTION_TAG: reproduction(lineage_tags(repository_root(Path.cwd())))})
    scores = {f"dev/{score}": trained.progress.best_score}
    tracker.log_checkpoint(out / "best.safetensors", "lesionsam", scores, trained.progress.step)
    return trained


def _write_outputs(out: Path, folder: Path, config: Config, trained: Trained, weights: Path) -> None:
    """Write what models/adapted/ holds beside the last epoch's weights and the run's record.

    `tuned.safetensors` is the small file of what was trained, beside `weights`, where the encoder's own were not.
    """
    notes = {"method": config.method.name, "best_epoch": str(trained.progress.best_epoch)}
    notes |= use_notes(config, trained)
    notes |= {key: value for key, value in weights_metadata(weights).items() if key in ORIGIN}
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
    shutil.copy2(PARAMS, out / PARAMS.name)
    shutil.copy2(folder / "history.csv", out / "history.csv")
    if (folder / "overlays").exists():
        shutil.copytree(folder / "overlays", out / "overlays")
