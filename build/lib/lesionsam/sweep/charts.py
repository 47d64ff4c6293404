"""Pictures of a sweep: its history, what mattered, and every trial as a line through its values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from lesionsam.sweep.space import Dimension
from lesionsam.sweep.trial import Place, shown
from lesionsam.utils.files import atomic_write

COMPLETE, PRUNED, FAILED, WINNER, START, LINE = "#0b62a3", "#d1702a", "#b0397a", "#2c7a3f", "#1d2433", "#9aa1ad"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MIN_COMPLETE = 4  # trials below which shares of importance say nothing
MAX_LABELS = 8  # choices named on an axis


def draw_pictures(study: optuna.Study, place: Place, space: Sequence[Dimension], what: str) -> dict[str, Path]:
    """History, importance and parallel coordinates as PNG files, those that the trials suffice for.

    Args:
        what: the value, in words.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("values") and state(t)]
    complete = [t for t in trials if state(t) == "complete"]
    if not complete:
        return {}
    best = max(complete, key=lambda t: (t.value or 0.0, -t.number))
    drawn: dict[str, Callable[[Axes], None]] = {
        "history": lambda axes: history(axes, trials, study.user_attrs.get("zero_shot"), what)
    }
    if len(complete) >= 2:
        drawn["parallel"] = lambda axes: parallel(axes, trials, best, space, what)
    if len(complete) >= MIN_COMPLETE and len(space) > 1 and len({t.value for t in complete}) > 1:
        shares = importance(study, space)
        drawn["importance"] = lambda axes: bars(axes, shares, len(complete), what)
    paths = {}
    for name, draw in drawn.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9, 5), layout="constrained")
            draw(figure.subplots())
            paths[name] = place.out / f"{name}.png"
            place.out.mkdir(parents=True, exist_ok=True)
            with atomic_write(paths[name]) as file:
                figure.savefig(file, dpi=110, format="png")
    return paths


def state(trial: FrozenTrial) -> str:
    """complete, pruned or failed; empty for a trial that is not shown."""
    if trial.state == TrialState.FAIL:
        return "failed" if "error" in trial.user_attrs else ""
    return {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "")


def points(trials: Sequence[FrozenTrial], wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) numbers and (N,) values of the trials in a state that have a value."""
    found = [(t.number, t.value) for t in trials if state(t) == wanted and t.value is not None]
    return np.array([number for number, _ in found], int), np.array([value for _, value in found], float)


def history(axes: Axes, trials: Sequence[FrozenTrial], zero_shot: float | None, what: str) -> None:
    """Value by trial: complete ones with the best so far, pruned ones where they stood, failed ones on the axis."""
    numbers, values = points(trials, "complete")
    axes.step(numbers, np.maximum.accumulate(values), where="post", color=WINNER, label="best so far")
    axes.scatter(numbers, values, color=COMPLETE, label="complete", zorder=3)
    numbers, values = points(trials, "pruned")
    if len(numbers):
        axes.scatter(numbers, values, color=PRUNED, marker="x", label="pruned, where it stood", zorder=3)
    failed = [t.number for t in trials if state(t) == "failed"]
    if failed:
        on_axis = axes.get_xaxis_transform()
        axes.plot(failed, [0.0] * len(failed), "v", color=FAILED, label="failed", transform=on_axis, clip_on=False)
    for t in trials:
        if "start" in t.user_attrs and t.value is not None:
            axes.scatter([t.number], [t.value], s=140, facecolor="none", edgecolor=START, label="start", zorder=4)
    if zero_shot is not None:
        axes.axhline(zero_shot, color=LINE, linestyle="--", label="zero-shot")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=what, title="Value by trial")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=6)


def importance(study: optuna.Study, space: Sequence[Dimension]) -> dict[str, float]:
    """Share of each key in the variance of the value over complete trials, by fANOVA (Hutter et al. 2014); sums to 1.

    Optuna's own default asks what tells the best few from the rest, and was wrong about eight trials of a clear case.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0), params=[d.key for d in space]
        )
    return {key: float(share) for key, share in shares.items()}


