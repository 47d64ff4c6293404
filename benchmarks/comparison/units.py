"""Train and evaluate every row of the comparison as ordinary runs on a folder of real pairs, resumable.

A row is params.yaml with some keys changed; a unit is a row with a seed. Each unit trains on the `train` split, selects
on `dev` and reads the `test` split once, at the end; its per-image figures are kept as one CSV, which is also how an
interrupted campaign knows what is done. The rows themselves are in `comparison.rows`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comparison.unet import evaluate_unet, train_unet
from lesionsam.boxes.annotator import annotate
from lesionsam.config.edit import fit, merge
from lesionsam.config.load import Config, config_digest, flatten, to_values, unflatten, validate
from lesionsam.config.presets import preset_names, preset_values
from lesionsam.config.schema import SimulatedBoxes
from lesionsam.data.contents import load_image, load_mask
from lesionsam.data.dataset import LesionDataset
from lesionsam.data.frames import Frames
from lesionsam.data.index import Row as IndexRow
from lesionsam.data.index import read_index, with_mask_hashes, write_index
from lesionsam.errors import UserError
from lesionsam.evaluation import statistics
from lesionsam.evaluation.baselines import evaluate_baselines
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.experiment.auto import auto_options
from lesionsam.experiment.run import Trained, input_frame, open_data, train, use_notes
from lesionsam.inference.decode import DecodeOptions
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.pipeline.paths import pretrained_weights
from lesionsam.pipeline.weights import write_weights
from lesionsam.tracking.tracker import NullTracker, Tracker
from lesionsam.types import Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.files import atomic_write, sha256_file, write_json_atomic, write_text_atomic

PROMPTS = ("none", "ring", "centre", "box", "zoom", "box+core")
ZERO_SHOT, BASELINES = "zero-shot", "baselines"
UNET = "unet"
EXPERIMENT = "lesionsam-evidence"  # of runs in MLflow
INTERVALS = {"num_bootstrap": 5000, "confidence": 0.95}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the line. preset: applied to the base first, where there is one. changes: dotted keys after it.
        seeds: how many. margin: least and greatest share by which the simulated big box is too large.
        trains: False for what is evaluated as it is. tests: False for a row that only tunes on the development split.
        masks: number of training lesions that it may see, drawn by seed and repeated to as many steps; 0 = all.
        network: sam, or unet for `comparison.unet`.
        model: pretrained model: a preset, a model.name of params.yaml, of the Hub or a folder; empty = the base's.
        baselines: whether a row that does not train carries the baselines without a network.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    preset: str = ""
    seeds: int = 3
    margin: tuple[float, float] = (0.10, 0.20)
    trains: bool = True
    tests: bool = True
    masks: int = 0
    network: str = "sam"
    model: str = ""
    baselines: bool = True


def configured(base: Config, row: Row, seed: int) -> Config:
    """Return the configuration of one unit: base, model, preset and changes of the row, seed and looseness."""
    low, high = row.margin
    values = model_values(base, row.model)
    values = preset_values(row.preset, values) if row.preset else values
    values = fit(merge(values, unflatten(row.changes)))
    values = unflatten({"train.seed": seed, "boxes.margin_low": low, "boxes.margin_high": high}, values)
    return validate(values, f"evidence row {row.name!r}")


def model_values(base: Config, model: str) -> dict[str, Any]:
    """Return the base's values with another pretrained model, see `Row.model`; epochs, batches and precision stay."""
    values = to_values(base)
    if model in ("", base.model.name):
        return values
    if model in preset_names():
        budget = {key: values["train"][key] for key in ("epochs", "batch_size", "precision")}
        return merge(preset_values(model, values), {"train": budget})
    return merge(values, {"model": {"name": model, "checkpoint": "published", "image_size": 0}})


