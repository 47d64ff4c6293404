"""Collective operations of the processes that train together; in a single process they change nothing.

Two groups of processes beside torch's default one, which DistributedDataParallel uses: a gloo group for values on the
CPU, such as stop signals, and one for tensors inside the forward and backward pass, so that their order is independent
of the gradients'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lesionsam.errors import UserError

Value = TypeVar("Value")
TIMEOUT = timedelta(hours=6)  # of a collective: decoding a large data set or an evaluation may lie between two
MOMENTUM = 0.1  # of running statistics, per step: torch's default
_groups: dict[str, Any] = {}


@contextmanager
def process_group(device: torch.device, *, join_seconds: float) -> Iterator[None]:
    """Join the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe while the block runs.

    Args:
        device: of this process's tensors. join_seconds: to wait for the other processes.
    Raises:
        UserError: they did not all come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=join_seconds)
        )
        _groups["cpu"] = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _groups["graph"] = dist.new_group(timeout=TIMEOUT)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the processes of this training did not find each other within {join_seconds:.0f} s ({reason}); start "
            "all of them with the same MASTER_ADDR and MASTER_PORT, a free port that every machine reaches"
        ) from None
    dist.set_timeout(TIMEOUT)  # after joining, long work may lie between two collectives
    yield
    _groups.clear()  # not after an error: a group that has lost a process may never end
    dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if "cpu" in _groups else 1


def rank() -> int:
    """Return the number of this process among those that train together, from 0."""
    return dist.get_rank() if "cpu" in _groups else 0


def is_main() -> bool:
    """Return whether this process writes, tracks and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier(group=_groups["cpu"])


def gather_objects(value: Value) -> list[Value]:
    """Return every process's value, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_groups["cpu"])
    return found


def max_of_ranks(*values: int) -> tuple[int, ...]:
    """Return the greatest of each value over the processes."""
    if world_size() == 1:
        return values
    found = torch.tensor(values)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_groups["cpu"])
    return tuple(found.tolist())


@torch.no_grad()
def rank_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over the processes, float32, without gradient."""
    if world_size() == 1:
        return values
    found = values.detach().float().clone()
    dist.all_reduce(found, group=_groups["graph"])
    return found / world_size()


@torch.no_grad()
def rank_any(flags: torch.Tensor) -> torch.Tensor:
    """Return where a flag is set in any process, bool."""
    if world_size() == 1:
        return flags
    found = flags.to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_groups["graph"])
    return found.bool()


class _Sum(torch.autograd.Function):
    """Sum over the processes; the gradient of the sum of all processes' losses flows back."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        found = values.contiguous().clone()
        dist.all_reduce(found, group=_groups["graph"])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradients[0])


def rank_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over the processes, differentiable."""
    return _Sum.apply(values) if world_size() > 1 else values  # pyright: ignore[reportReturnType]


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes in the order of their ranks, (B, ...) -> (world_size * B, ...), differentiable.

    All processes hold the same number of rows.
    """
    if world_size() == 1:
        return values
    whole = values.new_zeros(world_size(), *values.shape)
    whole[rank()] = values
    return rank_sum(whole).flatten(0, 1)


def gather_chosen(values: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of all processes, whose numbers may differ.

    Args:
        values: (N, C). chosen: (N,) bool.
    Returns:
        (world_size * greatest N, C), differentiable, and which of them are chosen; those filled up are not.
    """
    (longest,) = max_of_ranks(len(values))
    missing = longest - len(values)
    chosen = nn.functional.pad(chosen.float(), (0, missing))
    return gather_rows(nn.functional.pad(values, (0, 0, 0, missing))), gather_rows(chosen) > 0


class BatchNorm(nn.BatchNorm2d):
    """Normalise with the statistics of all processes' batches; torch's own layer for this needs a GPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """Normalise (B, C, H, W) per channel."""
        if world_size() == 1 or not self.training:
            return super().forward(input)
        x = input.float()
        count = x.numel() // x.shape[1] * world_size()
        mean = rank_sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = rank_sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, MOMENTUM)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), MOMENTUM)
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return (out * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)
