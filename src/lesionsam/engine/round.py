"""Run one round of the data engine: train on the labelled images, propose for the others, report.

People review on the annotation page between two rounds. All state is in files: the box table that `dvc repro` reads
too, the journal, the proposals, and per round the weights and figures.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.model import Model
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.proposals import doubt
from lesionsam.annotation.records import ACCEPTED, AUTOMATIC, OPEN, ImageState, Lesion
from lesionsam.annotation.review import ImageProposal, Proposals, confirmed_log_areas, proposals_path, propose_for_image
from lesionsam.annotation.store import Change, Store, utc_now
from lesionsam.annotation.table import outside
from lesionsam.boxes.annotator import SIMULATED, annotate
from lesionsam.config.load import Config, with_values
from lesionsam.data.index import dev_ids, id_hash
from lesionsam.engine.history import (
    OUTCOMES,
    ReviewedProposal,
    Round,
    calibrate_threshold,
    count_sources,
    reached_stage,
    read_rounds,
    reviewed_since,
    write_rounds,
)
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.experiment.resume import run_key
from lesionsam.experiment.run import input_frame, open_data, train, use_notes
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.images import IMAGE_SUFFIXES, image_size, read_image, read_mask
from lesionsam.utils.progress import progress

MIN_LABELLED = 8  # images with boxes that a round needs
DEV_SHARE = 0.15  # of the labelled images that select the best epoch
ENGINE_NAME = "engine"
SEED = 0  # of boxes simulated from masks, as in presets/demo.yaml and in benchmarks/comparison


@dataclass(frozen=True)
class EngineFolders:
    """Inputs and output folder of a data engine.

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
    place: EngineFolders,
    config: Config,
    *,
    training: bool = True,
    proposing: bool = True,
    auto: bool = False,
    share: float = 0.9,
    steps: int | None = None,
    say: Callable[[str], None] = print,
) -> Round:
    """Run one round; resume it if it was interrupted. The caller holds the lock of the table.

    Order: the reviews of the last round's proposals calibrate the doubt up to which the other proposals may be
    accepted; these are accepted (`auto`); then train, propose for the rest, measure.

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
    reviews = summarise_reviews(place, store, rounds[-1], share) if rounds else ReviewSummary()
    if auto and reviews.calm:
        _accept(store, reviews, pictures)
    weights = _weights(place, store, pictures, config, folder, steps, say) if training else place.start
    model = Model(weights, pictures, device=torch_device(config.runtime.device))
    if proposing:
        propose_all(model, store, pictures, place, say)
    states = store.all_states()
    num_automatic = sum(_accepted_since(state, rounds[-1].at) for state in states) if rounds else 0
    accepted = [each.outcome == ACCEPTED for each in reviews.reviewed]
    accepted_share = float(np.mean(accepted)) if accepted else None
    found = Round(
        number,
        utc_now(),
        model.label,
        len(place.catalogue.by_id),
        count_sources(states),
        round(sum(state.all_seconds for state in states), 1),
        {name: sum(each.outcome == name for each in reviews.reviewed) for name in OUTCOMES},
        accepted_share,
        reviews.limit,
        num_automatic,
        sum(store.state(image_id).status == OPEN for image_id in place.catalogue.by_id),
        rounds[-1].stage
        if rounds and accepted_share is None
        else reached_stage(accepted_share, len(reviews.calm) + reviews.num_taken, reviews.num_open + reviews.num_taken),
        quality_on(tests, weights, config) if tests else {},
        auto,
    )
    write_rounds(place.out, [*rounds, found])
    return found


@dataclass(frozen=True)
class ReviewSummary:
    """What the reviews since the last round say about its proposals.

    Attributes:
        reviewed: decided by people. limit: doubt up to which the others may stand unseen; None: none may.
        calm: those that it takes, image id -> the proposal. num_open: images to do, calm ones included.
        num_taken: taken already, by a call that broke off. label: of the model that proposed.
    """

    reviewed: Sequence[ReviewedProposal] = ()
    limit: float | None = None
    calm: Mapping[str, ImageProposal] = field(default_factory=dict)
    num_open: int = 0
    num_taken: int = 0
    label: str = ""


def summarise_reviews(place: EngineFolders, store: Store, last: Round, share: float) -> ReviewSummary:
    """Calibrate on the reviews of the last round's proposals, see `history.calibrate_threshold`."""
    proposals = Proposals(proposals_path(place.table_path), last.model)
    states, usual = store.all_states(), confirmed_log_areas(store, proposals)
    reviewed = reviewed_since(states, proposals, usual, last.at)
    limit = calibrate_threshold(reviewed, share)
    waiting = [image_id for image_id in place.catalogue.by_id if store.state(image_id).status == OPEN]
    calm = {}
    for image_id in sorted(waiting, key=id_hash):
        found = proposals.found.get(image_id)
        if limit is not None and found is not None and found.lesion and doubt(found.lesion, usual)[0] <= limit:
            calm[image_id] = found
    return ReviewSummary(
        reviewed, limit, calm, len(waiting), sum(_accepted_since(state, last.at) for state in states), last.model
    )