def model_weights(base: Config, model: str, out: Path) -> Path:
    """Return the pretrained weights of a row's model; fetch them into the folder of the results at first.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if model in ("", base.model.name):
        return Path(base.model.checkpoint)
    folder = out / "weights" / slug(model)
    if not (folder / "weights.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(validate(fit(model_values(base, model)), f"--model {model}"), folder)
    return pretrained_weights(folder)


def slug(text: str) -> str:
    """Return a name for files: lower case, runs of other characters than letters and digits as one hyphen."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def unit_path(out: Path, row: Row, seed: int) -> Path:
    """Return the file of a unit's per-image figures."""
    return out / "units" / f"{slug(row.name)}.seed{seed}.csv"


def unit_digest(config: Config, row: Row, weights_sha256: str) -> str:
    """Return a digest of what a unit's figures depend on except the pairs: configuration, masks, network, weights."""
    parts = (config_digest(config), row.masks, row.network, weights_sha256)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def is_finished(out: Path, base: Config, row: Row, seed: int, weights_sha256: str) -> bool:
    """Return whether a unit's figures exist.

    Args:
        weights_sha256: of the pretrained weights.
    Raises:
        UserError: they are those of other settings.
    """
    path = unit_path(out, row, seed)
    if not path.exists():
        return False
    try:
        kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("digest")
    except (OSError, ValueError):
        kept = None
    if kept != unit_digest(configured(base, row, seed), row, weights_sha256):
        raise UserError(
            f"{path}: figures of other settings or weights than those asked for; choose another --out, or "
            "delete it to run it again"
        )
    return True


def check_pairs(index_path: Path, rows: Sequence[IndexRow]) -> None:
    """Write the index of the pairs, or check that it is the one that is there; images and masks count by contents.

    Raises:
        UserError: the figures beside it are of other pairs.
    """
    if not index_path.exists():
        write_index(index_path, rows)
        return
    kept, wanted = read_index(index_path), {row["image_id"]: row for row in with_mask_hashes(rows)}
    if changed := sorted(name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name)):
        raise UserError(
            f"{index_path}: lists other pairs than the folder holds, the first is {changed[0]!r}; choose "
            "another --out, or give the folder that it was made from"
        )


def few(data: LesionDataset, count: int, seed: int) -> LesionDataset:
    """Repeat `count` of a data set's lesions to its length: as many steps with fewer masks.

    Those of one seed contain those of a smaller count.
    """

    def place(k: int) -> str:
        return hashlib.sha256(f"masks {seed} {data.ids[k]}".encode()).hexdigest()

    chosen = sorted(range(len(data)), key=place)[:count]
    index, f = np.resize(np.array(chosen), len(data)), data.frames
    arrays = {
        name: getattr(f, name)[index] for name in ("images", "priors", "masks", "sizes", "big_boxes", "small_boxes")
    }
    frames = Frames(**arrays, others=tuple(f.others[k] for k in index))
    return LesionDataset([data.samples[k] for k in index], frames, with_masks=data.with_masks)


def tracker_of(config: Config, row: Row, seed: int, folder: Path, root: Path | None) -> NullTracker:
    """Open a unit's own MLflow run below `root`; None: no tracking."""
    if root is None:
        return NullTracker(None)
    return Tracker.open(
        folder,
        uri="",
        experiment=EXPERIMENT,
        root=root,
        run_name=f"{row.name}, seed {seed}",
        params=flatten(config),
        tags={"evidence.row": row.name},
        system_metrics=False,
    )


def run_unit(
    base: Config,
    row: Row,
    seed: int,
    index: Mapping[str, IndexRow],
    weights: Path,
    out: Path,
    track: Path | None = None,
) -> None:
    """Train and evaluate one unit and write its CSV (last, so that it stands for a finished unit).

    The CSV's rows are those of `evaluation.evaluate.evaluate_model`, with the row's name as model and the seed as run.

    Args:
        track: folder whose mlflow.db gets a run of it; None: none does.
    """
    config, target, status = configured(base, row, seed), unit_path(out, row, seed), "FAILED"
    tracker = tracker_of(config, row, seed, out / "runs" / target.stem, track)
    try:
        _run_unit(config, row, seed, index, weights, out, tracker)
        status = "FINISHED"
    finally:
        tracker.close(status)


