"""Memory and time of a run: make a lack of memory on a CPU an error, and report what a run took."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from lesionsam.models.identity import processor
from lesionsam.training.state import Progress

GB = 1e9


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Limit the memory of this process to what the machine has left, while the block runs on a CPU under Linux.

    Linux grants more memory than there is and kills the process that uses it. An allocation beyond the limit fails
    instead, and `training.oom` can go on with smaller parts.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu" and sys.platform == "linux":
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        limits = [psutil.Process().memory_info().data + free, *before]
        resource.setrlimit(resource.RLIMIT_DATA, (min(n for n in limits if n != resource.RLIM_INFINITY), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def cost(progress: Progress, device: torch.device) -> dict[str, float | int | str]:
    """Return what a training took: seconds and steps over all resumes, peak memory (GB) of the last process, device.

    The seconds are those of the steps and of loading their batches, without evaluations and decoding.
    """
    is_gpu = device.type == "cuda"
    return {
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "peak_memory_gb": round(peak_memory(device), 3),
        "memory_of": "GPU" if is_gpu else "process",
        "device": torch.cuda.get_device_name(device) if is_gpu else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
