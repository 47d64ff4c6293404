"""An evaluation as files: tables for people and machines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lesionsam.evaluation import statistics
from lesionsam.evaluation.columns import ELLIPSE, LEAKING, PRIOR, PRIOR_OFFSET, Evaluation
from lesionsam.prompts import BOTH, NONE, ZOOM
from lesionsam.utils.files import write_json_atomic, write_text_atomic

ZERO_SHOT, ADAPTED = "zero-shot", "adapted"
BASELINES = (ELLIPSE, PRIOR, PRIOR_OFFSET)
TABLES = ("table", "per_image", "strata", "jitter", "calibration")  # each a CSV of the results
LABEL_FREE_TITLES = {
    "consistency": "agreement between prompts",
    "core_coverage": "core covered",
    "leakage": "mask outside the big box",
    "entropy": "entropy [nats]",
    "predicted_iou": "predicted IoU",
}
HEADLINE = (  # names of `flat_metrics`: at most five of them exist without masks, the other ten with masks
    *("adapted.objective", "zero_shot.objective", "adapted.box.miou", "zero_shot.box.miou", "adapted.box.difference"),
    *("adapted.box.failure_rate", "adapted.box_core.miou", "adapted.ring.miou", "adapted.centre.miou"),
    "box_prior_offset.box_core.miou",
    *("adapted.box.consistency", "adapted.box.core_coverage", "adapted.box.leakage"),
    *("zero_shot.box.consistency", "zero_shot.box.core_coverage"),
)
NOTES = {
    NONE: "none: no prompt; one lesion per image, of all candidates the one that looks most like a lesion "
    "(docs/decisions/0022-no-prompt-is-a-prompt.md).",
    ZOOM: "zoom: the big box, its surroundings enlarged to the model's whole frame, as lesionsam predict --zoom does.",
    BOTH: "box+core: both boxes, the mask of the enlarged big box fused with the box prior, as lesionsam predict "
    "--prompt box+core does.",
    LEAKING: "tight: the bounding box of the true mask as prompt; it leaks the label.",
    ELLIPSE: "ellipse, box prior: no network, given the same boxes (the ellipse needs the big one only).",
}


def write_results(
    folder: Path, evaluation: Evaluation, *, num_bootstrap: int, confidence: float, settings: Mapping[str, object]
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Write per_image, table, strata, jitter, calibration (CSV), table.md, summary.json and metrics.json.

    Args:
        evaluation: models `zero-shot` and `adapted` and the baselines. settings: goes into summary.json as it is.
    Returns:
        (table as in table.csv, metrics as in metrics.json).
    """
    folder.mkdir(parents=True, exist_ok=True)
    how = {"num_bootstrap": num_bootstrap, "confidence": confidence}
    table = statistics.table(evaluation.rows, reference=ZERO_SHOT, **how)
    calibration = calibration_curve(evaluation.calibration)
    if len(calibration):
        scores = statistics.calibration_scores(evaluation.calibration)
        for region, suffix in (("image", ""), ("big_box", "_big_box")):
            part = scores[scores["region"] == region].drop(columns="region")
            table = table.merge(
                part.rename(columns={"ece": f"ece{suffix}", "brier": f"brier{suffix}"}), "left", ["model", "prompt"]
            )
    frames = {
        "per_image": evaluation.rows,
        "table": table,
        "strata": statistics.strata(evaluation.rows, **how),
        "jitter": jitter_curve(evaluation.jitter, **how),
        "calibration": calibration,
    }
    for name, frame in frames.items():
        write_csv(folder / f"{name}.csv", frame)
    against = against_baselines(evaluation.rows, **how)
    numbers = flat_metrics(table)
    write_text_atomic(folder / "table.md", markdown(table, against))
    write_json_atomic(folder / "metrics.json", numbers)
    write_json_atomic(
        folder / "summary.json",
        {
            "num_images": int(evaluation.rows["image_id"].nunique()),
            "num_lesions": num_lesions(evaluation.rows),
            "has_truth": statistics.has_truth(evaluation.rows),
            "settings": dict(settings),
            "num_bootstrap": num_bootstrap,
            "confidence": confidence,
            "failure_below_iou": statistics.metrics.FAILURE,
            "metrics": numbers,
            "against_baselines": json.loads(against.to_json(orient="records")),
        },
    )
    return table, numbers


