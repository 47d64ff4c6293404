"""Draw the report's charts, each from one CSV of the results, as SVG inside the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lesionsam.utils.pages import data_uri

COLOURS = {
    "adapted": "#0b62a3",
    "zero-shot": "#d1702a",
    "ellipse": "#8a8f99",
    "box prior": "#5f9e6e",
    "box prior + offset": "#2c7a3f",
}
OTHER_COLOURS = ("#7a4fa3", "#b0397a", "#8a6d1d", "#3a8f9c", "#555b66")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ad",
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": "#1d2433",
    "axes.labelcolor": "#1d2433",
    "xtick.color": "#5b6475",
    "ytick.color": "#1d2433",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lesionsam",
}
CHANCE = "#9aa1ad"  # of reference lines
LINE: dict[str, Any] = {"lw": 1.8, "marker": "o", "ms": 4}
MARK: dict[str, Any] = {"fmt": "o", "ms": 5, "lw": 1.6}  # with an interval


@dataclass(frozen=True)
class Chart:
    """A picture for the page: data URI, alternative text and caption."""

    uri: str
    alt: str
    caption: str


def chart(draw: Callable[[Axes], None], caption: str, *, height: float = 3.6) -> Chart:
    """Run `draw(axes)` and return the figure as SVG; no global matplotlib state is touched."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(data_uri(buffer.getvalue(), "image/svg+xml"), caption, caption)


def colour(name: str, others: Sequence[str] = ()) -> str:
    """Return a model's colour: its fixed one, or one by its position among the models without."""
    if name in COLOURS:
        return COLOURS[name]
    strangers = [other for other in others if other not in COLOURS]
    return OTHER_COLOURS[strangers.index(name) % len(OTHER_COLOURS)] if name in strangers else OTHER_COLOURS[-1]


def miou_by_prompt(table: pd.DataFrame, prompts: Sequence[str]) -> Chart:
    """Draw the mean IoU with interval, one row per prompt source, one mark per model."""
    models = list(table["model"].drop_duplicates())

    def draw(axes: Axes) -> None:
        for k, model in enumerate(models):
            part = table[table["model"] == model].set_index("prompt")
            shown = [(row, prompt) for row, prompt in enumerate(prompts) if prompt in part.index]
            y = np.array([row for row, _ in shown], float) + (k - (len(models) - 1) / 2) * 0.13
            means = part.loc[[prompt for _, prompt in shown]]
            spread = np.abs(means[["low", "high"]].to_numpy().T - means["miou"].to_numpy())
            axes.errorbar(means["miou"], y, xerr=spread, **MARK, color=colour(model, models), label=model)
        axes.set_yticks(range(len(prompts)), prompts)
        axes.invert_yaxis()
        axes.set_xlabel("mean IoU over test images")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=9, columnspacing=1.2, handletextpad=0.3
        )

    return chart(draw, "Mean IoU by prompt source; bars are bootstrap intervals over images.", height=4.2)


def paired_scatter(rows: pd.DataFrame, prompt: str, first: str, second: str) -> Chart:
    """Draw each lesion's IoU of two models with the same prompt."""
    wide = rows[rows["prompt"] == prompt].pivot_table(index=["image_id", "lesion_id"], columns="model", values="iou")

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=CHANCE, lw=1)
        axes.scatter(wide[first], wide[second], s=18, alpha=0.6, color=COLOURS["adapted"], linewidths=0)
        axes.set(xlabel=f"IoU, {first}", ylabel=f"IoU, {second}", xlim=(0, 1), ylim=(0, 1), aspect="equal")

    better = float((wide[second] > wide[first]).mean())
    return chart(
        draw, f"Prompt {prompt}: each point a lesion; above the line {second} is better ({better:.0%} of lesions)."
    )


