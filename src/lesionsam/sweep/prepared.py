"""Prepare what all trials share: samples, of which some development images stay unseen, and pretrained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config, config_digest, flatten, read_yaml
from lesionsam.config.schema import FolderData
from lesionsam.config.zoo import known
from lesionsam.data.contents import load_image, load_mask, samples_digest
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.resume import training_digest
from lesionsam.experiment.run import Data, input_frame, open_data
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.pipeline.paths import BOXES, CACHE, INDEX, PRETRAINED, pretrained_weights
from lesionsam.sweep.space import Dimension
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import sha256_file

DVC_LOCK = Path("dvc.lock")
PREPARING = ("download", "boxes", "weights")  # stages of dvc.yaml


@dataclass
class PreparedData:
    """Samples and weights that `dvc repro` prepared; processes share decoded frames through their cache.

    Attributes:
        seen: samples of train and of the development images that trials are scored on. held: those that no trial sees.
    """

    seen: list[Sample]
    held: list[Sample]
    weights: Path
    _data: dict[int, Data] = field(default_factory=dict)
    _digest: str = ""

    @property
    def has_masks(self) -> bool:
        """Return whether every development image has a true mask."""
        return all(s.mask_path is not None for s in (*self.seen, *self.held) if s.split == "dev")

    def data(self, config: Config) -> Data:
        """Return training images, and the development images that trials are scored on."""
        size = config.model.image_size
        if size not in self._data:
            self._data[size] = open_data(config, self.seen, frame=input_frame(config, self.weights), cache=CACHE)
        return self._data[size]

    def digest(self) -> str:
        """Return the hash of boxes, weights, images and masks; read once."""
        if not self._digest:
            text = f"{samples_digest((*self.seen, *self.held))} {sha256_file(self.weights)}"
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._digest

    def run_key(self, config: Config) -> str:
        """Return the name of a training's scratch folder: hash of parameters, data, pretrained weights and code.

        After a change of code an unfinished training so begins anew.
        """
        text = f"{config_digest(config, ('model', 'method', 'train'))} {self.digest()} {training_digest()}"
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def open_prepared(config: Config) -> PreparedData:
    """Return the samples that `dvc repro` prepared, without the test split.

    Raises:
        UserError: nothing is prepared yet, or no development images are left to score on.
    """
    for path, stages in ((INDEX, "boxes weights"), (BOXES, "boxes weights"), (PRETRAINED, "weights")):
        if not path.exists():
            raise UserError(
                f"{path}: expected what the pipeline prepares, found nothing; run `dvc repro {stages}` first"
            )
    if changed := changed_since_preparation(config):
        raise UserError(f"{changed[0]}; run `dvc repro boxes weights` with these parameters first")
    samples = [s for s in read_boxes(BOXES, read_index(INDEX), root=Path.cwd()) if s.split in ("train", "dev")]
    held = held_out([s.image_id for s in samples if s.split == "dev"], config.sweep.holdout)
    return PreparedData(
        [s for s in samples if s.split == "train" or s.image_id not in held],
        [s for s in samples if s.split == "dev" and s.image_id in held],
        pretrained_weights(PRETRAINED),
    )


def changed_since_preparation(config: Config) -> list[str]:
    """Return keys with another value than in DVC's record of the preparing stages; none without a record."""
    if not DVC_LOCK.exists():
        return []
    stages, now, found = read_yaml(DVC_LOCK).get("stages", {}), flatten(config), []
    for stage in PREPARING:
        for name, value in stages.get(stage, {}).get("params", {}).get("params.yaml", {}).items():
            then = flatten({name: value})
            here = {key: None for key in now if key == name or key.startswith(f"{name}.")}
            for key in sorted(here | then, key=lambda k: k not in here or k not in then):  # those of both first
                if then.get(key) != now.get(key):
                    was, is_now = (held.get(key, "nothing") for held in (then, now))
                    found.append(f"{key}: expected {was}, which data and models were prepared with, got {is_now}")
    return found


def held_out(image_ids: Sequence[str], share: float) -> set[str]:
    """Return the share of the development images that no trial sees, by hash of the id; at least one on either side."""
    ids = sorted(set(image_ids), key=lambda name: hashlib.sha256(f"sweep {name}".encode()).hexdigest())
    count = min(max(round(share * len(ids)), 1), len(ids) - 1) if share > 0 else 0
    return set(ids[: max(count, 0)])


def zero_shot(config: Config, prepared: PreparedData) -> dict[str, float]:
    """Return scores of the pretrained model on the images that trials are scored on."""
    device = torch_device(config.runtime.device)
    sam = load_sam(config.model.name, prepared.weights, image_size=config.model.image_size).to(device)
    return quick_evaluate(
        sam,
        prepared.data(config).dev,
        prompts=list(OBJECTIVE_PROMPTS),
        seed=config.evaluate.seed,
        batch_size=config.evaluate.batch_size,
        device=device,
        num_points=config.method.num_points,
    )


def num_blocks(config: Config, prepared: PreparedData) -> int:
    """Return the number of transformer blocks of the prepared model's encoder."""
    if known(config.model.name).side:
        return known(config.model.name).blocks
    return len(load_sam(config.model.name, prepared.weights, image_size=config.model.image_size).blocks)


def score_held(config: Config, prepared: PreparedData, sam: Sam, *, model: str, run: str) -> pd.DataFrame:
    """Return scores at original size on the development images that no trial saw: model, run, image_id, prompt, score.

    score is the IoU where there are masks, else the mean of core coverage, consistency and 1 - leakage.
    """
    threshold = isinstance(config.data, FolderData) and config.data.threshold_masks
    rows = evaluate_model(
        sam,
        prepared.held,
        load_image,
        partial(load_mask, threshold=threshold) if prepared.has_masks else None,
        prompts=list(OBJECTIVE_PROMPTS),
        seed=config.evaluate.seed,
        batch_size=config.evaluate.batch_size,
        num_points=config.method.num_points,
        device=torch_device(config.runtime.device),
        model=model,
        run=run,
    ).rows
    score = (
        rows["iou"] if prepared.has_masks else (rows["core_coverage"] + rows["consistency"] + 1 - rows["leakage"]) / 3
    )
    return rows[["model", "run", "image_id", "prompt"]].assign(score=score)


def fixed_values(config: Config, space: Sequence[Dimension], prepared: PreparedData) -> dict[str, object]:
    """Return what all trials of a study share, flat: other keys of model, method and train, scoring, data."""
    searched = {dimension.key for dimension in space}
    kept = ("model.", "method.", "train.", "sweep.objective", "sweep.epochs", "sweep.holdout", "evaluate.seed")
    values: dict[str, object] = {
        key: value for key, value in flatten(config).items() if key.startswith(kept) and key not in searched
    }
    return values | {"data and weights": prepared.digest()}
