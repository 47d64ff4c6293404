"""The data engine, `lesionsam engine`: a round trains on what is labelled, proposes for the rest, and reports.

Between two rounds people review on the annotation page. Everything is files: the table of boxes that `dvc repro` reads
too, the journal, the proposals, and per round the weights and the figures.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.model import Model
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.products import Products, masks_folder
from lesionsam.annotation.proposals import doubt
from lesionsam.annotation.records import ACCEPTED, AUTOMATIC, OPEN, ImageState, Lesion
from lesionsam.annotation.review import Found, Proposals, look, proposals_path, usual_areas
from lesionsam.annotation.store import Change, Store, utc_now
from lesionsam.annotation.table import outside
from lesionsam.boxes.annotator import annotate
from lesionsam.config.load import Config, with_values
from lesionsam.data.index import dev_ids, id_hash
from lesionsam.engine.history import (
    OUTCOMES,
    Reviewed,
    Round,
    calibrated,
    count_sources,
    read_rounds,
    reviewed_since,
    stage_of,
    write_rounds,
)
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.build import trained_prompts
from lesionsam.experiment.resume import run_key
from lesionsam.experiment.run import input_side, open_data, train
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.prompts import TRAINED_WITH
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.images import IMAGE_SUFFIXES, image_size, read_image, read_mask
from lesionsam.utils.progress import progress

LEAST = 8  # images with boxes that a round needs
DEV_SHARE = 0.15  # of the labelled images that select the best epoch
WHO = "engine"
SIMULATED: dict[str, Any] = {"margin": (0.10, 0.20), "core": (0.45, 0.55), "jitter": 0.03, "min_area": 16}
SEED = 0  # of boxes simulated from masks, as in presets/demo.yaml and in the evidence, like `SIMULATED`


@dataclass(frozen=True)
class Place:
    """Where a data engine works.

    Attributes:
        catalogue, table_path: images and their two-box CSV. out: folder of the rounds. start: weights that every round
        begins from. test: folders of images and of masks that quality is measured on, or None.
    """

    catalogue: Catalogue
    table_path: Path
    out: Path
    start: Path
    test: tuple[Path, Path] | None = None


def run_round(
    place: Place,
    config: Config,
    *,
    training: bool = True,
    proposing: bool = True,
    auto: bool = False,
    share: float = 0.9,
    steps: int | None = None,
    say: Callable[[str], None] = print,
) -> Round:
    """One round, resumed where it broke off. The caller holds the lock of the table.

    Order: what people made of the last round's proposals calibrates the doubt up to which the others of the same
    proposals may stand; they are taken (`auto`); then train, propose for the rest, measure.

    Args:
        config: sections model, method, train and evaluate are read. training: False proposes with `place.start` as it
            is. proposing: False trains and measures alone. auto: accept below the calibrated doubt. share: of
            automatically accepted proposals that people would accept unchanged, at least. steps: as many epochs as make
            about so many, whatever is labelled by then; None: `train.epochs`.
    Raises:
        UserError: too few boxes, boxes outside their image, weights that do not fit, a table that cannot be read, test
            images without masks.
    """
    if not 0.5 <= share < 1:
        raise UserError(f"--share: expected a share of at least 0.5 and below 1, got {share:g}")
    tests = pairs_of(*place.test) if place.test is not None else []
    store, pictures, rounds = Store(place.table_path, place.catalogue), Pictures(), read_rounds(place.out)
    number = len(rounds) + 1
    folder = place.out / f"round-{number:02d}"
    judged = judge(place, store, rounds[-1], share) if rounds else Judged()
    if auto and judged.calm:
        _accept(store, judged, pictures)
    weights = _weights(place, store, pictures, config, folder, steps, say) if training else place.start
    model = Model(weights, pictures, device=torch_device(config.runtime.device))
    if proposing:
        propose_all(model, store, pictures, place, say)
    states = store.all_states()
    num_automatic = sum(_taken(state, rounds[-1].at) for state in states) if rounds else 0
    accepted = [each.outcome == ACCEPTED for each in judged.reviewed]
    accepted_share = float(np.mean(accepted)) if accepted else None
    found = Round(
        number,
        utc_now(),
        model.label,
        len(place.catalogue.by_id),
        count_sources(states),
        round(sum(state.all_seconds for state in states), 1),
        {name: sum(each.outcome == name for each in judged.reviewed) for name in OUTCOMES},
        accepted_share,
        judged.limit,
        num_automatic,
        sum(store.state(image_id).status == OPEN for image_id in place.catalogue.by_id),
        rounds[-1].stage
        if rounds and accepted_share is None
        else stage_of(accepted_share, len(judged.calm) + judged.num_taken, judged.num_open + judged.num_taken),
        quality_on(tests, weights, config) if tests else {},
        auto,
    )
    write_rounds(place.out, [*rounds, found])
    if num_automatic:
        try:
            Products(masks_folder(place.table_path), place.catalogue, store, model).write_all()
        except OSError as error:
            say(
                f"warning: masks cannot be written: {error}; `lesionsam annotate` writes them when it is opened with "
                "this model"
            )
    return found


@dataclass(frozen=True)
class Judged:
    """What the reviews since the last round say of its proposals.

    Attributes:
        reviewed: decided by people. limit: doubt up to which the others may stand unseen; None: none may.
        calm: those that it takes, image id -> the proposal. num_open: images to do, calm ones included.
        num_taken: taken already, by a call that broke off. label: of the model that proposed.
    """

    reviewed: Sequence[Reviewed] = ()
    limit: float | None = None
    calm: Mapping[str, Found] = field(default_factory=dict)
    num_open: int = 0
    num_taken: int = 0
    label: str = ""


def judge(place: Place, store: Store, last: Round, share: float) -> Judged:
    """Calibrate on what people have made of the last round's proposals; see `engine_rounds.calibrated`."""
    proposals = Proposals(proposals_path(place.table_path), last.model)
    states, usual = store.all_states(), usual_areas(store, proposals)
    reviewed = reviewed_since(states, proposals, usual, last.at)
    limit = calibrated(reviewed, share)
    waiting = [image_id for image_id in place.catalogue.by_id if store.state(image_id).status == OPEN]
    calm = {}
    for image_id in sorted(waiting, key=id_hash):
        found = proposals.found.get(image_id)
        if limit is not None and found is not None and found.lesion and doubt(found.lesion, usual)[0] <= limit:
            calm[image_id] = found
    return Judged(reviewed, limit, calm, len(waiting), sum(_taken(state, last.at) for state in states), last.model)


