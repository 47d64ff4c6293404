"""Teacher: exponential moving average of the trained parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn


def copy_trained(module: nn.Module) -> nn.Module:
    """Return a copy that shares the storage of frozen parameters and owns the trained ones."""
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
    def update(self, taken: bool | torch.Tensor = True) -> None:
        """Average once, after the student's optimiser step.

        Args:
            taken: whether the step was taken; if not, nothing changes. May be a bool scalar on the device.
        """
        sources, weight = [p.detach() for p in self._sources], 1 - self.decay
        if taken is True:
            torch._foreach_lerp_(self._averages, sources, weight)
        else:  # t + taken (1 - d) (s - t), without reading `taken`
            change = torch._foreach_sub(sources, self._averages)
            torch._foreach_mul_(change, taken * torch.tensor(weight, device=sources[0].device))
            torch._foreach_add_(self._averages, change)
        for average, source in self._buffers:
            new = torch.lerp(average, source, weight) if average.is_floating_point() else source
            average.copy_(new if taken is True else torch.where(torch.as_tensor(taken), new, average))
