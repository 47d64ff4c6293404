"""Config -> what trains: the strategy put into SAM, its learning rates, the settings of a method."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.boxes.prior import outline_offset
from lesionsam.config.load import Config
from lesionsam.config.schema_method import ContrastiveMethod, LearnedWeights, MaskPrompts, SupervisedMethod
from lesionsam.data.augment import Distortion
from lesionsam.data.dataset import LesionDataset
from lesionsam.data.frames import PRIOR_SCALE
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.methods.contrastive import Options as ContrastiveOptions
from lesionsam.methods.supervised import LOG_WEIGHTS, MaskDraws, Options, Supervised
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.sam import Sam
from lesionsam.models.trainable import select_trainable
from lesionsam.training.optimizer import Group, parameter_groups, schedule_factor


def strategy_of(config: Config) -> Strategy:
    """Which parameters of the encoder train, as `models.adapted` takes it."""
    m = config.model
    if m.encoder == "adapter":
        return Strategy("adapter", last_k=m.adapter_last_k, adapter_dim=m.adapter_dim)
    if m.encoder == "lora":
        return Strategy(
            "lora", last_k=m.lora_last_k, lora_rank=m.lora_rank, lora_alpha=m.lora_alpha, lora_dropout=m.lora_dropout
        )
    return Strategy(m.encoder, last_k=m.unfreeze_last_k if m.encoder == "blocks" else 0)


def choose_trained(config: Config, sam: Sam) -> None:
    """Put in what `model.encoder` asks for and say which parameters train."""
    m, strategy = config.model, strategy_of(config)
    attach(sam, strategy, seed=config.train.seed)
    select_trainable(
        sam,
        encoder=m.encoder,
        unfreeze_last_k=strategy.last_k if m.encoder == "blocks" else 0,
        train_decoder=m.train_decoder,
        train_prompt_encoder=m.train_prompt_encoder,
    )


def prepare_sam(config: Config, weights: Path, device: torch.device) -> Sam:
    """The pretrained SAM with what `model.encoder` asks for, its trained parameters chosen."""
    sam = load_sam(config.model.name, weights, image_size=config.model.image_size)
    choose_trained(config, sam)
    return sam.to(device)


def learning_groups(config: Config, method: Method) -> list[Group]:
    """The trained parameters by learning rate; learnt weights of the loss's terms as a group apart."""
    t, rates = config.train, {}
    if isinstance(config.method, SupervisedMethod) and isinstance(config.method.weighting, LearnedWeights):
        rates[LOG_WEIGHTS] = config.method.weighting.learning_rate
    rates |= {"head.": t.lr_head, "image_encoder": t.lr_encoder, "": t.lr_decoder}
    return parameter_groups(method.model, rates, apart=[LOG_WEIGHTS])


def build_supervised(m: SupervisedMethod, sam: Sam) -> Supervised:
    """The supervised method around a SAM whose trained parts are selected."""
    p = m.prompts
    draws = MaskDraws(p.box_jitter, p.max_points, p.point_jitter, p.negative) if isinstance(p, MaskPrompts) else None
    options = Options(
        loss=m.loss,
        candidates=m.candidates,
        iou_loss=m.iou_loss,
        beta=m.weights.iou,
        learned_weights=isinstance(m.weighting, LearnedWeights),
        average=m.average,
        num_points=m.num_points,
        prompts_per_image=m.prompts_per_image,
        corrections=m.corrections,
        prompts=p.shares(),
        from_masks=draws,
    )
    return Supervised(sam, options)


