"""Sections `model` and `method` of params.yaml; the others, and how to add a key, are in `config.schema`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lesionsam.config.zoo import ZOO

MAX_ENTROPY = 0.6932  # ln 2, rounded up
NAME = rf"^({'|'.join(map(re.escape, ZOO))}|[~/]?[\w.-]+(/[\w.-]+)+|/[\w.-]+)$"


class Section(BaseModel):
    """Section of params.yaml. Unknown keys are refused, values are not converted and do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def key(about: str, *, initial: Any = ..., **limits: Any) -> Any:
    """Return a pydantic field for a key of params.yaml.

    Args:
        about: comment in params.yaml. initial: value where the default file lacks the key. limits: as for `Field`.
    """
    return Field(description=about, examples=None if initial is ... else [initial], **limits)


ENCODER = "trained part of the encoder: none | blocks | adapter | lora"
LAST_K = "in the last K transformer blocks; 0 = in all"


class AnyModel(Section):
    name: str = Field(
        pattern=NAME,
        title=f"{', '.join(ZOO)}, a model of the Hugging Face Hub (OWNER/NAME) or a folder",
        description="compact | vit_b | sam2.1-tiny | sam3 | ..., a model of the Hub (OWNER/NAME) or a folder",
    )
    revision: str = Field(min_length=1, description="branch, tag or commit of a model of the Hub")
    checkpoint: str = Field(
        min_length=1, description="file, or `published` for the model's own weights (downloaded and verified)"
    )
    image_size: int = Field(ge=0, le=4096, description="side of the model's input [px]; 0 = the model's own")
    train_decoder: bool = Field(description="train the mask decoder")
    train_prompt_encoder: bool = Field(description="train the prompt encoder", examples=[True])


class FrozenEncoder(AnyModel):
    encoder: Literal["none"] = Field(description=ENCODER)


class BlocksEncoder(AnyModel):
    encoder: Literal["blocks"] = Field(description=ENCODER)
    unfreeze_last_k: int = Field(ge=0, le=64, description="train the last K transformer blocks and the neck; 0 = all")


class AdapterEncoder(AnyModel):
    encoder: Literal["adapter"] = Field(description=ENCODER)
    adapter_dim: int = Field(
        ge=1, le=4096, description="hidden units of an adapter; two per block, after attention and MLP", examples=[32]
    )
    adapter_last_k: int = Field(ge=0, le=64, description=f"adapters {LAST_K}", examples=[0])


class LoraEncoder(AnyModel):
    encoder: Literal["lora"] = Field(description=ENCODER)
    lora_rank: int = Field(
        ge=1, le=1024, description="rank of the updates of the attention's linear layers", examples=[8]
    )
    lora_alpha: float = Field(gt=0, le=4096, description="the updates are scaled by alpha / rank", examples=[16.0])
    lora_dropout: float = Field(ge=0, lt=1, description="dropout of the updates' input, in training", examples=[0.0])
    lora_last_k: int = Field(ge=0, le=64, description=f"updates {LAST_K}", examples=[0])


class Gate(Section):
    region: Literal["image", "big_box"] = key("region the entropy is averaged over: image (published) | big_box")
    entropy_thresh: float = key(
        "trust an image at or below this mean binary entropy [nats, at most 0.693]", ge=0, le=MAX_ENTROPY
    )
    trust_empty: bool = key("trust an image whose mask is empty (published: true)")


class Negatives(Section):
    missed_core: Literal["negative", "ignore", "positive"] = key(
        "core pixels outside the teacher's mask: negative (published) | ignore | positive"
    )
    certain_background: bool = key("use pixels outside the big box as negatives")
    in_batch: bool = key("use the negatives of the other images of the batch too")
    random_fallback: bool = key("use random pixels where an image has no negatives (published: true)")


class Head(Section):
    norm: Literal["group", "batch"] = key("normalisation: group | batch")
    ema: bool = key("the teacher has an averaged head of its own; false: one shared head (published)")


