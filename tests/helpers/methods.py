"""Small methods, their options and a batch, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from helpers.tiny import tiny_data, tiny_sam
from lesionsam.methods.contrastive import ContrastiveOptions
from lesionsam.methods.supervised import Supervised, SupervisedOptions
from lesionsam.models.trainable import select_trainable
from lesionsam.types import Batch

CPU = torch.device("cpu")


DEFAULT = ContrastiveOptions(
    weights={"contrast": 0.0, "distil": 0.0, "pseudo": 1.0, "projection": 0.0},
    temperature=0.1,
    pos_samples=256,
    neg_samples=1024,
    ema_decay=0.99,
    teacher_share=1.0,
    num_points=10,
    teacher_prompt="box+core",
    monitor_masks=True,
    gate_region="big_box",
    entropy_thresh=0.2,
    trust_empty=False,
    missed_core="ignore",
    certain_background=True,
    in_batch=True,
    random_fallback=False,
    head_norm="group",
    head_ema=True,
    target="prior",
    offset=0.0,
    tightness=1.0,
    softness=3.0,
    teacher_weight=0.0,
    ramp_steps=0,
    placebo="none",
    prompts={"ring": 0.25, "centre": 0.25, "box": 0.5, "box+core": 0.0},
    prompts_per_image=2,
)


def options(base: ContrastiveOptions = DEFAULT, **changes: Any) -> ContrastiveOptions:
    """Change some options; a weight is changed under its term's name: contrast=1.0."""
    weights = {name: changes.pop(name, weight) for name, weight in base.weights.items()}
    return replace(base, weights=weights, **changes)


SUPERVISED = SupervisedOptions(
    loss="dice_bce",
    candidates="one",
    iou_loss="monitor",
    iou_weight=0.5,
    learned_weights=False,
    average=0.0,
    num_points=10,
    prompts_per_image=2,
    corrections=0,
    prompts=DEFAULT.prompts,
    from_masks=None,
)


def supervised(**changes: Any) -> Supervised:
    sam = tiny_sam()
    select_trainable(sam, encoder="blocks", unfreeze_last_k=0, train_decoder=True)
    return Supervised(sam, replace(SUPERVISED, **changes))


def some_batch(count: int = 4, **changes: Any) -> Batch:
    return replace(tiny_data(count).batch(range(count)), **changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
