"""Report a sweep: its trials as a table, a summary, and the comparison of winner and start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import spearmanr

from lesionsam.config.load import Config
from lesionsam.evaluation.statistics import paired, per_image
from lesionsam.sweep.prepared import PreparedData
from lesionsam.sweep.space import Dimension, Value
from lesionsam.sweep.study import best_trial, complete_trials, is_finished, state_name
from lesionsam.sweep.trial import START, WINNER, FullTraining, StudyFolder, budget, printable
from lesionsam.utils.files import write_text_atomic

MIN_RANKED = 4  # trials that a rank correlation is worth stating for
SEED_OFFSET = 1000  # of the comparison's seeds, from train.seed: none that a trial used


def shown_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials worth a row: all but lost ones (queued again) and duplicates (not trained)."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if is_finished(t) or t.state == TrialState.RUNNING]


def table(study: optuna.Study, config: Config, space: Sequence[Dimension]) -> list[dict[str, str]]:
    """Return one row per trial: number, state, value, the keys' values, epochs (of its budget), duration."""
    rows = []
    for t in shown_trials(study):
        values, scores = t.user_attrs.get("values", {}), t.user_attrs.get("scores", {})
        steps = max(t.intermediate_values, default=0)
        rows.append(
            {
                "trial": f"{t.number}{' (start)' if 'start' in t.user_attrs else ''}",
                "state": state_name(t),
                "value": "" if t.value is None else f"{t.value:.4f}",
                **{d.name: printable(values.get(d.key, "")) for d in space},
                "epochs": f"{steps}/{budget(config)}",
                "seconds": f"{t.duration.total_seconds():.0f}" if t.duration else "",
                "label_free": f"{scores['label_free']:.4f}" if "label_free" in scores else "",
                "note": t.user_attrs.get("error", ""),
            }
        )
    return rows if any(row["note"] for row in rows) else [{k: v for k, v in row.items() if k != "note"} for row in rows]


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as a Markdown table in columns."""
    if not rows:
        return "no trial yet"
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [
        [name.ljust(width) for name, width in zip(names, widths, strict=True)],
        ["-" * width for width in widths],
        *([row[name].ljust(width) for name, width in zip(names, widths, strict=True)] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rank_correlation(study: optuna.Study) -> tuple[float, int] | None:
    """Return Spearman's correlation of label-free score and true mean IoU over complete trials, and their number.

    None for fewer than `MIN_RANKED`, without masks, or where either does not vary.
    """
    scores = [t.user_attrs.get("scores", {}) for t in complete_trials(study)]
    pairs = np.array([(s["label_free"], s["miou"]) for s in scores if "miou" in s and "label_free" in s])
    if len(pairs) < MIN_RANKED or np.ptp(pairs[:, 0]) == 0 or np.ptp(pairs[:, 1]) == 0:
        return None
    return float(np.asarray(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)), len(pairs)


def comparisons(config: Config, best: Mapping[str, Value], start: Mapping[str, Value]) -> list[FullTraining]:
    """Return the trainings of the closing comparison: both with the same new seeds, in turns."""
    seeds = [config.train.seed + SEED_OFFSET + k for k in range(config.sweep.confirm_seeds)]
    return [
        FullTraining(which, seed, dict(values)) for seed in seeds for which, values in ((WINNER, best), (START, start))
    ]


@dataclass(frozen=True)
class Verdict:
    """Winner minus start on images that no trial saw: mean over images (seeds averaged first), bootstrap interval."""

    winner: float
    start: float
    difference: float
    low: float
    high: float
    num_images: int
    num_seeds: int
    seeds_sd: float

    def line(self, config: Config, has_masks: bool) -> str:
        """Return it in words, with the data it was measured on."""
        what = (
            "mean IoU of ring, centre, box at original size" if has_masks else "label-free score of ring, centre, box"
        )
        says = "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"
        return (
            f"winner against start: {self.winner:.4f} - {self.start:.4f} = {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] ({config.evaluate.confidence:.0%} interval over images), {says}; "
            f"{what}, on the {self.num_images} development images no trial saw, {self.num_seeds} new seeds each at "
            f"{config.train.epochs} epochs (sd of the difference over seeds "
            f"{self.seeds_sd:.4f}); the test split was not read"
        )


def judge(config: Config, study_folder: StudyFolder, trainings: Sequence[FullTraining]) -> Verdict | None:
    """Return the verdict, None before every training of the comparison has its scores."""
    if not trainings or not all(training.path(study_folder).exists() for training in trainings):
        return None
    rows = pd.concat(
        [
            pd.read_csv(training.path(study_folder), dtype={"image_id": str, "run": str}).assign(model=training.kind)
            for training in trainings
        ]
    )
    winner, start = (rows[rows["model"] == kind] for kind in (WINNER, START))
    settings = {"num_bootstrap": config.evaluate.num_bootstrap, "confidence": config.evaluate.confidence}
    found = paired(winner, start, "score", **settings)
    by_seed = winner.groupby("run")["score"].mean() - start.groupby("run")["score"].mean()
    return Verdict(
        float(per_image(winner, "score").mean()),
        float(per_image(start, "score").mean()),
        found["difference"],
        found["difference_low"],
        found["difference_high"],
        int(found["num_pairs"]),
        len(by_seed),
        float(by_seed.std()),
    )


def summary(study: optuna.Study, config: Config, prepared: PreparedData, verdict: Verdict | None) -> list[str]:
    """Return the results in lines."""
    best, trials = best_trial(study), shown_trials(study)
    counts = {
        state: sum(state_name(t) == state for t in trials) for state in ("complete", "pruned", "failed", "running")
    }
    scored, what = sum(s.split == "dev" for s in prepared.seen), scored_by(config, prepared)
    lines = [
        f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count),
        f"value: {what} on {scored} development images at model size, best epoch; budget of a trial "
        f"{budget(config)} of {config.train.epochs} epochs; zero-shot {study.user_attrs['zero_shot']:.4f}",
    ]
    if best is None:
        return [*lines, "no trial is complete"]
    start = next((t for t in trials if "start" in t.user_attrs and t.value is not None), None)
    values = " ".join(f"{key}={printable(value)}" for key, value in best.user_attrs["values"].items())
    lines.append(
        f"best: trial {best.number}, {best.value:.4f}, {values}"
        + (f"; start (trial {start.number}) {start.value:.4f}" if start is not None else "")
    )
    if (label_free := rank_correlation(study)) is not None:
        lines.append(
            f"label-free score against true mean IoU: Spearman {label_free[0]:+.2f} over {label_free[1]} complete "
            "trials, each at its best epoch"
        )
    if verdict is not None:
        lines.append(verdict.line(config, prepared.has_masks))
    elif prepared.held and config.sweep.confirm_seeds and "start" not in best.user_attrs:
        lines.append("not compared on unseen images yet: the same command without --timeout does that")
    elif "start" in best.user_attrs:
        lines.append("params.yaml as it stood is the best found: nothing to compare")
    elif not prepared.held or not config.sweep.confirm_seeds:
        lines.append(
            "not compared on unseen images (sweep.holdout or sweep.confirm_seeds is 0); the best of many leads by luck"
        )
    return lines


def time_left(
    finished: Sequence[FrozenTrial], config: Config, num_trials: int, num_workers: int, *, compares: bool
) -> list[str]:
    """Return the time left in words, judged by the finished trials: for the other trials, and for the comparison."""
    seconds = sum(t.duration.total_seconds() for t in finished if t.duration is not None)
    epochs = sum(max(t.intermediate_values, default=0) for t in finished)
    if not epochs:
        return []
    rest = seconds / len(finished) * max(0, num_trials - len(finished)) / num_workers
    after = seconds / epochs * config.train.epochs * 2 * config.sweep.confirm_seeds * compares / num_workers
    found = [f"about {rest / 60:.0f} min left"] if rest > 90 else []
    return found + ([f"then about {after / 60:.0f} min to compare"] if after > 90 else [])


def score_name(config: Config, prepared: PreparedData) -> str:
    """Return the score that is a trial's value: `objective`, the mean IoU, or `label_free`."""
    return config.sweep.objective if prepared.has_masks else "label_free"


def scored_by(config: Config, prepared: PreparedData) -> str:
    """Return the value of a trial in words."""
    if score_name(config, prepared) == "label_free":
        return "label-free score (core coverage, consistency, 1 - leakage)"
    return "mean IoU of ring, centre, box"


def write(study_folder: StudyFolder, rows: Sequence[Mapping[str, str]], lines: Sequence[str]) -> list[Path]:
    """Write trials.csv and summary.md into the sweep's folder, and return their paths."""
    study_folder.out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(study_folder.out / "trials.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    body = "\n".join(f"- {line}" for line in lines)
    write_text_atomic(study_folder.out / "summary.md", f"# {study_folder.study}\n\n{body}\n\n{as_text(rows)}\n")
    return [study_folder.out / "trials.csv", study_folder.out / "summary.md"]
