"""Choose the device that torch runs on."""

from __future__ import annotations

import torch

from lesionsam.errors import UserError


def torch_device(name: str) -> torch.device:
    """runtime.device -> a device that is there.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"runtime.device: {name!r} asked for, but torch {torch.__version__} finds no GPU; use auto or cpu"
        )
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
