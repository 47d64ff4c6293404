"""The sections `model` and `method` of params.yaml; the others, and how to add a key, are in `lesionsam.schema`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ENTROPY = 0.6932  # ln 2, rounded up
NUM_BLOCKS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}  # transformer blocks of SAM's own encoders


class Section(BaseModel):
    """A section of params.yaml: unknown keys refused, values neither converted nor changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ENCODER = "which encoder parameters train: none | blocks | adapter | lora"
LAST_K = "in the last K transformer blocks; 0 = in all"


class AnyModel(Section):
    name: Literal["compact", "vit_b", "vit_l", "vit_h"] = Field(description="compact | vit_b | vit_l | vit_h")
    checkpoint: str = Field(min_length=1, description="file, or `published` for SAM's own (downloaded and verified)")
    image_size: int = Field(ge=0, le=4096, description="side S of the model's input [px]; 0 = the model's own")
    train_decoder: bool = Field(description="the mask decoder trains too")
    train_prompt_encoder: bool = Field(description="the prompt encoder trains too", examples=[True])


class FrozenEncoder(AnyModel):
    encoder: Literal["none"] = Field(description=ENCODER)


class BlocksEncoder(AnyModel):
    encoder: Literal["blocks"] = Field(description=ENCODER)
    unfreeze_last_k: int = Field(
        ge=0, le=64, description="with blocks: the last K transformer blocks and the neck; 0 = all"
    )


class AdapterEncoder(AnyModel):
    encoder: Literal["adapter"] = Field(description=ENCODER)
    adapter_dim: int = Field(
        ge=1, le=4096, description="hidden units of each adapter, two a block (after attention and MLP)", examples=[32]
    )
    adapter_last_k: int = Field(ge=0, le=64, description=f"adapters {LAST_K}", examples=[0])


class LoraEncoder(AnyModel):
    encoder: Literal["lora"] = Field(description=ENCODER)
    lora_rank: int = Field(ge=1, le=1024, description="of the updates of the attention's qkv and proj", examples=[8])
    lora_alpha: float = Field(gt=0, le=4096, description="the updates count alpha / rank times", examples=[16.0])
    lora_dropout: float = Field(ge=0, lt=1, description="of the updates' input, in training", examples=[0.0])
    lora_last_k: int = Field(ge=0, le=64, description=f"updates {LAST_K}", examples=[0])


class Gate(Section):
    region: Literal["image", "big_box"] = Field(description="entropy averaged over: image (published) | big_box")
    entropy_thresh: float = Field(
        ge=0,
        le=MAX_ENTROPY,
        description="an image is trusted at or below this mean binary entropy [nats, at most 0.693]",
    )
    trust_empty: bool = Field(description="published: true")


class Negatives(Section):
    missed_core: Literal["negative", "ignore", "positive"] = Field(
        description="core pixels the teacher missed: negative (published) | ignore | positive"
    )
    certain_background: bool = Field(description="pixels outside the big box are negatives")
    in_batch: bool = Field(description="also the negatives of the other images of the batch")
    random_fallback: bool = Field(description="published: true; random pixels where an image has no negatives")


class Head(Section):
    norm: Literal["group", "batch"] = Field(description="group | batch")
    ema: bool = Field(description="the teacher has its own head, an average; published: false, one shared head")


TARGET_KIND = "prior | teacher | fused (prior and teacher) | ellipse"
SOFTNESS = "soft labels are sigmoid(softness * (prior + offset))"
PLACEBO = "none | other (target of another image) | warped (the same, warped into this big box)"
OFFSET = "outline offset of the prior: boxes (found from the boxes alone) | none | a number"
LOOSENESS = "by how much annotators draw the big box too large, for finding the offset"


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
        gt=0, lt=1, description="share of the teacher's logits in the fused target, once risen", examples=[0.5]
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
    """Kind of prompt -> probability; they sum to 1."""
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


class PromptShares(Section):
    ring: float = Field(ge=0)
    centre: float = Field(ge=0)
    box: float = Field(ge=0)
    box_core: float = Field(ge=0, alias="box+core")
    none: float = Field(ge=0, description="no prompt: the decoder finds the lesion by itself", examples=[0.0])

    def shares(self) -> dict[str, float]:
        """Probability of each kind of prompt; they sum to 1."""
        return proportions(self.model_dump(by_alias=True, include={"ring", "centre", "box", "box_core", "none"}))


