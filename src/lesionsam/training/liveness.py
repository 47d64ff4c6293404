"""Check in a run's first steps that every term of the loss has a gradient and that the head has not collapsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.methods.base import Method, Term
from lesionsam.models.projection import COLLAPSED_COSINE, spread
from lesionsam.parallel.collectives import gather_objects
from lesionsam.training.state import Progress

LIVENESS_STEPS = range(9)  # steps that are watched; in the first, distillation is at its minimum, without gradient
REMEDIES = {  # term -> what to do where its gradient is zero
    "contrast": "lesions smaller than a cell of the feature grid give it no pixels: crop the images around them, or "
    "raise model.image_size"
}


class Liveness:
    """Watch the first steps of a run.

    Args:
        parameters: all that train. at: `alive` holds the terms that have had a gradient. say: receives warnings.
    """

    def __init__(
        self, method: Method, parameters: Sequence[nn.Parameter], at: Progress, say: Callable[[str], None]
    ) -> None:
        self.method, self.parameters, self.at, self.say = method, parameters, at, say
        self.projected: torch.Tensor | None = None
        self._hook: Any = None
        if method.head is not None and at.step in LIVENESS_STEPS:
            self._hook = method.head.register_forward_hook(self._keep_projected)

    def _keep_projected(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:  # the student's; a head that is shared projects the teacher's pixels too
            self.projected = output.detach()

    def note(self, terms: Mapping[str, Term]) -> None:
        """Note the terms whose gradient is not zero; call it between the forward and the backward pass.

        Raises:
            UserError: a term does not depend on anything that trains.
        """
        if self.at.step not in LIVENESS_STEPS:
            return
        for name, term in terms.items():
            if not term.value.requires_grad:
                raise UserError(
                    f"the term `{name}` is switched on (weight {weight_of(term):g}) but depends on nothing that "
                    "trains; set its weight to 0 or train what it depends on"
                )
            if name not in self.at.alive:
                gradients = torch.autograd.grad(term.value, self.parameters, retain_graph=True, allow_unused=True)
                if any(gather_objects(any(g is not None and bool((g != 0).any()) for g in gradients))):
                    self.at.alive.append(name)

    def check(self, terms: Mapping[str, Term], monitors: Mapping[str, torch.Tensor], *, over: bool = False) -> None:
        """Stop the run if a term has had no gradient in the watched steps.

        It only warns if the gate trusted no image, and after a single step: distillation starts without gradient.

        Args:
            terms: of the last step. monitors: their means over it.
            over: the run ends, which may be before the last watched step.
        Raises:
            UserError: a term has had no gradient.
        """
        if self.at.step != LIVENESS_STEPS.stop and not (over and self.at.step < LIVENESS_STEPS.stop):
            return
        for name in (name for name in terms if name not in self.at.alive):
            if "trusted" in monitors and float(monitors["trusted"]) == 0:
                self.say(
                    f"warning: the term `{name}` has had no gradient so far: the gate trusted no image "
                    f"(mean entropy {float(monitors['entropy']):.3f}; raise method.gate.entropy_thresh)"
                )
            elif self.at.step < 2:
                self.say(f"warning: the term `{name}` had no gradient in the one step of this run")
            else:
                raise UserError(
                    f"the term `{name}` is switched on (weight {weight_of(terms[name]):g}) but its gradient was zero "
                    f"in each of the first {min(self.at.step, len(LIVENESS_STEPS))} steps; "
                    f"{REMEDIES.get(name, 'change what it depends on')}, or set its weight to 0"
                )
        if self.projected is not None:
            found = spread(self.projected)
            if found["mean_cosine"] > COLLAPSED_COSINE:
                self.say(
                    f"warning: the projection head has collapsed (mean cosine {found['mean_cosine']:.3f}, channel std "
                    f"{found['channel_std']:.4f}): the contrastive term teaches nothing; lower its learning rate or "
                    "temperature"
                )
        self.projected = None
        if self._hook is not None:
            self._hook.remove()


def weight_of(term: Term) -> float:
    """Return the weight of a term as a number."""
    return float(torch.as_tensor(term.weight))
