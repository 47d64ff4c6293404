"""Compare ways of training on real pairs, row by row, resumable: `python benchmarks/comparison/run.py FOLDER`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import run_guarded

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the modules of this folder import each other as `comparison.NAME`
TEST_SPLIT, DEV_FRACTION = "val", 1 / 6  # 900 + 142 pairs: 750 to train, 150 to select on, 142 to report on


def main(
    folder: Annotated[Path, typer.Argument(help="holds images/{train,val} and masks/{train,val}, or an index.csv")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is finished there is not run again")] = Path(
        "evidence"
    ),
    params: Annotated[Path, typer.Option(help="the default that the rows change")] = ROOT / "params.yaml",
    epochs: Annotated[int, typer.Option(help="epochs of every row but the published letter's")] = 4,
    precision: Annotated[str, typer.Option(help="fp32 | bf16, of every row but the published letter's")] = "bf16",
    only: Annotated[str, typer.Option(help="rows whose name holds this text; empty = all")] = "",
    seeds: Annotated[int, typer.Option(help="seeds of a row, at most")] = 3,
    workers: Annotated[int, typer.Option(help="units at once, one thread each")] = 2,
    tune: Annotated[bool, typer.Option(help="only the learning rates, on the development split")] = False,
    which: Annotated[
        str,
        typer.Option(
            "--set",
            help="rows | strategies (every way to fine-tune) | inserted (LoRA and adapters) | unprompted (use "
            "without a prompt) | labels (what masks are worth) | looseness (told and found) | controls (the default "
            "beside supervision, its placebos and parts)",
        ),
    ] = "rows",
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="pretrained model, beside each other if repeated, instead of a set: a preset (sam2.1-tiny), a "
            "model.name of params.yaml, OWNER/NAME of the Hub or a folder",
        ),
    ] = None,
    track: Annotated[bool, typer.Option(help="each unit also a run in mlflow.db (lesionsam-evidence)")] = False,
    unit: Annotated[str, typer.Option(hidden=True, help="run one unit, NAME#SEED, in this process")] = "",
) -> None:
    """Train and evaluate every row of the comparison on a folder of real pairs; the test split is read once per row."""
    from comparison.rows import DEFAULT, DEFAULT_BLIND, ELLIPSE, LETTER, SETS, SUPERVISED, models_plan
    from comparison.units import (
        check_pairs,
        costs,
        gap_closed,
        is_finished,
        model_weights,
        read_units,
        run_unit,
        summarise,
        unit_path,
    )
    from lesionsam.config.load import load_config, with_values
    from lesionsam.data.index import read_index
    from lesionsam.data.sources.folder import index_folder
    from lesionsam.errors import UserError
    from lesionsam.utils.files import sha256_file, write_text_atomic

    if which not in SETS:
        raise UserError(f"--set: expected one of {', '.join(SETS)}, got {which!r}")
    if models and len(set(models)) < len(models):
        raise UserError(f"--model: expected each model once, got {', '.join(models)}")
    plan = models_plan(models) if models else SETS[which]
    base = with_values(
        load_config(params, check_files=False),
        {"train.epochs": epochs, "runtime.num_threads": 1, "train.precision": precision},
    )
    planned = plan.tuning(base) if tune else plan.rows(base)
    index_path = out / "index.csv"
    weights = {model: ROOT / model_weights(base, model, out.resolve()) for model in {row.model for row in planned}}
    if unit:
        name, seed = unit.rsplit("#", 1)
        row = next(row for row in planned if row.name == name)
        return run_unit(base, row, int(seed), read_index(index_path), weights[row.model], out, ROOT if track else None)
    own_index = folder / "index.csv"
    if own_index.exists():
        check_pairs(index_path, list(read_index(own_index).values()))
    else:
        check_pairs(index_path, index_folder(folder, dev_fraction=DEV_FRACTION, test_split=TEST_SPLIT))
    digests = {model: sha256_file(path) for model, path in weights.items()}
    done_before = {
        (row.name, seed)
        for row in planned
        for seed in range(row.seeds)
        if is_finished(out, base, row, seed, digests[row.model])
    }
    waiting = [
        (row, seed)
        for seed in range(seeds)
        for row in planned
        if only in row.name and seed < row.seeds and (row.name, seed) not in done_before
    ]
    waiting.sort(key=lambda job: job[0].name == LETTER)  # ten times as long as any other row: last
    begun, done = time.monotonic(), 0

    def work(job: tuple) -> int:
        nonlocal done
        row, seed = job
        command = [
            sys.executable,
            __file__,
            str(folder),
            "--out",
            str(out),
            "--params",
            str(params),
            "--epochs",
            str(epochs),
            "--precision",
            precision,
            "--set",
            which,
            "--unit",
            f"{row.name}#{seed}",
            *(part for model in models or () for part in ("--model", model)),
            *(["--tune"] if tune else []),
            *(["--track"] if track else []),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        done += 1
        spent = time.monotonic() - begun
        print(
            f"{done}/{len(waiting)} {row.name} seed {seed}: {'done' if code == 0 else f'failed ({code})'}, "
            f"{spent / done * (len(waiting) - done) / 60:.0f} min left",
            flush=True,
        )
        return code

    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(work, waiting))
    if tune:
        for row in planned:
            if (notes := unit_path(out, row, 0).with_suffix(".json")).exists():
                print(f"{row.name}: objective on dev {json.loads(notes.read_text())['dev_objective']:.4f}")
    else:
        figures = read_units(out, planned)
        text = summarise(figures, plan.comparisons, costs(out, planned) if which == "strategies" else None)
        if {DEFAULT, ELLIPSE, SUPERVISED} <= set(figures.get("model", [])):
            closed = gap_closed(figures, ELLIPSE, SUPERVISED, DEFAULT)
            text += (
                "\nGap closed between the ellipse as target and supervised: "
                + ", ".join(f"{prompt} {value:.0%}" for prompt, value in closed.items())
                + "\n"
            )
        if which == "labels" and {DEFAULT_BLIND, "supervised, all masks"} <= set(figures.get("model", [])):
            from comparison.charts import draw_labels

            num_all = sum(row["split"] == "train" for row in read_index(index_path).values())
            worth = draw_labels(out / "labels.png", figures, DEFAULT_BLIND, num_all)
            text += (
                "\nTwo boxes are worth, in masks: "
                + ", ".join(f"{prompt} {words}" for prompt, words in worth.items())
                + f"; {out / 'labels.png'}\n"
            )
        table = "table-models.md" if models else "table.md" if which == "rows" else f"table-{which}.md"
        write_text_atomic(out / table, text)
        print(text)
    if any(codes):
        raise SystemExit(1)


if __name__ == "__main__":
    run_guarded(lambda: typer.run(main))
