"""Define the rows of the comparison: ablation, placebo controls, published recipe, supervision, loose boxes; every way
to fine-tune; use without a prompt; and the worth of masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from comparison.units import UNET, ZERO_SHOT, Row, configured
from lesionsam.config.load import Config, to_values
from lesionsam.evaluation.columns import PRIOR_OFFSET

DEFAULT, SUPERVISED, ELLIPSE = "two boxes (default)", "supervised, tuned", "placebo: ellipse as target"
WARPED, OTHER = "placebo: another image's target, warped", "placebo: another image's target"
PRIOR, TEACHER, TUNED_PLACEBO = "prior alone as target", "teacher alone as target", "published, its placebo"
LETTER, TUNED = "published, to the letter", "published, learning rate tuned"
OPEN = 0.6932  # entropy threshold that trusts every image: an ellipse's labels are equally soft for all
ENCODER_RATES, DECODER_RATES = (5e-4, 1e-3), (1.5e-4, 5e-4)  # pairs tried on dev, one seed, default and supervised
CONTRASTS = (0.0, 0.02, 0.1)  # weights of the contrastive term beside the pseudo-mask term
PUBLISHED_RATES = (3e-5, 1e-4, 3e-4)  # for the published recipe, whose own 2e-6 is meant for ViT-B
SUPERVISED_RATES = {"train.lr_encoder": 1e-3, "train.lr_decoder": 1.5e-4}  # chosen by the rows of `tuning`
PUBLISHED_RATE = 3e-4  # likewise (docs/log.md)


def rate(value: float) -> dict[str, float]:
    """Return changes that set one learning rate for encoder, decoder and head."""
    return {f"train.lr_{part}": value for part in ("encoder", "decoder", "head")}


def rates(encoder: float, decoder: float) -> dict[str, float]:
    """Return changes that set one learning rate for the encoder and one for the decoder."""
    return {"train.lr_encoder": encoder, "train.lr_decoder": decoder}


def budget(base: Config) -> dict[str, object]:
    """Return the base's number of epochs and batch size, for a recipe with values of its own."""
    return {
        "train.epochs": base.train.epochs,
        "train.batch_size": base.train.batch_size,
        "train.precision": base.train.precision,
    }


def tuning(base: Config) -> list[Row]:
    """Return the rows that choose learning rates, on the development split alone."""
    pairs = [
        (f"encoder {encoder:g} decoder {decoder:g}", rates(encoder, decoder))
        for encoder in ENCODER_RATES
        for decoder in DECODER_RATES
    ]
    found = [Row(f"tune default {tag}", values, seeds=1, tests=False) for tag, values in pairs]
    found += [
        Row(f"tune contrast {value:g}", {"method.weights.contrast": value}, seeds=1, tests=False) for value in CONTRASTS
    ]
    found += [Row(f"tune supervised {tag}", values, preset="supervised", seeds=1, tests=False) for tag, values in pairs]
    found += [
        Row(f"tune published {value:g}", budget(base) | rate(value), preset="published", seeds=1, tests=False)
        for value in PUBLISHED_RATES
    ]
    return found


