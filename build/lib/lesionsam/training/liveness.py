"""Check that every term that is switched on has a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.methods.base import Method, Term
from lesionsam.models.projection import COLLAPSED_COSINE
from lesionsam.training.state import Progress

LIVENESS_STEPS = range(9)  # steps whose terms are checked for gradient; in the first one distillation has none


def note_alive(terms: Mapping[str, Term], parameters: Sequence[nn.Parameter], alive: list[str]) -> None:
    """Add to `alive` the terms whose gradient is not zero in this batch."""
    for name, term in terms.items():
        if name not in alive and term.value.requires_grad and term.weight > 0:
            gradients = torch.autograd.grad(term.value, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and bool((g != 0).any()) for g in gradients):
                alive.append(name)


def check_alive(terms: Mapping[str, Term], method: Method, at: Progress, say: Callable[[str], None]) -> None:
    """Stop when a term that is switched on never had a gradient; a gate that trusts nobody is named as the reason.

    A run of one step is only warned about: distillation starts at zero, with gradient zero.
    """
    for name, term in terms.items():
        if not term.monitor and name not in at.alive:
            trusted = method.monitors().get("trusted")
            if trusted is not None and float(trusted) == 0:
                say(
                    f"warning: the term `{name}` has had no gradient so far: the gate trusted no image "
                    f"(mean entropy {float(method.monitors()['entropy']):.3f}; raise method.gate.entropy_thresh)"
                )
            elif at.step < 2:
                say(f"warning: the term `{name}` had no gradient in the one step of this run")
            else:
                weight = torch.as_tensor(term.weight).item()
                raise UserError(
                    f"the term `{name}` is switched on (weight {weight:g}) but its gradient was zero in each of the "
                    f"first {min(at.step, len(LIVENESS_STEPS))} steps; set its weight to 0 or change what it depends on"
                )
    measured = method.head_spread() if "contrast" in terms else None
    if measured is not None and measured["mean_cosine"] > COLLAPSED_COSINE:
        say(
            f"warning: the projection head has collapsed (mean cosine {measured['mean_cosine']:.3f}, channel std "
            f"{measured['channel_std']:.4f}): the contrastive term teaches nothing; lower its learning rate or "
            "temperature"
        )
