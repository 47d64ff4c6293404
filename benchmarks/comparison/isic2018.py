"""Run the comparison on the official split of ISIC 2018: `make evidence-isic2018`.

Fetches data and weights (14 GB), estimates the cost on this machine, then trains and evaluates every row of the set
`controls` with three seeds: 2,594 images to train on, the 100 of the validation set to select on, 1,000 to report on.
The same command goes on where it was interrupted. `--estimate` stops before the training.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import run_guarded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the modules of this folder import each other as `comparison.NAME`
PRESET, SET = "isic2018-vit-b", "controls"


def main(
    out: Annotated[Path, typer.Option(help="folder of data, weights and results")] = Path("evidence-isic2018"),
    epochs: Annotated[int, typer.Option(help="epochs of every row but the published letter's; 0: the preset's")] = 0,
    seeds: Annotated[int, typer.Option(help="seeds of a row, at most")] = 3,
    workers: Annotated[int, typer.Option(help="units at once; more than one on a machine with several GPUs")] = 1,
    only: Annotated[str, typer.Option(help="rows whose name holds this text; empty = all")] = "",
    subset: Annotated[int, typer.Option(help="images fetched of each split, for a dry run; 0: all")] = 0,
    model: Annotated[str, typer.Option(help="model.name of params.yaml")] = "vit_b",
    checkpoint: Annotated[str, typer.Option(help="file of weights; published: SAM's own, downloaded")] = "published",
    base_url: Annotated[str, typer.Option(help="another place of the archives; empty: the official ones")] = "",
    estimate: Annotated[bool, typer.Option(help="stop after the estimate of the cost")] = False,
) -> None:
    """Train and evaluate every row of the comparison on ISIC 2018; resumable."""
    from comparison.rows import SETS
    from lesionsam.cli.smoke import smoke
    from lesionsam.config.edit import edit_text, merge
    from lesionsam.config.load import default_text, default_values, to_values, unflatten, validate
    from lesionsam.config.presets import preset_values
    from lesionsam.config.schema import IsicData
    from lesionsam.data.index import read_index, write_index
    from lesionsam.data.sources.isic import fetch_isic
    from lesionsam.pipeline.paths import pretrained_weights
    from lesionsam.pipeline.weights import write_weights
    from lesionsam.utils.files import write_text_atomic

    out.mkdir(parents=True, exist_ok=True)
    changes = {"model.name": model, "model.checkpoint": checkpoint, "data.subset": subset, "data.base_url": base_url}
    if epochs:
        changes["train.epochs"] = epochs
    values = merge(preset_values(PRESET, default_values()), unflatten(changes))
    config = validate(values, "--model, --checkpoint, --subset, --epochs")
    index_path, weights_folder = out / "raw" / "index.csv", out / "weights"
    if not index_path.exists():
        if not isinstance(config.data, IsicData):
            raise TypeError(f"{PRESET}: expected a data source of ISIC, got {config.data.source}")
        rows = fetch_isic(
            config.data.source,
            subset=subset,
            dev_fraction=config.data.dev_fraction,
            base_url=base_url,
            raw=out / "raw",
            archives=out / "archives",
            lock_path=out / "archives.lock.json",
        )
        write_index(index_path, rows)
    if not (weights_folder / "weights.json").exists():
        weights_folder.mkdir(exist_ok=True)
        write_weights(config, weights_folder)
    weights = pretrained_weights(weights_folder).resolve()
    config = validate(merge(values, unflatten({"model.checkpoint": str(weights)})), "--checkpoint")
    write_text_atomic(out / "params.yaml", edit_text(default_text(), to_values(config)))
    measured = smoke(model, weights, image_size=config.model.image_size, device=config.runtime.device)
    splits = [row["split"] for row in read_index(index_path).values()]
    counts = {name: splits.count(name) for name in ("train", "dev", "test")}
    units = [
        (row.trains, row.preset)
        for row in SETS[SET].rows(config)
        for _ in range(min(seeds, row.seeds))
        if only in row.name
    ]
    hours = estimated_hours(units, counts, config.train.epochs, measured)
    print(
        f"{len(units)} trainings and evaluations; {counts['train']}, {counts['dev']}, {counts['test']} images to "
        f"train, select and report on; at most about {hours:.1f} hours on this machine, {workers} at once"
    )
    if estimate:
        return
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "comparison" / "run.py"), str(out / "raw"), "--out", str(out)),
        *("--params", str(out / "params.yaml"), "--set", SET, "--epochs", str(config.train.epochs), "--only", only),
        *("--precision", config.train.precision, "--seeds", str(seeds), "--workers", str(workers)),
    ]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def estimated_hours(
    units: Sequence[tuple[bool, str]], counts: Mapping[str, int], epochs: int, measured: Mapping[str, float]
) -> float:
    """Return an upper estimate of the hours of a campaign, one unit at a time.

    Args:
        units: for each, whether it trains, and its preset. counts: images per split.
        measured: figures of `lesionsam.cli.smoke.smoke`. Cached activations make steps cheaper than it says.
    """
    from lesionsam.cli.smoke import NUM_TEST, NUM_TRAIN
    from lesionsam.config.load import default_values
    from lesionsam.config.presets import preset_values

    step, evaluation = measured["step"] / NUM_TRAIN, measured["evaluate"] / NUM_TEST
    seconds = 0.0
    for trains, preset in units:
        own = preset_values(preset, default_values())["train"]["epochs"] if preset == "published" else epochs
        if trains:
            seconds += own * (counts["train"] * step + counts["dev"] * measured["encode"])
        seconds += counts["test"] * evaluation
    return seconds / 3600


if __name__ == "__main__":
    run_guarded(lambda: typer.run(main))