TARGET_KIND = "prior | teacher | fused (prior and teacher) | ellipse"
SOFTNESS = "soft labels are sigmoid(softness * (prior + offset))"
PLACEBO = "none | other (target of another image) | warped (the same, warped into this big box)"
OFFSET = "outline offset of the prior: boxes (estimated from the boxes) | none | a number"
LOOSENESS = "share by which annotators draw the big box too large: auto (found by colour) | a number"
Looseness = Literal["auto"] | Annotated[float, Field(ge=0, le=4)]


class PriorTarget(Section):
    kind: Literal["prior"] = key(TARGET_KIND)
    offset: Literal["boxes", "none"] | Annotated[float, Field(ge=-3, le=3)] = key(OFFSET)
    looseness: Looseness = key(LOOSENESS)
    softness: float = key(SOFTNESS, gt=0, le=100)
    placebo: Literal["none", "other", "warped"] = key(PLACEBO)


class FusedTarget(Section):
    kind: Literal["fused"] = key(TARGET_KIND)
    offset: Literal["boxes", "none"] | Annotated[float, Field(ge=-3, le=3)] = key(OFFSET)
    looseness: Looseness = key(LOOSENESS)
    softness: float = key(SOFTNESS, gt=0, le=100)
    teacher_weight: float = key("final share of the teacher's logits in the fused target", gt=0, lt=1, initial=0.5)
    teacher_ramp: float = key(
        "share of all steps over which teacher_weight rises from 0; 0 = at once", ge=0, le=1, initial=1.0
    )
    placebo: Literal["none", "other", "warped"] = key(PLACEBO)


class TeacherTarget(Section):
    kind: Literal["teacher"] = key(TARGET_KIND)
    placebo: Literal["none", "other", "warped"] = key(PLACEBO, initial="none")


class EllipseTarget(Section):
    kind: Literal["ellipse"] = key(TARGET_KIND)
    softness: float = key(SOFTNESS, gt=0, le=100, initial=3.0)


def proportions(shares: dict[str, float]) -> dict[str, float]:
    """Return the probability of each kind of prompt; they sum to 1."""
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


class PromptShares(Section):
    ring: float = Field(ge=0)
    centre: float = Field(ge=0)
    box: float = Field(ge=0)
    box_core: float = Field(ge=0, alias="box+core")
    none: float = key("no prompt: the decoder must find the lesion", ge=0, initial=0.0)

    def shares(self) -> dict[str, float]:
        """Return the probability of each kind of prompt; they sum to 1."""
        return proportions(self.model_dump(by_alias=True, include={"ring", "centre", "box", "box_core", "none"}))


PROMPT_SOURCE = "source of the prompts: boxes (the two boxes) | masks"


class FromBoxes(Section):
    source: Literal["boxes"] = key(PROMPT_SOURCE)


class BoxPrompts(PromptShares, FromBoxes):
    """The fields of `FromBoxes` come first."""


class MaskPrompts(Section):
    source: Literal["masks"] = key(PROMPT_SOURCE)
    box: float = key("share of the mask's bounding box", ge=0, initial=0.4)
    points: float = key("share of points in the mask", ge=0, initial=0.4)
    box_points: float = key("share of both as one prompt", ge=0, alias="box+points", initial=0.2)
    box_jitter: float = key("shift of each side of the box, up to this share of its extent", ge=0, le=0.4, initial=0.1)
    max_points: int = key("maximum number of points in the mask, at least 1", ge=1, le=64, initial=3)
    point_jitter: float = key("shift of each point, up to this [px of the model's input]", ge=0, le=64, initial=2.0)
    negative: float = key("probability of an additional point outside the mask", ge=0, le=1, initial=0.3)

    def shares(self) -> dict[str, float]:
        """Return the probability of each kind of prompt; they sum to 1."""
        return proportions({"box": self.box, "points": self.points, "box+points": self.box_points})


