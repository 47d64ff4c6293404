"""Forward and backward pass of one step, over one batch or several that count as one large batch.

The batches of a step may be accumulated one after another, and each may be split over processes; both count as one
large batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lesionsam.methods.base import Method, Term
from lesionsam.parallel.collectives import rank, rank_mean, world_size
from lesionsam.parallel.draws import Draws, SharedDraws
from lesionsam.types import Batch

Shares = Mapping[str, float | torch.Tensor]
RANK_STRIDE = 2**40  # between the seeds of two processes' dropout


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one, with the seed of its random draws."""

    batch: Batch
    seed: int


@dataclass(frozen=True)
class StepValues:
    """Loss and monitors of a step.

    Attributes:
        terms, monitors: of the last part.
        losses: `loss`, the sum of the weighted terms, and the unweighted terms, over all parts, detached.
        means: the monitors over all parts. ids: of all images.
    """

    terms: Mapping[str, Term]
    monitors: Mapping[str, torch.Tensor]
    losses: Mapping[str, torch.Tensor]
    means: Mapping[str, torch.Tensor]
    ids: Sequence[str]


def draw_seed(seed: int, number: int, part: int = 0) -> int:
    """Return the seed of all draws of a part of a batch: a function of its arguments, so a resume needs no state."""
    return (seed * 1_000_003 + number + part * 1_000_000_007) % (2**63)


def step_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of a batch's draws; `number` counts batches from the beginning of the run."""
    return torch.Generator().manual_seed(draw_seed(seed, number))


def draws_of(part: Part) -> Draws:
    """Return the draws of a part of a batch, of which every process holds an equal share."""
    generator, count = torch.Generator().manual_seed(part.seed), len(part.batch.ids)
    if world_size() == 1:
        return generator
    return SharedDraws(generator, torch.arange(count) + rank() * count, world_size() * count)


class Forward(nn.Module):
    """The whole forward pass of a step as one module, as DistributedDataParallel needs it."""

    def __init__(self, method: Method, precision: str) -> None:
        super().__init__()
        self.model, self.method, self.precision = method.model, method, precision

    def forward(self, part: Part) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        """Return the terms and monitors of a part."""
        with autocast(part.batch.images.device, self.precision):
            return self.method.losses(part.batch, draws_of(part))


def forward_module(method: Method, precision: str) -> nn.Module:
    """Return the forward pass of a method; its gradients are averaged over the processes where there are several.

    Frozen parameters and buffers are not synchronised: every process has loaded the same ones.
    """
    forward = Forward(method, precision)
    if world_size() == 1:
        return forward
    # A prompt kind may be drawn in one process only, so that parameters differ in whether they are used.
    return DistributedDataParallel(forward, forward_sync_buffers=False, init_sync=False, find_unused_parameters=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed precision of a run; fp32 does nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def total_loss(terms: Mapping[str, Term], shares: Shares | None = None) -> torch.Tensor:
    """Return the sum of weight times value over the terms, each scaled by its share in the step."""
    weighted = {name: term.weight * term.value.float() for name, term in terms.items()}
    return torch.stack(
        [value if shares is None else share_of(name, shares) * value for name, value in weighted.items()]
    ).sum()


def add_gradients(
    method: Method,
    parts: Sequence[Part],
    *,
    precision: str,
    scaler: torch.amp.GradScaler,
    after_forward: Callable[[Mapping[str, Term]], None] = lambda terms: None,
    forward: nn.Module | None = None,
) -> StepValues:
    """Add the gradients of the parts, which are those of all their images as one batch.

    Exact but for what couples the images of a batch: shared negatives, batch norm, placebos, stratified draws.

    Args:
        after_forward: receives the terms of each part before the backward pass.
        forward: what `forward_module` returned for the run; None outside a run.
    """
    forward = forward or Forward(method, precision)
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in method.model.modules())
    device = parts[0].batch.images.device
    losses: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    means: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    shares_of_parts = [None] if len(parts) == 1 else term_shares(method, parts, precision)
    for part, shares in zip(parts, shares_of_parts, strict=True):
        if drops:  # dropout draws from torch's global generator; this makes it a function of the part, for resumes
            torch.manual_seed(part.seed + rank() * RANK_STRIDE)
        with gradients_stay(forward) if part is not parts[-1] else nullcontext():
            terms, monitors = forward(part)
            after_forward(terms)
            loss = total_loss(terms, shares)
            scaler.scale(loss).backward()
        values = {name: term.value.detach() for name, term in terms.items()}
        losses["loss"] = losses["loss"] + loss.detach()
        for sums, found in ((losses, values), (means, monitors)):
            for name, value in found.items():
                sums[name] = value if shares is None else sums[name] + share_of(name, shares) * value
    if world_size() > 1:
        losses, means = averaged(losses, means)
    return StepValues(terms, monitors, losses, means, [key for part in parts for key in part.batch.ids])


def gradients_stay(forward: nn.Module) -> AbstractContextManager[object]:
    """Return the context in which gradients are added up within each process only."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def averaged(*groups: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return named scalars averaged over the processes, in one transfer."""
    means = iter(rank_mean(torch.stack([value.float() for values in groups for value in values.values()])))
    return [{name: next(means) for name in values} for values in groups]


@torch.no_grad()
def term_shares(method: Method, parts: Sequence[Part], precision: str) -> list[Shares]:
    """Return each part's share of every term and monitor, and of the images under the name "".

    Means over images that a gate or missing masks leave out are thus means over those of the whole step.
    """
    counts = []
    for part in parts:
        with autocast(part.batch.images.device, precision):
            found = method.counts(part.batch, draws_of(part))
        counts.append({name: rank_mean(torch.as_tensor(count)) for name, count in found.items()})
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    num_images = sum(len(part.batch.ids) for part in parts)
    shares = []
    for part, count in zip(parts, counts, strict=True):
        own = {name: count[name] / torch.as_tensor(totals[name]).clamp(min=1e-6) for name in count}
        shares.append(own | {"": len(part.batch.ids) / num_images})
    return shares


def share_of(name: str, shares: Shares) -> float | torch.Tensor:
    """Return the share of a term or monitor; without a count it is the share of the images."""
    return shares.get(name, shares[""])