def rows(base: Config) -> list[Row]:
    """Return every reported row in the order of the table; the base is the default."""
    fused = dict(to_values(base)["method"]["target"])
    prior = {key: fused[key] for key in ("offset", "looseness", "softness", "placebo")} | {"kind": "prior"}
    teacher = {"method.target": {"kind": "teacher", "placebo": "none"}}
    ellipse = {"kind": "ellipse", "softness": fused["softness"]}
    tuned = budget(base) | rate(PUBLISHED_RATE)
    found = [
        Row(ZERO_SHOT, seeds=1, trains=False),
        Row(DEFAULT),
        Row(SUPERVISED, SUPERVISED_RATES, preset="supervised"),
        Row(ELLIPSE, {"method.target": ellipse, "method.gate.entropy_thresh": OPEN}),
        Row(WARPED, {"method.target.placebo": "warped"}),
        Row(OTHER, {"method.target.placebo": "other"}),
        Row(TUNED, tuned, preset="published"),
        Row(TUNED_PLACEBO, tuned | {"method.target.placebo": "other"}, preset="published"),
        Row(PRIOR, {"method.target": prior}),
        Row(f"{PRIOR}, without its outline offset", {"method.target": prior | {"offset": "none"}}),
        Row(TEACHER, teacher),
        Row("contrast alone", {"method.target": prior, "method.weights.contrast": 1.0, "method.weights.pseudo": 0.0}),
        Row(f"{DEFAULT}, without contrast", {"method.weights.contrast": 0.0}),
        Row(f"{DEFAULT}, with projection", {"method.weights.projection": 0.5}),
        Row(f"{DEFAULT}, with distillation", {"method.weights.distil": 0.1}),
        Row(f"{DEFAULT}, frames not widened", {"train.widen": 0.0}, seeds=1),
        Row(f"{SUPERVISED}, frames not widened", SUPERVISED_RATES | {"train.widen": 0.0}, "supervised", seeds=1),
    ]
    for share, seeds in ((0.40, 3), (0.20, 1), (0.80, 1), (0.10, 1)):
        tag, margin = f", boxes {share:.0%} too large", (share, share)
        found += [
            Row(ZERO_SHOT + tag, seeds=1, trains=False, margin=margin),
            Row(DEFAULT + tag, seeds=seeds, margin=margin),
            Row(SUPERVISED + tag, SUPERVISED_RATES, preset="supervised", seeds=seeds, margin=margin),
        ]
    return [*found, Row(LETTER, {"train.precision": base.train.precision}, preset="published")]


COMPARISONS = (
    (DEFAULT, SUPERVISED),
    (DEFAULT, ELLIPSE),
    (DEFAULT, WARPED),
    (DEFAULT, OTHER),
    (DEFAULT, ZERO_SHOT),
    (DEFAULT, TUNED),
    (TUNED, TUNED_PLACEBO),
    (DEFAULT, PRIOR),
    (DEFAULT, TEACHER),
    (f"{PRIOR}, without its outline offset", PRIOR),
    (DEFAULT, f"{DEFAULT}, without contrast"),
    (f"{DEFAULT}, with projection", DEFAULT),
    (f"{DEFAULT}, with distillation", DEFAULT),
    (DEFAULT, f"{DEFAULT}, frames not widened"),
    (SUPERVISED, f"{SUPERVISED}, frames not widened"),
    (f"{DEFAULT}, boxes 40% too large", DEFAULT),
    (f"{DEFAULT}, boxes 40% too large", f"{SUPERVISED}, boxes 40% too large"),
)


# ---- what trains, and what masks are worth -----------------------------------------------------------------------

LAST_K = 2  # of the compact model's 4 blocks
STRATEGY_RATES = {  # encoder (or what is inserted there), decoder; chosen by the rows of `strategies_tuning`
    "decoder": (1e-3, 5e-4),
    f"last {LAST_K} blocks": (1e-3, 1.5e-4),
    "adapters": (3e-3, 1.5e-4),
    "LoRA": (3e-3, 1.5e-4),
}
TRIED_RATES = {  # on the development split, one seed; the last blocks take the rates that are best for all of them
    "decoder": ((1e-3, 1.5e-4), (1e-3, 5e-4)),
    **dict.fromkeys(("adapters", "LoRA"), ((1e-3, 1.5e-4), (3e-3, 1.5e-4), (1e-2, 1.5e-4))),
}
UNET_ROW, UNET_EPOCHS, UNET_RATES = "U-Net from scratch", 5, (3e-4, 1e-3)  # epochs: times the base's
UNET_RATE = 1e-3  # chosen by the rows of `strategies_tuning`
STRATEGIES = {  # name -> preset, changes
    "decoder": ("supervised-decoder", {}),
    f"last {LAST_K} blocks": ("supervised-full", {"model.unfreeze_last_k": LAST_K}),
    "adapters": ("supervised-adapter", {}),
    "LoRA": ("supervised-lora", {}),
}
MASKS = (10, 30, 100, 300)
BLIND = {"train.select": "label_free"}  # no row of that set sees a mask of the development split
DEFAULT_BLIND = f"{DEFAULT}, no mask at all"


