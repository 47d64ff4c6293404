"""Config -> objects -> a trained model: where configuration stops.

Shared by the train stage, the sweep and the evidence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.boxes.prior import outline_offset
from lesionsam.config.load import Config, config_digest
from lesionsam.config.schema import FolderData
from lesionsam.config.schema_method import SupervisedMethod
from lesionsam.data.augment import Distortion
from lesionsam.data.dataset import Batches, LesionDataset, open_dataset
from lesionsam.data.frames import PRIOR_SCALE
from lesionsam.data.loader import Loader
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import OBJECTIVE_PROMPTS
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.experiment_cache import open_caches
from lesionsam.experiment_memory import parts_that_fit
from lesionsam.experiment_parts import build_supervised, contrastive_options, learning_groups, prepare_sam
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.models.trainable import trained_counts
from lesionsam.training.loop import OBJECTIVE, Evaluate, fit
from lesionsam.training.optimizer import schedule_factor
from lesionsam.training.progress import Log
from lesionsam.training.state import Progress, check_disk, load_best
from lesionsam.types import Sample
from lesionsam.utils.files import sha256_file

OFFSET_SAMPLES = 300  # images that the outline offset is found on, at most
OFFSET_SIDE = 128  # longest side of their priors, pixels
SELECTION_SEED = 0  # of the development prompts: the same in every epoch and run; no setting of the evaluation


@dataclass(frozen=True)
class Data:
    """The two splits that a training may read; never the test split.

    Attributes:
        activations: folder of the cache of frozen activations; None: none is kept.
    """

    train: LesionDataset
    dev: LesionDataset
    activations: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A finished run: the student with its best epoch's weights, and how it got there.

    Attributes:
        trained: number of trained parameters.
    """

    sam: Sam
    method: Method
    progress: Progress
    offset: float | None
    trained: int


def torch_device(name: str) -> torch.device:
    """runtime.device -> a device that is there.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"runtime.device: {name!r} asked for, but torch {torch.__version__} finds no GPU; use auto or cpu"
        )
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None


def trained_prompts(config: Config) -> str:
    """The kinds of prompt that a model is trained with, parted by blanks: what its weights file says of itself."""
    return " ".join(kind for kind, share in config.method.prompts.shares().items() if share > 0)


def pretrained_weights(folder: Path) -> Path:
    """The one checkpoint that the weights stage left in models/pretrained.

    Raises:
        UserError: there is none.
    """
    found = [folder / name for name in ("sam.safetensors", "sam.pth") if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder}: expected sam.safetensors or sam.pth, found neither; run `dvc repro weights`")
    return found[0]


def input_side(config: Config, weights: Path) -> int:
    """Side S of the model's input: model.image_size, or the checkpoint's own."""
    return config.model.image_size or int(load_sam(config.model.name, weights).image_encoder.img_size)


def open_data(config: Config, samples: Sequence[Sample], *, side: int, cache: Path) -> Data:
    """Decode the training and development samples (or reopen them).

    Args:
        side: S. cache: folder of decoded frames; activations are kept beside it.
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
            side,
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