def bars(axes: Axes, shares: dict[str, float], num_trials: int, what: str) -> None:
    """One bar per key, the largest on top."""
    names = sorted(shares, key=lambda key: shares[key])
    drawn = axes.barh(names, [shares[name] for name in names], color=COMPLETE)
    axes.bar_label(drawn, [f"{shares[name]:.0%}" for name in names], padding=3)
    axes.set(
        xlim=(0, 1.08),
        xlabel=f"share of the variance of {what} (fANOVA)",
        title=f"What mattered, over {num_trials} complete trials"
        + (": few, so no more than a hint" if num_trials < 10 * len(names) else ""),
    )
    axes.grid(axis="y", visible=False)


def parallel(
    axes: Axes, trials: Sequence[FrozenTrial], best: FrozenTrial, space: Sequence[Dimension], what: str
) -> None:
    """Each trial as a line through its values to its score: better ones darker, pruned ones dashed, winner and start
    marked."""
    shown_trials = [t for t in trials if t.value is not None]
    scores = np.array([t.value for t in shown_trials], float)
    low, high = float(scores.min()), float(scores.max())
    width = (high - low) or 1.0
    for t, score in zip(shown_trials, scores, strict=True):
        heights = [place_on(d, t.user_attrs["values"][d.key]) for d in space] + [(score - low) / width]
        colour, weight, order = COMPLETE, 1.2, 2.0
        if t.number == best.number:
            colour, weight, order = WINNER, 2.8, 5.0
        elif "start" in t.user_attrs:
            colour, weight, order = START, 2.2, 4.0
        elif state(t) == "pruned":
            colour = PRUNED
        plain = colour in (COMPLETE, PRUNED)
        axes.plot(
            range(len(heights)),
            heights,
            color=colour,
            linewidth=weight,
            linestyle="--" if state(t) == "pruned" else "-",
            alpha=0.25 + 0.6 * (score - low) / width if plain else 1.0,
            zorder=order,
        )
    for label, colour, line in (
        ("winner", WINNER, "-"),
        ("start", START, "-"),
        ("complete, darker is better", COMPLETE, "-"),
        ("pruned", PRUNED, "--"),
    ):
        axes.plot([], [], color=colour, linestyle=line, label=label)
    for k, d in enumerate(space):
        axes.axvline(k, color=LINE, linewidth=0.8)
        for height, text in ticks(d):
            axes.annotate(text, (k, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    axes.axvline(len(space), color=LINE, linewidth=0.8)
    for height in (0.0, 0.5, 1.0):
        text = f"{low + height * width:.4f}"
        axes.annotate(text, (len(space), height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    axes.set_xticks(range(len(space) + 1), [d.name for d in space] + ["value"])
    axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.15, len(space) + 0.35), title=f"Trials by their values; {what}")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)


def place_on(dimension: Dimension, value: Any) -> float:
    """Height from 0 to 1 of a value on its axis."""
    if dimension.choices:
        return dimension.choices.index(value) / (len(dimension.choices) - 1)
    numbers = np.array([dimension.low, dimension.high, value], float)
    low, high, at = np.log(numbers) if dimension.log else numbers
    return float((at - low) / (high - low))


def ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Heights and words of an axis."""
    if dimension.choices:
        few = len(dimension.choices) <= MAX_LABELS
        named = dimension.choices if few else (dimension.choices[0], dimension.choices[-1])
        return [(place_on(dimension, choice), shown(choice)) for choice in named]
    middle = (dimension.low * dimension.high) ** 0.5 if dimension.log else (dimension.low + dimension.high) / 2
    return [(height, f"{value:.3g}") for height, value in ((0.0, dimension.low), (0.5, middle), (1.0, dimension.high))]
