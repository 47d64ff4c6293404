"""The comparison's U-Net: from scratch, on the true masks that the supervised rows see; no prompt, no foundation.

ResNet-18 encoder and U-Net decoder (Ronneberger et al. 2015, arXiv:1505.04597) of segmentation-models-pytorch, random
start: no weights are fetched. It goes through the same loop, batches and augmentation as every other row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from lesionsam import metrics
from lesionsam.boxes.prior import OUTSIDE
from lesionsam.config.load import Config
from lesionsam.data.loader import Loader
from lesionsam.evaluation.cases import LoadImage, LoadMask, build_cases, by_image, load_checked, measure, upscaled
from lesionsam.experiment.build import training_settings
from lesionsam.experiment.run import Data
from lesionsam.losses import soft_mask_loss
from lesionsam.methods.base import Method, Term
from lesionsam.methods.grid import known_masks, mean_over
from lesionsam.models.transforms import image_region, model_frames
from lesionsam.training.loop import OBJECTIVE, fit
from lesionsam.training.optimizer import Group
from lesionsam.training.progress import Log
from lesionsam.training.state import Progress, load_best
from lesionsam.types import Batch, Frame, Sample
from lesionsam.utils.devices import torch_device
from lesionsam.utils.progress import progress

ENCODER = "resnet18"
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mean and deviation of RGB in 0..255
BOXED = ("box", "box+core")  # prompt sources under which its mask is cut to the big box


class Segmenter(Method):
    """A network from images to logits, (B, 3, S, S) -> (B, 1, S, S), trained on true masks as a method of the loop."""

    def __init__(self, network: nn.Module) -> None:
        self.model = self.kept = network

    def losses(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        """Return 2 BCE + Dice on the valid pixels."""
        y = logits_of(self.model, batch.images, batch.sizes)
        m, known = known_masks(batch, y.shape[-1])
        return {"mask": Term(mean_over(soft_mask_loss(y, m, batch.valid.float()), known), 1.0)}, {}

    def counts(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the number of images with a mask."""
        return {"mask": known_masks(batch, 1)[1].sum()}

    def after_step(self, taken: bool | torch.Tensor = True) -> None:
        """Nothing follows a step."""


def normalize(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return (B, 3, S, S) float32 with ImageNet's mean and deviation, 0 on the padding."""
    mean, std = (torch.tensor(value, device=images.device).view(1, 3, 1, 1) for value in IMAGENET)
    return (images.float() - mean) / std * image_region(sizes, images.shape[-1])[:, None]


def logits_of(network: nn.Module, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, S, S) float32 logits of (B, 3, S, S) uint8 RGB whose image parts have (B, 2) sizes."""
    return network(normalize(images, sizes))[:, 0].float()


def build_unet(seed: int) -> nn.Module:
    """The network with random weights, a function of the seed."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(seed)
    return smp.Unet(ENCODER, encoder_weights=None, in_channels=3, classes=1)


def train_unet(
    config: Config, data: Data, *, folder: Path, log: Log, say: Callable[[str], None] = print
) -> tuple[nn.Module, Progress]:
    """Train on the masks of data.train, keep the epoch with the best mean IoU on data.dev; resumes in `folder`.

    Args:
        config: what `train` says holds, with lr_decoder for all of the network.
    Returns:
        the network in eval mode, and where the run ended.
    """
    t, device = config.train, torch_device(config.runtime.device)
    if config.runtime.num_threads:
        torch.set_num_threads(config.runtime.num_threads)
    method = Segmenter(build_unet(t.seed).to(device))
    say(
        f"training a U-Net of {sum(p.numel() for p in method.model.parameters()):,} parameters on {len(data.train)} "
        "lesions"
    )
    loader = partial(Loader, device=device, num_workers=config.runtime.num_workers)
    at = fit(
        method,
        loader(data.train),
        [Group("network", list(method.model.parameters()), t.lr_decoder)],
        training_settings(config, data.train),
        evaluate=partial(_score, network=method.model, batches=loader(data.dev), size=config.evaluate.batch_size),
        log=log,
        folder=folder,
        say=say,
    )
    load_best(folder, method.model)
    return method.model.eval(), at


def _score(epoch: int, *, network: nn.Module, batches: Loader, size: int) -> Mapping[str, float]:
    """Mean IoU over the lesions with a mask, in the model frame."""
    found: list[float] = []
    with torch.inference_mode():
        for batch in batches.batches(size):
            masks = (logits_of(network, batch.images, batch.sizes) > 0) & batch.valid
            truth, known = known_masks(batch, masks.shape[-1])
            for mask, true, there in zip(masks.cpu().numpy(), truth.cpu().numpy(), known.tolist(), strict=True):
                if there:
                    found.append(metrics.iou(mask, true > 0.5))
    return {OBJECTIVE: float(np.mean(found))}


def evaluate_unet(
    network: nn.Module,
    samples: Sequence[Sample],
    load_image: LoadImage,
    load_mask: LoadMask,
    *,
    frame: Frame,
    batch_size: int,
    tolerance: float = metrics.BOUNDARY_TOLERANCE,
    model: str,
    run: str,
) -> pd.DataFrame:
    """Its figures at original size: without a prompt as it is, under `box` and `box+core` cut to the big box.

    Args:
        frame: the model frame, as it was trained.
    Returns:
        the columns of `evaluation.columns.ROW_COLUMNS` that it has, a row per lesion and prompt source.
    """
    device = next(network.parameters()).device
    images, rows = by_image(samples), []
    starts = range(0, len(images), batch_size)
    for start in progress(starts, total=len(starts), title=f"evaluating {model}"):
        chunk = images[start : start + batch_size]
        with torch.inference_mode():
            frames, sizes = model_frames([load_checked(lesions[0], load_image) for lesions in chunk], frame)
            answers = logits_of(network, frames.to(device), sizes.to(device))
        for lesions, answer in zip(chunk, answers, strict=True):
            for case in build_cases(lesions, load_mask):
                whole = upscaled(answer, case, frame)
                cut = np.full_like(whole, OUTSIDE)
                cut[case.big] = whole[case.big]
                key = {
                    "image_id": case.sample.image_id,
                    "lesion_id": case.sample.lesion_id,
                    "width": case.sample.width,
                    "height": case.sample.height,
                }
                for prompt, logits in {"none": whole, **dict.fromkeys(BOXED, cut)}.items():
                    rows.append({"model": model, "run": run, "prompt": prompt} | key | measure(logits, case, tolerance))
    return pd.DataFrame(rows)
