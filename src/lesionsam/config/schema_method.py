"""Sections `model` and `method` of params.yaml; the others, and how to add a key, are in `config.schema`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lesionsam.config.zoo import ZOO

MAX_ENTROPY = 0.6932  # ln 2, rounded up
NAME = rf"^({'|'.join(map(re.escape, ZOO))}|[\w.-]+(/[\w.-]+)+)$"


class Section(BaseModel):
    """Section of params.yaml. Unknown keys are refused, values are not converted and do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
    region: Literal["image", "big_box"] = Field(
        description="region the entropy is averaged over: image (published) | big_box"
    )
    entropy_thresh: float = Field(
        ge=0, le=MAX_ENTROPY, description="trust an image at or below this mean binary entropy [nats, at most 0.693]"
    )
    trust_empty: bool = Field(description="trust an image whose mask is empty (published: true)")


class Negatives(Section):
    missed_core: Literal["negative", "ignore", "positive"] = Field(
        description="core pixels outside the teacher's mask: negative (published) | ignore | positive"
    )
    certain_background: bool = Field(description="use pixels outside the big box as negatives")
    in_batch: bool = Field(description="use the negatives of the other images of the batch too")
    random_fallback: bool = Field(description="use random pixels where an image has no negatives (published: true)")


class Head(Section):
    norm: Literal["group", "batch"] = Field(description="normalisation: group | batch")
    ema: bool = Field(description="the teacher has an averaged head of its own; false: one shared head (published)")


TARGET_KIND = "prior | teacher | fused (prior and teacher) | ellipse"
SOFTNESS = "soft labels are sigmoid(softness * (prior + offset))"
PLACEBO = "none | other (target of another image) | warped (the same, warped into this big box)"
OFFSET = "outline offset of the prior: boxes (estimated from the boxes) | none | a number"
LOOSENESS = "share by which annotators draw the big box too large, to estimate the offset"


class PriorTarget(Section):
    kind: Literal["prior"] = Field(description=TARGET_KIND)
    offset: Literal["boxes", "none"] | Annotated[float, Field(ge=-3, le=3)] = Field(description=OFFSET)
    looseness: float = Field(ge=0, le=4, description=LOOSENESS)
    softness: float = Field(gt=0, le=100, description=SOFTNESS)
    placebo: Literal["none", "other", "warped"] = Field(description=PLACEBO)


class FusedTarget(Section):
    kind: Literal["fused"] = Field(description=TARGET_KIND)
    offset: Literal["boxes", "none"] | Annotated[float, Field(ge=-3, le=3)] = Field(description=OFFSET)
    looseness: float = Field(ge=0, le=4, description=LOOSENESS)
    softness: float = Field(gt=0, le=100, description=SOFTNESS)
    teacher_weight: float = Field(
        gt=0, lt=1, description="final share of the teacher's logits in the fused target", examples=[0.5]
    )
    teacher_ramp: float = Field(
        ge=0, le=1, description="share of all steps over which teacher_weight rises from 0; 0 = at once", examples=[1.0]
    )
    placebo: Literal["none", "other", "warped"] = Field(description=PLACEBO)


class TeacherTarget(Section):
    kind: Literal["teacher"] = Field(description=TARGET_KIND)
    placebo: Literal["none", "other", "warped"] = Field(description=PLACEBO, examples=["none"])


class EllipseTarget(Section):
    kind: Literal["ellipse"] = Field(description=TARGET_KIND)
    softness: float = Field(gt=0, le=100, description=SOFTNESS, examples=[3.0])


def proportions(shares: dict[str, float]) -> dict[str, float]:
    """Return the probability of each kind of prompt; they sum to 1."""
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


class PromptShares(Section):
    ring: float = Field(ge=0)
    centre: float = Field(ge=0)
    box: float = Field(ge=0)
    box_core: float = Field(ge=0, alias="box+core")
    none: float = Field(ge=0, description="no prompt: the decoder must find the lesion", examples=[0.0])

    def shares(self) -> dict[str, float]:
        """Return the probability of each kind of prompt; they sum to 1."""
        return proportions(self.model_dump(by_alias=True, include={"ring", "centre", "box", "box_core", "none"}))


PROMPT_SOURCE = "source of the prompts: boxes (the two boxes) | masks"


class FromBoxes(Section):
    source: Literal["boxes"] = Field(description=PROMPT_SOURCE)


class BoxPrompts(PromptShares, FromBoxes):
    """The fields of `FromBoxes` come first."""


