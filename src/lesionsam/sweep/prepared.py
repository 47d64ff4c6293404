"""Prepare what all trials share: samples, of which some development images stay unseen, and pretrained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config, config_digest, flatten, read_yaml
from lesionsam.config.schema import FolderData
from lesionsam.config.schema_method import ContrastiveMethod, EllipseTarget, PriorTarget
from lesionsam.config.zoo import known
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.build import build_method, prepare_sam
from lesionsam.experiment.resume import training_digest
from lesionsam.experiment.run import Data, input_frame, open_data
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.pipeline.paths import pretrained_weights
from lesionsam.prompts import draw_prompts
from lesionsam.sweep.space import Dimension
from lesionsam.training.gradients import step_generator
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import read_image, read_mask

BOXES, INDEX, PRETRAINED, CACHE, LOCK = (
    Path("data/boxes.csv"),
    Path("data/raw/index.csv"),
    Path("models/pretrained"),
    Path(".cache/frames"),
    Path("dvc.lock"),
)
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
            images = {key: row["sha256"] for key, row in read_index(INDEX).items()}
            pairs = [
                f"{s.image_id} {images[s.image_id]} {sha256_file(s.mask_path) if s.mask_path else None}"
                for s in sorted((*self.seen, *self.held), key=lambda s: (s.image_id, s.lesion_id))
            ]
            text = " ".join([sha256_file(BOXES), sha256_file(self.weights), *pairs])
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
    if not LOCK.exists():
        return []
    stages, now, found = read_yaml(LOCK).get("stages", {}), flatten(config), []
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


def idle_gate(config: Config, prepared: PreparedData, space: Sequence[Dimension]) -> str | None:
    """Return why the gate's threshold changes nothing on these images, None if it does or if training decides that.

    If the target is made from image and boxes alone, its entropy is known before training.
    """
    key, method = "method.gate.entropy_thresh", config.method
    dimension = next((d for d in space if d.key == key), None)
    others = [
        d.key for d in space if d.key.startswith(("method.target.", "method.gate.", "method.name")) and d.key != key
    ]
    if (
        dimension is None
        or others
        or not isinstance(method, ContrastiveMethod)
        or not isinstance(method.target, PriorTarget | EllipseTarget)
    ):
        return None
    entropies = target_entropies(config, prepared)
    thresholds = [float(v) for v in dimension.choices] or [dimension.low, dimension.high]
    trusted = [int((entropies <= threshold).sum()) for threshold in (min(thresholds), max(thresholds))]
    if trusted[0] != trusted[1]:
        return None
    return (
        f"from {min(thresholds):g} to {max(thresholds):g} the gate trusts the same {trusted[0]} of {len(entropies)} "
        f"images (entropy of their targets {entropies.min():.3f} to {entropies.max():.3f})"
    )


@torch.no_grad()
def target_entropies(config: Config, prepared: PreparedData) -> np.ndarray:
    """Return the (N,) mean binary entropy of every training image's target, nats, as the gate sees it."""
    device = torch_device(config.runtime.device)
    data = prepared.data(config).train
    sam = prepare_sam(config, prepared.weights, device)
    method, _ = build_method(config, sam, prepared.weights, data, device)
    if not isinstance(method, Contrastive):
        raise ValueError("only the contrastive method has a gate")
    found = []
    for batch in data.batches(config.train.batch_size):
        batch = batch.to(device)
        prompts = draw_prompts("box", batch.big_boxes, batch.small_boxes, num_points=1, generator=step_generator(0, 0))
        found.append(method.target(batch, None, prompts)[1].cpu().numpy())
    return np.concatenate(found)


def score_held(config: Config, prepared: PreparedData, sam: Sam, *, model: str, run: str) -> pd.DataFrame:
    """Return scores at original size on the development images that no trial saw: model, run, image_id, prompt, score.

    score is the IoU where there are masks, else the mean of core coverage, consistency and 1 - leakage.
    """
    threshold = isinstance(config.data, FolderData) and config.data.threshold_masks
    rows = evaluate_model(
        sam,
        prepared.held,
        lambda sample: read_image(sample.image_path),
        partial(_mask, threshold=threshold) if prepared.has_masks else None,
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


def _mask(sample: Sample, *, threshold: bool) -> np.ndarray | None:
    if sample.mask_path is None:
        return None
    return read_mask(sample.mask_path, (sample.width, sample.height), threshold=threshold)


def fixed_values(config: Config, space: Sequence[Dimension], prepared: PreparedData) -> dict[str, object]:
    """Return what all trials of a study share, flat: other keys of model, method and train, scoring, data."""
    searched = {dimension.key for dimension in space}
    kept = ("model.", "method.", "train.", "sweep.objective", "sweep.epochs", "sweep.holdout", "evaluate.seed")
    values: dict[str, object] = {
        key: value for key, value in flatten(config).items() if key.startswith(kept) and key not in searched
    }
    return values | {"data and weights": prepared.digest()}
