"""Stage evaluate: the test split, once: adapted and zero-shot model per prompt source, and what needs no network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config, load_config
from lesionsam.config.schema import FolderData
from lesionsam.config.schema_method import ContrastiveMethod
from lesionsam.data.index import read_index
from lesionsam.errors import UserError, run_guarded
from lesionsam.evaluation import tables as results
from lesionsam.evaluation.baselines import evaluate_baselines
from lesionsam.evaluation.columns import LEAKING, concat
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.pictures import write_pictures
from lesionsam.experiment.auto import lesion_search
from lesionsam.experiment.run import pretrained_weights
from lesionsam.models.checkpoint import load_sam
from lesionsam.prompts import NONE
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tracker import Tracker
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.images import read_image, read_mask
from lesionsam.utils.locks import file_lock
from lesionsam.utils.processes import exit_with_parent

ROOT = Path.cwd()
OUTPUT, CACHE = Path("results"), Path(".scratch/evaluation")
BEST, TRAINED = Path("models/adapted/best.safetensors"), Path("models/adapted")
LOOSENESS = 0.15  # of the box prior's outline offset, where the method's own target names none
# The first of these that is evaluated is shown in pictures.
PICTURED = ("box", "box+core", "ring", "centre", "tight")


def load_image(sample: Sample) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the original frame."""
    return read_image(sample.image_path)


def load_mask(sample: Sample, *, threshold: bool) -> np.ndarray | None:
    """(H, W) bool, or None where nobody drew one."""
    if sample.mask_path is None:
        return None
    return read_mask(sample.mask_path, (sample.width, sample.height), threshold=threshold)


def looseness(config: Config) -> float:
    """How much too large annotators draw the big box: as the method says, or the usual."""
    target = config.method.target if isinstance(config.method, ContrastiveMethod) else None
    return float(getattr(target, "looseness", LOOSENESS))


def main() -> None:
    """One writer at a time, which ends with the `dvc repro` that started it."""
    exit_with_parent()
    with file_lock(CACHE / "lock", "the evaluation"):
        evaluate(load_config())


def evaluate(config: Config) -> None:
    """Parameters -> figures of the test split -> results/ and the tracked run."""
    e = config.evaluate
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    device = torch_device(config.runtime.device)
    samples = [
        s
        for s in read_boxes(Path("data/boxes.csv"), read_index(Path("data/raw/index.csv")), root=ROOT)
        if s.split == "test"
    ]
    if not samples:
        raise UserError("data/boxes.csv: no rows of split 'test'; evaluation needs at least one test image")
    masked = any(s.mask_path is not None for s in samples)
    masks = (
        partial(load_mask, threshold=isinstance(config.data, FolderData) and config.data.threshold_masks)
        if masked
        else None
    )
    prompts = [prompt for prompt in e.prompts if masked or prompt != LEAKING]
    drawing = {"seed": e.seed, "batch_size": e.batch_size, "num_points": config.method.num_points, "device": device}
    settings = {
        "prompts": prompts,
        "seed": e.seed,
        "num_points": config.method.num_points,
        "masks": masked,
        "boundary_tolerance": e.boundary_tolerance,
        "jitter": list(e.jitter),
        "model": config.model.name,
        "image_size": config.model.image_size,
    }
    measured = partial(
        evaluate_model,
        samples=samples,
        load_image=load_image,
        load_mask=masks,
        prompts=prompts,
        boundary_tolerance=e.boundary_tolerance,
        jitter=e.jitter,
        **drawing,
    )
    auto = config.auto.model_dump() if NONE in prompts else {}

    pretrained = pretrained_weights(Path("models/pretrained"))
    place = CACHE / results.cache_key(samples, [pretrained], settings | auto | {"looseness": looseness(config)})
    if (known := results.open_evaluation(place)) is None:
        unadapted = load_sam(config.model.name, pretrained, image_size=config.model.image_size)
        baselines, offset = evaluate_baselines(
            samples, load_image, masks, looseness=looseness(config), boundary_tolerance=e.boundary_tolerance
        )
        zero_shot = measured(unadapted, model=results.ZERO_SHOT, search=lesion_search(config, pretrained))
        known = concat([zero_shot, baselines]), {"outline_offset": offset}
        results.save_evaluation(place, *known)
    before, extra = known
    adapted = load_sam(config.model.name, BEST, image_size=config.model.image_size)
    after = measured(adapted, model=results.ADAPTED, search=lesion_search(config, BEST))

    everything = results.arranged(concat([before, after]))
    table, numbers = results.write_results(
        OUTPUT, everything, num_bootstrap=e.num_bootstrap, confidence=e.confidence, settings=settings | extra
    )
    pictures = write_pictures(
        OUTPUT / "overlays",
        adapted,
        samples,
        everything.rows,
        load_image,
        masks,
        model=results.ADAPTED,
        prompt=next(prompt for prompt in PICTURED if prompt in prompts),
        count=e.overlays,
        **drawing,
    )
    if config.tracking.enabled:
        track(config, numbers, pictures)
    results.print_tables(table)
    print(f"{len(samples)} lesions; tables, pictures and per-image figures in {OUTPUT}/")


def track(config: Config, numbers: dict[str, float], pictures: list[Path]) -> None:
    """Add the figures to the run that trained the model; settings are tags, since parameters cannot change."""
    e = config.evaluate
    tags = {
        "evaluate.seed": str(e.seed),
        "evaluate.prompts": ", ".join(e.prompts),
        "evaluate.confidence": str(e.confidence),
        "evaluate.boundary_tolerance": str(e.boundary_tolerance),
    }
    tracker = Tracker.reopen(
        TRAINED, uri=config.tracking.uri, experiment=config.tracking.experiment, root=repository_root(ROOT), tags=tags
    )
    tracker.log({f"test/{name}": value for name, value in numbers.items()}, 0)
    for path in pictures:
        tracker.log_artifact(path, "evaluation/overlays")
    for name in ("table.md", "summary.json", *(f"{name}.csv" for name in results.TABLES)):
        tracker.log_artifact(OUTPUT / name, "evaluation")
    tracker.close()


if __name__ == "__main__":
    run_guarded(main)
