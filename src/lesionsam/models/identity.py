"""What the output of an encoder's frozen part depends on beside the image: the identity of cached activations."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesionsam.models.sam import Sam
from lesionsam.utils.code import MODEL_LIBRARIES, NO_RESULT, code_digest, library_versions, source_digest


def frozen_identity(sam: Sam, num_blocks: int) -> str:
    """Return the SHA-256, 64 hex digits, of weights, structure and code of what `prefix.encode_frozen` runs.

    The weights themselves, not the file they came from: the same prefix in another checkpoint is the same prefix.
    """
    digest = hashlib.sha256(str(sam.frame).encode())
    if type(sam.encoder).__module__.startswith("transformers."):  # which keeps attention in modules of its own
        digest.update(library_versions(*MODEL_LIBRARIES).encode())
    for module in ("models.prefix", sam.__module__.removeprefix("lesionsam.")):
        digest.update(code_digest(module, without=NO_RESULT).encode())
    for path in sorted(filter(None, {inspect.getsourcefile(type(part)) for part in (sam.encoder, *sam.blocks)})):
        digest.update(source_digest(Path(path)).encode())
    tensors = {}
    for name, module in frozen_parts(sam, num_blocks):
        if isinstance(module, nn.Parameter):
            tensors[name] = module
            continue
        for inner, part in module.named_modules():
            digest.update(f"{name}.{inner} {type(part).__qualname__} {plain_settings(part)}".encode())
        tensors |= {f"{name}.{inner}": value for inner, value in [*module.named_parameters(), *module.named_buffers()]}
    for name, value in tensors.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_parts(sam: Sam, num_blocks: int) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield the modules of the encoder's leading part; `num_blocks` as `prefix.num_frozen_blocks` counts, from 0."""
    yield from sam.stem()
    for k, block in enumerate(sam.blocks[:num_blocks]):
        yield f"blocks.{k}", block
    if num_blocks > len(sam.blocks):
        yield from sam.neck()


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """The numbers and words that a module keeps beside its weights: heads, window, stride."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | tuple) and name != "training" and not name.startswith("_")
    }


def arithmetic(device: torch.device) -> str:
    """What decides the last bits of a result on this device: the processor, its kernels, torch and its threads."""
    if device.type == "cuda":
        switches = (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        )
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {switches}"
    else:
        where = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {where}, {torch.get_float32_matmul_precision()}"


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else f"{platform.machine()} {platform.processor()}"
