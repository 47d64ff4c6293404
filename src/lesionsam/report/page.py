"""Write a run's results as one HTML file: it opens offline, holds its pictures and names the file of every figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from lesionsam.config.load import read_yaml
from lesionsam.config.summary import trained_parts
from lesionsam.errors import UserError
from lesionsam.evaluation import statistics
from lesionsam.evaluation.picks import DISPUTED, GROUPS, Pick, disputed
from lesionsam.evaluation.tables import (
    ADAPTED,
    BASELINES,
    LABEL_FREE_TITLES,
    NOTES,
    ZERO_SHOT,
    baseline_cells,
    prompts_in,
    read_csv,
    sections,
)
from lesionsam.report import charts
from lesionsam.report.verdict import verdict
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.pages import jpeg_uri, render

MAX_BYTES = 15_000_000  # of the page
JPEG_QUALITY = 82
IOU_SCORES = ("objective", "ring", "centre", "box")  # columns of history.csv, mean IoU; needs masks
LABEL_FREE = "label_free"  # needs none; on another scale, so never on one axis with an IoU
NOT_LOSSES = ("epoch", "step", "lr", "seconds")
GATE = "trusted"  # column of history.csv, and beginning of others
MAX_CURVES = 8
MAX_DISPUTED = 12  # rows of the table
MAX_PICTURES = 20  # of each group; 4 groups of noisy ones stay below MAX_BYTES
LINES = "Yellow: prediction; blue: the expert's outline; white: big box (dashed) and small box."


def build_report(results: Path, training: Path, output: Path, *, commit: str | None = None) -> int:
    """Write the page.

    Args:
        results: folder of the evaluate stage. training: folder of the train stage (params.yaml, history.csv).
        output: HTML file to write. commit: of the code, for the reader who wants to repeat it.
    Returns:
        Its size, bytes.
    Raises:
        UserError: results without an evaluation, or a page over `MAX_BYTES`.
    """
    summary = read_summary(results)
    if not (training / "params.yaml").is_file():
        raise UserError(f"{training / 'params.yaml'}: no such file; run `dvc repro train` first")
    table = read_csv(results / "table.csv")
    params_text = (training / "params.yaml").read_text(encoding="utf-8")
    params = read_yaml(training / "params.yaml")
    write_page(
        output,
        title="Two boxes per lesion: what the adapted model does",
        subtitle=f"{params['data']['source']} data · model {params['model']['name']} · method "
        f"{params['method']['name']} · {summary['num_images']} test images, {summary['num_lesions']} lesions",
        verdict=verdict(table, read_csv(results / "strata.csv"), read_csv(results / "per_image.csv"), summary),
        story=story(params, summary),
        headline=headline(table),
        tables=tables(table, summary),
        notes=notes(table, "From results/table.csv and results/summary.json."),
        chart_groups=chart_groups(results, training, table),
        cases=[
            *cases(results / "overlays", training / "overlays", summary["has_truth"], captions(results)),
            *label_issues(results, summary["has_truth"]),
        ],
        reproduce="In the repository, at this commit and with these parameters in params.yaml:",
        commands="\n".join([f"git checkout {commit}"] * bool(commit) + ["dvc repro", "dvc metrics show"]),
        details=[("params.yaml as used for training", params_text)],
    )
    return output.stat().st_size


def read_summary(results: Path) -> dict[str, Any]:
    """Read summary.json of an evaluation.

    Raises:
        UserError: there is none, or none that can be read.
    """
    path = results / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro evaluate` first") from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON ({error}); run `dvc repro evaluate` again") from None


def write_page(output: Path, **content: object) -> None:
    """Fill the template and write it atomically.

    Raises:
        UserError: a page over `MAX_BYTES`, or a place that cannot be written.
    """
    text = render("lesionsam.report", "report.html", **content)
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(
            f"{output}: the page would take {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB; "
            "lower evaluate.overlays"
        )
    try:
        write_text_atomic(output, text)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another place") from None


def story(params: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Return the introduction: labels, what trained, how it was selected and measured."""
    method, model, boxes = params["method"], params["model"], params["boxes"]
    drawn = (
        "simulated from the masks (which the method itself never sees)"
        if boxes["source"] == "simulated"
        else "drawn by an annotator"
    )
    labels = (
        "The model was trained with true masks."
        if method["name"] == "supervised"
        else f"The model was adapted from two boxes per lesion, {drawn}: a big one that holds the lesion "
        "and a small one inside it. "
        f"No mask took part in training; the target of the pseudo-mask term is “{method['target']['kind']}”."
    )
    selection = (
        "by true masks of the development images"
        if params["train"]["select"] == "objective" and summary["has_truth"]
        else "by a score that needs no mask"
    )
    out = [
        f"{labels} What trains is {trained_parts(model)}, for {params['train']['epochs']} epochs; "
        f"the best epoch was chosen {selection}. "
        "Training and selection never read the test images; the evaluation does, and this page shows its last run."
    ]
    if summary["has_truth"]:
        out.append(
            f"All figures are per image at the image's original size and averaged over images; brackets are "
            f"{summary['confidence']:.0%} bootstrap intervals over images ({summary['num_bootstrap']} resamples). "
            "Each model answers exactly the same drawn prompts."
        )
    else:
        out.append(
            "These test images have no masks, so there is no IoU. Shown is what needs none: agreement "
            "between prompts, how much of the "
            "small box the masks cover, how much of them leaves the big box, and pictures."
        )
    return out


