"""The optimiser: groups of parameters, the learning-rate schedule, steps that are skipped if not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models.trainable import trained_parameters
from lesionsam.parallel.collectives import gather_objects
from lesionsam.training.state import Progress

MAX_NONFINITE = 3  # steps that may be skipped in a row
FP16_HALVINGS = 16  # GradScaler begins at 2^16 and halves its scale at each skipped step: so many more may be needed


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        name: under which the learning rate is logged, `lr/NAME`.
        separate: neither decayed nor clipped with the others. AdamW updates each parameter independently, so that such
            a group has in effect its own optimiser.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    separate: bool = False


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, tuple[str | Sequence[str], float]], separate: Sequence[str] = ()
) -> list[Group]:
    """Split the trained parameters into groups.

    Args:
        learning_rates: name of a group -> (part of its parameters' names, or several, learning rate). The first match
            counts; an empty part matches all the rest.
        separate: names of groups that are decayed and clipped separately, see `Group`.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in learning_rates}
    parts = {name: [part] if isinstance(part, str) else part for name, (part, _) in learning_rates.items()}
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            groups[next(name for name, part in parts.items() if any(one in parameter_name for one in part))].append(p)
    used = [Group(name, ps, learning_rates[name][1], name in separate) for name, ps in groups.items() if ps]
    if sum(len(g.parameters) for g in used) != len(trained_parameters(model)):
        raise ValueError("every trained parameter must belong to exactly one group")
    return used


@dataclass(frozen=True)
class Schedule:
    """Factor of every learning rate at a step: linear warm-up, then a decay to `final`.

    The step is the number of steps since the beginning of the run, skipped ones included: the decay ends with the last
    epoch however many were skipped.

    Attributes:
        num_steps: of the whole run. shape: cosine, linear or constant. warmup: share of all steps.
        final: factor at the end.
    """

    num_steps: int
    shape: str
    warmup: float
    final: float

    def __call__(self, step: int) -> float:
        warm = max(1, round(self.warmup * self.num_steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.num_steps - warm)
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.shape]
        return self.final + (1 - self.final) * falling


def build_optimizer(
    groups: Sequence[Group], *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return AdamW over the groups; fused on a GPU, where it can skip a step without the host."""
    return torch.optim.AdamW(
        [
            {"params": list(g.parameters), "lr": g.learning_rate, "base": g.learning_rate, "name": g.name}
            | ({"weight_decay": 0.0} if g.separate else {})
            for g in groups
        ],
        weight_decay=weight_decay,
        betas=betas,
        fused=groups[0].parameters[0].device.type == "cuda",
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's learning rate and return them as logged: `lr/NAME`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
    return {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}


def clip_gradients(groups: Sequence[Group], limit: float) -> torch.Tensor:
    """Clip the gradient's norm over all groups but the separate ones.

    Returns:
        The norm before, a scalar; not finite if any gradient, clipped or not, is not.
    """
    norm = nn.utils.clip_grad_norm_([p for g in groups if not g.separate for p in g.parameters], limit)
    separate = [p.grad for g in groups if g.separate for p in g.parameters if p.grad is not None]
    return norm + 0 * nn.utils.get_total_norm(separate) if separate else norm


class Steps:
    """Take optimiser steps, skip those whose loss or gradient is not finite, report the skipped ones.

    A fused optimiser decides on the device, so that the host need not wait for the backward pass; the result is read
    when the next step is under way.

    Args:
        at: `nonfinite` counts the steps skipped in a row. say: receives a line for each skipped step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, at: Progress, say: Callable[[str], None]
    ) -> None:
        self.optimizer, self.scaler, self.at, self.say = optimizer, scaler, at, say
        self.max_nonfinite = MAX_NONFINITE + (FP16_HALVINGS if scaler.is_enabled() else 0)
        self._unread: list[tuple[Callable[[], bool], int, Mapping[str, torch.Tensor], Sequence[str]]] = []

    def take(self, norm: torch.Tensor, losses: Mapping[str, torch.Tensor], ids: Sequence[str]) -> bool | torch.Tensor:
        """Take a step unless its loss or gradient is not finite.

        Args:
            norm: of the unscaled gradient. losses: `loss` and its terms. ids: of the images, for messages.
        Returns:
            Whether the step was taken; a scalar on the device if the host does not know yet.
        Raises:
            UserError: too many steps in a row were skipped.
        """
        finite = torch.isfinite(torch.stack([norm.float(), *(value.float() for value in losses.values())])).all()
        self.settle()
        if self.optimizer.defaults["fused"]:
            # AdamW skips the step where this is 1, as it does for GradScaler; the attribute is not declared.
            setattr(self.optimizer, "found_inf", (~finite).float())  # noqa: B010
            self.optimizer.step()
            self._unread.append((async_flag(finite), self.at.step, losses, ids))
            taken: bool | torch.Tensor = finite
        else:
            taken = bool(finite)
            if taken:
                self.optimizer.step()
            self._record(taken, self.at.step, losses, ids)
        if self.scaler.is_enabled():
            self.scaler.update()
        return taken

    def settle(self) -> None:
        """Read the results that are waiting on the device.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        while self._unread:
            read, step, losses, ids = self._unread.pop(0)
            self._record(read(), step, losses, ids)

    def _record(self, taken: bool, step: int, losses: Mapping[str, torch.Tensor], ids: Sequence[str]) -> None:
        if taken:
            self.at.nonfinite = 0
            return
        self.at.nonfinite += 1
        found = {name: value.item() for name, value in losses.items()}
        named = ", ".join(f"{n}={v:g}" for n, v in found.items() if n != "loss" and not math.isfinite(v))
        ids = [key for part in gather_objects(list(ids)) for key in part]
        what = f"the loss ({named})" if named else "the gradient" if math.isfinite(found["loss"]) else "the loss"
        message = f"{what} is not finite at step {step}; images {', '.join(ids)}"
        if self.at.nonfinite >= self.max_nonfinite:
            raise UserError(
                f"{message}; {self.at.nonfinite} times without a step between: lower train.lr_* or use "
                "train.precision fp32"
            )
        self.say(f"warning: {message}; this step is not taken")


def async_flag(flag: torch.Tensor) -> Callable[[], bool]:
    """Copy a device flag to the host without blocking; call the result to read it.

    Reading waits for the copy, not for work that was queued after it.
    """
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copied, done = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> bool:
        done.synchronize()
        return bool(copied)

    return read
