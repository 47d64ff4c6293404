"""`lesionsam smoke`: check in a minute, without data, that a checkpoint works on this machine, and what a step costs.

It runs once through everything that a long run does, on a few generated images: hash, load, one prediction, one
evaluation of the pretrained model, one training step of the default method. Each figure is printed as soon as it is
known, so that after a failure the last line shows how far it came.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from lesionsam import metrics
from lesionsam.boxes.annotator import SIMULATED, annotate
from lesionsam.boxes.geometry import to_model_frame
from lesionsam.config.load import Config, default_values, unflatten, validate
from lesionsam.config.zoo import known
from lesionsam.data.augment import Augmentation
from lesionsam.data.contents import load_image, load_mask
from lesionsam.data.dataset import LesionDataset, open_dataset
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.errors import UserError
from lesionsam.evaluation.evaluate import evaluate_model
from lesionsam.experiment.build import choose_trained, learning_groups
from lesionsam.experiment.resources import peak_memory
from lesionsam.experiment.run import build_method
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.published import CHECKPOINTS, published_name
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.trainable import trained_parameters
from lesionsam.models.transforms import model_frames, upscale
from lesionsam.training.gradients import autocast, step_generator, total_loss
from lesionsam.training.optimizer import build_optimizer, clip_gradients
from lesionsam.types import Prompts, Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.weights import weights_bytes, weights_sha256

NUM_TRAIN, NUM_TEST = 2, 2  # generated pictures: of the training step, of prediction and evaluation
MAX_SIDE = 320
CPU_IMAGE_SIZE = 256  # of SAM's own sizes without a GPU: at 1024 px a training step there takes minutes and 10 GB
PROMPTS = ("ring", "centre", "box", "box+core")


def smoke(
    name: str,
    checkpoint: Path,
    *,
    image_size: int | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Try a checkpoint end to end.

    Args:
        name: model.name of params.yaml. checkpoint: its weights, a file or a folder in the form of the Hub.
        image_size: side of the model's input, pixels; 0 = the model's own; None = the model's own on a GPU and for the
            compact model, `CPU_IMAGE_SIZE` for the others without one.
        device: auto, cpu, cuda or cuda:N. say: receives each line of the report.
    Returns:
        seconds of load, encode, decode, evaluate and step; `box_iou`, `predicted_iou`, `loss`, `gradient_norm`;
        `trained` parameters;
        `peak_gb`, of the GPU where there is one, else of this process.
    Raises:
        UserError: a file that is no checkpoint of this model, too little memory, or a value that is not finite.
    """
    where = torch_device(device)
    if image_size is None:
        multiple = known(name).multiple
        image_size = CPU_IMAGE_SIZE // multiple * multiple if where.type == "cpu" and known(name).side else 0
    if not checkpoint.exists():
        raise UserError(f"--checkpoint: {checkpoint}: no such file; give the path of the model's weights")
    config = validate(
        unflatten(
            {
                "model.name": name,
                "model.checkpoint": str(checkpoint),
                "model.image_size": image_size,
                "runtime.device": device,
                "method.gate.entropy_thresh": 0.69,  # trusts every image: the step must have a gradient
            },
            default_values(),
        ),
        "lesionsam smoke",
    )
    say(f"machine     {machine(where)}")
    say(f"checkpoint  {checkpoint.name}, {weights_bytes(checkpoint) / 1e6:.1f} MB, {identity(name, checkpoint)}")
    figures: dict[str, float] = {}

    with out_of_memory_explained(), tempfile.TemporaryDirectory(prefix="lesionsam-smoke-") as folder:
        begun = time.perf_counter()
        sam = load_sam(name, checkpoint, image_size=image_size).to(where).eval()
        figures["load"] = elapsed(begun, where)
        num_parameters, side = sum(p.numel() for p in sam.parameters()), sam.side
        say(f"load        {figures['load']:.1f} s, {num_parameters / 1e6:.1f} M parameters, input {side} x {side} px")

        samples = generated_samples(Path(folder))
        train = [s for s in samples if s.split == "train"]
        test = [s for s in samples if s.split == "test"]
        figures |= predict_one(sam, test[0], where)
        say(
            f"predict     encoder {figures['encode']:.2f} s, decoder {figures['decode'] * 1000:.0f} ms an image; "
            f"big box: IoU {figures['box_iou']:.3f}, predicted {figures['predicted_iou']:.3f}"
        )

        begun = time.perf_counter()
        result = evaluate_model(
            sam,
            test,
            load_image,
            load_mask,
            prompts=PROMPTS,
            seed=0,
            batch_size=1,
            num_points=config.method.num_points,
            device=where,
        )
        figures["evaluate"] = elapsed(begun, where)
        means = result.rows.groupby("prompt")["iou"].mean()
        reached = ", ".join(f"{prompt} {means[prompt]:.3f}" for prompt in PROMPTS)
        say(f"evaluate    {figures['evaluate']:.1f} s for {NUM_TEST} images; mean IoU {reached}")

        data = open_dataset(train, sam.frame, Path(folder) / "frames", with_masks=True)
        figures |= train_one_step(config, sam, checkpoint, data, where)
        say(
            f"train       {figures['step']:.2f} s for a step of {NUM_TRAIN} images, {figures['trained'] / 1e6:.1f} M "
            f"parameters; loss {figures['loss']:.4f}, gradient norm {figures['gradient_norm']:.3f}"
        )
    figures["peak_gb"] = peak_memory(where)
    whose = "on the GPU" if where.type == "cuda" else "in this process, libraries included"
    say(f"memory      {figures['peak_gb']:.2f} GB at most {whose}")
    say("all parts work")
    return figures