def unet_changes(base: Config, value: float) -> dict[str, float]:
    """Return the changes for a network that starts at random and needs more steps than a pretrained one."""
    return {"train.epochs": UNET_EPOCHS * base.train.epochs, **rate(value)}


def strategies(base: Config) -> list[Row]:
    """Return rows for every way to fine-tune: no network, zero-shot, published, two boxes, supervised."""
    return [
        Row(ZERO_SHOT, seeds=1, trains=False),
        Row(TUNED, budget(base) | rate(PUBLISHED_RATE), preset="published"),
        Row(DEFAULT),
        *(
            Row(f"supervised, {name}", rates(*STRATEGY_RATES[name]) | changes, preset=preset)
            for name, (preset, changes) in STRATEGIES.items()
        ),
        Row(SUPERVISED, SUPERVISED_RATES, preset="supervised"),  # everything trains
        Row(UNET_ROW, unet_changes(base, UNET_RATE), preset="supervised", network=UNET),
    ]


def strategies_tuning(base: Config) -> list[Row]:
    """Return the rows that choose learning rates of the strategies, on the development split alone."""
    return [
        Row(
            f"tune supervised, {name}, encoder {pair[0]:g} decoder {pair[1]:g}",
            rates(*pair) | STRATEGIES[name][1],
            preset=STRATEGIES[name][0],
            seeds=1,
            tests=False,
        )
        for name, pairs in TRIED_RATES.items()
        for pair in pairs
    ] + [
        Row(
            f"tune {UNET_ROW} {value:g}",
            unet_changes(base, value),
            preset="supervised",
            seeds=1,
            tests=False,
            network=UNET,
        )
        for value in UNET_RATES
    ]


def labels(base: Config) -> list[Row]:
    """Return rows for the worth of two boxes in masks: supervised on few masks against two boxes."""
    supervised = SUPERVISED_RATES | BLIND
    return [
        Row(ZERO_SHOT, seeds=1, trains=False),
        Row(DEFAULT_BLIND, BLIND),
        *(Row(f"supervised, {count} masks", supervised, preset="supervised", masks=count) for count in MASKS),
        Row("supervised, all masks", supervised, preset="supervised"),
    ]


# ---- LoRA and adapters: what makes their steps cheaper -----------------------------------------------------------

INSERTED = {"LoRA": ("lora", "lora_last_k"), "adapters": ("adapter", "adapter_last_k")}  # name -> encoder, key of K
INSERTED_LAST_K = (0, 2, 1)  # of the compact model's 4 blocks; 0 = all
TEACHER_SHARES = (0.25, 0.0)  # of the steps; all of them in the rows above


def inserted(base: Config) -> list[Row]:
    """Return rows for two boxes with LoRA or adapters, in all blocks, beside the default."""
    return [
        Row(DEFAULT),
        *(
            Row(f"two boxes, {name}", rates(*STRATEGY_RATES[name]) | {"model.encoder": encoder})
            for name, (encoder, _) in INSERTED.items()
        ),
    ]


def inserted_tuning(base: Config) -> list[Row]:
    """Return the same for the last K blocks and for a teacher that seldom encodes, on the development split alone."""
    return [
        Row(
            f"tune two boxes, {name}, last {last_k or 'all'}",
            rates(*STRATEGY_RATES[name]) | {"model.encoder": encoder, f"model.{key}": last_k},
            seeds=1,
            tests=False,
        )
        for last_k in INSERTED_LAST_K
        for name, (encoder, key) in INSERTED.items()
    ] + [
        Row(
            f"tune two boxes, LoRA, teacher in {share:.0%} of the steps",
            rates(*STRATEGY_RATES["LoRA"]) | {"model.encoder": "lora", "method.teacher_share": share},
            seeds=1,
            tests=False,
        )
        for share in TEACHER_SHARES
    ]


# ---- use without a prompt ----------------------------------------------------------------------------------------

LONGER = 3  # times the base's epochs
UNPROMPTED, AS_LONG = "two boxes, preset no-prompt", f"{DEFAULT}, as long and as distorted"


