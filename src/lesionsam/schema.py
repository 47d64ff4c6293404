"""The schema of params.yaml: every key with its type, limits, unit and meaning, and no default anywhere.

To add a key: a field here (its description is the comment that params.yaml carries), the line in params.yaml, and the
same line in `presets/demo.yaml`. A key that only one variant of a section reads goes into that variant's class, with an
`examples` entry as the value to start from. Units stand in brackets. `lesionsam.config` loads, explains and hashes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PromptKind = Literal["ring", "centre", "box", "box+core", "tight"]
MAX_ENTROPY = 0.6932  # ln 2, rounded up
NUM_BLOCKS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}  # transformer blocks of SAM's own encoders


class Section(BaseModel):
    """A section of params.yaml: unknown keys refused, values neither converted nor changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Inputs(Section):
    folder: str = Field(
        min_length=1,
        description=(
            "images/{train,val,test} and optional masks/{train,val,test}; read when data.source is folder or coco"
        ),
    )
    boxes: str = Field(min_length=1, description="your two-box CSV file; read when boxes.source is csv")


DATA_SOURCE = "synthetic | isic2016 | isic2017 | isic2018 | folder | coco"
DEV_FRACTION = "share of the training images held out to select on, by hash of the id; 0 = the source's own split"


class SyntheticData(Section):
    source: Literal["synthetic"] = Field(description=DATA_SOURCE)
    seed: int = Field(ge=0, description="of the generated images")
    num_train: int = Field(ge=1, le=1_000_000, description="generated images to train on")
    num_dev: int = Field(ge=1, le=1_000_000, description="generated images to select on")
    num_test: int = Field(ge=1, le=1_000_000, description="generated images to report on, once")
    max_side: int = Field(
        ge=48, le=4096, description="longest side of a generated image [px]; sizes and aspect ratios vary below it"
    )


class FolderData(Section):
    source: Literal["folder"] = Field(description=DATA_SOURCE)
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    test_split: Literal["val", "test"] = Field(
        description="which of your splits is reported on, once: val | test", examples=["test"]
    )
    threshold_masks: bool = Field(
        description="grey masks (JPEG and the like) are cut at half of their range, not refused", examples=[False]
    )


class CocoData(Section):
    source: Literal["coco"] = Field(description=DATA_SOURCE)
    annotations: str = Field(
        pattern=r"\{split\}",
        title="a path with {split} in it",
        description="COCO instances in inputs.folder; {split} is train, val and test",
        examples=["annotations/{split}.json"],
    )
    images: str = Field(
        min_length=1, description="folder of the images in inputs.folder, {split} likewise", examples=["images/{split}"]
    )
    categories: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        title="a list of category names", description="names of those that are lesions; [] = all", examples=[[]]
    )
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    test_split: Literal["val", "test"] = Field(
        description="which of your splits is reported on, once: val | test", examples=["test"]
    )


class IsicData(Section):
    source: Literal["isic2016", "isic2017", "isic2018"] = Field(description=DATA_SOURCE)
    subset: int = Field(ge=0, description="images fetched of each split, at most; 0 = the whole archives", examples=[0])
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    base_url: str = Field(
        pattern=r"^(https?://\S+)?$",
        title="empty, or an address that starts with https:// or http://",
        description="where the archives are; empty = ISIC's own server and its mirror",
        examples=[""],
    )


BOX_SOURCE = "simulated (annotator drawn from masks) | csv (inputs.boxes, no mask needed anywhere)"


class SimulatedBoxes(Section):
    source: Literal["simulated"] = Field(description=BOX_SOURCE)
    seed: int = Field(ge=0, description="of the simulated annotator")
    margin_low: float = Field(
        ge=0, le=4, description="big box: least share by which width and height exceed the lesion's"
    )
    margin_high: float = Field(ge=0, le=4, description="big box: greatest share")
    core_low: float = Field(gt=0, le=1, description="small box: least share of the lesion's extent")
    core_high: float = Field(
        gt=0, le=1, description="small box: greatest share, before it shrinks to lie wholly inside the lesion"
    )
    jitter: float = Field(
        ge=0, le=0.5, description="centre of either box moves by up to this share of the lesion's extent"
    )
    min_area: int = Field(ge=1, description="lesions (components of a mask) smaller than this are not annotated [px]")


class CsvBoxes(Section):
    source: Literal["csv"] = Field(description=BOX_SOURCE)


ENCODER = "which encoder parameters train: none | blocks"


class AnyModel(Section):
    name: Literal["compact", "vit_b", "vit_l", "vit_h"] = Field(description="compact | vit_b | vit_l | vit_h")
    checkpoint: str = Field(min_length=1, description="file, or `published` for SAM's own (downloaded and verified)")
    image_size: int = Field(ge=0, le=4096, description="side S of the model's input [px]; 0 = the model's own")
    train_decoder: bool = Field(description="mask decoder and prompt encoder train too")


class FrozenEncoder(AnyModel):
    encoder: Literal["none"] = Field(description=ENCODER)


class BlocksEncoder(AnyModel):
    encoder: Literal["blocks"] = Field(description=ENCODER)
    unfreeze_last_k: int = Field(
        ge=0, le=64, description="with blocks: the last K transformer blocks and the neck; 0 = all"
    )


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


class PromptShares(Section):
    ring: float = Field(ge=0)
    centre: float = Field(ge=0)
    box: float = Field(ge=0)
    box_core: float = Field(ge=0, alias="box+core")

    def shares(self) -> dict[str, float]:
        """Probability of each kind of prompt; they sum to 1."""
        values = self.model_dump(by_alias=True)
        return {kind: share / sum(values.values()) for kind, share in values.items()}


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


