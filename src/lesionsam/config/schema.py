"""Schema of params.yaml: type, limits, unit and description of each key. It holds no default values.

To add a key, add a field here, the line in params.yaml and the same line in `presets/demo.yaml`. The description of the
field is the comment in params.yaml; units stand in brackets. A key that one variant of a section reads goes into that
variant's class, with its initial value in `examples`. The sections `model` and `method` are in `config.schema_method`.
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

VERSION = 2  # of the format of params.yaml; `config.upgrade` reads the older ones
PromptKind = Literal["none", "ring", "centre", "box", "zoom", "box+core", "tight"]


class Inputs(Section):
    folder: str = Field(
        min_length=1,
        description=(
            "images/{train,val,test} and optional masks/{train,val,test}; read when data.source is folder or coco"
        ),
    )
    boxes: str = Field(min_length=1, description="your two-box CSV file; read when boxes.source is csv")


DATA_SOURCE = "synthetic | isic2016 | isic2017 | isic2018 | folder | coco"
DEV_FRACTION = "share of the training images held out for development, by hash of the id; 0 = the source's own split"


class SyntheticData(Section):
    source: Literal["synthetic"] = Field(description=DATA_SOURCE)
    seed: int = Field(ge=0, description="random seed of the generated images")
    num_train: int = Field(ge=1, le=1_000_000, description="generated training images")
    num_dev: int = Field(ge=1, le=1_000_000, description="generated development images, to select on")
    num_test: int = Field(ge=1, le=1_000_000, description="generated test images, to report on")
    max_side: int = Field(
        ge=48, le=4096, description="largest side of a generated image [px]; sizes and aspect ratios vary"
    )


class FolderData(Section):
    source: Literal["folder"] = Field(description=DATA_SOURCE)
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    test_split: Literal["val", "test"] = Field(description="your split to report on: val | test", examples=["test"])
    threshold_masks: bool = Field(
        description="cut grey masks (such as JPEG) at half of their range instead of refusing them", examples=[False]
    )


class CocoData(Section):
    source: Literal["coco"] = Field(description=DATA_SOURCE)
    annotations: str = Field(
        pattern=r"\{split\}",
        title="a path with {split} in it",
        description="COCO instances in inputs.folder; {split} stands for train, val and test",
        examples=["annotations/{split}.json"],
    )
    images: str = Field(
        min_length=1, description="image folder in inputs.folder; {split} likewise", examples=["images/{split}"]
    )
    categories: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        title="a list of category names", description="categories that are lesions; [] = all", examples=[[]]
    )
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    test_split: Literal["val", "test"] = Field(description="your split to report on: val | test", examples=["test"])


class IsicData(Section):
    source: Literal["isic2016", "isic2017", "isic2018"] = Field(description=DATA_SOURCE)
    subset: int = Field(ge=0, description="maximum number of images per split; 0 = the whole archives", examples=[0])
    dev_fraction: float = Field(ge=0, lt=1, description=DEV_FRACTION, examples=[0.0])
    base_url: str = Field(
        pattern=r"^(https?://\S+)?$",
        title="empty, or an address that starts with https:// or http://",
        description="server of the archives; empty = ISIC's own server and its mirror",
        examples=[""],
    )


BOX_SOURCE = "simulated (drawn from the masks) | csv (read from inputs.boxes; no masks needed)"


class SimulatedBoxes(Section):
    source: Literal["simulated"] = Field(description=BOX_SOURCE)
    seed: int = Field(ge=0, description="random seed of the simulated annotator")
    margin_low: float = Field(
        ge=0, le=4, description="big box: width and height exceed the lesion's by at least this share"
    )
    margin_high: float = Field(ge=0, le=4, description="big box: by at most this share")
    core_low: float = Field(gt=0, le=1, description="small box: at least this share of the lesion's width and height")
    core_high: float = Field(
        gt=0, le=1, description="small box: at most this share, before it shrinks to fit inside the lesion"
    )
    jitter: float = Field(
        ge=0, le=0.5, description="shift of either box's centre, up to this share of the lesion's extent"
    )
    min_area: int = Field(ge=1, description="smallest area of an annotated lesion (component of a mask) [px]")

    def annotator(self) -> dict[str, Any]:
        """Return the arguments of `boxes.annotator.annotate`."""
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
    scale: float = Field(ge=0, lt=1, description="scale image, mask and boxes up or down by up to this share")
    brightness: float = Field(ge=0, lt=1, description="multiply by 1 plus or minus up to this")
    contrast: float = Field(ge=0, lt=1, description="the same, about the image's mean grey")
    hue: float = Field(ge=0, le=0.5, description="rotate by up to this share of the colour circle")
    blur: float = Field(ge=0, le=16, description="Gaussian, standard deviation up to this [px of the model's input]")


class Train(Section):
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=4096, description="[images]")
    accumulate: int = Field(ge=1, le=4096, description="batches per optimiser step")
    lr_encoder: float = Field(gt=0, le=1, description="learning rate of encoder blocks, adapters or LoRA")
    lr_decoder: float = Field(gt=0, le=1, description="learning rate of mask decoder and prompt encoder")
    lr_head: float = Field(gt=0, le=1, description="learning rate of the projection head")
    weight_decay: float = Field(ge=0, le=1)
    beta1: float = Field(ge=0, lt=1, description="AdamW: decay of the mean gradient, per step")
    beta2: float = Field(ge=0, lt=1, description="AdamW: decay of the mean squared gradient, per step")
    warmup: float = Field(ge=0, lt=1, description="warm-up, as a share of all steps")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="cosine | linear | constant")
    final_lr: float = Field(ge=0, le=1, description="final learning rate, as a share of the initial one")
    clip: float = Field(gt=0, description="maximum gradient norm")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="fp32 | bf16 | fp16 (autocast)")
    augment: bool = Field(description="flips and quarter turns")
    widen: float = Field(
        ge=0,
        le=1,
        description="share of images that are zoomed out: shorter side extended by half with its mirror image",
    )
    distort: Distort = Field(description="drawn for each image and epoch; 0 = off")
    select: Literal["objective", "label_free"] = Field(
        description="best checkpoint by: objective (mean IoU of ring, centre, box on dev) | label_free"
    )
    patience: int = Field(ge=0, description="epochs without improvement before stopping; 0 = never")
    overlays: int = Field(ge=0, le=64, description="overlay pictures of dev images per epoch")


class Evaluate(Section):
    seed: int = Field(ge=0, description="random seed of the prompts")
    prompts: Annotated[tuple[PromptKind, ...], Field(strict=False, min_length=1)] = Field(
        description="zoom: the big box with its surroundings enlarged"
    )
    batch_size: int = Field(ge=1, le=4096, description="[images]")
    num_bootstrap: int = Field(ge=10, le=1_000_000, description="bootstrap resamples of a confidence interval")
    confidence: float = Field(gt=0, lt=1)
    boundary_tolerance: float = Field(
        gt=0, le=0.5, description="tolerance of boundary F1, as a share of the image diagonal"
    )
    jitter: Annotated[tuple[Annotated[float, Field(ge=0, le=0.9)], ...], Field(strict=False)] = Field(
        description="scale and shift the boxes by up to these shares"
    )
    overlays: int = Field(ge=0, le=64, description="number of best, of median and of worst cases shown")


class Auto(Section):
    points_per_side: int = Field(ge=1, le=128, description="grid of point prompts: points per side")
    points_per_batch: int = Field(ge=1, le=4096, description="prompts decoded at once")
    pred_iou_thresh: float = Field(ge=0, lt=1, description="drop masks at or below this predicted IoU; 0 = none")
    stability_score_thresh: float = Field(
        ge=0, le=1, description="drop masks below this stability (IoU of two cuts); 0 = none"
    )
    stability_score_offset: float = Field(
        gt=0, le=20, description="distance of the two cuts from the mask threshold [logits]"
    )
    box_nms_thresh: float = Field(ge=0, le=1, description="keep the better of two masks whose boxes' IoU exceeds this")
    crop_n_layers: int = Field(ge=0, le=4, description="layers of crops searched as well; layer i has 4^i crops")
    crop_nms_thresh: float = Field(
        ge=0, le=1, description="the same between crops; the mask of the smaller crop is kept"
    )
    crop_overlap_ratio: float = Field(
        ge=0, lt=1, description="overlap of the crops of layer 1, as a share of the image's shorter side"
    )
    crop_n_points_downscale_factor: int = Field(
        ge=1, le=16, description="the grid of layer i has points_per_side / this^i points per side"
    )
    min_mask_region_area: int = Field(
        ge=0, description="fill holes and remove islands smaller than this [px]; 0 = none"
    )


class Space(BaseModel):
    """Dotted keys of other sections; `sweep.space.read_space` checks them against the schema."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Sweep(Section):
    objective: Literal["objective", "label_free"] = Field(
        description="objective (mean IoU of ring, centre, box on dev) | label_free (needs no masks)"
    )
    sampler: Literal["gp", "tpe", "random"] = Field(description="gp | tpe | random")
    pruner: Literal["median", "hyperband", "none"] = Field(
        description="stops weak trials early: median | hyperband | none"
    )
    seed: int = Field(ge=0, description="random seed of the sampler; each trial has a seed of its own")
    epochs: int = Field(ge=0, le=100_000, description="epochs of a trial, at most train.epochs; 0 = train.epochs")
    holdout: float = Field(
        ge=0, lt=1, description="share of the dev images kept from all trials, to compare best and initial values"
    )
    confirm_seeds: int = Field(
        ge=0, le=100, description="new seeds to train best and initial values with, at train.epochs; 0 = none"
    )
    space: Space = Field(description="any key of model, method, train: {low, high, log, step} or [choices]")