def unprompted(base: Config) -> list[Row]:
    """Return rows for training without a prompt, beside the same training with prompts alone."""
    budget_of_it = {"train.epochs": LONGER * base.train.epochs}
    distorted = to_values(configured(base, Row("", preset="no-prompt"), 0))["train"]["distort"]
    return [
        Row(ZERO_SHOT, seeds=1, trains=False),
        Row(DEFAULT),
        Row(AS_LONG, budget_of_it | {"train.distort": distorted}),
        Row(UNPROMPTED, budget_of_it, preset="no-prompt"),
    ]


# ---- how loose the boxes are -------------------------------------------------------------------------------------

LOOSENESS = "method.target.looseness"
MARGINS = {"0 to 5 %": (0.0, 0.05), "10 to 20 %": (0.1, 0.2), "30 to 50 %": (0.3, 0.5), "70 to 90 %": (0.7, 0.9)}


def looseness(base: Config, *, tests: bool = True) -> list[Row]:
    """Return rows of the default that is told how loose its boxes are, of the same told nothing, and what they beat."""
    trained = [
        Row(f"{DEFAULT}, boxes {name} too large, {what}", {LOOSENESS: value}, margin=margin, tests=tests)
        for name, margin in MARGINS.items()
        for what, value in (("told nothing", "auto"), ("told", sum(margin) / 2))
    ]
    if not tests:
        return trained
    as_it_is = [
        Row(f"{ZERO_SHOT}, boxes {name} too large", seeds=1, trains=False, margin=margin)
        for name, margin in MARGINS.items()
    ]
    return [*as_it_is, *trained, Row(SUPERVISED, SUPERVISED_RATES, preset="supervised")]


# ---- several pretrained models -----------------------------------------------------------------------------------


def models_plan(models: Sequence[str]) -> Plan:
    """Return rows for pretrained models side by side, each as it is and adapted with two boxes; see `Row.model`."""

    def rows_of(base: Config) -> list[Row]:
        return [
            row
            for k, model in enumerate(models)
            for row in (
                Row(f"{ZERO_SHOT}, {model}", seeds=1, trains=False, model=model, baselines=k == 0),
                Row(f"{DEFAULT}, {model}", model=model),
            )
        ]

    own = [(f"{DEFAULT}, {model}", f"{ZERO_SHOT}, {model}") for model in models]
    others = [(f"{name}, {model}", f"{name}, {models[0]}") for name in (ZERO_SHOT, DEFAULT) for model in models[1:]]
    return Plan(rows_of, lambda base: [], (*own, *others))


@dataclass(frozen=True)
class Plan:
    """A set of rows with a name.

    Attributes:
        rows, tuning: the base -> its rows, and those that choose learning rates. comparisons: pairs of row names.
    """

    rows: Callable[[Config], list[Row]]
    tuning: Callable[[Config], list[Row]]
    comparisons: tuple[tuple[str, str], ...]


SETS = {
    "rows": Plan(rows, tuning, COMPARISONS),
    "strategies": Plan(
        strategies,
        strategies_tuning,
        (
            *((f"supervised, {name}", SUPERVISED) for name in STRATEGIES),
            *((DEFAULT, f"supervised, {name}") for name in STRATEGIES),
            (DEFAULT, SUPERVISED),
            (UNET_ROW, SUPERVISED),
            (DEFAULT, UNET_ROW),
        ),
    ),
    "inserted": Plan(inserted, inserted_tuning, tuple((f"two boxes, {name}", DEFAULT) for name in INSERTED)),
    "unprompted": Plan(unprompted, lambda base: [], ((UNPROMPTED, DEFAULT), (UNPROMPTED, AS_LONG), (AS_LONG, DEFAULT))),
    "looseness": Plan(
        looseness,
        partial(looseness, tests=False),
        (
            *(
                (f"{DEFAULT}, boxes {name} too large, told nothing", f"{other}, boxes {name} too large{told}")
                for name in MARGINS
                for other, told in ((DEFAULT, ", told"), (PRIOR_OFFSET, ""))
            ),
            (f"{DEFAULT}, boxes 10 to 20 % too large, told nothing", SUPERVISED),
        ),
    ),
    "labels": Plan(labels, tuning, tuple((DEFAULT_BLIND, f"supervised, {count} masks") for count in (*MASKS, "all"))),
}
