"""Memory and time of a run: predict whether its steps fit into the memory, and report what a run took."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable
from functools import partial

import psutil
import torch

from lesionsam.config.load import Config
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import ENCODER_TERMS
from lesionsam.models.identity import processor
from lesionsam.models.memory import held_bytes, predict_step
from lesionsam.models.sam import Sam
from lesionsam.training.state import Progress

GB = 1e9


def parts_that_fit(
    config: Config, sam: Sam, method: Method, device: torch.device, say: Callable[[str], None], there: int | None = None
) -> int:
    """Return the number of parts that each batch is computed in; say what a step needs and what is available.

    Args:
        sam: the student, on the device. there: bytes of the device that this run may use; None = look it up.
    """
    teacher, reference = method.teacher, method.reference
    held = held_bytes([method.model, *([] if teacher is None else [teacher.module]), *filter(None, [reference])])
    predict = partial(
        predict_step,
        sam,
        held=held,
        answers=answers_per_image(config),
        device=device.type,
        precision=config.train.precision,
        teacher=teacher is not None,
    )
    there, size, parts = memory_of(device) if there is None else there, config.train.batch_size, 1
    needed = predict(batch_size=size).total
    while predict(batch_size=-(-size // parts)).total > there and size // (2 * parts) >= method.smallest_batch:
        parts *= 2
    left = predict(batch_size=-(-size // parts)).total
    line = f"memory: a step of {size} images takes about {needed / GB:.1f} of {there / GB:.1f} GB"
    if parts > 1:
        line += (
            f"; so they are computed in {parts} parts, as with train.batch_size {size // parts} and train.accumulate "
            f"{parts} times as large"
        )
    if left > there:
        line += f"; even {-(-size // parts)} would take {left / GB:.1f}: it may not fit"
    say(line)
    return parts


def answers_per_image(config: Config) -> int:
    """Return the decoder passes with gradient per image and step."""
    method = config.method
    if method.name == "contrastive":
        weights = method.weights.model_dump()
        return method.prompts_per_image if any(w > 0 for n, w in weights.items() if n not in ENCODER_TERMS) else 0
    return method.prompts_per_image * (1 + method.corrections)


def memory_of(device: torch.device) -> int:
    """Return the bytes that this process holds or may still allocate, of the GPU or of the main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


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
