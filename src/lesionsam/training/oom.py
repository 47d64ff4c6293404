"""Recovery from running out of memory: undo the step and compute it in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

from lesionsam.errors import UserError, is_out_of_memory
from lesionsam.methods.base import Method
from lesionsam.parallel.collectives import world_size
from lesionsam.training.state import Progress
from lesionsam.types import Batch

Result = TypeVar("Result")


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Split a batch into parts of nearly equal size."""
    bounds = [round(k * len(batch.ids) / num_parts) for k in range(num_parts + 1)]
    return [batch[low:high] for low, high in pairwise(bounds)] if num_parts > 1 else [batch]


@dataclass(frozen=True)
class Snapshot:
    """What a forward pass changes, to undo it."""

    buffers: list[torch.Tensor]
    alive: list[str]

    @classmethod
    def take(cls, method: Method, at: Progress) -> Snapshot:
        """Copy the present state."""
        return cls([buffer.clone() for buffer in method.model.buffers()], list(at.alive))

    @torch.no_grad()
    def restore(self, method: Method, at: Progress) -> None:
        """Go back to it; gradients are dropped."""
        at.alive = list(self.alive)
        for buffer, value in zip(method.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        for parameter in method.model.parameters():
            parameter.grad = None


def with_smaller_parts(
    compute: Callable[[int], Result], batches: Sequence[Batch], method: Method, at: Progress, say: Callable[[str], None]
) -> Result:
    """Return compute(at.parts); each time the memory runs out, undo it, double `at.parts` and try again.

    Args:
        compute: forward and backward of a step whose batches are each split into so many parts.
    Raises:
        UserError: the smallest parts do not fit either, or several processes train, which cannot go back together.
    """
    while True:
        snapshot = Snapshot.take(method, at)
        try:
            return compute(at.parts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
        snapshot.restore(method, at)  # after the except block: its traceback holds the tensors of the failed pass
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = len(batches[0].ids)
        if world_size() > 1:
            raise UserError(
                f"memory does not hold a step of {size // at.parts} image(s) per process ({reason}); halve "
                "train.batch_size and double train.accumulate, or train fewer blocks (model.unfreeze_last_k)"
            )
        if size // (2 * at.parts) < method.smallest_batch:
            raise UserError(
                f"memory does not hold a step of {size // at.parts} image(s) ({reason}); lower "
                "model.image_size, train fewer blocks (model.unfreeze_last_k), set runtime.checkpointing or set "
                "train.precision to bf16"
            )
        at.parts *= 2
        say(
            f"out of memory ({reason}); from here on the {size} images of a batch are computed in {at.parts} parts, as "
            f"with train.batch_size {size // at.parts} and train.accumulate {at.parts} times as large"
        )
