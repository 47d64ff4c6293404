"""Step evaluate: the test split, once: adapted and zero-shot model per prompt source, and what needs no network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config
from lesionsam.config.schema import FolderData
from lesionsam.config.schema_method import ContrastiveMethod
from lesionsam.data.contents import load_image, load_mask
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.evaluation import tables as results
from lesionsam.evaluation.baselines import evaluate_baselines
from lesionsam.evaluation.columns import LEAKING, concat
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.evaluation.kept import cache_key, open_evaluation, save_evaluation
from lesionsam.evaluation.pictures import write_pictures
from lesionsam.evaluation.plots import write_plots
from lesionsam.experiment.auto import decoding
from lesionsam.models.checkpoint import load_sam
from lesionsam.pipeline.paths import ADAPTED, BOXES, INDEX, RESULTS, SCRATCH, pretrained_weights
from lesionsam.prompts import NONE
from lesionsam.tracking.lineage import lineage_tags, repository_root
from lesionsam.tracking.naming import reproduction
from lesionsam.tracking.tracker import DESCRIPTION_TAG, Tracker
from lesionsam.utils.devices import torch_device
from lesionsam.utils.locks import file_lock
from lesionsam.utils.processes import exit_with_parent
from lesionsam.utils.progress import say, working

CACHE, BEST = SCRATCH / "evaluation", ADAPTED / "best.safetensors"
LOOSENESS = 0.15  # of the box prior's outline offset, where the method's own target names none
# The first of these that is evaluated is shown in pictures.
PICTURED = ("box", "box+core", "ring", "centre", "tight")


def evaluate_models(config: Config) -> pd.DataFrame:
    """Evaluate the adapted and the pretrained model on the test split; write results/ and add to the tracked run.

    The pretrained model's figures are kept, and taken from there while nothing that they depend on changes.

    Returns:
        The table as in results/table.csv.
    """
    exit_with_parent()
    with file_lock(CACHE / "lock", "the evaluation"), working("evaluating"):
        return _evaluate(config)


def _evaluate(config: Config) -> pd.DataFrame:
    e = config.evaluate
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    device = torch_device(config.runtime.device)
    samples = [s for s in read_boxes(BOXES, read_index(INDEX), root=Path.cwd()) if s.split == "test"]
    if not samples:
        raise UserError(f"{BOXES}: no rows of split 'test'; evaluation needs at least one test image")
    say(f"evaluating on {len(samples)} lesions of the test split")
    masked = any(s.mask_path is not None for s in samples)
    threshold = isinstance(config.data, FolderData) and config.data.threshold_masks
    masks = partial(load_mask, threshold=threshold) if masked else None
    prompts = [prompt for prompt in e.prompts if masked or prompt != LEAKING]
    drawing = {"seed": e.seed, "num_points": config.method.num_points}
    measuring = {"prompts": prompts, **drawing, "boundary_tolerance": e.boundary_tolerance, "jitter": list(e.jitter)}
    settings = {**measuring, "masks": masked, "model": config.model.name, "image_size": config.model.image_size}
    running = {"batch_size": e.batch_size, "device": device}  # changes no result
    measured = partial(evaluate_model, samples=samples, load_image=load_image, load_mask=masks, **measuring, **running)
    auto = config.auto.model_dump() if NONE in prompts else {}

    pretrained = pretrained_weights()
    place = CACHE / cache_key(samples, [pretrained], settings | auto | {"looseness": _looseness(config)})
    if (known := open_evaluation(place)) is None:
        unadapted = load_sam(config.model.name, pretrained, image_size=config.model.image_size)
        baselines, outline = evaluate_baselines(
            samples, load_image, masks, looseness=_looseness(config), boundary_tolerance=e.boundary_tolerance
        )
        zero_shot = measured(unadapted, model=results.ZERO_SHOT, decoding=decoding(config, pretrained))
        known = concat([zero_shot, baselines]), {f"outline_{name}": value for name, value in vars(outline).items()}
        save_evaluation(place, *known)
    before, extra = known
    adapted = load_sam(config.model.name, BEST, image_size=config.model.image_size)
    after = measured(adapted, model=results.ADAPTED, decoding=decoding(config, BEST))

    everything = results.arranged(concat([before, after]))
    table, numbers = results.write_results(
        RESULTS, everything, num_bootstrap=e.num_bootstrap, confidence=e.confidence, settings=settings | extra
    )
    write_plots(
        RESULTS / "plots", *(results.read_csv(RESULTS / f"{n}.csv") for n in ("table", "jitter", "calibration"))
    )
    pictures = write_pictures(
        RESULTS / "overlays",
        adapted,
        samples,
        everything.rows,
        load_image,
        masks,
        model=results.ADAPTED,
        prompt=next(prompt for prompt in PICTURED if prompt in prompts),
        count=e.overlays,
        **drawing,
        **running,
    )
    if config.tracking.enabled:
        _track(config, table, numbers, pictures)
    results.print_tables(table)
    print(f"{len(samples)} lesions; tables, pictures and per-image figures in {RESULTS}/")
    return table


def _looseness(config: Config) -> float | None:
    """Return by how much annotators draw the big box too large: as the method says, or the usual; None: by colour."""
    target = config.method.target if isinstance(config.method, ContrastiveMethod) else None
    told = getattr(target, "looseness", LOOSENESS)
    return None if told == "auto" else told


def _track(config: Config, table: pd.DataFrame, numbers: dict[str, float], pictures: list[Path]) -> None:
    """Add the figures to the run that trained the model; settings are tags, since parameters cannot change."""
    e, root = config.evaluate, repository_root(Path.cwd())
    tags = {
        DESCRIPTION_TAG: f"{results.headline_text(table)}\n\n{reproduction(lineage_tags(root))}",
        "evaluate.seed": str(e.seed),
        "evaluate.prompts": ", ".join(e.prompts),
        "evaluate.confidence": str(e.confidence),
        "evaluate.boundary_tolerance": str(e.boundary_tolerance),
    }
    tracker = Tracker.reopen(
        ADAPTED, uri=config.tracking.uri, experiment=config.tracking.experiment, root=root, tags=tags
    )
    tracker.log({f"test/{name}": value for name, value in results.headline_metrics(numbers).items()}, 0)
    for path in pictures:
        group, _, rest = path.stem.partition("_")
        rank = rest.partition("_")[0]
        tracker.log_picture(path, f"test_{group}", int(rank) if rank.isdigit() else 0)  # the slider goes by rank
        tracker.log_artifact(path, "evaluation/overlays")  # which `lesionsam compare` reads
    for name in ("table.md", "summary.json", *(f"{name}.csv" for name in results.TABLES)):
        tracker.log_artifact(RESULTS / name, "evaluation")
    tracker.close()
