"""Train a model as a configuration says; shared by the train stage, the sweep and the comparison.

Configuration ends here: what this module calls takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.outline import OUTLINE, Outline
from lesionsam.config.load import Config
from lesionsam.config.schema import FolderData
from lesionsam.config.schema_method import SupervisedMethod
from lesionsam.data.dataset import Batches, LesionDataset, open_dataset
from lesionsam.data.loader import Loader
from lesionsam.errors import UserError
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.build import (
    build_method,
    learning_groups,
    num_steps,
    prepare_sam,
    trained_prompts,
    training_settings,
)
from lesionsam.experiment.caches import open_caches
from lesionsam.experiment.resources import memory_limit
from lesionsam.methods.base import Method
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam, sam_of
from lesionsam.models.trainable import trained_counts
from lesionsam.parallel.collectives import is_main, rank, world_size
from lesionsam.prompts import TRAINED_WITH
from lesionsam.training.loop import OBJECTIVE, Evaluate, fit
from lesionsam.training.progress import Log
from lesionsam.training.state import Progress, check_disk, load_best
from lesionsam.types import Frame, Sample
from lesionsam.utils.devices import slow_precision, torch_device

SELECTION_SEED = 0  # of the development prompts, the same in every epoch and run


@dataclass(frozen=True)
class Data:
    """Training and development split; training never reads the test split.

    Attributes:
        activations: folder of the cache of frozen activations; None = no cache.
    """

    train: LesionDataset
    dev: LesionDataset
    activations: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A finished run; `sam` has the weights of the best epoch.

    Attributes:
        outline: correction of the target's prior, None if it has none. trained: number of trained parameters.
    """

    sam: Sam
    method: Method
    progress: Progress
    outline: Outline | None
    trained: int


def use_notes(config: Config, trained: Trained) -> dict[str, str]:
    """Return the metadata that tell predictions how weights were trained, see `DecodeOptions.of_metadata`."""
    notes = {TRAINED_WITH: trained_prompts(config)}
    return notes if trained.outline is None else notes | {OUTLINE: trained.outline.to_text()}


def input_frame(config: Config, weights: Path) -> Frame:
    """Return the frame that the model takes images in, at model.image_size or the checkpoint's own side."""
    return load_sam(config.model.name, weights, image_size=config.model.image_size).frame


def open_data(config: Config, samples: Sequence[Sample], *, frame: Frame, cache: Path) -> Data:
    """Decode the training and development samples, or reopen them from the cache.

    Args:
        frame: that the model takes images in. cache: folder of decoded frames; activations go into a folder beside it.
    Raises:
        UserError: an empty split, or a supervised run on images without masks.
    """
    threshold = isinstance(config.data, FolderData) and config.data.threshold_masks
    sets = {}
    for split in ("train", "dev"):
        chosen = [s for s in samples if s.split == split]
        if not chosen:
            raise UserError(
                f"data/boxes.csv: no rows of split {split!r}; training needs both train and dev "
                "(data.dev_fraction takes dev images out of train)"
            )
        wanted = split == "dev" or isinstance(config.method, SupervisedMethod) or config.method.monitor_masks
        sets[split] = open_dataset(
            chosen,
            frame,
            cache,
            with_masks=wanted,
            threshold_masks=threshold,
            num_workers=config.runtime.num_workers,
            title=f"{split} images",
        )
    if isinstance(config.method, SupervisedMethod) and not sets["train"].has_masks:
        missing = next(s for s in sets["train"].samples if s.mask_path is None)
        raise UserError(
            f"method.name: supervised needs a mask for every training image; {missing.image_id!r} has none "
            "(use method.name: contrastive, which needs none)"
        )
    return Data(sets["train"], sets["dev"], cache.with_name("activations"))


def train(
    config: Config,
    data: Data,
    weights: Path,
    *,
    folder: Path,
    log: Log,
    say: Callable[[str], None] = print,
    after_epoch: Callable[[Sam, int], None] | None = None,
    save_last: Callable[[Sam], None] | None = None,
    stop_requested: Callable[[], int] = lambda: 0,
) -> Trained:
    """Train a model, or resume its training; return it with the weights of its best epoch.

    Args:
        weights: pretrained checkpoint. folder: scratch folder of this run alone, see `resume.run_key`.
        log: receives (values, step). after_epoch: receives the model in eval mode and the epoch, for pictures.
        save_last: receives the model as it is after the last epoch. stop_requested: see `fit`.
    Raises:
        UserError: too little disk space, or as `fit`. Interrupted: as `fit`.
    """
    device = torch_device(config.runtime.device)
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    sam = prepare_sam(config, weights, device)
    method, outline = build_method(config, sam, weights, data.train, device)
    counts = trained_counts(method.model)
    num_trained, num_all = sum(counts.values()), sum(p.numel() for p in method.model.parameters())
    say(
        f"training {num_trained:,} of {num_all:,} parameters ("
        + ", ".join(f"{part.replace('_', ' ')} {count:,}" for part, count in counts.items())
        + f") on {len(data.train)} lesions"
        + ("" if outline is None else f", {outline}")
    )
    for doubt in [] if outline is None else outline.doubts():
        say(f"note: {doubt}")
    if note := slow_precision(config.train.precision, device):
        say(f"note: {note}")
    log({"parameters": num_all, "parameters_trained": num_trained}, 0)
    steps = num_steps(config, data.train)
    teacher = method.teacher
    if teacher is not None and teacher.decay > 0:
        say(f"teacher: half-life {np.log(2) / -np.log(teacher.decay):.0f} of {steps} steps")
    kept = sam_of(method.kept)
    if is_main():
        check_disk(folder, method)
    with memory_limit(device), open_caches(config, data.activations, sam, method, device, say) as caches:
        share = {"rank": rank(), "num_ranks": world_size()}
        loader = partial(Loader, device=device, num_workers=config.runtime.num_workers, **share)
        evaluate: Evaluate = partial(
            _evaluate,
            sam=kept,
            data=data.dev,
            # Nothing of a running average trains: its frozen part differs from the cached one.
            batches=loader(data.dev, cache=caches.dev if kept is sam else None),
            config=config,
            device=device,
            after_epoch=after_epoch,
        )
        progress = fit(
            method,
            loader(data.train, cache=caches.train),
            learning_groups(config, method),
            training_settings(config, data.train),
            evaluate=evaluate,
            objective=selection_key(config, data.dev),
            log=log,
            folder=folder,
            say=say,
            stop_requested=stop_requested,
        )
    if save_last is not None:
        save_last(kept)
    load_best(folder, method.model)
    method.model.eval()
    return Trained(sam, method, progress, outline, num_trained)


def _evaluate(
    epoch: int,
    *,
    sam: Sam,
    data: LesionDataset,
    batches: Batches,
    config: Config,
    device: torch.device,
    after_epoch: Callable[[Sam, int], None] | None,
) -> dict[str, float]:
    scores = quick_evaluate(
        sam,
        batches,
        prompts=list(OBJECTIVE_PROMPTS),
        seed=SELECTION_SEED,
        batch_size=config.evaluate.batch_size,
        device=device,
        num_points=config.method.num_points,
    )
    names = dict.fromkeys((*OBJECTIVE_PROMPTS, "label_free", selection_key(config, data)))
    if after_epoch is not None:
        after_epoch(sam, epoch)
    return {name: scores[name] for name in names if name in scores}


def selection_key(config: Config, dev: LesionDataset) -> str:
    """Return the score that selects the best epoch: label-free unless every development image has a mask."""
    return OBJECTIVE if config.train.select == "objective" and dev.has_masks else "label_free"
