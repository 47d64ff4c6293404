"""Schema of params.yaml: type, limits, unit and description of each key. It holds no default values.

To add a key, add a field here, the line in params.yaml and the same line in `presets/demo.yaml`. Its first argument
is the comment in params.yaml; units stand in brackets. A key that one variant of a section reads goes into that
variant's class, with its initial value as `initial`. The sections `model` and `method` are in `config.schema_method`.
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
    key,
)

VERSION = 2  # of the format of params.yaml; `config.upgrade` reads the older ones
PromptKind = Literal["none", "ring", "centre", "box", "zoom", "box+core", "tight"]


class Inputs(Section):
    folder: str = key(
        "images/{train,val,test} and optional masks/{train,val,test}; read when data.source is folder or coco",
        min_length=1,
    )
    boxes: str = key("your two-box CSV file; read when boxes.source is csv", min_length=1)


DATA_SOURCE = "synthetic | isic2016 | isic2017 | isic2018 | folder | coco"
DEV_FRACTION = "share of the training images held out for development, by hash of the id; 0 = the source's own split"


class SyntheticData(Section):
    source: Literal["synthetic"] = key(DATA_SOURCE)
    seed: int = key("random seed of the generated images", ge=0)
    num_train: int = key("generated training images", ge=1, le=1_000_000)
    num_dev: int = key("generated development images, to select on", ge=1, le=1_000_000)
    num_test: int = key("generated test images, to report on", ge=1, le=1_000_000)
    max_side: int = key("largest side of a generated image [px]; sizes and aspect ratios vary", ge=48, le=4096)


class FolderData(Section):
    source: Literal["folder"] = key(DATA_SOURCE)
    dev_fraction: float = key(DEV_FRACTION, ge=0, lt=1, initial=0.0)
    test_split: Literal["val", "test"] = key("your split to report on: val | test", initial="test")
    threshold_masks: bool = key(
        "cut grey masks (such as JPEG) at half of their range instead of refusing them", initial=False
    )


class CocoData(Section):
    source: Literal["coco"] = key(DATA_SOURCE)
    annotations: str = key(
        "COCO instances in inputs.folder; {split} stands for train, val and test",
        pattern=r"\{split\}",
        title="a path with {split} in it",
        initial="annotations/{split}.json",
    )
    images: str = key("image folder in inputs.folder; {split} likewise", min_length=1, initial="images/{split}")
    categories: Annotated[tuple[str, ...], Field(strict=False)] = key(
        "categories that are lesions; [] = all", title="a list of category names", initial=[]
    )
    dev_fraction: float = key(DEV_FRACTION, ge=0, lt=1, initial=0.0)
    test_split: Literal["val", "test"] = key("your split to report on: val | test", initial="test")


class IsicData(Section):
    source: Literal["isic2016", "isic2017", "isic2018"] = key(DATA_SOURCE)
    subset: int = key("maximum number of images per split; 0 = the whole archives", ge=0, initial=0)
    dev_fraction: float = key(DEV_FRACTION, ge=0, lt=1, initial=0.0)
    base_url: str = key(
        "server of the archives; empty = ISIC's own server and its mirror",
        pattern=r"^(https?://\S+)?$",
        title="empty, or an address that starts with https:// or http://",
        initial="",
    )


BOX_SOURCE = "simulated (drawn from the masks) | csv (read from inputs.boxes; no masks needed)"


class SimulatedBoxes(Section):
    source: Literal["simulated"] = key(BOX_SOURCE)
    seed: int = key("random seed of the simulated annotator", ge=0)
    margin_low: float = key("big box: width and height exceed the lesion's by at least this share", ge=0, le=4)
    margin_high: float = key("big box: by at most this share", ge=0, le=4)
    core_low: float = key("small box: at least this share of the lesion's width and height", gt=0, le=1)
    core_high: float = key("small box: at most this share, before it shrinks to fit inside the lesion", gt=0, le=1)
    jitter: float = key("shift of either box's centre, up to this share of the lesion's extent", ge=0, le=0.5)
    min_area: int = key("smallest area of an annotated lesion (component of a mask) [px]", ge=1)

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
    source: Literal["csv"] = key(BOX_SOURCE)


class Distort(Section):
    scale: float = key("scale image, mask and boxes up or down by up to this share", ge=0, lt=1)
    brightness: float = key("multiply by 1 plus or minus up to this", ge=0, lt=1)
    contrast: float = key("the same, about the image's mean grey", ge=0, lt=1)
    hue: float = key("rotate by up to this share of the colour circle", ge=0, le=0.5)
    blur: float = key("Gaussian, standard deviation up to this [px of the model's input]", ge=0, le=16)


class Train(Section):
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = key("[images]", ge=1, le=4096)
    accumulate: int = key("batches per optimiser step", ge=1, le=4096)
    lr_encoder: float = key("learning rate of encoder blocks, adapters or LoRA", gt=0, le=1)
    lr_decoder: float = key("learning rate of mask decoder and prompt encoder", gt=0, le=1)
    lr_head: float = key("learning rate of the projection head", gt=0, le=1)
    weight_decay: float = Field(ge=0, le=1)
    beta1: float = key("AdamW: decay of the mean gradient, per step", ge=0, lt=1)
    beta2: float = key("AdamW: decay of the mean squared gradient, per step", ge=0, lt=1)
    warmup: float = key("warm-up, as a share of all steps", ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = key("cosine | linear | constant")
    final_lr: float = key("final learning rate, as a share of the initial one", ge=0, le=1)
    clip: float = key("maximum gradient norm", gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32 | bf16 | fp16 (autocast)")
    augment: bool = key("flips and quarter turns")
    widen: float = key(
        "share of images that are zoomed out: shorter side extended by half with its mirror image", ge=0, le=1
    )
    distort: Distort = key("drawn for each image and epoch; 0 = off")
    select: Literal["objective", "label_free"] = key(
        "best checkpoint by: objective (mean IoU of ring, centre, box on dev) | label_free"
    )
    patience: int = key("epochs without improvement before stopping; 0 = never", ge=0)
    overlays: int = key("overlay pictures of dev images per epoch", ge=0, le=64)


class Evaluate(Section):
    seed: int = key("random seed of the prompts", ge=0)
    prompts: Annotated[tuple[PromptKind, ...], Field(strict=False, min_length=1)] = key(
        "zoom: the big box with its surroundings enlarged"
    )
    batch_size: int = key("[images]", ge=1, le=4096)
    num_bootstrap: int = key("bootstrap resamples of a confidence interval", ge=10, le=1_000_000)
    confidence: float = Field(gt=0, lt=1)
    boundary_tolerance: float = key("tolerance of boundary F1, as a share of the image diagonal", gt=0, le=0.5)
    jitter: Annotated[tuple[Annotated[float, Field(ge=0, le=0.9)], ...], Field(strict=False)] = key(
        "scale and shift the boxes by up to these shares"
    )
    overlays: int = key("number of best, of median and of worst cases shown", ge=0, le=64)


class Auto(Section):
    points_per_side: int = key("grid of point prompts: points per side", ge=1, le=128)
    points_per_batch: int = key("prompts decoded at once", ge=1, le=4096)
    pred_iou_thresh: float = key("drop masks at or below this predicted IoU; 0 = none", ge=0, lt=1)
    stability_score_thresh: float = key("drop masks below this stability (IoU of two cuts); 0 = none", ge=0, le=1)
    stability_score_offset: float = key("distance of the two cuts from the mask threshold [logits]", gt=0, le=20)
    box_nms_thresh: float = key("keep the better of two masks whose boxes' IoU exceeds this", ge=0, le=1)
    crop_n_layers: int = key("layers of crops searched as well; layer i has 4^i crops", ge=0, le=4)
    crop_nms_thresh: float = key("the same between crops; the mask of the smaller crop is kept", ge=0, le=1)
    crop_overlap_ratio: float = key(
        "overlap of the crops of layer 1, as a share of the image's shorter side", ge=0, lt=1
    )
    crop_n_points_downscale_factor: int = key(
        "the grid of layer i has points_per_side / this^i points per side", ge=1, le=16
    )
    min_mask_region_area: int = key("fill holes and remove islands smaller than this [px]; 0 = none", ge=0)


class Space(BaseModel):
    """Dotted keys of other sections; `sweep.space.read_space` checks them against the schema."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Sweep(Section):
    objective: Literal["objective", "label_free"] = key(
        "objective (mean IoU of ring, centre, box on dev) | label_free (needs no masks)"
    )
    sampler: Literal["gp", "tpe", "random"] = key("gp | tpe | random")
    pruner: Literal["median", "hyperband", "none"] = key("stops weak trials early: median | hyperband | none")
    seed: int = key("random seed of the sampler; each trial has a seed of its own", ge=0)
    epochs: int = key("epochs of a trial, at most train.epochs; 0 = train.epochs", ge=0, le=100_000)
    holdout: float = key("share of the dev images kept from all trials, to compare best and initial values", ge=0, lt=1)
    confirm_seeds: int = key("new seeds to train best and initial values with, at train.epochs; 0 = none", ge=0, le=100)
    space: Space = key("any key of model, method, train: {low, high, log, step} or [choices]")