def arranged(evaluation: Evaluation) -> Evaluation:
    """Sort rows as tables show them: baselines, zero-shot, then the rest."""
    place = {name: k for k, name in enumerate((*BASELINES, ZERO_SHOT))}
    order = evaluation.rows["model"].map(lambda name: place.get(name, len(place)))
    rows = evaluation.rows.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)
    return Evaluation(rows, evaluation.calibration, evaluation.jitter)


def num_lesions(rows: pd.DataFrame) -> int:
    """Return the number of (image_id, lesion_id) pairs."""
    return len(rows[["image_id", "lesion_id"]].drop_duplicates())


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as CSV with six significant digits, atomically."""
    write_text_atomic(path, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def calibration_curve(calibration: pd.DataFrame) -> pd.DataFrame:
    """Return the reliability curve: count, confidence (mean probability) and accuracy (true share) per bin."""
    keys = ["model", "prompt", "region", "bin"]
    sums = calibration.groupby(keys, sort=False)[["count", "probability_sum", "truth_sum"]].sum().reset_index()
    sums = sums[sums["count"] > 0]
    return sums[[*keys, "count"]].assign(
        confidence=sums["probability_sum"] / sums["count"], accuracy=sums["truth_sum"] / sums["count"]
    )


def jitter_curve(jitter: pd.DataFrame, *, num_bootstrap: int, confidence: float) -> pd.DataFrame:
    """Return the mean IoU by share of jitter: model, prompt, share, num_images, miou, low, high."""
    out = []
    for (model, prompt, share), group in jitter.groupby(["model", "prompt", "share"], sort=False):
        values = statistics.per_image(group, "iou").to_numpy()
        low, high = statistics.interval(values, num_bootstrap=num_bootstrap, confidence=confidence)
        out.append((model, prompt, share, len(values), values.mean(), low, high))
    return pd.DataFrame(out, columns=["model", "prompt", "share", "num_images", "miou", "low", "high"])


def against_baselines(rows: pd.DataFrame, *, num_bootstrap: int, confidence: float) -> pd.DataFrame:
    """Compare the adapted model with a box in its prompt to each baseline on the same boxes, paired over images."""
    out = []
    for baseline in BASELINES:
        second = rows[(rows["model"] == baseline) & (rows["prompt"] == BOTH)]
        for prompt in ("box", BOTH):
            first = rows[(rows["model"] == ADAPTED) & (rows["prompt"] == prompt)]
            if len(first) and len(second) and statistics.has_truth(rows):
                test = statistics.paired(first, second, "iou", num_bootstrap=num_bootstrap, confidence=confidence)
                out.append({"model": f"{ADAPTED}, {prompt}", "baseline": baseline} | test)
    columns = ["model", "baseline", "difference", "difference_low", "difference_high", "p", "num_pairs"]
    return pd.DataFrame(out, columns=columns)


def slug(name: str) -> str:
    """Return a name as part of a metric's name: `box prior + offset` -> `box_prior_offset`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def flat_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Return the metrics that DVC and MLflow show: model.prompt.metric, model.objective; finite ones only."""
    wanted = (
        ("miou", "failure_rate", "difference")
        if "miou" in table
        else ("consistency", "core_coverage", "leakage", "entropy")
    )
    out: dict[str, float] = {}
    for model in table["model"].drop_duplicates():
        part = table[table["model"] == model].set_index("prompt")
        if model in BASELINES:
            part = part.drop(columns="difference", errors="ignore")
        for prompt, row in part.iterrows():
            out |= {f"{slug(model)}.{slug(str(prompt))}.{name}": float(row[name]) for name in wanted if name in row}
        if "miou" in part and set(statistics.OBJECTIVE_PROMPTS) <= set(part.index):
            out[f"{slug(model)}.objective"] = float(part.loc[list(statistics.OBJECTIVE_PROMPTS), "miou"].mean())
    return {name: round(value, 6) for name, value in out.items() if np.isfinite(value)}


