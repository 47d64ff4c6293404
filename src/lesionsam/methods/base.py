"""The interface of a way of training: named loss terms and monitors of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn

from lesionsam.models.sam import Sam
from lesionsam.models.teacher import Teacher
from lesionsam.parallel.draws import Draws
from lesionsam.types import Batch


class Term(NamedTuple):
    """One term of the loss.

    Attributes:
        value: scalar tensor, the unweighted mean over whatever the term counts (images, prompts, cells).
        weight: factor in the loss, > 0; a tensor if it is learnt.
    """

    value: torch.Tensor
    weight: float | torch.Tensor


class Method(Protocol):
    """A way of training. It holds what differs between ways of training; the loop does the rest.

    Attributes:
        model: everything that trains. Its submodule `sam` is the segmenter.
        kept: module that is evaluated and saved: `model` or its running average, with the same parameter names.
        teacher: running average of `model`. reference: frozen pretrained SAM. head: projection head.
        smallest_batch: least number of images that `losses` accepts.
    """

    model: nn.Module
    kept: nn.Module
    teacher: Teacher | None = None
    reference: Sam | None = None
    head: nn.Module | None = None
    smallest_batch: int = 1

    def losses(self, batch: Batch, generator: Draws) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        """Return the loss terms and the monitors of a batch.

        The loss is the sum of weight times value over the terms. Monitors are scalars without gradient; they are logged
        and have no part in the loss. All random draws come from
        the generator. Where processes share a batch, a term or monitor is this process's part: the mean over the
        processes is that of the whole batch (`grid.mean_over`).
        """
        ...

    def counts(self, batch: Batch, generator: Draws) -> Mapping[str, torch.Tensor]:
        """Return how many items (or what sum of weights) the mean of each term or monitor of `losses` is over.

        The loop needs this if several batches make up one step, so that they count as one large batch. Names that are
        missing are means over all images of the batch.

        Args:
            generator: in the state in which `losses` gets it.
        """
        return {}

    def after_step(self, taken: bool | torch.Tensor = True) -> None:
        """Follow an optimiser step, for example with the teacher's average.

        Args:
            taken: True, or a bool scalar on the device, which is False if the optimiser skipped the step. Use the
                scalar as a factor: reading it would make the host wait for the device.
        """
        ...