class Foundation(Section):
    images: Literal["shapes", "data"] = key(
        "shapes (generated) | data (training images and masks of section data; needs `dvc repro boxes`)"
    )
    minutes: float = key("training time over all resumed runs [min]", gt=0, le=100_000)
    seed: int = key("random seed of weights, images, batches and prompts", ge=0)
    image_size: int = key("side S of the input [px]; a multiple of patch_size", ge=16, le=1024)
    patch_size: int = key("side of a patch, a cell of the feature grid [px]", ge=2, le=64)
    width: int = key("channels of the encoder's tokens; a multiple of num_heads", ge=8, le=4096)
    depth: int = key("transformer blocks of the encoder", ge=1, le=64)
    num_heads: int = key("attention heads of each block", ge=1, le=64)
    prompt_width: int = key("channels of features, prompt encoder and decoder; a multiple of 16", ge=16, le=1024)
    decoder_mlp: int = key("hidden units of the decoder's transformer", ge=8, le=8192)


class Cluster(Section):
    partition: str = key(
        "partition; empty = the cluster's default", pattern=r"^[\w.,@+-]*$", title="a name without blanks, or empty"
    )
    minutes: int = key("time limit of a job; at its end the work saves its state and is queued again [min]", ge=1)
    requeues: int = key("how often a job is queued again at its time limit", ge=0, le=10_000)
    gpus: int = key("GPUs per node; 0 = none", ge=0, le=64)
    cpus: int = key("CPU cores per node", ge=1, le=4096)
    memory_gb: float = key("memory per node [GB]", gt=0)
    tasks: int = key("array size: shards of a prediction, workers of a sweep", ge=1, le=10_000)


