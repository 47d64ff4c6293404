"""Choose the device that torch runs on."""

from __future__ import annotations

from pathlib import Path

import torch

from lesionsam.errors import UserError


def torch_device(name: str) -> torch.device:
    """Return the device with this name: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Raises:
        UserError: another name, or a GPU where torch finds none.
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


def slow_precision(precision: str, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return why training in this precision is slow on this device, empty where it is not or cannot be told.

    A CPU without bf16 instructions emulates them: bf16 autocast is then several times slower than fp32.

    Args:
        precision: fp32, bf16 or fp16. cpuinfo: the kernel's list of the CPU's instructions.
    """
    if precision != "bf16" or device.type != "cpu" or not cpuinfo.is_file():
        return ""
    flags = set(cpuinfo.read_text(encoding="utf-8").split())
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return ""
    return "this CPU has no bf16 instructions: train.precision bf16 is several times slower than fp32; set it to fp32"