class SupervisedMethod(Section):
    name: Literal["supervised"] = Field(description=METHOD_NAME)
    loss: Literal["dice_bce"] = Field(description="dice_bce", examples=["dice_bce"])
    beta: float = Field(ge=0, description=BETA)
    num_points: int = Field(ge=1, le=1000, description=NUM_POINTS)
    prompts_per_image: int = Field(ge=1, le=16, description=PER_IMAGE, examples=[2])
    prompts: PromptShares = Field(description=SHARES)


class Train(Section):
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=4096, description="[images]")
    accumulate: int = Field(ge=1, le=4096, description="batches per optimiser step")
    lr_encoder: float = Field(gt=0, le=1)
    lr_decoder: float = Field(gt=0, le=1)
    lr_head: float = Field(gt=0, le=1, description="of the projection head")
    weight_decay: float = Field(ge=0, le=1)
    warmup: float = Field(ge=0, lt=1, description="share of all steps")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="cosine | linear | constant")
    final_lr: float = Field(ge=0, le=1, description="floor, as a share of the learning rate")
    clip: float = Field(gt=0, description="gradient norm")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="fp32 | bf16 | fp16 (autocast)")
    augment: bool = Field(description="flips and quarter turns, image and boxes together")
    widen: float = Field(
        ge=0, le=1, description="share of images shown from farther away: shorter side extended by half with its mirror"
    )
    select: Literal["objective", "label_free"] = Field(
        description="best checkpoint by: objective (mean IoU of ring, centre, box on dev) | label_free"
    )
    patience: int = Field(ge=0, description="epochs without improvement before stopping; 0 = never")
    overlays: int = Field(ge=0, le=64, description="pictures of dev images per epoch")


class Evaluate(Section):
    seed: int = Field(ge=0, description="of drawn prompts")
    prompts: Annotated[tuple[PromptKind, ...], Field(strict=False, min_length=1)]
    batch_size: int = Field(ge=1, le=4096, description="[images]")
    num_bootstrap: int = Field(ge=10, le=1_000_000, description="resamples of an interval")
    confidence: float = Field(gt=0, lt=1)
    boundary_tolerance: float = Field(gt=0, le=0.5, description="of boundary F1, as a share of the image diagonal")
    jitter: Annotated[tuple[Annotated[float, Field(ge=0, le=0.9)], ...], Field(strict=False)] = Field(
        description="boxes scaled and shifted by up to these shares"
    )
    overlays: int = Field(ge=0, le=64, description="best, median and worst cases, each this many")


class Space(BaseModel):
    """Free keys: `lesionsam.sweep_space` checks each against the schema itself."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Sweep(Section):
    objective: Literal["objective", "label_free"] = Field(
        description="objective (mean IoU of ring, centre, box on dev) | label_free (needs no masks)"
    )
    sampler: Literal["gp", "tpe", "random"] = Field(description="gp | tpe | random")
    pruner: Literal["median", "hyperband", "none"] = Field(
        description="stops weak trials early: median | hyperband | none"
    )
    seed: int = Field(ge=0, description="of the sampler; each trial draws with a seed of its own")
    epochs: int = Field(ge=0, le=100_000, description="of a trial, at most train.epochs; 0 = train.epochs")
    holdout: float = Field(
        ge=0, lt=1, description="share of the dev images that no trial sees, to compare winner and start on"
    )
    confirm_seeds: int = Field(
        ge=0, le=100, description="new seeds that winner and start are trained with at train.epochs; 0 = none"
    )
    space: Space = Field(description="any key of model, method, train: {low, high, log, step} or [choices]")


class Tracking(Section):
    enabled: bool
    uri: str = Field(description="MLflow tracking URI; empty = sqlite:///mlflow.db in the repository root")
    experiment: str = Field(min_length=1)
    system_metrics: bool


class Runtime(Section):
    device: str = Field(
        pattern=r"^(auto|cpu|cuda(:\d+)?)$", title="auto, cpu, cuda or cuda:N", description="auto | cpu | cuda | cuda:N"
    )
    num_workers: int = Field(
        ge=0, le=256, description="processes that decode, threads that make batches ahead; 0 = none"
    )
    num_threads: int = Field(ge=0, le=1024, description="CPU threads of torch; 0 = its own choice")
    cache_gb: float = Field(
        ge=0, description="disk for the frozen encoder's activations, all runs together; 0 = no cache [GB]"
    )
    cache_memory_gb: float = Field(ge=0, description="of these, kept in memory by each process [GB]")
    cache_gpu_gb: float = Field(ge=0, description="of these, kept on the GPU [GB]")


class Config(Section):
    """All of params.yaml. Get one from `lesionsam.config.load_config`, which also checks the rules between keys."""

    version: int = Field(ge=1, le=1)
    inputs: Inputs = Field(description="your own files; DVC watches both paths for change")
    data: SyntheticData | FolderData | CocoData | IsicData = Field(discriminator="source")
    boxes: SimulatedBoxes | CsvBoxes = Field(discriminator="source")
    model: FrozenEncoder | BlocksEncoder = Field(discriminator="encoder")
    method: ContrastiveMethod | SupervisedMethod = Field(discriminator="name")
    train: Train
    evaluate: Evaluate
    sweep: Sweep = Field(description="of `python src/tune.py`; no stage reads it")
    tracking: Tracking
    runtime: Runtime = Field(description="how and where, never what: in no hash, so a change never retrains")
