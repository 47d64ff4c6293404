"""Compare runs on one page, on the lesions that all of them were evaluated on, in paired tests with the first run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lesionsam.config.load import read_yaml
from lesionsam.errors import UserError
from lesionsam.evaluation import statistics
from lesionsam.evaluation.columns import LEAKING, ROW_COLUMNS
from lesionsam.evaluation.picks import DISPUTED, GROUPS
from lesionsam.evaluation.tables import ADAPTED, BASELINES, ZERO_SHOT, print_tables, prompts_in, read_csv, sections
from lesionsam.overlays import sheet
from lesionsam.report import charts
from lesionsam.report.page import (
    LINES,
    add_section,
    embedded,
    figure,
    grid,
    main_prompt,
    notes,
    ranked,
    read_summary,
    write_page,
)
from lesionsam.report.runs import EvaluatedRun, open_runs

COMMON = (*BASELINES, ZERO_SHOT)  # models that runs on one test split share
MODELS_TITLE = "Pretrained models"
SECTIONS = ("data", "boxes", "model", "method", "train", "evaluate")  # of params.yaml; the rest changes no figure
SAME = 2e-3  # IoU per lesion: another attention kernel may turn a pixel
CHANGED = 0.01  # IoU; less is not listed
MAX_PICTURED = 12  # lesions shown with every run's mask
MAX_CHANGED = 10  # lesions listed on either side
KEYS = ["image_id", "lesion_id"]


def compare(texts: Sequence[str], output: Path, root: Path) -> int:
    """Find the runs, print the tables and write the page. Return the page's size in bytes."""
    with open_runs(texts, root) as runs:
        summaries = [read_summary(run.results) for run in runs]
        rows = side_by_side(runs)
        table = tabulated(rows, name_of(runs[0]), summaries[0])
        print_tables(table, name_of(runs[0]), [(MODELS_TITLE, model_cells(runs, table))])
        write_page(
            output, commands=shlex.join(["lesionsam", "compare", *texts]), **content(runs, summaries, rows, table)
        )
    return output.stat().st_size