class Tracking(Section):
    enabled: bool
    uri: str = key("MLflow tracking URI; empty = sqlite:///mlflow.db in the repository root")
    experiment: str = Field(min_length=1)
    system_metrics: bool
    tensorboard: bool = key("also write event files to tensorboard/; needs the package tensorboard")


class Runtime(Section):
    device: str = key(
        "auto | cpu | cuda | cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$", title="auto, cpu, cuda or cuda:N"
    )
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = key(
        "processes that train together, one per GPU or share of the CPU: 1 | N | auto (all GPUs)"
    )
    nodes: int = key("machines of one training, in a Slurm job", ge=1, le=1024)
    num_workers: int = key("processes that decode images, threads that prepare batches; 0 = none", ge=0, le=256)
    num_threads: int = key("CPU threads of torch; 0 = torch's own choice", ge=0, le=1024)
    checkpointing: bool = key(
        "recompute the trained blocks' activations in the backward pass: less memory, more time, the same gradients",
        initial=False,
    )
    cache_gb: float = key("disk for the frozen encoder's activations, all runs together [GB]; 0 = no cache", ge=0)


class Config(Section):
    """All of params.yaml. `config.load.load_config` reads one and checks the rules between keys as well."""

    version: int = Field(ge=VERSION, le=VERSION)
    inputs: Inputs = key("your own files; both paths must exist, DVC watches them")
    data: SyntheticData | FolderData | CocoData | IsicData = Field(discriminator="source")
    boxes: SimulatedBoxes | CsvBoxes = Field(discriminator="source")
    model: FrozenEncoder | BlocksEncoder | AdapterEncoder | LoraEncoder = Field(discriminator="encoder")
    method: ContrastiveMethod | SupervisedMethod = Field(discriminator="name")
    train: Train
    evaluate: Evaluate
    auto: Auto = key("automatic masks without a prompt: `lesionsam predict --everything`")
    sweep: Sweep = key("`python src/tune.py`; read by no stage")
    foundation: Foundation = key("`lesionsam foundation`, a compact SAM from scratch")
    cluster: Cluster = key("`lesionsam submit`, jobs of Slurm; read by no stage")
    tracking: Tracking
    runtime: Runtime = key("how and where to run; a change never retrains")