class MaskPrompts(Section):
    source: Literal["masks"] = Field(description=PROMPT_SOURCE)
    box: float = Field(ge=0, description="share of the mask's bounding box", examples=[0.4])
    points: float = Field(ge=0, description="share of points in the mask", examples=[0.4])
    box_points: float = Field(ge=0, alias="box+points", description="share of both as one prompt", examples=[0.2])
    box_jitter: float = Field(
        ge=0, le=0.4, description="shift of each side of the box, up to this share of its extent", examples=[0.1]
    )
    max_points: int = Field(ge=1, le=64, description="maximum number of points in the mask, at least 1", examples=[3])
    point_jitter: float = Field(
        ge=0, le=64, description="shift of each point, up to this [px of the model's input]", examples=[2.0]
    )
    negative: float = Field(
        ge=0, le=1, description="probability of an additional point outside the mask", examples=[0.3]
    )

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
    contrast: float = Field(ge=0, description="contrastive term, InfoNCE (published: alpha)")
    distil: float = Field(ge=0, description="distillation to the pretrained features (published: gamma)")
    pseudo: float = Field(ge=0, description="mask loss against the pseudo mask")
    projection: float = Field(ge=0, description="two-box projection term")


class ContrastiveMethod(Section):
    name: Literal["contrastive"] = Field(description=METHOD_NAME)
    weights: ContrastiveWeights = Field(description="of the loss terms; 0 = off")
    temperature: float = Field(gt=0, le=10, description="temperature of InfoNCE")
    pos_samples: int = Field(ge=1, le=65536, description="maximum number of anchors per image")
    neg_samples: int = Field(ge=1, le=65536, description="maximum number of negatives per image")
    ema_decay: float = Field(ge=0, lt=1, description="decay of the teacher's average, per step")
    num_points: int = Field(ge=1, le=1000, description=NUM_POINTS)
    teacher_prompt: Literal["ring", "box", "core", "box+core"] = Field(
        description="prompt of the teacher: ring | box | core | box+core"
    )
    monitor_masks: bool = Field(description="log the loss against true masks where there are any; no gradient")
    gate: Gate
    negatives: Negatives
    head: Head
    target: PriorTarget | FusedTarget | TeacherTarget | EllipseTarget = Field(discriminator="kind")
    prompts_per_image: int = Field(ge=1, le=16, description=PER_IMAGE, examples=[2])
    prompts: PromptShares = Field(description=SHARES)


WEIGHTING = "fixed | learned (each multiplied by the exponential of a parameter)"


class FixedWeights(Section):
    kind: Literal["fixed"] = Field(description=WEIGHTING)


class LearnedWeights(Section):
    kind: Literal["learned"] = Field(description=WEIGHTING)
    learning_rate: float = Field(gt=0, le=1, description="learning rate of those parameters", examples=[1e-3])


class SupervisedWeights(Section):
    iou: float = Field(
        ge=0, description="loss of the IoU head; trains when iou_loss is mse or smooth_l1", examples=[0.5]
    )


class SupervisedMethod(Section):
    name: Literal["supervised"] = Field(description=METHOD_NAME)
    loss: Literal["dice_bce", "dice", "bce", "focal", "focal_dice"] = Field(
        description="dice_bce (2 BCE + Dice) | dice | bce | focal | focal_dice (20 focal + Dice, as SAM)",
        examples=["dice_bce"],
    )
    candidates: Literal["one", "three"] = Field(
        description="one (the single mask) | three (also the best of the three candidates)", examples=["one"]
    )
    iou_loss: Literal["monitor", "mse", "smooth_l1"] = Field(
        description="loss of the IoU head: monitor (squared error, no gradient) | mse | smooth_l1", examples=["monitor"]
    )
    weights: SupervisedWeights = Field(description="of the loss terms", examples=[{"iou": 0.5}])
    weighting: FixedWeights | LearnedWeights = Field(
        discriminator="kind", description="weighting of the terms", examples=[{"kind": "fixed"}]
    )
    average: float = Field(
        ge=0,
        lt=1,
        description="decay, per step, of an average of the weights that is saved instead of them; 0 = none",
        examples=[0.0],
    )
    num_points: int = Field(ge=1, le=1000, description=NUM_POINTS)
    prompts_per_image: int = Field(ge=1, le=16, description=PER_IMAGE, examples=[2])
    corrections: int = Field(
        ge=0, le=16, description="rounds after the first, each with a click in a wrong region", examples=[0]
    )
    prompts: BoxPrompts | MaskPrompts = Field(discriminator="source", description=SHARES)
