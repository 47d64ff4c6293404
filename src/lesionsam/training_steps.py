"""Steps of the optimiser that are not taken where a loss or a gradient is not finite; no GPU stands still for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from lesionsam.errors import UserError
from lesionsam.training_state import Progress

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
            self._untold.append((told_later(is_finite), self.at.step, tuple(ids)))
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


def told_later(flag: torch.Tensor) -> Callable[[], bool]:
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


def bad_terms(terms: Iterable[str], values: Mapping[str, torch.Tensor]) -> str:
    """The terms of a loss that are not finite, with their values."""
    found = {name: values[name].item() for name in terms}
    return ", ".join(f"{name}={value:g}" for name, value in found.items() if not math.isfinite(value))
