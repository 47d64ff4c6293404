"""When the memory does not hold a step: batches in parts, begun again with more of them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lesionsam.errors import UserError
from lesionsam.methods.base import Method, Term
from lesionsam.training.state import Progress
from lesionsam.types import Batch

Values = dict[str, torch.Tensor]


def in_parts(
    batch: Batch, parts: int, add_gradients: Callable[[Batch, float], tuple[Mapping[str, Term], Values]]
) -> tuple[Mapping[str, Term], Values] | str:
    """Forward and backward of a batch in so many parts, one after the other, whose gradients add up.

    Args:
        add_gradients: (part, its share of the batch) -> terms and scalars of the part; `loss` among the scalars.
    Returns:
        terms of the last part and the scalars' means over the batch. Or, where the memory did not suffice, what torch
        said; the gradients are then good for nothing.
    """
    means: dict[str, Any] = {}
    bounds = [round(k * len(batch.ids) / parts) for k in range(parts + 1)]
    try:
        for low, high in pairwise(bounds):
            share = (high - low) / len(batch.ids)
            terms, values = add_gradients(batch[low:high] if parts > 1 else batch, share)
            means = values if parts == 1 else {name: means.get(name, 0) + share * v for name, v in values.items()}
        return terms, means
    except torch.OutOfMemoryError as error:
        return str(error).partition("\n")[0]


@dataclass(frozen=True)
class Moment:
    """How things stood before a group of batches: all that one changes, gradients aside."""

    progress: dict[str, Any]
    buffers: list[torch.Tensor]
    num_waiting: int

    @classmethod
    def of(cls, at: Progress, method: Method, num_waiting: int) -> Moment:
        """This moment."""
        return cls(copy.deepcopy(vars(at)), [buffer.clone() for buffer in method.model.buffers()], num_waiting)

    @torch.no_grad()
    def restore(self, at: Progress, method: Method) -> None:
        """Back to it."""
        vars(at).update(copy.deepcopy(self.progress))
        for buffer, value in zip(method.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)


def make_smaller(at: Progress, batch: Batch, method: Method, reason: str, say: Callable[[str], None]) -> None:
    """Halve what is in memory at once: every batch is made in twice as many parts.

    Raises:
        UserError: a part cannot be smaller.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = len(batch.ids)
    if size // (2 * at.parts) < method.smallest_batch:
        raise UserError(
            f"the GPU's memory does not hold a step of {size // at.parts} image(s) ({reason}); lower model.image_size, "
            "train fewer blocks (model.unfreeze_last_k) or set train.precision to bf16"
        )
    at.parts *= 2
    say(
        f"out of memory ({reason}); from here on the {size} images of a batch are made in {at.parts} parts, as with "
        f"train.batch_size {size // at.parts} and train.accumulate {at.parts} times as large"
    )
