"""Steps of the optimiser that are not taken where a loss or a gradient is not finite; no GPU stands still for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models.trainable import trained_parameters
from lesionsam.training.state import Progress

MAX_NONFINITE = 3  # losses or gradients that are not finite, without a step between, before the run stops


class Steps:
    """Takes steps, counts those that cannot be taken and names their images.

    An optimiser that is fused asks on its device whether the gradient is finite (as for `torch.amp.GradScaler`), so
    that the host need not wait for the backward pass; what it found is said when the next batch is under way.

    Args:
        at: counts losses and gradients that are not finite. say: told of each.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, at: Progress, say: Callable[[str], None]
    ) -> None:
        self.optimizer, self.scaler, self.at, self.say = optimizer, scaler, at, say
        self._untold: list[tuple[Callable[[], bool], int, tuple[str, ...]]] = []

    def take(self, norm: torch.Tensor, ids: Sequence[str]) -> bool:
        """A step, unless the gradient is not finite; whether it was taken, as far as the host knows.

        Args:
            norm: of the gradient. ids: of the images that it comes from.
        Raises:
            UserError: several could not be taken running.
        """
        if self.scaler.is_enabled():  # passes over such a step by itself, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.at.nonfinite = 0
            return True
        is_finite = torch.isfinite(norm)
        if self.optimizer.defaults["fused"]:
            setattr(self.optimizer, "found_inf", (~is_finite).float())  # noqa: B010 - no attribute that types know
            self.optimizer.step()
            self._untold.append((async_flag(is_finite), self.at.step, tuple(ids)))
            return True
        if not is_finite:
            self.skip("the gradient", ids, self.at.step)
            return False
        self.optimizer.step()
        self.at.nonfinite = 0
        return True

    def settle(self) -> None:
        """Hear of the steps whose gradient the device has looked at.

        Raises:
            UserError: several could not be taken running.
        """
        while self._untold:
            read, step, ids = self._untold.pop(0)
            if read():
                self.at.nonfinite = 0
            else:
                self.skip("the gradient", ids, step)

    def skip(self, what: str, ids: Sequence[str], step: int) -> None:
        """Count what is not finite and name its images.

        Raises:
            UserError: that makes several without a step between.
        """
        self.at.nonfinite += 1
        message = f"{what} is not finite at step {step}; images {', '.join(ids)}"
        if self.at.nonfinite >= MAX_NONFINITE:
            raise UserError(
                f"{message}; {self.at.nonfinite} times without a step between: lower train.lr_* or use "
                "train.precision fp32"
            )
        self.say(f"warning: {message}; this step is not taken")


def async_flag(flag: torch.Tensor) -> Callable[[], bool]:
    """Begin to bring a flag to the host. What is returned waits for it, but for nothing that is queued after it.

    So a GPU that a loop asks once a batch, when the backward pass is queued, has that pass to work on while the host
    learns of the forward pass and queues what follows: it never stands still for the answer.
    """
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copied, done = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> bool:
        done.synchronize()
        return bool(copied)

    return read


def nonfinite_terms(terms: Iterable[str], values: Mapping[str, torch.Tensor]) -> str:
    """The terms of a loss that are not finite, with their values."""
    found = {name: values[name].item() for name in terms}
    return ", ".join(f"{name}={value:g}" for name, value in found.items() if not math.isfinite(value))


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        apart: neither decayed nor clipped with the others. AdamW treats each parameter by itself, so that such a group
            is an optimiser of its own in all but name.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    apart: bool = False


def schedule_factor(step: int, num_steps: int, *, schedule: str, warmup: float, final: float) -> float:
    """Factor of the learning rate at a step: linear warm-up over a share of all steps, then cosine, linear or constant
    down to `final`."""
    warm = max(1, round(warmup * num_steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, num_steps - warm)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return final + (1 - final) * falling


def parameter_groups(model: nn.Module, learning_rates: Mapping[str, float], apart: Sequence[str] = ()) -> list[Group]:
    """Split the trained parameters by the first learning rate whose key is part of their name.

    Args:
        learning_rates: part of a parameter's name (`image_encoder`, `head.`) -> learning rate; `` matches the rest.
        apart: those of its keys whose groups have an optimiser of their own, see `Group`.
    """
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in learning_rates}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[next(key for key in learning_rates if key in name)].append(p)
    used = [Group(key, ps, learning_rates[key], key in apart) for key, ps in groups.items() if ps]
    if sum(len(g.parameters) for g in used) != len(trained_parameters(model)):
        raise ValueError("every trained parameter must belong to exactly one group")
    return used
