"""Draw a sweep by Optuna: history, curves by epoch, importance, trials as lines through their values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import optuna
from matplotlib import pyplot
from matplotlib.axes import Axes
from optuna.importance import FanovaImportanceEvaluator
from optuna.visualization import matplotlib as plots

from lesionsam.sweep.space import Dimension
from lesionsam.sweep.study import complete_trials
from lesionsam.utils.files import atomic_write

MIN_COMPLETE = 4  # trials below which importance says nothing


def draw_pictures(study: optuna.Study, out: Path, space: Sequence[Dimension], value_name: str) -> dict[str, Path]:
    """Draw the pictures that the trials suffice for as PNG files, and return their paths by name.

    Importance is fANOVA's (Hutter et al. 2014): Optuna's default asks what tells the best few from the rest, and was
    wrong about eight trials of a clear case.
    """
    complete, keys = complete_trials(study), [d.key for d in space]
    draw: dict[str, Callable[[], Axes]] = {}
    if complete:
        draw["history"] = partial(plots.plot_optimization_history, study, target_name=value_name)
        draw["curves"] = partial(plots.plot_intermediate_values, study)
    if len(complete) >= 2:
        draw["parallel"] = partial(plots.plot_parallel_coordinate, study, keys, target_name=value_name)
    if len(complete) >= MIN_COMPLETE and len(space) > 1 and len({t.value for t in complete}) > 1:
        evaluator = FanovaImportanceEvaluator(seed=0)
        draw["importance"] = partial(plots.plot_param_importances, study, evaluator, keys, target_name=value_name)
    out.mkdir(parents=True, exist_ok=True)
    pyplot.switch_backend("agg")
    paths = {}
    for name, plot in draw.items():
        with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna sets a style for the whole process
            warnings.simplefilter("ignore")
            plot()
            figure = pyplot.gcf()
            figure.set_size_inches(10, 6)
            paths[name] = out / f"{name}.png"
            with atomic_write(paths[name]) as file:
                figure.savefig(file, dpi=110, format="png", bbox_inches="tight")
            pyplot.close("all")
    return paths