def headline(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the figures at the top of the page."""
    own = table[table["model"] == ADAPTED].set_index("prompt")
    if "miou" not in table:
        shown = [name for name in ("consistency", "core_coverage", "leakage") if name in own]
        return [figure(LABEL_FREE_TITLES[name].capitalize(), own[name].mean(), "mean over prompts") for name in shown]
    before = table[table["model"] == ZERO_SHOT].set_index("prompt")
    return [
        figure(f"Mean IoU, prompt {prompt}", own.loc[prompt, "miou"], f"zero-shot {before.loc[prompt, 'miou']:.3f}")
        for prompt in (*statistics.OBJECTIVE_PROMPTS, "box+core")
        if prompt in own.index and prompt in before.index
    ]


def figure(label: str, value: Any, note: str) -> dict[str, str]:
    """Return a number of the headline for the template."""
    return {"label": label, "value": f"{value:.3f}", "note": note}


def grid(title: str, cells: Sequence[Sequence[str]], main: str | None = None) -> dict[str, object]:
    """Return a table for the template; the row of the model `main` stands out."""
    return {"title": title, "cells": cells, "main": main}


def tables(table: pd.DataFrame, summary: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return the main tables and the comparison with the baselines."""
    out = [grid(title, cells, ADAPTED) for title, cells in sections(table)]
    if against := summary["against_baselines"]:
        title = "Adapted model minus what needs no network, paired over images"
        out.append(grid(title, baseline_cells(pd.DataFrame(against))))
    return out


def notes(table: pd.DataFrame, source: str) -> list[str]:
    """Return the notes needed to read the tables, and their source."""
    shown = {*prompts_in(table), *table["model"]}
    return [*(note for name, note in NOTES.items() if name in shown), source]


def main_prompt(prompts: Sequence[str]) -> str:
    """Return the prompt of the charts that show one alone."""
    return next((prompt for prompt in ("box", "centre", "ring") if prompt in prompts), prompts[0])


def add_section(
    groups: list[dict[str, Any]],
    title: str,
    source: str,
    drawn: Sequence[charts.Chart],
    text: str = "",
    grids: Sequence[Mapping[str, object]] = (),
) -> None:
    """Append a section of charts and tables to the page; nothing without either."""
    if drawn or grids:
        groups.append({"title": title, "source": source, "charts": list(drawn), "text": text, "tables": list(grids)})


def chart_groups(results: Path, training: Path, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the sections with charts; a section without data is left out."""
    prompts, trained = prompts_in(table), f"{training.parent.name}/{training.name}"
    main = main_prompt(prompts)
    groups: list[dict[str, Any]] = []
    add = partial(add_section, groups)
    if "miou" in table:
        rows = read_csv(results / "per_image.csv")
        drawn = [charts.miou_by_prompt(table, prompts)]
        if {ZERO_SHOT, ADAPTED} <= set(rows.loc[rows["prompt"] == main, "model"]):
            drawn.append(charts.paired_scatter(rows, main, ZERO_SHOT, ADAPTED))
        add("By prompt and by image", "results/table.csv and results/per_image.csv", drawn)
    if (training / "history.csv").exists():
        history = pd.read_csv(training / "history.csv")
        add("Training", f"{trained}/history.csv", training_charts(history))
        if GATE in history and history[GATE].notna().any():
            add("What the gate let through", f"{trained}/history.csv", [charts.gate_chart(history)])
    if (training / "cost.json").exists():
        add("Time and memory", f"{trained}/cost.json", [], grids=[grid("Training", cost_cells(training))])
    strata = read_csv(results / "strata.csv")
    if len(strata):
        shown = strata[~strata["model"].isin(BASELINES[1:])]
        sizes = "; ".join(
            f"{r['stratum']}: {r['share_low']:.1%} to {r['share_high']:.1%} of the image"
            for _, r in strata.drop_duplicates("stratum").iterrows()
        )
        wanted = [prompt for prompt in dict.fromkeys((main, "centre")) if prompt in set(shown["prompt"])]
        drawn = [charts.strata_chart(shown, prompt) for prompt in wanted]
        add("By lesion size", "results/strata.csv", drawn, f"Tertiles of the test lesions: {sizes}.")
    jitter, calibration = read_csv(results / "jitter.csv"), read_csv(results / "calibration.csv")
    if len(jitter):
        text = (
            "Width, height and centre of both boxes drawn anew within the share given; "
            "the far end of the curve is well beyond an annotator's care."
        )
        add("Sloppy boxes", "results/jitter.csv", [charts.jitter_chart(jitter)], text)
    if len(calibration) and "ece_big_box" in table:
        known = table[table["prompt"] == main].dropna(subset=["ece_big_box"])
        drawn = [charts.calibration_chart(calibration, main, known.set_index("model")["ece_big_box"].to_dict())]
        text = (
            "A well calibrated model lies on the line. ECE is over pixels inside the big box; "
            "over the whole image it is in results/table.csv."
        )
        add("Calibration", "results/calibration.csv", drawn, text)
    return groups


def training_charts(history: pd.DataFrame) -> list[charts.Chart]:
    """Return the charts of history.csv: loss terms, and development scores with one axis per kind of score."""
    numeric = [name for name in history.select_dtypes("number").columns if history[name].notna().any()]
    scores = (*IOU_SCORES, LABEL_FREE)
    losses = [
        name
        for name in numeric
        if name.removeprefix("dev_") not in scores
        and name.removeprefix("train_") not in NOT_LOSSES
        and not name.startswith(("dev_", GATE))
    ][:MAX_CURVES]
    drawn = [(losses, "mean over the epoch", "Loss terms and monitors during training.")]
    for label, kind in (("mean IoU", IOU_SCORES), ("label-free score", (LABEL_FREE,))):
        caption = f"Development images, {label}, on the model's frame (quick figures)."
        drawn.append(([name for name in kind if name in numeric], f"{label} of development images", caption))
    return [charts.training_curves(history, names, label, caption) for names, label, caption in drawn if names]


def captions(results: Path) -> dict[str, str]:
    """Return the text below each case's picture, by the name that its file has after group and rank.

    With masks it is the IoU that each model reaches with the prompt of the pictures.
    """
    rows = read_csv(results / "per_image.csv")
    rows = rows[rows["prompt"] == main_prompt(list(rows["prompt"].drop_duplicates()))]
    found = {}
    for (image_id, lesion_id), part in rows.groupby(["image_id", "lesion_id"], sort=False):
        known = part.dropna(subset=["iou"])
        scores = ", ".join(f"{model} {iou:.2f}" for model, iou in zip(known["model"], known["iou"], strict=True))
        name = Path(Pick("", 0, str(image_id), str(lesion_id)).file_name).stem.removeprefix("_0_")
        found[name] = f"{name}: IoU {scores}" if scores else name
    return found


def cases(overlays: Path, epochs: Path, has_truth: bool, captions: Mapping[str, str]) -> list[dict[str, object]]:
    """Return the best, median and worst cases and the last epoch's development pictures; captions: see `captions`."""
    by = "IoU" if has_truth else "agreement between prompts"
    text = f"Chosen by {by}. {LINES} Click a picture to enlarge it. From results/overlays."
    out = [
        case_group(f"{group.capitalize()} cases", text if group == GROUPS[0] else "", found, captions=captions)
        for group in GROUPS
        if (found := ranked(overlays, group))
    ]
    if last := sorted(epochs.glob("*.png"))[-1:]:
        out.append(case_group("Development images, last epoch", f"From {epochs.parent.name}/{epochs.name}.", last))
    return out


def case_group(
    title: str,
    text: str,
    paths: Sequence[Path],
    grids: Sequence[Mapping[str, object]] = (),
    captions: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Return a section of pictures for the template, at most `MAX_PICTURES`."""
    pictures = []
    for path in paths[:MAX_PICTURES]:
        with Image.open(path) as image:
            name = path.stem.split("_", 2)[-1]
            pictures.append(embedded(image, path.stem) | {"caption": (captions or {}).get(name, "")})
    return {"title": title, "text": text, "tables": list(grids), "pictures": pictures}


def ranked(overlays: Path, group: str) -> list[Path]:
    """Return a group's pictures in the order of their ranks, see `evaluation.picks.Pick.file_name`."""
    return sorted(overlays.glob(f"{group}_*.png"), key=lambda path: int(path.name.split("_")[1]))


def label_issues(results: Path, has_truth: bool) -> list[dict[str, object]]:
    """Return the lesions whose mask should be checked, with their pictures; empty without masks."""
    if not has_truth:
        return []
    rows = read_csv(results / "per_image.csv")
    found = disputed(rows[rows["model"] == ADAPTED], MAX_DISPUTED)
    if found.empty:
        return []
    cells = [["image", "lesion", "agreement between prompts", "best IoU with the mask"]]
    cells += [
        [str(r["image_id"]), str(r["lesion_id"]), f"{r['consistency']:.3f}", f"{r['iou']:.3f}"]
        for r in found.to_dict("records")
    ]
    text = (
        "Whatever the prompt, the model gives the same answer here, and the mask is another. Either may be wrong. From "
        "results/per_image.csv and results/overlays."
    )
    shown = grid("Agreement and IoU, the widest gap first", cells)
    return [case_group("Worth a second look at the label", text, ranked(results / "overlays", DISPUTED), [shown])]


def cost_cells(training: Path) -> list[list[str]]:
    """Return the table of a training's cost.json."""
    took = json.loads((training / "cost.json").read_text(encoding="utf-8"))
    seconds, steps = float(took["seconds"]), max(1, int(took["steps"]))
    return [
        ["steps", "in all", "per step", f"peak memory of the {took['memory_of']}", "on"],
        [
            str(took["steps"]),
            f"{seconds / 60:.1f} min",
            f"{seconds / steps:.2f} s",
            f"{took['peak_memory_gb']:.2f} GB",
            f"{took['device']}, {took['threads']} CPU thread(s), torch {took['torch']}",
        ],
    ]


def embedded(image: Image.Image, name: str) -> dict[str, str]:
    """Return an image as a JPEG inside the page."""
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return {"name": safe, "uri": jpeg_uri(image, JPEG_QUALITY), "caption": ""}