def machine(device: torch.device) -> str:
    """Return processor, memory and library versions in one line."""
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 1e9
    text = (
        f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GB; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB; {text}"
    return f"no GPU used; {text}"


def identity(name: str, checkpoint: Path) -> str:
    """Return the file's SHA-256 and whether it is one of SAM's published checkpoints."""
    digest = weights_sha256(checkpoint)
    whose = "not a published SAM checkpoint"
    if known := published_name(digest):
        whose = f"SAM's own {known}, as published"
    elif name in CHECKPOINTS and checkpoint.name == CHECKPOINTS[name].file:
        whose = f"NOT the published {name}, whose name it bears (expected SHA-256 {CHECKPOINTS[name].sha256})"
    return f"SHA-256 {digest}: {whose}"


def elapsed(begun: float, device: torch.device) -> float:
    """Return the seconds since `begun` (time.perf_counter), after synchronising the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn torch's out-of-memory error into one line with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not suffice ({str(error).splitlines()[0]}); try a smaller --image-size "
            "or a smaller model"
        ) from error


def generated_samples(folder: Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> list[Sample]:
    """Generate a few images on disk, with simulated boxes."""
    rows = write_dataset(folder, seed=0, counts={"train": num_train, "test": num_test}, max_side=MAX_SIDE)
    return annotate({str(row["image_id"]): row for row in rows}, root=Path(), seed=0, **SIMULATED)


@torch.inference_mode()
def predict_one(sam: Sam, sample: Sample, device: torch.device) -> dict[str, float]:
    """Return the seconds of encoder and decoder, and the IoU of one mask prompted with the big box."""
    truth = load_mask(sample)
    frame, sizes = model_frames([load_image(sample)], sam.frame)
    height, width = sizes[0].tolist()
    box = to_model_frame(sample.big_box, sample.width, sample.height, sam.frame)
    begun = time.perf_counter()
    features = encode(sam, sam.normalize(frame.to(device), sizes.to(device)))
    seconds = elapsed(begun, device)
    begun = time.perf_counter()
    prompts = Prompts(boxes=torch.from_numpy(box.astype(np.float32))[None].to(device))
    low_res, predicted = decode(sam, features, prompts)
    logits = upscale(low_res[0, 0], (height, width), (sample.height, sample.width), sam.frame).cpu().numpy()
    decoder_seconds = elapsed(begun, device)
    if not np.isfinite(logits).all():
        raise UserError("prediction: the mask's logits are not finite; the weights are damaged or of another model")
    return {
        "encode": seconds,
        "decode": decoder_seconds,
        "box_iou": metrics.iou(logits > 0, np.asarray(truth)),
        "predicted_iou": float(predicted[0, 0]),
    }


def train_one_step(
    config: Config, sam: Sam, checkpoint: Path, data: LesionDataset, device: torch.device
) -> dict[str, float]:
    """Take one step of the default method with the loop's parts; check that loss, gradient and weights are finite."""
    t = config.train
    choose_trained(config, sam)
    method, _ = build_method(config, sam, checkpoint, data, device)
    parameters = trained_parameters(method.model)
    groups = learning_groups(config, method)
    optimizer = build_optimizer(groups, weight_decay=t.weight_decay, betas=(t.beta1, t.beta2))
    method.model.train()
    batch = next(data.epoch(NUM_TRAIN, seed=t.seed, epoch=0, augmentation=Augmentation(flips=t.augment))).to(device)
    begun = time.perf_counter()
    with autocast(device, t.precision):
        terms, _ = method.losses(batch, step_generator(t.seed, 0))
    total = total_loss(terms)
    total.backward()
    norm = float(clip_gradients(groups, t.clip))
    optimizer.step()
    method.after_step()
    seconds = elapsed(begun, device)
    if not math.isfinite(total.item()) or not math.isfinite(norm) or norm == 0:
        raise UserError(
            f"training step: loss {total.item():g}, gradient norm {norm:g}; expected finite numbers and a "
            "gradient above 0; the weights are damaged or of another model"
        )
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise UserError("training step: weights are not finite after one step; the given ones are damaged")
    num_trained = sum(p.numel() for p in parameters)
    return {"step": seconds, "loss": total.item(), "gradient_norm": norm, "trained": float(num_trained)}