def _taken(state: ImageState, since: str) -> bool:
    """Whether the engine accepted a proposal for this image since then."""
    return (
        state.changed_by == WHO
        and state.changed_at > since
        and any(lesion.source == AUTOMATIC for lesion in state.lesions)
    )


def _accept(store: Store, judged: Judged, pictures: Pictures) -> None:
    """Take the calm proposals, as no person's; not where the image file has changed since."""
    digest, _, threshold = judged.label.partition("@")
    for image_id, found in judged.calm.items():
        if found.lesion is None or pictures.stamp(store.catalogue.by_id[image_id]) != found.stamp:
            continue
        boxes = found.lesion.big, found.lesion.small
        lesion = Lesion("0", *boxes, proposed=boxes, model=digest, threshold=float(threshold))
        store.save(
            image_id,
            Change(store.state(image_id).revision, WHO, f"{WHO}-{digest}", lesions=(lesion,), automatic=True),
            found.size,
        )


def _weights(
    place: Place,
    store: Store,
    pictures: Pictures,
    config: Config,
    folder: Path,
    steps: int | None,
    say: Callable[[str], None],
) -> Path:
    """Train on what is labelled; resumed where it broke off, kept where it is done with the same boxes and values."""
    target, key_path = folder / "model.safetensors", folder / "model.key"
    samples = labelled_samples(place.catalogue, store, pictures)
    values: dict[str, object] = {"train.select": "label_free"}
    if steps is not None:
        values["train.epochs"] = epochs_of(samples, steps, config.train.batch_size)
    config = with_values(config, values)
    key = run_key(config, samples, place.start)
    if target.exists() and key_path.exists() and key_path.read_text(encoding="utf-8") == key:
        return target
    scratch = folder / f"scratch-{key}"
    data = open_data(config, samples, side=input_side(config, place.start), cache=scratch / "frames")
    trained = train(config, data, place.start, folder=scratch, log=lambda values, step: None, say=say)
    save_sam(
        trained.sam,
        target,
        name=config.model.name,
        metadata={"method": config.method.name, TRAINED_WITH: trained_prompts(config)},
    )
    write_text_atomic(key_path, key)
    for each in folder.glob("scratch-*"):
        shutil.rmtree(each)
    return target


