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


class NumberedSampler(BaseSampler):
    """A sampler whose draws depend on seed, trial number and earlier trials alone.

    A number is given out once, so no two workers draw alike, and neither does a sweep that was started again.
    """

    def __init__(self, kind: str, seed: int, num_trials: int) -> None:
        self._kind, self._seed, self._startup = kind, seed, max(3, min(STARTUP_TRIALS, num_trials // 3))
        self._inner: BaseSampler = RandomSampler(seed)
        self.at_random = False  # for the next trial, after a duplicate

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Seed a new sampler with (seed, number)."""
        seed = random.Random(f"{self._seed} {trial.number}").randrange(2**31)  # noqa: S311  # nosec B311
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._kind == "gp" and not self.at_random:
                self._inner = GPSampler(seed=seed, n_startup_trials=self._startup)
            elif self._kind == "tpe" and not self.at_random:
                self._inner = TPESampler(seed=seed, n_startup_trials=self._startup)
            else:
                self._inner = RandomSampler(seed)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Call the sampler itself."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Call the sampler itself; a Gaussian process sees pruned trials too."""
        seen = cast(optuna.Study, WithPruned(study)) if isinstance(self._inner, GPSampler) else study
        return self._inner.sample_relative(seen, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Call the sampler itself."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Call the sampler itself."""
        self._inner.after_trial(study, trial, state, values)


class WithPruned:
    """A study whose pruned trials look complete, with the value that they would have come to.

    Optuna's Gaussian process sees complete trials alone, so that it proposes again and again what was pruned. A pruned
    trial's value is its last one plus the median of what complete trials gained from that epoch to their value.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool, states: Sequence[TrialState], use_cache: bool) -> list[FrozenTrial]:
        """Return what Optuna's samplers ask for, pruned trials completed."""
        trials = self._study._get_trials(deepcopy, (*states, TrialState.PRUNED), use_cache)
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        return [finished(t, complete) if t.state == TrialState.PRUNED else t for t in trials if is_usable(t)]


def is_usable(trial: FrozenTrial) -> bool:
    """Return whether a trial has a value; a pruned one that reported nothing has none."""
    return trial.state != TrialState.PRUNED or bool(trial.intermediate_values)


def finished(pruned: FrozenTrial, complete: Sequence[FrozenTrial]) -> FrozenTrial:
    """Return a pruned trial as if it had gone on; see `WithPruned`."""
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
