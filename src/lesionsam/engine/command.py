"""`lesionsam engine` and `python src/engine_trial.py`: what they are given, and what they say at the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.serve import default_table
from lesionsam.config.load import Config, load_config, with_values
from lesionsam.engine.history import read_rounds
from lesionsam.engine.report import CURVE, REPORT, curve, news, write_report
from lesionsam.engine.round import Place, limit_threads, masks_of, pairs_of, quality_on, run_round
from lesionsam.engine_trial import DRAW, Annotator, audit, drawn_only, trial
from lesionsam.tracking.registry import resolve_model
from lesionsam.utils.files import write_bytes_atomic, write_json_atomic
from lesionsam.utils.processes import only_one

PRETRAINED = Path("models/pretrained")  # where the weights stage leaves SAM's published weights
BUDGETS = (0.5, 1.0)  # of the engine's seconds at which drawing alone is measured, and all images after them


def start_weights(config: Config, start: str | None) -> Path:
    """The weights that every round begins from.

    Raises:
        UserError: they are not there.
    """
    checkpoint = config.model.checkpoint
    return resolve_model(start or (PRETRAINED if checkpoint == "published" else checkpoint))


def run(
    images: Sequence[str],
    *,
    boxes: Path | None,
    out: Path,
    params: Path,
    start: str | None,
    training: bool,
    auto: bool,
    share: float,
    test: Path | None,
) -> None:
    """One round, its report, and what to do next."""
    config = load_config(params, check_files=False)
    limit_threads(config)
    table = boxes or default_table(Path(images[0]))
    place = Place(
        Catalogue(images), table, out, start_weights(config, start), (test / "images", test / "masks") if test else None
    )
    with only_one(table.parent / f".{table.name}.lock", f"annotation of {table}"):
        run_round(place, config, training=training, auto=auto, share=share)
    rounds = read_rounds(out)
    write_report(out, rounds)
    for sentence in news(rounds):
        print(sentence)
    weights = out / f"round-{len(rounds):02d}" / "model.safetensors" if training else place.start
    review = ["lesionsam", "annotate", *images, "--boxes", str(table), "--model", str(weights)]
    print(f"report: {out / REPORT}, {out / CURVE}\nreview: {shlex.join(review)}")


def run_trial(
    folder: Path,
    *,
    out: Path,
    params: Path,
    first: int,
    each: int,
    rounds: int,
    auto_from: int,
    share: float,
    steps: int,
    precision: str,
) -> None:
    """The engine with a simulated annotator on folder/images/train and its masks, measured on folder/images/val; and
    drawing alone, for the same seconds and for all images."""
    config = with_values(
        load_config(params, check_files=False), {"train.precision": precision, "runtime.num_threads": 1}
    )
    limit_threads(config)
    catalogue = Catalogue([folder / "images" / "train"])
    masks = masks_of(folder / "masks" / "train")
    annotator = Annotator(
        {image_id: masks[image_id.lower()] for image_id in catalogue.by_id if image_id.lower() in masks}
    )
    start, test = start_weights(config, None), (folder / "images" / "val", folder / "masks" / "val")
    if not (out / "start.json").exists():
        write_json_atomic(out / "start.json", quality_on(pairs_of(*test), start, config))
    places = {name: Place(catalogue, out / name / "boxes.csv", out / name, start, test) for name in ("engine", "drawn")}
    reviewed = trial(
        places["engine"],
        annotator,
        config,
        first=first,
        each=each,
        rounds=rounds,
        auto_from=auto_from,
        share=share,
        steps=steps,
    )
    write_report(out / "engine", reviewed)
    budgets = [*(reviewed[-1].seconds * part for part in BUDGETS), DRAW * len(catalogue)]
    drawn = drawn_only(places["drawn"], annotator, config, budgets, steps=steps)
    write_report(out / "drawn", drawn)
    before = (0.0, json.loads((out / "start.json").read_text(encoding="utf-8"))["objective"])
    lines = {
        name: [before, *((one.seconds, one.quality["objective"]) for one in ones)]
        for name, ones in {"reviewing proposals": reviewed, "drawing alone": drawn}.items()
    }
    write_bytes_atomic(out / CURVE, curve(lines, "mean IoU on the test pairs (ring, centre, box)"))
    taken, count = audit(places["engine"], annotator)
    print(f"accepted automatically: {count}, of which the annotator would take {taken}")
    for name, points in lines.items():
        print(f"{name}: " + ", ".join(f"{seconds / 60:.0f} min {value:.3f}" for seconds, value in points))
