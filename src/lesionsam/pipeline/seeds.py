"""`lesionsam train --seeds N`: the same training from several seeds, and which differences are noise."""

from __future__ import annotations

import hashlib
import shutil

import pandas as pd

from lesionsam.config.load import Config, config_digest, to_values, validate
from lesionsam.errors import UserError
from lesionsam.evaluation import statistics
from lesionsam.evaluation.kept import MEASURES
from lesionsam.evaluation.tables import ADAPTED, ZERO_SHOT, grid, prompts_in, read_csv, write_csv
from lesionsam.experiment.launch import is_joining, num_processes
from lesionsam.experiment.resume import TRAINING
from lesionsam.pipeline.evaluate import evaluate_models
from lesionsam.pipeline.paths import BOXES, INDEX, RESULTS, SCRATCH, pretrained_weights
from lesionsam.pipeline.train import train_model
from lesionsam.utils.code import NO_RESULT, code_digest
from lesionsam.utils.files import sha256_file, write_text_atomic

FOLDER = SCRATCH / "seeds"
SECTIONS = ("data", "boxes", "model", "method", "train", "evaluate", "auto")


def train_seeds(config: Config, count: int) -> str:
    """Train and evaluate with `count` seeds from train.seed on; write results/seeds.csv and seeds.md.

    A seed that was trained under the same parameters, code, images, boxes and weights is not trained again.
    models/adapted and results hold the training of train.seed itself in the end, as without further seeds.

    Returns:
        The text of seeds.md.
    Raises:
        UserError: training in several processes, which read the seed from params.yaml.
    """
    if is_joining() or num_processes(config) > 1:
        raise UserError("--seeds: trains in one process; set runtime.devices and runtime.nodes to 1")
    parts = []
    for seed in reversed(range(config.train.seed, config.train.seed + count)):
        own = with_seed(config, seed)
        place = FOLDER / _key(own) / "per_image.csv"
        if not place.is_file() or seed == config.train.seed:
            print(f"seed {seed}", flush=True)
            train_model(own)
            evaluate_models(own)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RESULTS / "per_image.csv", place)
        parts.append(read_csv(place).assign(run=str(seed)))
    e = config.evaluate
    table = seeds_table(parts, num_bootstrap=e.num_bootstrap, confidence=e.confidence)
    write_csv(RESULTS / "seeds.csv", table)
    text = seeds_text(table, count)
    write_text_atomic(RESULTS / "seeds.md", text)
    return text


def with_seed(config: Config, seed: int) -> Config:
    """Return the configuration with another train.seed."""
    values = to_values(config)
    values["train"]["seed"] = seed
    return validate(values, "params.yaml")


def _key(config: Config) -> str:
    """Return the name of a seed's folder: parameters, code, images, boxes and weights decide."""
    code = code_digest(TRAINING, *MEASURES, without=NO_RESULT)
    files = (sha256_file(path) for path in (INDEX, BOXES, pretrained_weights()))
    return hashlib.sha256("\n".join([config_digest(config, SECTIONS), code, *files]).encode()).hexdigest()[:24]


def seeds_table(parts: list[pd.DataFrame], *, num_bootstrap: int, confidence: float) -> pd.DataFrame:
    """Summarise the adapted model over seeds, beside zero-shot.

    Args:
        parts: rows of `columns.Evaluation` of each seed, with the seed in the column run.
    Returns:
        prompt, mean and sd (over seeds; mean IoU, or the agreement between prompts without masks), num_seeds,
        difference to zero-shot, difference_low, difference_high (over images, seeds averaged), verdict: `better`,
        `worse` or `noise`. It is noise if the interval covers 0, or the difference is below twice the standard error
        over seeds.
    """
    rows = pd.concat(parts)
    score = "iou" if statistics.has_truth(rows) else "consistency"
    out = []
    for prompt in prompts_in(rows):
        adapted, before = (rows[(rows["model"] == m) & (rows["prompt"] == prompt)] for m in (ADAPTED, ZERO_SHOT))
        adapted, before = adapted.dropna(subset=[score]), before.dropna(subset=[score])
        if not len(adapted) or not len(before):
            continue
        means = [statistics.per_image(group, score).mean() for _, group in adapted.groupby("run")]
        sd = pd.Series(means).std()
        found = statistics.paired(adapted, before, score, num_bootstrap=num_bootstrap, confidence=confidence)
        is_clear = found["difference_low"] > 0 or found["difference_high"] < 0
        error = sd / len(means) ** 0.5 if len(means) > 1 else 0.0
        is_noise = not is_clear or abs(found["difference"]) < 2 * error
        verdict = "noise" if is_noise else "better" if found["difference"] > 0 else "worse"
        row = {"prompt": prompt, "mean": float(pd.Series(means).mean()), "sd": float(sd), "num_seeds": len(means)}
        row |= {name: found[name] for name in ("difference", "difference_low", "difference_high")}
        out.append(row | {"verdict": verdict, "score": score})
    return pd.DataFrame(out)


def seeds_text(table: pd.DataFrame, count: int) -> str:
    """Return `seeds_table` as Markdown, with what it says."""
    what = "mean IoU" if not len(table) or table["score"].iloc[0] == "iou" else "agreement between prompts (no masks)"
    cells = [["prompt", f"{what}, mean over seeds", "sd over seeds", "difference to zero-shot", "which is"]]
    for _, row in table.iterrows():
        difference = statistics.format_interval(
            row["difference"], row["difference_low"], row["difference_high"], sign=True
        )
        cells.append([row["prompt"], f"{row['mean']:.3f}", f"{row['sd']:.3f}", difference, row["verdict"]])
    largest = 2 * 2**0.5 * float(table["sd"].max()) if len(table) else float("nan")
    note = (
        f"Two single trainings that differ by less than {largest:.3f} (2 standard deviations of a difference) cannot "
        "be told apart."
    )
    return f"{count} seeds.\n\n{grid(cells)}\n\n{note}\n"
