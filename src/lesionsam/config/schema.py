"""The schema of params.yaml: every key with its type, limits, unit and meaning, and no default anywhere.

To add a key: a field here (its description is the comment that params.yaml carries), the line in params.yaml, and the
same line in `presets/demo.yaml`. A key that only one variant of a section reads goes into that variant's class, with an
`examples` entry as the value to start from. Units stand in brackets. `lesionsam.config` loads, explains and hashes.
The sections `model` and `method` are in `lesionsam.schema_method`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lesionsam.config.schema_method import (
    AdapterEncoder,
    BlocksEncoder,
    ContrastiveMethod,
    FrozenEncoder,
    LoraEncoder,
    Section,
    SupervisedMethod,
)

PromptKind = Literal["none", "ring", "centre", "box", "nearer", "box+core", "tight"]


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

    def annotator(self) -> dict[str, Any]:
        """The simulated annotator, as arguments of `boxes.annotate`."""
        return {
            "seed": self.seed,
            "margin": (self.margin_low, self.margin_high),
            "core": (self.core_low, self.core_high),
            "jitter": self.jitter,
            "min_area": self.min_area,
        }


class CsvBoxes(Section):
    source: Literal["csv"] = Field(description=BOX_SOURCE)


class Distort(Section):
    scale: float = Field(ge=0, lt=1, description="shrunk or enlarged by up to this share; image, mask and boxes")
    brightness: float = Field(ge=0, lt=1, description="times 1 plus or minus up to this")
    contrast: float = Field(ge=0, lt=1, description="about the image's mean grey, times 1 plus or minus up to this")
    hue: float = Field(ge=0, le=0.5, description="turned by up to this share of the colour circle")
    blur: float = Field(ge=0, le=16, description="Gaussian of up to this standard deviation [px of the model's input]")


class Train(Section):
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=4096, description="[images]")
    accumulate: int = Field(ge=1, le=4096, description="batches per optimiser step")
    lr_encoder: float = Field(gt=0, le=1, description="of encoder blocks, adapters or low-rank updates")
    lr_decoder: float = Field(gt=0, le=1, description="of mask decoder and prompt encoder")
    lr_head: float = Field(gt=0, le=1, description="of the projection head")
    weight_decay: float = Field(ge=0, le=1)
    beta1: float = Field(ge=0, lt=1, description="of AdamW: decay of the mean gradient, per step")
    beta2: float = Field(ge=0, lt=1, description="of AdamW: decay of its mean square")
    warmup: float = Field(ge=0, lt=1, description="share of all steps")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="cosine | linear | constant")
    final_lr: float = Field(ge=0, le=1, description="floor, as a share of the learning rate")
    clip: float = Field(gt=0, description="gradient norm")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="fp32 | bf16 | fp16 (autocast)")
    augment: bool = Field(description="flips and quarter turns, image and boxes together")
    widen: float = Field(
        ge=0, le=1, description="share of images shown from farther away: shorter side extended by half with its mirror"
    )
    distort: Distort = Field(description="drawn anew for each image and epoch; 0 = off")
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


class Auto(Section):
    points_per_side: int = Field(ge=1, le=128, description="grid of point prompts over the image, points a side")
    points_per_batch: int = Field(ge=1, le=4096, description="prompts decoded at once")
    pred_iou_thresh: float = Field(ge=0, lt=1, description="masks at or below this predicted IoU are dropped; 0 = none")
    stability_score_thresh: float = Field(
        ge=0, le=1, description="masks below this stability (IoU of two cuts) are dropped; 0 = none"
    )
    stability_score_offset: float = Field(gt=0, le=20, description="those cuts lie so far from the threshold [logits]")
    box_nms_thresh: float = Field(ge=0, le=1, description="of two masks whose boxes' IoU exceeds this the better stays")
    crop_n_layers: int = Field(ge=0, le=4, description="layers of crops that are searched too; layer i has 4^i")
    crop_nms_thresh: float = Field(ge=0, le=1, description="as box_nms_thresh, between crops; the smaller crop's stays")
    crop_overlap_ratio: float = Field(
        ge=0, lt=1, description="by how much crops of layer 1 overlap, as a share of the image's shorter side"
    )
    crop_n_points_downscale_factor: int = Field(
        ge=1, le=16, description="the grid of layer i has points_per_side / this^i points a side"
    )
    min_mask_region_area: int = Field(
        ge=0, description="holes and islands smaller than this are filled and removed [px]; 0 = none"
    )


class Space(BaseModel):
    """Free keys: `lesionsam.sweep.space` checks each against the schema itself."""

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


class Foundation(Section):
    images: Literal["shapes", "data"] = Field(
        description="shapes (generated) | data (training images and masks of section data, after `dvc repro boxes`)"
    )
    minutes: float = Field(gt=0, le=100_000, description="running time by the clock, resumed runs added up")
    seed: int = Field(ge=0, description="of weights, images, batches and prompts")
    image_size: int = Field(ge=16, le=1024, description="side S of the input [px]; a multiple of patch_size")
    patch_size: int = Field(ge=2, le=64, description="side of a patch [px], a cell of the feature grid")
    width: int = Field(ge=8, le=4096, description="channels of the encoder's tokens; a multiple of num_heads")
    depth: int = Field(ge=1, le=64, description="transformer blocks of the encoder")
    num_heads: int = Field(ge=1, le=64, description="attention heads of each block")
    prompt_width: int = Field(
        ge=16, le=1024, description="channels of features, prompt encoder and decoder; a multiple of 16"
    )
    decoder_mlp: int = Field(ge=8, le=8192, description="hidden units of the decoder's transformer")


class Tracking(Section):
    enabled: bool
    uri: str = Field(description="MLflow tracking URI; empty = sqlite:///mlflow.db in the repository root")
    experiment: str = Field(min_length=1)
    system_metrics: bool
    tensorboard: bool = Field(description="values also as event files in tensorboard/; needs the package tensorboard")


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
    model: FrozenEncoder | BlocksEncoder | AdapterEncoder | LoraEncoder = Field(discriminator="encoder")
    method: ContrastiveMethod | SupervisedMethod = Field(discriminator="name")
    train: Train
    evaluate: Evaluate
    auto: Auto = Field(description="masks without a prompt: `lesionsam predict --everything`, what falls back on it")
    sweep: Sweep = Field(description="of `python src/tune.py`; no stage reads it")
    foundation: Foundation = Field(description="of `lesionsam foundation`, a compact SAM from scratch")
    tracking: Tracking
    runtime: Runtime = Field(description="how and where, never what: in no hash, so a change never retrains")