def _run_unit(
    config: Config, row: Row, seed: int, index: Mapping[str, IndexRow], weights: Path, out: Path, tracker: NullTracker
) -> None:
    begun = time.monotonic()
    b = config.boxes
    if not isinstance(b, SimulatedBoxes):
        raise UserError(f"boxes.source: evidence needs simulated boxes, got {b.source}")
    samples = annotate(index, root=Path(), **b.annotator())
    test = [s for s in samples if s.split == "test"]
    target = unit_path(out, row, seed)
    notes: dict[str, Any] = {"row": row.name, "seed": seed, "digest": unit_digest(config, row, sha256_file(weights))}
    trained: Trained | None = None
    if row.trains:
        scratch = out / "scratch" / f"{target.stem}-{config_digest(config)[:12]}"
        data = open_data(config, samples, frame=input_frame(config, weights), cache=out / "frames")
        if row.masks:
            data = replace(data, train=few(data.train, row.masks, seed))
        say = partial(print, f"[{row.name} seed {seed}]", flush=True)
        if row.network == UNET:
            model, at = train_unet(config, data, folder=scratch, log=tracker.log, say=say)
            notes |= {"outline": None, "trained_parameters": sum(p.numel() for p in model.parameters())}
        else:
            trained = train(config, data, weights, folder=scratch, log=tracker.log, say=say)
            model, at = trained.sam, trained.progress
            notes |= {
                "outline": None if trained.outline is None else vars(trained.outline),
                "trained_parameters": trained.trained,
            }
        notes |= {
            "dev_objective": at.best_score,
            "best_epoch": at.best_epoch,
            "train_seconds": time.monotonic() - begun,
            "seconds_per_epoch": at.seconds / max(1, at.epoch),
        }
    else:
        model = load_sam(config.model.name, weights, image_size=config.model.image_size)
    if not row.tests:
        write_json_atomic(target.with_suffix(".json"), notes)
        write_text_atomic(target, "")
        return
    if isinstance(model, Sam):
        notes_of_use = {} if trained is None else use_notes(config, trained)
        decoding = DecodeOptions.of_metadata(notes_of_use, auto_options(config))
        figures = evaluate_sam(model, config, row, seed, test, decoding)
    else:
        figures = evaluate_unet(
            model,
            test,
            load_image,
            load_mask,
            frame=input_frame(config, weights),
            batch_size=config.evaluate.batch_size,
            model=row.name,
            run=str(seed),
        )
    if not row.trains and row.baselines:
        tag = "" if row.model else row.name.removeprefix(ZERO_SHOT)
        baselines, outline = evaluate_baselines(test, load_image, load_mask, looseness=None)
        figures = pd.concat([figures, baselines.rows.assign(model=baselines.rows["model"] + tag)])
        notes["test_outline"] = vars(outline)
    for (_, prompt), part in figures.groupby(["model", "prompt"]):
        if (part["model"] == row.name).all():
            tracker.log({f"test/{prompt}/miou": float(part["iou"].mean())}, 0)
    write_json_atomic(target.with_suffix(".json"), notes)
    with atomic_write(target, "w") as file:
        figures.to_csv(file, index=False)


def evaluate_sam(
    sam: Sam, config: Config, row: Row, seed: int, test: Sequence[Sample], decoding: DecodeOptions
) -> pd.DataFrame:
    """Return a unit's figures on the test samples, columns `evaluation.columns.ROW_COLUMNS`."""
    return evaluate_model(
        sam,
        test,
        load_image,
        load_mask,
        prompts=PROMPTS,
        decoding=decoding,
        seed=config.evaluate.seed,
        batch_size=config.evaluate.batch_size,
        num_points=config.method.num_points,
        device=torch_device(config.runtime.device),
        model=row.name,
        run=str(seed),
    ).rows


