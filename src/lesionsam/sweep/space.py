"""Read the search space: `sweep.space` of params.yaml against the schema, and which of its keys change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from lesionsam.config.edit import fit
from lesionsam.config.limits import Limits, read_when
from lesionsam.config.load import Config, describe, flatten, to_values, unflatten, validate
from lesionsam.errors import UserError

SEARCHED = ("model", "method", "train")  # sections that a training reads
PREPARED = ("model.name", "model.revision", "model.checkpoint")  # other stages made files from these
NOT_SEARCHED = {
    "train.seed": "a seed is chance, no setting; winner and start are compared over several",
    "train.epochs": "the length of a trial is sweep.epochs, and a longer trial would win by its length",
}
FIELDS = ("low", "high", "log", "step")
DIGITS = 3  # significant ones of a drawn number
MAX_LISTED = 100_000  # combinations of a finite space that are listed

Value = bool | int | float | str


@dataclass(frozen=True)
class Dimension:
    """One key of the space: `choices`, or numbers from low to high, both included.

    Attributes:
        key: dotted. whole: integers only. step: 0 = any number (1 where whole).
    """

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0
    whole: bool = False

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition(".")[2]

    def __contains__(self, value: object) -> bool:
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-8

    def values(self) -> list[Value] | None:
        """Return every value, or None if they are infinitely many."""
        if self.choices:
            return list(self.choices)
        if not self.step:
            return None
        count = int((self.high - self.low) / self.step + 1e-8) + 1
        return [self.rounded(self.low + k * self.step) for k in range(count)] if count <= MAX_LISTED else None

    def rounded(self, value: Any) -> Value:
        """Return a drawn value as it is tried: a number without step is rounded to `DIGITS` digits within the range."""
        if self.choices or isinstance(value, str):
            return value
        if self.whole:
            return int(value)
        digits = DIGITS if not self.step else 12
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key} in {', '.join(map(str, self.choices))}"
        step = f", step {self.step:g}" if self.step and not (self.whole and self.step == 1) else ""
        return f"{self.key} from {self.low:g} to {self.high:g}{' (log)' if self.log else ''}{step}"


def same(one: object, other: object) -> bool:
    """Return whether two values are equal; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def read_space(config: Config) -> list[Dimension]:
    """Return the dimensions of `sweep.space`, in its order.

    Raises:
        UserError: empty, an unknown key, one that a training does not read, a range outside the key's limits, or one
            that leaves out the value params.yaml has (trial 0).
    """
    written, foreign = to_values(config)["sweep"]["space"], foreign_keys(config)
    if not written:
        raise UserError(
            "sweep.space: expected at least one key with {low, high} or [choices], got none; "
            "such as `method.temperature: {low: 0.02, high: 1.0, log: true}`"
        )
    return [_dimension(key, value, config) for key, value in written.items() if key not in foreign]


def foreign_keys(config: Config) -> dict[str, str]:
    """Return keys of `sweep.space` that only other variants read -> why."""
    values, current = to_values(config), flatten(config)
    needed = {key: read_when(key, values) for key in values["sweep"]["space"]}
    return {
        key: f"{tag} is {current[tag]}, and only {' or '.join(words)} reads it"
        for key, (tag, words) in ((key, need) for key, need in needed.items() if need is not None)
    }


def _dimension(key: str, written: object, config: Config) -> Dimension:
    place = f"sweep.space: {key}"
    try:
        limits = describe(key, config)
    except UserError as error:
        raise UserError(f"sweep.space: {error}") from None
    if key.split(".")[0] not in SEARCHED or key in PREPARED:
        raise UserError(
            f"{place}: expected a key that a training reads (of {', '.join(SEARCHED)}; not {', '.join(PREPARED)}), "
            "as a trial uses the data, boxes and weights that are there; remove it"
        )
    if key in NOT_SEARCHED:
        raise UserError(f"{place}: expected another key: {NOT_SEARCHED[key]}; remove it")
    if limits.kind in ("section", "list"):
        raise UserError(f"{place}: expected a number, word or boolean, got {limits.expected}; name one of its keys")
    if isinstance(written, list):
        dimension = _choices(place, key, written, config)
    elif isinstance(written, Mapping):
        dimension = _range(place, key, written, limits, config)
    else:
        raise UserError(f"{place}: expected {{low, high}} or [choices], got {written}")
    current = flatten(config)[key]
    if current not in dimension:
        raise UserError(
            f"{place}: params.yaml has {current}, which lies outside; trial 0 is params.yaml as it stands: widen the "
            f"range (now {dimension})"
        )
    return dimension


def _choices(place: str, key: str, written: list[Any], config: Config) -> Dimension:
    if len(written) < 2 or any(same(a, b) for i, a in enumerate(written) for b in written[:i]):
        raise UserError(f"{place}: expected at least two different choices, got [{', '.join(map(str, written))}]")
    for choice in written:
        if not isinstance(choice, bool | int | float | str):
            raise UserError(f"{place}: expected numbers, words or booleans as choices, got {choice}")
        _check(f"{place}: choice {choice}", key, choice, config)
    return Dimension(key, choices=tuple(written))