def side_by_side(runs: Sequence[EvaluatedRun]) -> pd.DataFrame:
    """Join per_image.csv of all runs on their common lesions; adapted models get their runs' names.

    Shared models (zero-shot, baselines) appear once if their figures are equal in all runs, otherwise per run.

    Raises:
        UserError: no lesion in common, or some have masks and others none.
    """
    frames = [read_rows(run.results / "per_image.csv") for run in runs]
    if len({statistics.has_truth(frame) for frame in frames}) > 1:
        names = {statistics.has_truth(frame): run.name for run, frame in zip(runs, frames, strict=True)}
        raise UserError(f"{names[True]} was evaluated against masks and {names[False]} without; they share no figure")
    lesions = frames[0][KEYS].drop_duplicates()
    for frame in frames[1:]:
        lesions = lesions.merge(frame[KEYS].drop_duplicates())
    if lesions.empty:
        raise UserError(
            f"{', '.join(run.name for run in runs)}: no test lesion in common, so there is nothing to "
            "compare; evaluate them on the same split"
        )
    frames = [frame.merge(lesions) for frame in frames]
    parts = []
    for model in COMMON:
        of_runs = [frame[frame["model"] == model] for frame in frames]
        if all(equal(of_runs[0], other) for other in of_runs[1:]):
            parts.append(of_runs[0])
        else:
            parts += [part.assign(model=f"{model} of {run.name}") for run, part in zip(runs, of_runs, strict=True)]
    names = [name_of(run) for run in runs]
    parts += [frame[frame["model"] == ADAPTED].assign(model=name) for name, frame in zip(names, frames, strict=True)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def read_rows(path: Path) -> pd.DataFrame:
    """Read the evaluation's per_image.csv.

    Raises:
        UserError: it is another file, or an empty one.
    """
    try:
        rows = read_csv(path)
    except ValueError as error:  # pandas' own errors of reading are of this kind
        raise UserError(f"{path}: expected a CSV of the evaluation ({error}); run `dvc repro evaluate` again") from None
    if missing := [name for name in ROW_COLUMNS if name not in rows]:
        raise UserError(f"{path}: expected a column {missing[0]!r}; run `dvc repro evaluate` again")
    return rows


def name_of(run: EvaluatedRun) -> str:
    """Return a run's name in tables; never that of a baseline."""
    return f"run {run.name}" if run.name in COMMON else run.name


def equal(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Return whether two evaluations of a model give the same figures in any order of rows."""
    columns = ["prompt", *KEYS, "iou", "core_coverage", "leakage"]
    a, b = (frame[columns].sort_values(columns[:3]).reset_index(drop=True) for frame in (first, second))
    return (
        len(a) == len(b)
        and bool(a[columns[:3]].equals(b[columns[:3]]))
        and bool(np.allclose(a[columns[3:]].to_numpy(float), b[columns[3:]].to_numpy(float), atol=SAME, equal_nan=True))
    )


def tabulated(rows: pd.DataFrame, reference: str, summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return `statistics.table` against the first run, with its evaluation's resamples and confidence."""
    return statistics.table(
        rows, reference=reference, num_bootstrap=summary["num_bootstrap"], confidence=summary["confidence"]
    )


def content(
    runs: Sequence[EvaluatedRun], summaries: Sequence[Mapping[str, Any]], rows: pd.DataFrame, table: pd.DataFrame
) -> dict[str, object]:
    """Return the template's variables, except the command."""
    names, first = [name_of(run) for run in runs], name_of(runs[0])
    tables = [grid(MODELS_TITLE, model_cells(runs, table), first)]
    tables += [grid(title, cells, first) for title, cells in sections(table, first)]
    if differing := setting_cells(runs):
        tables.append(grid("What was set differently", differing))
    return {
        "title": f"{len(runs)} runs side by side",
        "subtitle": ", ".join(f"{name}: {run.found}" for name, run in zip(names, runs, strict=True)),
        "verdict": [],
        "story": story(runs, summaries, rows),
        "headline": headline(table, names),
        "tables": tables,
        "notes": notes(
            table, "Figures made from each run's results/per_image.csv, settings from its models/adapted/params.yaml."
        ),
        "chart_groups": chart_groups(rows, table, names),
        "cases": shared_pictures(runs),
        "reproduce": "The same page from the same runs:",
        "details": [
            (f"params.yaml of {name}", run.params.read_text(encoding="utf-8"))
            for name, run in zip(names, runs, strict=True)
            if run.params is not None
        ],
    }


def story(runs: Sequence[EvaluatedRun], summaries: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[str]:
    """Return the introduction: what is compared, and the caveats."""
    lesions, first = rows[KEYS].drop_duplicates(), name_of(runs[0])
    out = [
        f"{len(lesions)} test lesions on {lesions['image_id'].nunique()} images, answered by every run. Differences "
        f"are to {first}, lesion by lesion and averaged per image; brackets are {summaries[0]['confidence']:.0%} "
        f"bootstrap intervals over images, p is Wilcoxon's."
    ]
    left_out = {name_of(run): int(s["num_lesions"]) - len(lesions) for run, s in zip(runs, summaries, strict=True)}
    if any(left_out.values()):
        out.append(
            "Left out, since not every run has them: "
            + ", ".join(f"{count} lesions of {name}" for name, count in left_out.items() if count)
            + "."
        )
    drawn = [{key: s["settings"].get(key) for key in ("seed", "num_points")} for s in summaries]
    if any(other != drawn[0] for other in drawn[1:]):
        out.append(
            "Beware: the runs were evaluated with differently drawn prompts (evaluate.seed, method.num_points); "
            "part of a difference is that."
        )
    if len(runs) > 2:
        out.append(f"p values are not corrected for the {len(runs) - 1} comparisons.")
    out.append("An interval over images says nothing of another seed: two runs of one configuration differ too.")
    return out


def headline(table: pd.DataFrame, names: Sequence[str]) -> list[dict[str, str]]:
    """Return each run's headline figure, see `score`."""
    return [figure(name, value, label) for name in names for label, value in [score(table, name)]]


def score(table: pd.DataFrame, name: str) -> tuple[str, float]:
    """Return what a model's one figure is, and it: mean IoU over the objective's prompts, or agreement of prompts."""
    own = table[table["model"] == name].set_index("prompt")
    if "miou" in table and set(statistics.OBJECTIVE_PROMPTS) <= set(own.index):
        return "Mean IoU of ring, centre, box", float(own.loc[list(statistics.OBJECTIVE_PROMPTS), "miou"].mean())
    if "miou" in table:
        return "Mean IoU over prompts", float(own["miou"].mean())
    return "Agreement between prompts", float(own["consistency"].mean())


def model_cells(runs: Sequence[EvaluatedRun], table: pd.DataFrame) -> list[list[str]]:
    """Return one row per run, with a header: its pretrained model, what trained, its figure before and after."""
    rows = []
    for run in runs:
        known, name = settings(run), name_of(run)
        zero_shot = ZERO_SHOT if (table["model"] == ZERO_SHOT).any() else f"{ZERO_SHOT} of {run.name}"
        values = [score(table, one)[1] for one in (zero_shot, name)]
        rows.append([name, *(known.get(f"model.{key}", "not known") for key in ("name", "encoder")), *values])
    label = score(table, name_of(runs[0]))[0]
    header = ["", "pretrained model", "encoder", f"{label}: zero-shot", "adapted", "gain"]
    return [header, *([*words, *(f"{value:.3f}" for value in (a, b)), f"{b - a:+.3f}"] for *words, a, b in rows)]


def settings(run: EvaluatedRun) -> dict[str, str]:
    """Return the parameters of a run that affect its figures, dotted keys; empty if unknown."""
    if run.params is None:
        return {}
    values = read_yaml(run.params)
    flat = pd.json_normalize({section: values[section] for section in SECTIONS if section in values})
    return {str(key): str(value) for key, value in flat.iloc[0].items()}


def setting_cells(runs: Sequence[EvaluatedRun]) -> list[list[str]]:
    """Return one row per parameter that differs between runs, with a header; empty if none does."""
    known = [settings(run) for run in runs]
    keys = list(dict.fromkeys(key for values in known for key in values))
    rows = [
        [key, *(values.get(key, "not there" if values else "not known") for values in known)]
        for key in keys
        if len({values.get(key) for values in known}) > 1
    ]
    return [["", *(name_of(run) for run in runs)], *rows] if rows else []


def chart_groups(rows: pd.DataFrame, table: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the sections with charts and the lesions that changed most; none without masks."""
    if "miou" not in table:
        return []
    prompts, first, source = prompts_in(table), names[0], "each run's results/per_image.csv"
    scatters = [charts.paired_scatter(rows, main_prompt(prompts), first, other) for other in names[1:]]
    changed = [
        grid(f"{other} minus {first}", cells)
        for other in names[1:]
        if len(cells := changed_cells(rows, first, other)) > 1
    ]
    groups: list[dict[str, Any]] = []
    add_section(groups, "By prompt and by lesion", source, [charts.miou_by_prompt(table, prompts), *scatters])
    text = f"IoU, mean over the prompts that do not leak the mask, against {first}."
    add_section(groups, "Lesions that changed most", source, [], text, changed)
    return groups


def changed_cells(rows: pd.DataFrame, first: str, second: str) -> list[list[str]]:
    """Return the lesions that gained and lost most from the first run to the second, with a header."""
    known = rows[rows["model"].isin([first, second]) & (rows["prompt"] != LEAKING)].dropna(subset=["iou"])
    wide = known.pivot_table(index=KEYS, columns="model", values="iou").dropna()
    wide = wide.assign(change=wide[second] - wide[first]).sort_values("change", ascending=False, kind="stable")
    shown = pd.concat(
        [wide[wide["change"] >= CHANGED].head(MAX_CHANGED), wide[wide["change"] <= -CHANGED].tail(MAX_CHANGED)]
    )
    return [
        ["image", "lesion", first, second, "change"],
        *(
            [*map(str, key), f"{r[first]:.3f}", f"{r[second]:.3f}", f"{r['change']:+.3f}"]
            for key, (_, r) in zip(shown.index, shown.iterrows(), strict=True)
        ),
    ]


def shared_pictures(runs: Sequence[EvaluatedRun]) -> list[dict[str, object]]:
    """Return pictures of lesions that every run's evaluation drew, runs beside each other; worst cases first."""
    drawn = [drawn_lesions(run.results / "overlays") for run in runs]
    common = [name for name in drawn[0] if all(name in other for other in drawn[1:])][:MAX_PICTURED]
    pictures = []
    for name in common:
        of_runs = []
        for known in drawn:
            with Image.open(known[name]) as image:
                of_runs.append(np.asarray(image.convert("RGB")))
        title = "left to right: " + ", ".join(name_of(run) for run in runs)
        pictures.append(embedded(Image.fromarray(sheet(of_runs, len(runs), title, key=False)), name))
    text = f"{LINES} Click a picture to enlarge it. From each run's results/overlays."
    return [{"title": "Pictured in every run", "text": text, "tables": [], "pictures": pictures}] if pictures else []


def drawn_lesions(folder: Path) -> dict[str, Path]:
    """Return lesion (as in file names, see `evaluation.picks.Pick.file_name`) -> its picture, worst cases first."""
    found: dict[str, Path] = {}
    for group in (*reversed(GROUPS), DISPUTED):
        for path in ranked(folder, group):
            found.setdefault(path.stem.split("_", 2)[2], path)
    return found