def headline_metrics(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return those of `flat_metrics` that a list of runs is compared by, at most ten; the tables hold the rest."""
    return {name: numbers[name] for name in HEADLINE if name in numbers}


def headline_text(table: pd.DataFrame) -> str:
    """Return the first table of `sections` as Markdown."""
    title, cells = sections(table)[0]
    return f"**{title}**\n\n{grid(cells)}"


def grid(cells: Sequence[Sequence[str]]) -> str:
    """Return cells, the first row a header, as a Markdown table."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def prompts_in(table: pd.DataFrame) -> list[str]:
    """Return the prompt sources of a table, the poorest first."""
    order = (NONE, "ring", "centre", "box", ZOOM, BOTH, LEAKING)
    found = [str(prompt) for prompt in table["prompt"].drop_duplicates()]
    return sorted(found, key=lambda prompt: order.index(prompt) if prompt in order else len(order))


def sections(table: pd.DataFrame, reference: str = ZERO_SHOT) -> list[tuple[str, list[list[str]]]]:
    """Return (title, cells) of the tables that are shown; the first row of cells is the header.

    Args:
        reference: the model that the table's differences are to.
    """
    prompts = prompts_in(table)
    header = ["", *prompts]
    if "miou" in table:
        wanted = [
            ("Mean IoU over images, with interval", "miou"),
            (f"Paired difference of IoU to {reference}, with interval and Wilcoxon p", "difference"),
            ("Mean Dice", "dice"),
            ("95 % Hausdorff distance, pixels, mean (a missed lesion counts as the image's diagonal)", "hd95"),
            (f"Failure rate (share of images with IoU < {statistics.metrics.FAILURE})", "failure_rate"),
        ]
    else:
        wanted = [(f"No masks: {title}", name) for name, title in LABEL_FREE_TITLES.items()]
    networks = table[~table["model"].isin(BASELINES)]
    tables = [
        (title, statistics.wide(networks if name == "difference" else table, prompts, name)) for title, name in wanted
    ]
    return [(title, [header, *cells]) for title, cells in tables if cells]


def baseline_cells(against: pd.DataFrame) -> list[list[str]]:
    """Format `against_baselines` as cells, with a header."""
    rows = [
        [
            str(r["model"]),
            str(r["baseline"]),
            statistics.format_interval(r["difference"], r["difference_low"], r["difference_high"], sign=True),
            statistics.format_p(r["p"]),
        ]
        for _, r in against.iterrows()
    ]
    return [["model", "minus baseline", "difference of IoU", "p"], *rows]


def markdown(table: pd.DataFrame, against: pd.DataFrame) -> str:
    """Return the text of table.md."""
    count = int(table["num_images"].max()) if len(table) else 0
    parts = [f"{count} test images. Rows are models and baselines, columns the prompt they are given."]
    tables = sections(table)
    if len(against):
        tables.append(("Adapted against what needs no network, paired", baseline_cells(against)))
    parts += [f"**{title}**\n\n{grid(cells)}" for title, cells in tables]
    shown = {*prompts_in(table), *table["model"]}
    parts += [note for name, note in NOTES.items() if name in shown]
    return "\n\n".join(parts) + "\n"


def print_tables(
    table: pd.DataFrame, reference: str = ZERO_SHOT, first: Sequence[tuple[str, list[list[str]]]] = ()
) -> None:
    """Print the main tables on the terminal, after those of `first`, (title, cells with a header) each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    own = sections(table, reference)
    for title, cells in [*first, *(own[:2] if "miou" in table else own)]:
        shown = Table(*cells[0], title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for row in cells[1:]:
            shown.add_row(*(cell.replace(" [", "\n[").replace("] p", "]\np").replace("[", "\\[") for cell in row))
        console.print(shown)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a frame as written here: ids stay text even if they look like numbers; only an empty field is NaN."""
    text = dict.fromkeys(("model", "run", "prompt", "region", "image_id", "lesion_id", "stratum"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