def _range(place: str, key: str, written: Mapping[str, Any], limits: Limits, config: Config) -> Dimension:
    if limits.kind not in ("integer", "number"):
        raise UserError(f"{place}: expected a list of choices for {limits.expected}, got a range")
    if unknown := [name for name in written if name not in FIELDS]:
        raise UserError(f"{place}.{unknown[0]}: expected only {', '.join(FIELDS)}; remove it")
    if missing := [name for name in ("low", "high") if name not in written]:
        raise UserError(f"{place}: expected {missing[0]}, got {{{', '.join(written)}}}")
    whole, low, high, log = limits.kind == "integer", written["low"], written["high"], written.get("log", False)
    numbers = int if whole else int | float
    for name in ("low", "high"):
        if isinstance(written[name], str):
            raise UserError(f"{place}.{name}: expected a number, got {written[name]}")
        _check(f"{place}.{name}", key, written[name], config)
    if not isinstance(log, bool):
        raise UserError(f"{place}.log: expected true or false, got {log}")
    if not low < high:
        raise UserError(f"{place}: expected low below high, got {low} and {high}")
    if log and low <= 0:
        raise UserError(f"{place}.low: expected a number above 0 where log is true, got {low}")
    step = written.get("step", 1 if whole else 0)
    if "step" in written and (isinstance(step, bool) or not isinstance(step, numbers) or not 0 < step <= high - low):
        raise UserError(
            f"{place}.step: expected {'an integer' if whole else 'a number'} above 0 and at most high - low "
            f"({high - low:g}), got {step}"
        )
    if log and "step" in written:
        raise UserError(f"{place}: expected log or step, got both; remove one")
    if whole and not log:
        high = low + (high - low) // step * step
    return Dimension(key, low=low, high=high, log=log, step=0 if log and not whole else step, whole=whole)


def _check(place: str, key: str, value: object, config: Config) -> None:
    """Check one value of a key by schema and rules."""
    try:
        configured(config, {key: value})
    except UserError as error:
        raise UserError(f"{place}: {str(error).removeprefix('sweep: ').removeprefix(f'{key}: ')}") from None


def configured(config: Config, changes: Mapping[str, Any], source: str = "sweep") -> Config:
    """Return the configuration with some dotted keys changed, fitted to the variants that they choose."""
    return validate(fit(unflatten(changes, to_values(config))), source)


def combinations(space: Sequence[Dimension]) -> list[dict[str, Value]] | None:
    """Return every point of a finite space, or None if it is infinite or too large to list."""
    axes = [dimension.values() for dimension in space]
    if any(axis is None for axis in axes) or math.prod(len(axis or ()) for axis in axes) > MAX_LISTED:
        return None
    return [dict(zip((d.key for d in space), point, strict=True)) for point in product(*(axis or () for axis in axes))]


def to_json(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Return the space as plain values."""
    return [asdict(dimension) for dimension in space]


def from_json(held: Sequence[Mapping[str, Any]]) -> list[Dimension]:
    """Return the space that `to_json` was given."""
    return [Dimension(**{**one, "choices": tuple(one["choices"])}) for one in held]


# ---- dead keys -----------------------------------------------------------------------------------------------

# What reads keys: name -> key that switches it on, words that do so (none: a number above 0).
READERS: dict[str, tuple[str, tuple[object, ...]]] = {
    "contrast": ("method.weights.contrast", ()),
    "pseudo": ("method.weights.pseudo", ()),
    "projection": ("method.weights.projection", ()),
    "teacher": ("method.target.kind", ("teacher", "fused")),
    "offset": ("method.target.offset", ("boxes",)),
    "iou": ("method.iou_loss", ("mse", "smooth_l1")),
    "head": ("method.name", ("contrastive",)),
    "schedule": ("train.schedule", ("cosine", "linear")),
    "encoder": ("model.encoder", ("blocks", "adapter", "lora")),
    "decoder": ("model.train_decoder", (True,)),
    "prompts": ("model.train_prompt_encoder", (True,)),
}
# Names of readers, any of which suffices, and the beginnings of the keys that nothing else reads.
READ_BY = (
    ("", "train.overlays train.select method.monitor_masks"),  # no part of what is learnt
    ("iou", "method.weights.iou"),
    ("schedule", "train.final_lr"),
    ("encoder", "train.lr_encoder"),
    ("decoder prompts", "train.lr_decoder"),
    ("head", "train.lr_head"),
    ("contrast", "method.temperature method.pos_samples method.neg_samples"),
    ("contrast", "method.negatives. method.head. train.lr_head"),
    ("contrast pseudo", "method.gate. method.target."),
    ("pseudo projection", "method.prompts. method.prompts_per_image"),
    ("teacher", "method.teacher_prompt"),
    ("teacher contrast", "method.ema_decay method.teacher_share"),
    ("offset", "method.target.looseness"),
)


def dead_keys(config: Config, space: Sequence[Dimension]) -> dict[str, str]:
    """Return keys that change nothing at any point of the space -> why, from the method's own logic."""
    held: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in flatten(config).items()}
    held |= {d.key: d.choices or (d.low, d.high) for d in space}  # a range: at either end
    dead: dict[str, str] = {}
    for readers, beginnings in READ_BY:
        needs = [READERS[name] for name in readers.split()]
        if all(key in held for key, _ in needs) and not any(
            value in words if words else value > 0 for key, words in needs for value in held[key]
        ):
            states = (f"{key} is {' or '.join(str(value).lower() for value in held[key])}" for key, _ in needs)
            reason = " and ".join(states) or "it is no part of what is learnt"
            dead |= {d.key: reason for d in space if d.key.startswith(tuple(beginnings.split())) and d.key not in dead}
    return {d.key: dead[d.key] for d in space if d.key in dead}