PROMPT_SOURCE = "drawn from: boxes (the two boxes) | masks"


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
        ge=0, le=0.4, description="each side of the box moves by up to this share of its extent", examples=[0.1]
    )
    max_points: int = Field(ge=1, le=64, description="from 1 to this many points in the mask", examples=[3])
    point_jitter: float = Field(
        ge=0, le=64, description="each moves by up to this [px of the model's input]", examples=[2.0]
    )
    negative: float = Field(
        ge=0, le=1, description="probability of a point outside the mask beside them", examples=[0.3]
    )

    def shares(self) -> dict[str, float]:
        """Probability of each kind of prompt; they sum to 1."""
        return proportions({"box": self.box, "points": self.points, "box+points": self.box_points})


METHOD_NAME = "contrastive (two boxes, no masks) | supervised (masks)"
BETA = "weight of the IoU monitor in the printed total; carries no gradient"
NUM_POINTS = "points of a ring prompt"
PER_IMAGE = "prompts drawn for each image in a step, each decoded"
SHARES = "share of the student's prompts, per image and step"


class ContrastiveMethod(Section):
    name: Literal["contrastive"] = Field(description=METHOD_NAME)
    alpha: float = Field(ge=0, description="weight of the contrastive term")
    beta: float = Field(ge=0, description=BETA)
    gamma: float = Field(ge=0, description="weight of the distillation to the pretrained features")
    delta: float = Field(ge=0, description="weight of the pseudo-mask term")
    epsilon: float = Field(ge=0, description="weight of the two-box projection term")
    temperature: float = Field(gt=0, le=10, description="of InfoNCE")
    pos_samples: int = Field(ge=1, le=65536, description="anchors per image, at most")
    neg_samples: int = Field(ge=1, le=65536, description="negatives per image, at most")
    ema_decay: float = Field(ge=0, lt=1, description="of the teacher, per step")
    num_points: int = Field(ge=1, le=1000, description=NUM_POINTS)
    teacher_prompt: Literal["ring", "box", "core", "box+core"] = Field(description="ring | box | core | box+core")
    monitor_masks: bool = Field(description="log loss against true masks where there are any; never a gradient")
    gate: Gate
    negatives: Negatives
    head: Head
    target: PriorTarget | FusedTarget | TeacherTarget | EllipseTarget = Field(discriminator="kind")
    prompts_per_image: int = Field(ge=1, le=16, description=PER_IMAGE, examples=[2])
    prompts: PromptShares = Field(description=SHARES)


WEIGHTING = "of the terms: fixed | learned (each times the exponential of a parameter)"


class FixedWeights(Section):
    kind: Literal["fixed"] = Field(description=WEIGHTING)


class LearnedWeights(Section):
    kind: Literal["learned"] = Field(description=WEIGHTING)
    learning_rate: float = Field(
        gt=0, le=1, description="of those parameters, in an optimiser of their own", examples=[1e-3]
    )


class SupervisedMethod(Section):
    name: Literal["supervised"] = Field(description=METHOD_NAME)
    loss: Literal["dice_bce", "dice", "bce", "focal", "focal_dice"] = Field(
        description="dice_bce (2 BCE + Dice) | dice | bce | focal | focal_dice (20 focal + Dice, as SAM)",
        examples=["dice_bce"],
    )
    candidates: Literal["one", "three"] = Field(
        description="one (the single mask) | three (and the best of the three candidates beside it)", examples=["one"]
    )
    iou_loss: Literal["monitor", "mse", "smooth_l1"] = Field(
        description="of the IoU head: monitor (squared error, no gradient) | mse | smooth_l1", examples=["monitor"]
    )
    beta: float = Field(ge=0, description="weight of the IoU head's term")
    weighting: FixedWeights | LearnedWeights = Field(
        discriminator="kind", description="weights of the terms", examples=[{"kind": "fixed"}]
    )
    average: float = Field(
        ge=0,
        lt=1,
        description="decay, per step, of an average of the weights, which is then what is kept; 0 = none",
        examples=[0.0],
    )
    num_points: int = Field(ge=1, le=1000, description=NUM_POINTS)
    prompts_per_image: int = Field(ge=1, le=16, description=PER_IMAGE, examples=[2])
    corrections: int = Field(
        ge=0, le=16, description="rounds after the first, each with a click where the mask is wrong", examples=[0]
    )
    prompts: BoxPrompts | MaskPrompts = Field(discriminator="source", description=SHARES)
