"""Read the search space: `sweep.space` of params.yaml against the schema, and which of its keys change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from lesionsam.config.edit import fit
from lesionsam.config.limits import Limits, read_when
from lesionsam.config.load import Config, describe, flatten, to_values, unflatten, validate
from lesionsam.errors import UserError

SEARCHED = ("model", "method", "train")  # sections that a training reads
PREPARED = ("model.name", "model.checkpoint")  # other stages made files from these
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
        dimension = _range(place, key, written, limits)
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
        try:
            configured(config, {key: choice})
        except UserError as error:
            raise UserError(f"{place}: choice {choice}: {str(error).partition(': ')[2]}") from None
    return Dimension(key, choices=tuple(written))


def _range(place: str, key: str, written: Mapping[str, Any], limits: Limits) -> Dimension:
    if limits.kind not in ("integer", "number"):
        raise UserError(f"{place}: expected a list of choices for {limits.expected}, got a range")
    if unknown := [name for name in written if name not in FIELDS]:
        raise UserError(f"{place}.{unknown[0]}: expected only {', '.join(FIELDS)}; remove it")
    if missing := [name for name in ("low", "high") if name not in written]:
        raise UserError(f"{place}: expected {missing[0]}, got {{{', '.join(written)}}}")
    whole, log = limits.kind == "integer", written.get("log", False)
    numbers = {name: written[name] for name in ("low", "high", "step") if name in written}
    kinds = (int,) if whole else (int, float)
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number):
            raise UserError(f"{place}.{name}: expected {'an integer' if whole else 'a number'}, got {number}")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step", 1 if whole else 0)
    if not isinstance(log, bool):
        raise UserError(f"{place}.log: expected true or false, got {log}")
    if not low < high:
        raise UserError(f"{place}: expected low below high, got {low} and {high}")
    for name, number in (("low", low), ("high", high)):
        if (limits.low is not None and (number < limits.low or (limits.low_open and number == limits.low))) or (
            limits.high is not None and (number > limits.high or (limits.high_open and number == limits.high))
        ):
            raise UserError(f"{place}.{name}: expected {limits.expected}, got {number}")
    if log and low <= 0:
        raise UserError(f"{place}.low: expected a number above 0 where log is true, got {low}")
    if "step" in written and (step <= 0 or step > high - low):
        raise UserError(f"{place}.step: expected a number above 0 and at most high - low ({high - low:g}), got {step}")
    if log and "step" in written:
        raise UserError(f"{place}: expected log or step, got both; remove one")
    if whole and not log:
        high = low + (high - low) // step * step
    return Dimension(key, low=low, high=high, log=log, step=0 if log and not whole else step, whole=whole)


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


def dead_keys(config: Config, space: Sequence[Dimension]) -> dict[str, str]:
    """Return keys that change nothing at any point of the space -> why, from the method's own logic.

    What depends on the images (a gate that trusts the same ones at every threshold) is `prepared.idle_gate`.
    """
    by_key, held = {dimension.key: dimension for dimension in space}, flatten(config)

    def may(key: str, test: Callable[[Any], bool]) -> bool:
        """Return whether a key passes a test at some point of the space (a range: at either end)."""
        dimension = by_key.get(key)
        if dimension is None:
            return key in held and test(held[key])
        return any(test(value) for value in dimension.choices or (dimension.low, dimension.high))

    def on(weight: str) -> bool:
        return may(f"method.weights.{weight}", lambda value: value > 0)

    dead: dict[str, str] = {}
    for key in by_key:
        reason = next((reason for prefixes, reason in _rules(may, on) if key.startswith(prefixes)), None)
        if reason is not None:
            dead[key] = reason
    return dead


def _rules(
    may: Callable[[str, Callable[[Any], bool]], bool], on: Callable[[str], bool]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (beginnings of keys, why they are dead)."""

    def one_of(*words: object) -> Callable[[Any], bool]:
        return lambda value: value in words

    if not may("method.iou_loss", one_of("mse", "smooth_l1")):
        yield ("method.weights.iou", "method.monitor_masks"), "it weighs or switches a monitor without gradient"
    yield ("train.overlays", "train.select"), "it is no part of what is learnt"
    if not may("train.schedule", one_of("cosine", "linear")):
        yield ("train.final_lr",), "train.schedule is constant"
    if not may("model.encoder", one_of("blocks", "adapter", "lora")):
        yield ("train.lr_encoder",), "model.encoder is none"
    if not may("model.train_decoder", one_of(True)) and not may("model.train_prompt_encoder", one_of(True)):
        yield ("train.lr_decoder",), "model.train_decoder and model.train_prompt_encoder are false"
    if not may("method.name", one_of("contrastive")):
        yield ("train.lr_head",), "only the contrastive method has a projection head"
        return
    if not on("contrast"):
        yield (
            (
                "method.temperature",
                "method.pos_samples",
                "method.neg_samples",
                "method.negatives.",
                "method.head.",
                "train.lr_head",
            ),
            "method.weights.contrast is 0, so that there is no contrastive term",
        )
    if not on("contrast") and not on("pseudo"):
        yield (
            ("method.gate.", "method.target."),
            "method.weights.contrast and method.weights.pseudo are 0, so that no term reads the pseudo mask",
        )
    if not on("pseudo") and not on("projection"):
        yield (
            ("method.prompts.", "method.prompts_per_image"),
            "method.weights.pseudo and method.weights.projection are 0, so that no mask is decoded to learn",
        )
    taught = may("method.target.kind", one_of("teacher", "fused"))
    if not taught:
        yield ("method.teacher_prompt",), "the target is not the teacher's"
        if not on("contrast"):
            yield (
                ("method.ema_decay",),
                "nothing reads the teacher (method.weights.contrast is 0, the target is not the teacher's)",
            )
    if not may("method.target.offset", one_of("boxes")):
        yield ("method.target.looseness",), "method.target.offset is not boxes"