def _accepted_since(state: ImageState, since: str) -> bool:
    """Return whether the engine has accepted a proposal for this image since then."""
    return (
        state.changed_by == ENGINE_NAME
        and state.changed_at > since
        and any(lesion.source == AUTOMATIC for lesion in state.lesions)
    )


def _accept(store: Store, reviews: ReviewSummary, pictures: Pictures) -> None:
    """Accept the proposals below the threshold, except where the image file has changed since."""
    digest, _, threshold = reviews.label.partition("@")
    for image_id, found in reviews.calm.items():
        if found.lesion is None or pictures.stamp(store.catalogue.by_id[image_id]) != found.stamp:
            continue
        boxes = found.lesion.big, found.lesion.small
        lesion = Lesion("0", *boxes, proposed=boxes, model=digest, threshold=float(threshold))
        base, change = store.state(image_id).revision, f"{ENGINE_NAME}-{digest}"
        store.save(image_id, Change(base, ENGINE_NAME, change, lesions=(lesion,), automatic=True), found.size)


def _weights(
    place: EngineFolders,
    store: Store,
    pictures: Pictures,
    config: Config,
    folder: Path,
    steps: int | None,
    say: Callable[[str], None],
) -> Path:
    """Train on the labelled images; resume an interrupted training, reuse one with the same boxes and values."""
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
    data = open_data(config, samples, frame=input_frame(config, place.start), cache=scratch / "frames")
    trained = train(config, data, place.start, folder=scratch, log=lambda values, step: None, say=say)
    save_sam(
        trained.sam,
        target,
        name=config.model.name,
        metadata={"method": config.method.name, **use_notes(config, trained)},
    )
    write_text_atomic(key_path, key)
    for each in folder.glob("scratch-*"):
        shutil.rmtree(each)
    return target


def epochs_of(samples: Sequence[Sample], steps: int, batch_size: int) -> int:
    """Return the number of epochs, at least one, that makes about so many steps."""
    batches = -(-sum(sample.split == "train" for sample in samples) // batch_size)
    return max(1, round(steps / max(1, batches)))


def labelled_samples(catalogue: Catalogue, store: Store, pictures: Pictures) -> list[Sample]:
    """Return every lesion with boxes whose image is available, split by hash of the image id.

    Raises:
        UserError: too few, or boxes that lie outside their image.
    """
    states = [state for state in store.all_states() if state.lesions and state.image_id in catalogue.by_id]
    if len(states) < MIN_LABELLED:
        raise UserError(
            f"{store.path}: {len(states)} images with boxes; a round needs at least {MIN_LABELLED}; draw some "
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


def propose_all(
    model: Model, store: Store, pictures: Pictures, place: EngineFolders, say: Callable[[str], None]
) -> None:
    """Propose for every image without boxes that has no proposal of this model."""
    proposals = Proposals(proposals_path(place.table_path), model.label)
    waiting = [
        entry
        for entry in place.catalogue.by_id.values()
        if store.state(entry.image_id).status == OPEN and entry.image_id not in proposals.found
    ]
    faults = 0
    for entry in progress(waiting, total=len(waiting), title="proposing"):
        try:
            proposals.add(propose_for_image(model, pictures, entry))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            faults += 1
    if faults:
        say(f"{faults} images could not be read; each is named above")


def quality_on(samples: Sequence[Sample], weights: Path, config: Config) -> dict[str, float]:
    """Return the mean IoU at original size by prompt, and `objective`, the mean over prompts."""
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
    """Pair images and masks by name (subfolders included); boxes are simulated from the masks.

    Raises:
        UserError: an image without a mask, or a mask without a lesion.
    """
    found, index = mask_paths(masks), {}
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


def mask_paths(folder: Path) -> dict[str, Path]:
    """Return image id in lower case -> mask file, subfolders included."""
    return {
        path.stem.lower().removesuffix("_segmentation"): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    }


def set_threads(config: Config) -> None:
    """Set torch's number of threads from params.yaml."""
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