class Foundation(Section):
    images: Literal["shapes", "data"] = Field(
        description="shapes (generated) | data (training images and masks of section data; needs `dvc repro boxes`)"
    )
    minutes: float = Field(gt=0, le=100_000, description="training time over all resumed runs [min]")
    seed: int = Field(ge=0, description="random seed of weights, images, batches and prompts")
    image_size: int = Field(ge=16, le=1024, description="side S of the input [px]; a multiple of patch_size")
    patch_size: int = Field(ge=2, le=64, description="side of a patch, a cell of the feature grid [px]")
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
    tensorboard: bool = Field(description="also write event files to tensorboard/; needs the package tensorboard")


class Runtime(Section):
    device: str = Field(
        pattern=r"^(auto|cpu|cuda(:\d+)?)$", title="auto, cpu, cuda or cuda:N", description="auto | cpu | cuda | cuda:N"
    )
    num_workers: int = Field(
        ge=0, le=256, description="processes that decode images, threads that prepare batches; 0 = none"
    )
    num_threads: int = Field(ge=0, le=1024, description="CPU threads of torch; 0 = torch's own choice")
    cache_gb: float = Field(
        ge=0, description="disk for the frozen encoder's activations, all runs together [GB]; 0 = no cache"
    )


class Config(Section):
    """All of params.yaml. `config.load.load_config` reads one and checks the rules between keys as well."""

    version: int = Field(ge=VERSION, le=VERSION)
    inputs: Inputs = Field(description="your own files; both paths must exist, DVC watches them")
    data: SyntheticData | FolderData | CocoData | IsicData = Field(discriminator="source")
    boxes: SimulatedBoxes | CsvBoxes = Field(discriminator="source")
    model: FrozenEncoder | BlocksEncoder | AdapterEncoder | LoraEncoder = Field(discriminator="encoder")
    method: ContrastiveMethod | SupervisedMethod = Field(discriminator="name")
    train: Train
    evaluate: Evaluate
    auto: Auto = Field(description="automatic masks without a prompt: `lesionsam predict --everything`")
    sweep: Sweep = Field(description="`python src/tune.py`; read by no stage")
    foundation: Foundation = Field(description="`lesionsam foundation`, a compact SAM from scratch")
    tracking: Tracking
    runtime: Runtime = Field(description="how and where to run; a change never retrains")