def contrastive_options(m: ContrastiveMethod, offset: float, ramp_steps: int) -> ContrastiveOptions:
    """The settings of the contrastive method.

    Args:
        offset: of the outline, found or given. ramp_steps: over which the teacher's weight in the target rises.
    """
    target = m.target
    return ContrastiveOptions(
        alpha=m.weights.contrast,
        beta=0.5,
        gamma=m.weights.distil,
        delta=m.weights.pseudo,
        epsilon=m.weights.projection,
        temperature=m.temperature,
        pos_samples=m.pos_samples,
        neg_samples=m.neg_samples,
        ema_decay=m.ema_decay,
        num_points=m.num_points,
        teacher_prompt=m.teacher_prompt,
        monitor_masks=m.monitor_masks,
        gate_region=m.gate.region,
        entropy_thresh=m.gate.entropy_thresh,
        trust_empty=m.gate.trust_empty,
        missed_core=m.negatives.missed_core,
        certain_background=m.negatives.certain_background,
        in_batch=m.negatives.in_batch,
        random_fallback=m.negatives.random_fallback,
        head_norm=m.head.norm,
        head_ema=m.head.ema,
        target=target.kind,
        offset=offset,
        softness=getattr(target, "softness", 1.0),
        teacher_weight=getattr(target, "teacher_weight", 0.0),
        ramp_steps=ramp_steps,
        placebo=getattr(target, "placebo", "none"),
        prompts=m.prompts.shares(),
        prompts_per_image=m.prompts_per_image,
    )


OFFSET_SAMPLES = 300  # images that the outline offset is found on, at most


OFFSET_SIDE = 128  # longest side of their priors, pixels


def trained_prompts(config: Config) -> str:
    """The kinds of prompt that a model is trained with, parted by blanks: what its weights file says of itself."""
    return " ".join(kind for kind, share in config.method.prompts.shares().items() if share > 0)


def find_offset(data: LesionDataset, looseness: float) -> float:
    """The outline offset of a training set, from its boxes alone; see `boxes.prior.outline_offset`."""
    stride = max(1, data.side // OFFSET_SIDE)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), OFFSET_SAMPLES)).round().astype(int))
    priors = [np.asarray(data.frames.priors[k, ::stride, ::stride], np.float32) / PRIOR_SCALE for k in chosen]
    boxes = [data.frames.big_boxes[k] / stride for k in chosen]
    sizes = [(int(height) // stride, int(width) // stride) for height, width in (data.frames.sizes[k] for k in chosen)]
    return outline_offset(priors, boxes, looseness, sizes)


def num_steps(config: Config, data: LesionDataset) -> int:
    """Optimiser steps of a whole run on these samples."""
    t = config.train
    return t.epochs * -(-data.batches_per_epoch(t.batch_size) // t.accumulate)


def fit_arguments(config: Config, data: LesionDataset) -> dict[str, Any]:
    """What section `train` says of a whole run on these samples, as arguments of `training.fit`."""
    t = config.train
    return {
        "epochs": t.epochs,
        "batch_size": t.batch_size,
        "accumulate": t.accumulate,
        "weight_decay": t.weight_decay,
        "betas": (t.beta1, t.beta2),
        "factor": partial(
            schedule_factor, num_steps=num_steps(config, data), schedule=t.schedule, warmup=t.warmup, final=t.final_lr
        ),
        "clip": t.clip,
        "precision": t.precision,
        "seed": t.seed,
        "augment": t.augment,
        "widen": t.widen,
        "distort": Distortion(**t.distort.model_dump()),
        "patience": t.patience,
    }


def build_method(
    config: Config, sam: Sam, weights: Path, data: LesionDataset, device: torch.device
) -> tuple[Method, float | None]:
    """The configured method around a SAM whose trained parts are selected.

    Returns:
        The method, and the outline offset that it uses (None where its target has none).
    """
    m = config.method
    if isinstance(m, SupervisedMethod):
        return build_supervised(m, sam), None
    target = m.target
    offset = getattr(target, "offset", None)
    found = (
        find_offset(data, getattr(target, "looseness", 0.0))
        if offset == "boxes"
        else float(offset)
        if isinstance(offset, float | int)
        else 0.0
    )
    options = contrastive_options(m, found, round(getattr(target, "teacher_ramp", 0.0) * num_steps(config, data)))
    reference = None
    if m.weights.distil > 0:
        reference = load_sam(config.model.name, weights, image_size=config.model.image_size).to(device)
        reference.requires_grad_(False).eval()
    torch.manual_seed(config.train.seed)  # the head is the only part that starts at random
    return Contrastive(sam, reference, options), found if offset is not None else None
