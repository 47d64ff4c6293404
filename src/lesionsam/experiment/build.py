"""Build what a configuration describes: the prepared SAM, the method, the learning rates, the settings of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.outline import Outline, find_outline
from lesionsam.config.load import Config
from lesionsam.config.schema_method import (
    ContrastiveMethod,
    FusedTarget,
    LearnedWeights,
    MaskPrompts,
    PriorTarget,
    SupervisedMethod,
)
from lesionsam.data.augment import Augmentation, Distortion
from lesionsam.data.dataset import LesionDataset
from lesionsam.data.frames import PRIOR_SCALE
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive, ContrastiveOptions
from lesionsam.methods.supervised import LOG_WEIGHTS, MaskDraws, Supervised, SupervisedOptions
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.sam import Sam
from lesionsam.models.trainable import ENCODER, select_trainable
from lesionsam.training.loop import Settings
from lesionsam.training.optimizer import Group, Schedule, parameter_groups


def strategy_of(config: Config) -> Strategy:
    """Return which parameters of the encoder train."""
    m = config.model
    if m.encoder == "adapter":
        return Strategy("adapter", last_k=m.adapter_last_k, adapter_dim=m.adapter_dim)
    if m.encoder == "lora":
        return Strategy(
            "lora", last_k=m.lora_last_k, lora_rank=m.lora_rank, lora_alpha=m.lora_alpha, lora_dropout=m.lora_dropout
        )
    return Strategy(m.encoder, last_k=m.unfreeze_last_k if m.encoder == "blocks" else 0)


def choose_trained(config: Config, sam: Sam) -> None:
    """Add the adapters or LoRA updates of `model.encoder` to a SAM and select the parameters that train."""
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
    """Load the pretrained SAM, add adapters or LoRA updates and select the parameters that train."""
    sam = load_sam(config.model.name, weights, image_size=config.model.image_size)
    choose_trained(config, sam)
    sam.checkpointing = config.runtime.checkpointing
    return sam.to(device)


def learning_groups(config: Config, method: Method) -> list[Group]:
    """Return the trained parameters by learning rate; learnt weights of the loss terms are a separate group."""
    t, rates = config.train, {}
    if isinstance(config.method, SupervisedMethod) and isinstance(config.method.weighting, LearnedWeights):
        rates["loss_weights"] = (LOG_WEIGHTS, config.method.weighting.learning_rate)
    rates |= {"head": ("head.", t.lr_head), "encoder": (ENCODER, t.lr_encoder), "decoder": ("", t.lr_decoder)}
    return parameter_groups(method.model, rates, separate=["loss_weights"])


def build_supervised(m: SupervisedMethod, sam: Sam) -> Supervised:
    """Build the supervised method around a SAM whose trained parameters are selected."""
    p = m.prompts
    draws = MaskDraws(p.box_jitter, p.max_points, p.point_jitter, p.negative) if isinstance(p, MaskPrompts) else None
    options = SupervisedOptions(
        loss=m.loss,
        candidates=m.candidates,
        iou_loss=m.iou_loss,
        iou_weight=m.weights.iou,
        learned_weights=isinstance(m.weighting, LearnedWeights),
        average=m.average,
        num_points=m.num_points,
        prompts_per_image=m.prompts_per_image,
        corrections=m.corrections,
        prompts=p.shares(),
        from_masks=draws,
    )
    return Supervised(sam, options)


def contrastive_options(m: ContrastiveMethod, outline: Outline, ramp_steps: int) -> ContrastiveOptions:
    """Return the settings of the contrastive method.

    Args:
        outline: correction of the box prior. ramp_steps: steps over which the teacher's weight in the target rises.
    """
    target = m.target
    return ContrastiveOptions(
        weights=m.weights.model_dump(),
        temperature=m.temperature,
        pos_samples=m.pos_samples,
        neg_samples=m.neg_samples,
        ema_decay=m.ema_decay,
        teacher_share=m.teacher_share,
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
        offset=outline.offset,
        tightness=outline.tightness,
        softness=getattr(target, "softness", 1.0),
        teacher_weight=getattr(target, "teacher_weight", 0.0),
        ramp_steps=ramp_steps,
        placebo=getattr(target, "placebo", "none"),
        prompts=m.prompts.shares(),
        prompts_per_image=m.prompts_per_image,
    )


OUTLINE_SAMPLES = 300  # greatest number of images that the outlines are estimated from
OUTLINE_SIDE = 128  # longest side of their priors, pixels


def trained_prompts(config: Config) -> str:
    """Return the kinds of prompt that a model is trained with, separated by spaces, for its weights file."""
    return " ".join(kind for kind, share in config.method.prompts.shares().items() if share > 0)


def outline_of(data: LesionDataset, looseness: float | None) -> Outline:
    """Estimate the outlines of a training set without its masks; see `boxes.outline.find_outline`."""
    stride = max(1, data.side // OUTLINE_SIDE)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), OUTLINE_SAMPLES)).round().astype(int))
    priors = [np.asarray(data.frames.priors[k, ::stride, ::stride], np.float32) / PRIOR_SCALE for k in chosen]
    big, small = ([boxes[k] / stride for k in chosen] for boxes in (data.frames.big_boxes, data.frames.small_boxes))
    sizes = [(int(height) // stride, int(width) // stride) for height, width in (data.frames.sizes[k] for k in chosen)]
    return find_outline(priors, big, small, looseness, sizes)


def num_steps(config: Config, data: LesionDataset) -> int:
    """Return the number of optimiser steps of a whole run on these samples."""
    t = config.train
    return t.epochs * -(-data.batches_per_epoch(t.batch_size) // t.accumulate)


def training_settings(config: Config, data: LesionDataset) -> Settings:
    """Return the settings of section `train` for a whole run on these samples."""
    t = config.train
    return Settings(
        epochs=t.epochs,
        batch_size=t.batch_size,
        accumulate=t.accumulate,
        clip=t.clip,
        precision=t.precision,
        seed=t.seed,
        patience=t.patience,
        schedule=Schedule(num_steps(config, data), t.schedule, warmup=t.warmup, final=t.final_lr),
        augmentation=Augmentation(flips=t.augment, widen=t.widen, distortion=Distortion(**t.distort.model_dump())),
        weight_decay=t.weight_decay,
        betas=(t.beta1, t.beta2),
    )


def build_method(
    config: Config, sam: Sam, weights: Path, data: LesionDataset, device: torch.device
) -> tuple[Method, Outline | None]:
    """Build the configured method around a SAM whose trained parameters are selected.

    Returns:
        The method, and the correction of the box prior in its target (None if the target has none).
    """
    m = config.method
    if isinstance(m, SupervisedMethod):
        return build_supervised(m, sam), None
    target = m.target
    outline = None
    if isinstance(target, PriorTarget | FusedTarget):
        if target.offset == "boxes":
            outline = outline_of(data, None if target.looseness == "auto" else target.looseness)
        else:
            outline = Outline(0.0 if target.offset == "none" else target.offset)
    options = contrastive_options(
        m, outline or Outline(), round(getattr(target, "teacher_ramp", 0.0) * num_steps(config, data))
    )
    reference = None
    if options.weights["distil"] > 0:
        reference = load_sam(config.model.name, weights, image_size=config.model.image_size).to(device)
        reference.requires_grad_(False).eval()
    torch.manual_seed(config.train.seed)  # only the head starts at random
    return Contrastive(sam, reference, options), outline