def find_offset(data: LesionDataset, looseness: float) -> float:
    """The outline offset of a training set, from its boxes alone; see `box_prior.outline_offset`."""
    stride = max(1, data.side // OFFSET_SIDE)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), OFFSET_SAMPLES)).round().astype(int))
    priors = [np.asarray(data.frames.priors[k, ::stride, ::stride], np.float32) / PRIOR_SCALE for k in chosen]
    boxes = [data.frames.big_boxes[k] / stride for k in chosen]
    sizes = [(int(height) // stride, int(width) // stride) for height, width in (data.frames.sizes[k] for k in chosen)]
    return outline_offset(priors, boxes, looseness, sizes)


def num_steps(config: Config, data: LesionDataset) -> int:
    """Optimiser steps of a whole run on these samples."""
    t = config.train
    return t.epochs * -(-data.batches_per_epoch(t.batch_size) // t.accumulate)


def how_to_train(config: Config, data: LesionDataset) -> dict[str, Any]:
    """What section `train` says of a whole run on these samples, as arguments of `training.fit`."""
    t = config.train
    return {
        "epochs": t.epochs,
        "batch_size": t.batch_size,
        "accumulate": t.accumulate,
        "weight_decay": t.weight_decay,
        "betas": (t.beta1, t.beta2),
        "factor": partial(
            schedule_factor, num_steps=num_steps(config, data), schedule=t.schedule, warmup=t.warmup, final=t.final_lr
        ),
        "clip": t.clip,
        "precision": t.precision,
        "seed": t.seed,
        "augment": t.augment,
        "widen": t.widen,
        "distort": Distortion(**t.distort.model_dump()),
        "patience": t.patience,
    }


def build_method(
    config: Config, sam: Sam, weights: Path, data: LesionDataset, device: torch.device
) -> tuple[Method, float | None]:
    """The configured method around a SAM whose trained parts are selected.

    Returns:
        The method, and the outline offset that it uses (None where its target has none).
    """
    m = config.method
    if isinstance(m, SupervisedMethod):
        return build_supervised(m, sam), None
    target = m.target
    offset = getattr(target, "offset", None)
    found = (
        find_offset(data, getattr(target, "looseness", 0.0))
        if offset == "boxes"
        else float(offset)
        if isinstance(offset, float | int)
        else 0.0
    )
    options = contrastive_options(m, found, round(getattr(target, "teacher_ramp", 0.0) * num_steps(config, data)))
    reference = None
    if m.gamma > 0:
        reference = load_sam(config.model.name, weights, image_size=config.model.image_size).to(device)
        reference.requires_grad_(False).eval()
    torch.manual_seed(config.train.seed)  # the head is the only part that starts at random
    return Contrastive(sam, reference, options), found if offset is not None else None


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
    asked_to_end: Callable[[], int] = lambda: 0,
) -> Trained:
    """One training run, resumed where `folder` holds its state; the model comes back with its best epoch's weights.

    Args:
        weights: the pretrained checkpoint. folder: scratch of this very run; the caller keys it (see `run_key`).
        log: receives (values, step). after_epoch: is shown the model in eval mode after each epoch, for pictures.
        save_last: is shown the model as the last epoch left it. asked_to_end: see `fit`.
    Raises:
        UserError: too little disk for what this run will write, or as `fit`. Interrupted: as `fit`.
    """
    device = torch_device(config.runtime.device)
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    sam = prepare_sam(config, weights, device)
    method, offset = build_method(config, sam, weights, data.train, device)
    counts = trained_counts(method.model)
    num_trained, num_all = sum(counts.values()), sum(p.numel() for p in method.model.parameters())
    say(
        f"training {num_trained:,} of {num_all:,} parameters ("
        + ", ".join(f"{part.replace('_', ' ')} {count:,}" for part, count in counts.items())
        + f") on {len(data.train)} lesions"
        + (f", outline offset {offset:+.2f}" if offset is not None else "")
    )
    log({"parameters": num_all, "parameters_trained": num_trained}, 0)
    steps = num_steps(config, data.train)
    teacher = method.teacher
    if teacher is not None and teacher.decay > 0:
        say(f"teacher: half-life {np.log(2) / -np.log(teacher.decay):.0f} of {steps} steps")
    kept = method.kept.get_submodule("sam")
    parts = parts_that_fit(config, sam, method, device, say)
    check_disk(folder, method)
    with open_caches(config, data.activations, sam, method, device, say) as caches:
        loader = partial(Loader, device=device, num_workers=config.runtime.num_workers)
        evaluate: Evaluate = partial(
            _evaluate,
            sam=kept,
            data=data.dev,
            # An average trains nothing, so that its frozen part is another than what the cache holds.
            batches=loader(data.dev, cache=caches.dev if kept is sam else None),
            config=config,
            device=device,
            after_epoch=after_epoch,
        )
        progress = fit(
            method,
            loader(data.train, cache=caches.train),
            groups=learning_groups(config, method),
            **how_to_train(config, data.train),
            device=device,
            evaluate=evaluate,
            log=log,
            folder=folder,
            parts=parts,
            say=say,
            asked_to_end=asked_to_end,
        )
    if save_last is not None:
        save_last(kept)
    load_best(folder, method.model)
    method.model.eval()
    return Trained(sam, method, progress, offset, num_trained)


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
    key = selection_key(config, data)
    kept = {name: scores[name] for name in (*OBJECTIVE_PROMPTS, "label_free") if name in scores}
    if after_epoch is not None:
        after_epoch(sam, epoch)
    return kept | {OBJECTIVE: scores[key]}


def selection_key(config: Config, dev: LesionDataset) -> str:
    """Which score selects: the true one where asked for and known for every dev image, else the label-free one."""
    return OBJECTIVE if config.train.select == "objective" and dev.has_masks else "label_free"


def run_key(config: Config, boxes_csv: Path, weights: Path) -> str:
    """Name of a run's scratch folder: hash of parameters, data and pretrained weights; hardware is not in it."""
    parts = {
        "config": config_digest(config, ("model", "method", "train")),
        "boxes": sha256_file(boxes_csv),
        "weights": sha256_file(weights),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
