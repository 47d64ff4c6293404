"""Choose a trial's values and stop unpromising trials: Optuna's samplers and pruners as params.yaml names them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from lesionsam.config.load import Config
from lesionsam.sweep.space import Dimension, Value
from lesionsam.sweep.trial import budget

STARTUP_TRIALS = 10  # random ones before the sampler models anything, at most; a third of few
MEDIAN_STARTUP = 5  # trials before the median pruner stops one


def draw(trial: Trial, space: Sequence[Dimension]) -> dict[str, Value]:
    """Return a value for every key of the space, as it will be tried and written."""
    values: dict[str, Value] = {}
    for d in space:
        if d.choices:
            drawn = trial.suggest_categorical(d.key, d.choices)
        elif d.whole:
            drawn = trial.suggest_int(d.key, int(d.low), int(d.high), step=int(d.step), log=d.log)
        else:
            drawn = trial.suggest_float(d.key, d.low, d.high, step=d.step or None, log=d.log)
        values[d.key] = d.rounded(drawn)
    return values


def build_sampler(kind: str, seed: int, number: int, num_trials: int) -> BaseSampler:
    """Return the sampler of one trial, whose draws depend on the arguments and on earlier trials alone.

    So no two workers draw alike, and neither does a sweep that was started again.

    Args:
        kind: gp, tpe or random. number: trials before this one. num_trials: of the whole study.
    """
    drawn = random.Random(f"{seed} {number}").randrange(2**31)  # noqa: S311  # nosec B311
    if kind == "random":
        return RandomSampler(drawn)
    startup = max(3, min(STARTUP_TRIALS, num_trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return (PrunedGPSampler if kind == "gp" else TPESampler)(seed=drawn, n_startup_trials=startup)


class PrunedGPSampler(GPSampler):
    """Optuna's Gaussian process, which sees complete trials alone and proposes again and again what was pruned.

    Here it sees pruned trials as well, with the value that they would have come to.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the values that promise most."""
        return super().sample_relative(cast(optuna.Study, WithPruned(study)), trial, search_space)


class WithPruned:
    """A study whose pruned trials look complete; those that reported nothing are left out."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool, states: Sequence[TrialState], use_cache: bool) -> list[FrozenTrial]:
        """Return what Optuna's samplers ask for, pruned trials completed."""
        trials = self._study._get_trials(deepcopy, (*states, TrialState.PRUNED), use_cache)
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        return [t for t in trials if t.state != TrialState.PRUNED] + [
            finished(t, complete) for t in trials if t.state == TrialState.PRUNED and t.intermediate_values
        ]


def finished(pruned: FrozenTrial, complete: Sequence[FrozenTrial]) -> FrozenTrial:
    """Return a pruned trial with its last value plus the median of what complete trials gained from there on."""
    last = max(pruned.intermediate_values)
    gains = [t.value - t.intermediate_values[last] for t in complete if t.value and last in t.intermediate_values]
    value = pruned.intermediate_values[last] + (median(gains) if gains else 0.0)
    return optuna.trial.create_trial(value=value, params=pruned.params, distributions=pruned.distributions)


def build_pruner(config: Config) -> optuna.pruners.BasePruner:
    """Return the pruner of params.yaml on a trial's budget; its steps are epochs."""
    epochs = budget(config)
    if config.sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_STARTUP, n_warmup_steps=max(1, round(epochs / 3)))
    if config.sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, epochs // 9), max_resource=epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()