def training_curves(history: pd.DataFrame, names: Sequence[str], label: str, caption: str) -> Chart:
    """Draw columns of history.csv by epoch."""
    colours = (COLOURS["adapted"], COLOURS["zero-shot"], COLOURS["box prior + offset"], *OTHER_COLOURS)

    def draw(axes: Axes) -> None:
        for k, name in enumerate(names):
            label_ = name.removeprefix("train_").removeprefix("dev_")
            axes.plot(history["epoch"], history[name], **LINE, label=label_, color=colours[k % 8])
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(fontsize=9, ncols=2)

    return chart(draw, caption)


def gate_chart(history: pd.DataFrame) -> Chart:
    """Draw the share of training images that the gate trusts by epoch, in all and by size of the target."""
    sizes = {
        "trusted": "all",
        "trusted_small": "small (up to 5 % of the frame)",
        "trusted_medium": "medium (up to 20 %)",
        "trusted_large": "large",
    }
    shown = {name: label for name, label in sizes.items() if name in history and history[name].notna().any()}

    def draw(axes: Axes) -> None:
        for k, (name, label) in enumerate(shown.items()):
            paint = (COLOURS["adapted"], *OTHER_COLOURS)[k]
            axes.plot(history["epoch"], history[name], lw=2.2 if k == 0 else 1.3, color=paint, label=label)
        axes.set(xlabel="epoch", ylabel="share trusted by the gate", ylim=(-0.03, 1.05))
        axes.legend(fontsize=9)

    return chart(draw, "How many targets the entropy gate let through, by size of the target in the model's frame.")


def strata_chart(strata: pd.DataFrame, prompt: str) -> Chart:
    """Draw the mean IoU by lesion size for one prompt source."""
    part = strata[strata["prompt"] == prompt]
    models, names = list(part["model"].drop_duplicates()), list(part["stratum"].drop_duplicates())

    def draw(axes: Axes) -> None:
        for k, model in enumerate(models):
            own = part[part["model"] == model]
            x = np.array([names.index(name) for name in own["stratum"]]) + (k - (len(models) - 1) / 2) * 0.12
            spread = np.abs(own[["low", "high"]].to_numpy().T - own["miou"].to_numpy())
            axes.errorbar(x, own["miou"], yerr=spread, **MARK, color=colour(model, models), label=model)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("mean IoU")
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)

    return chart(draw, f"Prompt {prompt}, by lesion size (tertiles of the share of the image).")


def jitter_chart(jitter: pd.DataFrame) -> Chart:
    """Draw the mean IoU against the imprecision of the boxes."""
    models = list(jitter["model"].drop_duplicates())

    def draw(axes: Axes) -> None:
        for (model, prompt), part in jitter.groupby(["model", "prompt"], sort=False):
            part, solid, paint = part.sort_values("share"), prompt == "box", colour(str(model), models)
            shares, style = part["share"] * 100, "-" if solid else "--"
            axes.plot(shares, part["miou"], **LINE, ls=style, color=paint, label=f"{model}, {prompt}")
            if solid:
                axes.fill_between(shares, part["low"], part["high"], color=paint, alpha=0.12, lw=0)
        axes.set(xlabel="boxes scaled and shifted by up to [%]", ylabel="mean IoU")
        axes.legend(fontsize=9)

    return chart(draw, "Sloppier boxes at prediction; the band is the interval of the box prompt.")


def calibration_chart(calibration: pd.DataFrame, prompt: str, scores: dict[str, float]) -> Chart:
    """Draw the reliability inside the big box: share of lesion pixels against predicted probability."""
    part = calibration[(calibration["prompt"] == prompt) & (calibration["region"] == "big_box")]
    models = list(part["model"].drop_duplicates())

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=CHANCE, lw=1)
        for model in models:
            own = part[part["model"] == model]
            label = f"{model} (ECE {scores[model]:.3f})" if model in scores else model
            axes.plot(own["confidence"], own["accuracy"], **LINE, color=colour(model, models), label=label)
        axes.set(xlabel="predicted probability of lesion", ylabel="share that is lesion")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.legend(fontsize=9, loc="upper left")

    return chart(draw, f"Calibration of pixels inside the big box, prompt {prompt}.")
