"""What the ways of training share: weighted terms, drawn prompts of mixed kinds, and the low-resolution grid."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import nn

from lesionsam.models.sam import Sam
from lesionsam.models.teacher import Teacher
from lesionsam.types import Batch


class Term(NamedTuple):
    """One term of the loss: its plain value (scalar tensor) and its weight in the total, which may be learnt too.

    A monitor counts in the printed total only: it has no gradient and is not missed where it should have one.
    """

    value: torch.Tensor
    weight: float | torch.Tensor
    monitor: bool = False


class Method(Protocol):
    """What differs between ways of training, and nothing else. A way inherits what it has no use for.

    Attributes:
        model: everything that trains. Its submodule `sam` is the segmenter.
        kept: the module that is evaluated and saved, `model` or its running average; parameters of the same names.
        teacher: the running average of `model`. reference: the foundation, frozen. head: the projection head.
        smallest_batch: images that it needs together.
    """

    model: nn.Module
    kept: nn.Module
    teacher: Teacher | None = None
    reference: Sam | None = None
    head: nn.Module | None = None
    smallest_batch: int = 1

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Term]:
        """Terms of one batch; those without gradient are monitors. The total is the sum of weight times value."""
        ...

    def after_step(self) -> None:
        """Whatever follows an optimiser step, such as the teacher's average."""
        ...

    def monitors(self) -> dict[str, torch.Tensor]:
        """Scalars of the last batch that are logged but no part of the loss."""
        ...

    def head_spread(self) -> dict[str, float] | None:
        """Spread of the last batch's projected pixels (see `models.projection.spread`), where there is a head."""
        return None