def epochs_of(samples: Sequence[Sample], steps: int, batch_size: int) -> int:
    """As many epochs of the training samples as make about so many steps, at least one."""
    batches = -(-sum(sample.split == "train" for sample in samples) // batch_size)
    return max(1, round(steps / max(1, batches)))


def labelled_samples(catalogue: Catalogue, store: Store, pictures: Pictures) -> list[Sample]:
    """Every lesion with boxes whose image is at hand, split by hash of the image's id.

    Raises:
        UserError: too few, or boxes that lie outside their image.
    """
    states = [state for state in store.all_states() if state.lesions and state.image_id in catalogue.by_id]
    if len(states) < LEAST:
        raise UserError(
            f"{store.path}: {len(states)} images with boxes; a round needs at least {LEAST}; draw some "
            "with `lesionsam annotate`"
        )
    dev = dev_ids((state.image_id for state in states), max(DEV_SHARE, 2 / len(states)))
    samples = []
    for state in sorted(states, key=lambda state: state.image_id):
        entry = catalogue.by_id[state.image_id]
        width, height = pictures.size(entry)
        if wrong := [lesion.lesion_id for lesion in state.lesions if outside(lesion.boxes, width, height)]:
            raise UserError(
                f"{store.path}: {state.image_id!r}, lesion {wrong[0]}: lies outside the image of {width}x"
                f"{height} px; boxes are pixels of the upright image; correct the row or delete it"
            )
        samples += [
            Sample(
                state.image_id,
                lesion.lesion_id,
                "dev" if state.image_id in dev else "train",
                entry.path,
                None,
                width,
                height,
                np.array(lesion.big),
                np.array(lesion.small),
            )
            for lesion in state.lesions
        ]
    return samples


def propose_all(model: Model, store: Store, pictures: Pictures, place: Place, say: Callable[[str], None]) -> None:
    """Proposals for every image to do; those that are there are kept."""
    proposals = Proposals(proposals_path(place.table_path), model.label)
    waiting = [
        entry
        for entry in place.catalogue.by_id.values()
        if store.state(entry.image_id).status == OPEN and entry.image_id not in proposals.found
    ]
    faults = 0
    for entry in progress(waiting, total=len(waiting), title="proposing"):
        found = _look(model, pictures, entry)
        if found is None:
            faults += 1
        else:
            proposals.add(found)
    if faults:
        say(f"{faults} images could not be read; each is named above")


def _look(model: Model, pictures: Pictures, entry: Entry) -> Found | None:
    try:
        return look(model, pictures, entry)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return None


def quality_on(samples: Sequence[Sample], weights: Path, config: Config) -> dict[str, float]:
    """Mean IoU at original size on pairs of image and mask, by prompt, and `objective`, the mean of the prompts."""
    figures = evaluate_model(
        load_sam(None, weights),
        samples,
        lambda s: read_image(s.image_path),
        lambda s: read_mask(s.mask_path, (s.width, s.height)) if s.mask_path else None,
        prompts=OBJECTIVE_PROMPTS,
        seed=config.evaluate.seed,
        batch_size=config.evaluate.batch_size,
        num_points=config.method.num_points,
        device=torch_device(config.runtime.device),
        model="round",
        run="0",
    ).rows
    means = {str(prompt): float(value) for prompt, value in figures.groupby("prompt")["iou"].mean().items()}
    return {**means, "objective": float(np.mean([means[prompt] for prompt in OBJECTIVE_PROMPTS]))}


def pairs_of(images: Path, masks: Path) -> list[Sample]:
    """Images and masks of the same names (folders in them included), boxes simulated from the masks.

    Raises:
        UserError: an image without a mask, or a mask without a lesion.
    """
    found, index = masks_of(masks), {}
    for entry in Catalogue([images]).by_id.values():
        mask_path = found.get(entry.image_id.lower())
        if mask_path is None:
            raise UserError(f"{entry.path}: no mask of its name in {masks}; --test needs pairs")
        width, height = image_size(entry.path)
        index[entry.image_id] = {
            "split": "test",
            "image_path": str(entry.path),
            "mask_path": str(mask_path),
            "width": width,
            "height": height,
        }
    return annotate(index, root=Path(), seed=SEED, **SIMULATED)


def masks_of(folder: Path) -> dict[str, Path]:
    """Image id in lower case -> mask file, folders in the folder included."""
    return {
        path.stem.lower().removesuffix("_segmentation"): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    }


def limit_threads(config: Config) -> None:
    """Threads of torch, as params.yaml says."""
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