METHOD_NAME = "contrastive (two boxes, no masks) | supervised (masks)"
NUM_POINTS = "number of points of a ring prompt"
PER_IMAGE = "prompts decoded per image and step"
SHARES = "relative frequency of the student's prompts"


OLD_WEIGHTS = {  # of version 1, by method: name in section method -> name in method.weights
    "contrastive": {"alpha": "contrast", "gamma": "distil", "delta": "pseudo", "epsilon": "projection"},
    "supervised": {"beta": "iou"},
}


class ContrastiveWeights(Section):
    contrast: float = key("contrastive term, InfoNCE (published: alpha)", ge=0)
    distil: float = key("distillation to the pretrained features (published: gamma)", ge=0)
    pseudo: float = key("mask loss against the pseudo mask", ge=0)
    projection: float = key("two-box projection term", ge=0)


class ContrastiveMethod(Section):
    name: Literal["contrastive"] = key(METHOD_NAME)
    weights: ContrastiveWeights = key("of the loss terms; 0 = off")
    temperature: float = key("temperature of InfoNCE", gt=0, le=10)
    pos_samples: int = key("maximum number of anchors per image", ge=1, le=65536)
    neg_samples: int = key("maximum number of negatives per image", ge=1, le=65536)
    ema_decay: float = key("decay of the teacher's average, per step", ge=0, lt=1)
    teacher_share: float = key(
        "share of the steps in which the teacher encodes the images; in the others the student's features stand in",
        ge=0,
        le=1,
        initial=1.0,
    )
    num_points: int = key(NUM_POINTS, ge=1, le=1000)
    teacher_prompt: Literal["ring", "box", "core", "box+core"] = key(
        "prompt of the teacher: ring | box | core | box+core"
    )
    monitor_masks: bool = key("log the loss against true masks where there are any; no gradient")
    gate: Gate
    negatives: Negatives
    head: Head
    target: PriorTarget | FusedTarget | TeacherTarget | EllipseTarget = Field(discriminator="kind")
    prompts_per_image: int = key(PER_IMAGE, ge=1, le=16, initial=2)
    prompts: PromptShares = key(SHARES)


WEIGHTING = "fixed | learned (each multiplied by the exponential of a parameter)"


class FixedWeights(Section):
    kind: Literal["fixed"] = key(WEIGHTING)


class LearnedWeights(Section):
    kind: Literal["learned"] = key(WEIGHTING)
    learning_rate: float = key("learning rate of those parameters", gt=0, le=1, initial=1e-3)


class SupervisedWeights(Section):
    iou: float = key("loss of the IoU head; trains when iou_loss is mse or smooth_l1", ge=0, initial=0.5)


class SupervisedMethod(Section):
    name: Literal["supervised"] = key(METHOD_NAME)
    loss: Literal["dice_bce", "dice", "bce", "focal", "focal_dice"] = key(
        "dice_bce (2 BCE + Dice) | dice | bce | focal | focal_dice (20 focal + Dice, as SAM)", initial="dice_bce"
    )
    candidates: Literal["one", "three"] = key(
        "one (the single mask) | three (also the best of the three candidates)", initial="one"
    )
    iou_loss: Literal["monitor", "mse", "smooth_l1"] = key(
        "loss of the IoU head: monitor (squared error, no gradient) | mse | smooth_l1", initial="monitor"
    )
    weights: SupervisedWeights = key("of the loss terms", initial={"iou": 0.5})
    weighting: FixedWeights | LearnedWeights = key(
        "weighting of the terms", discriminator="kind", initial={"kind": "fixed"}
    )
    average: float = key(
        "decay, per step, of an average of the weights that is saved instead of them; 0 = none", ge=0, lt=1, initial=0.0
    )
    num_points: int = key(NUM_POINTS, ge=1, le=1000)
    prompts_per_image: int = key(PER_IMAGE, ge=1, le=16, initial=2)
    corrections: int = key("rounds after the first, each with a click in a wrong region", ge=0, le=16, initial=0)
    prompts: BoxPrompts | MaskPrompts = key(SHARES, discriminator="source")