def read_units(out: Path, rows: Sequence[Row]) -> pd.DataFrame:
    """Read all finished units of some rows, long format, in the order of the rows."""
    parts = [
        pd.read_csv(path, dtype={"run": str, "lesion_id": str, "image_id": str})
        for row in rows
        if row.tests
        for seed in range(row.seeds)
        if (path := unit_path(out, row, seed)).exists()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def costs(out: Path, rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return name of a row -> its trained parameters and seconds per epoch (mean over seeds), if known."""
    found = {}
    for row in rows:
        paths = [unit_path(out, row, seed).with_suffix(".json") for seed in range(row.seeds)]
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        known = [note for note in notes if "seconds_per_epoch" in note]
        if known:
            seconds = np.mean([note["seconds_per_epoch"] for note in known])
            found[row.name] = f"{known[0]['trained_parameters']:,}", f"{seconds:.1f}"
    return found


def summarise(
    figures: pd.DataFrame, comparisons: Sequence[tuple[str, str]], cost: Mapping[str, tuple[str, str]] | None = None
) -> str:
    """Return the campaign as Markdown: mIoU per row and prompt with intervals and seeds' sd, and paired differences.

    Args:
        comparisons: pairs of row names (first, second): first minus second, on the same images, seeds averaged first.
        cost: see `costs`; two more columns.
    """
    table = statistics.table(figures, reference=None, **INTERVALS)
    heads = [
        "row",
        "seeds",
        *(["trained parameters", "s per epoch"] if cost else []),
        *PROMPTS,
        "failures (box)",
        "box minus none",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model in table["model"].drop_duplicates():
        mine = table[table["model"] == model].set_index("prompt")
        cells = [
            statistics.format_interval(m.miou, m.low, m.high) + (f" sd {m.runs_sd:.3f}" if m.num_runs > 1 else "")
            if (m := mine.loc[prompt] if prompt in mine.index else None) is not None
            else ""
            for prompt in PROMPTS
        ]
        cells += [
            f"{mine.loc['box'].failure_rate:.1%}" if "box" in mine.index else "",
            _difference(figures, (model, "box"), (model, "none")),
        ]
        cells = [str(int(mine["num_runs"].max())), *((cost.get(model, ("", ""))) if cost else ()), *cells]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Paired differences (first minus second, same images, seeds averaged first):",
        "",
        "| first | second | " + " | ".join(PROMPTS) + " |",
        "|" + "---|" * (len(PROMPTS) + 2),
    ]
    names = set(figures["model"])
    for first, second in comparisons:
        if first in names and second in names:
            cells = [_difference(figures, (first, prompt), (second, prompt)) for prompt in PROMPTS]
            lines.append(f"| {first} | {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(figures: pd.DataFrame, first: tuple[str, str], second: tuple[str, str]) -> str:
    """Return first minus second, each a model and a prompt, paired, with its interval; empty if one is missing."""
    parts = [figures[(figures["model"] == model) & (figures["prompt"] == prompt)] for model, prompt in (first, second)]
    if not all(map(len, parts)):
        return ""
    p = statistics.paired(parts[0], parts[1], "iou", **INTERVALS)
    return statistics.format_interval(p["difference"], p["difference_low"], p["difference_high"], sign=True)


def gap_closed(figures: pd.DataFrame, low: str, high: str, name: str) -> dict[str, float]:
    """Return the share of the gap between two rows' mIoU that a third has gained, per prompt source."""
    table = statistics.table(figures, reference=None, **INTERVALS).set_index(["model", "prompt"])["miou"]
    return {
        prompt: float((table[name, prompt] - table[low, prompt]) / (table[high, prompt] - table[low, prompt]))
        for prompt in PROMPTS
        if all((model, prompt) in table.index for model in (low, high, name))
    }
