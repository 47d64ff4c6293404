"""Teacher: the exponential moving average of what trains."""

from __future__ import annotations

import copy

import torch
from torch import nn


def copy_trained(module: nn.Module) -> nn.Module:
    """A copy that shares storage with the original where it is frozen; its own where it trains."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, dict(shared))


class Teacher:
    """Exponential moving average of a module (arXiv:1703.01780) with its buffers (arXiv:2101.08482).

    Starts equal to the student, in eval mode, without gradient; frozen parameters are the student's own storage.

    Args:
        student: module whose trained parameters are followed.
        decay: d of t <- d t + (1 - d) s, per update. Half-life: ln 2 / -ln d updates.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.module, self.decay = copy_trained(student), decay
        own, theirs = dict(self.module.named_parameters()), dict(student.named_parameters())
        names = [name for name, p in theirs.items() if p.requires_grad]
        self._averages: list[torch.Tensor] = [own[n] for n in names]
        self._sources: list[torch.Tensor] = [theirs[n] for n in names]
        buffers = dict(self.module.named_buffers())
        self._buffers = [(buffers[n], b) for n, b in student.named_buffers()]
        for p in self._averages:
            p.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step, after the student's optimiser step."""
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._sources], 1 - self.decay)
        for average, source in self._buffers:
            if average.is_floating_point():
                average.lerp_(source, 1 - self.decay)
            else:
                average.copy_(source)
