"""Save and load training states, the best epoch's weights and the projection head."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.methods.base import Method
from lesionsam.utils.files import atomic_write, free_disk_bytes, write_bytes_atomic

NUM_STATES = 2  # training states kept: the newest and the one to fall back to
# Errors from reading a file that is cut, overwritten or of another kind.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError, zipfile.BadZipFile, zlib.error)


@dataclass
class Progress:
    """Where a run stands, beside its weights."""

    step: int = 0
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch finished
    best_score: float = -math.inf
    best_epoch: int = 0
    alive: list[str] = field(default_factory=list)
    nonfinite: int = 0
    parts: int = 1  # that each batch is computed in, to save memory
    seconds: float = 0.0  # spent in training, without evaluations
    sums: dict[str, float] = field(default_factory=dict)


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of a module's trained parameters and of all its buffers."""
    return {name for name, p in module.named_parameters() if p.requires_grad} | dict(module.named_buffers()).keys()


def state_of(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """Return the named parameters and buffers of a module, detached, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items() if name in names}


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters and all buffers of a module, detached, on the CPU."""
    return state_of(module, trained_names(module))


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Save atomically with `torch.save`; raise the OSError of a failing disk, which torch hides behind its own."""
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_tensors(path: Path) -> dict[str, Any]:
    """Load what `write_tensors` wrote, onto the CPU; raise one of `DAMAGE` if the file is damaged.

    `torch.load` does not compare the checksums that `torch.save` wrote, so a flipped bit would become a weight. Nor
    does it read a record that a flipped bit marks as a folder: its values would be whatever was in memory.
    """
    with zipfile.ZipFile(path) as archive:
        if folders := [info.filename for info in archive.infolist() if info.external_attr]:
            raise zipfile.BadZipFile(f"{folders[0]}: not a file")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged}: wrong checksum")
    return torch.load(path, weights_only=True, map_location="cpu")


def check_disk(folder: Path, method: Method) -> None:
    """Check before the first step that the states and weights of a run fit on the disk and can be written.

    They are: the states that are kept and the one being written (each trained value with its average and the
    optimiser's two), the best weights, and the two whole models that a run leaves; less what a resumed run has written.

    Raises:
        UserError: too little space. OSError: the folder is not writable.
    """
    state, names = method.model.state_dict(), trained_names(method.model)
    whole = sum(value.nbytes for value in state.values())
    trained = sum(value.nbytes for name, value in state.items() if name in names)
    needed = 2 * whole + trained * ((NUM_STATES + 1) * 4 + 1)
    with atomic_write(folder / "probe"):
        pass
    (folder / "probe").unlink()
    needed -= sum(path.stat().st_size for path in [*folder.glob("state-*.pt"), *folder.glob("best.pt")])
    if (free := free_disk_bytes(folder)) < needed:
        raise UserError(
            f"{folder}: {needed / 1e6:,.0f} MB needed for training states and weights, {free / 1e6:,.0f} MB free; free "
            "space on this disk, or train fewer parameters (model.unfreeze_last_k, model.encoder)"
        )


def save_best(folder: Path, method: Method) -> None:
    """Save what is evaluated (the student or its average) as folder/best.pt, atomically."""
    write_tensors(folder / "best.pt", state_of(method.kept, trained_names(method.model)))


def load_best(folder: Path, module: nn.Module) -> None:
    """Load the best epoch's parameters into the student.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        best = read_tensors(folder / "best.pt")
    except DAMAGE as error:
        raise UserError(
            f"{folder / 'best.pt'}: the best epoch's weights cannot be read ({type(error).__name__}); delete the "
            "folder to start anew"
        ) from None
    module.load_state_dict(best, strict=False)


def save_head(method: Method, path: Path) -> None:
    """Write the projection head, if the method has one, as safetensors, atomically."""
    if method.head is not None:
        state = {name: value.detach().cpu().contiguous() for name, value in method.head.state_dict().items()}
        write_bytes_atomic(path, safetensors.torch.save(state))


def save_state(
    folder: Path, at: Progress, method: Method, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Write everything that a resume needs as a new file; keep the one before as a fallback."""
    teacher = method.teacher
    averages = None if teacher is None else state_of(teacher.module, trained_names(method.model))
    state = {
        "progress": vars(at),
        "model": trained_state(method.model),
        "teacher": averages,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    write_tensors(folder / f"state-{at.step:09d}-{at.epoch:06d}.pt", state)
    for old in sorted(folder.glob("state-*.pt"))[:-NUM_STATES]:
        os.unlink(old)


def load_state(
    folder: Path, method: Method, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress | None:
    """Restore the newest readable state of a folder.

    Returns:
        Where the run stood, or None where the folder holds no state.
    Raises:
        UserError: states are there but none can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("state-*.pt"), reverse=True)
    for file in files:
        try:
            state = read_tensors(file)
        except DAMAGE as error:
            print(
                f"warning: {file} cannot be read ({type(error).__name__}); falling back to the state before it",
                flush=True,
            )
            continue
        method.model.load_state_dict(state["model"], strict=False)
        teacher = method.teacher
        if teacher is not None:
            teacher.module.load_state_dict(state["teacher"], strict=False)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # as this device has it; the state may come from another
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return Progress(**state["progress"])
    if files:
        raise UserError(
            f"{folder}: none of the {len(files)} training states can be read; delete the folder to start anew"
        )
    return None
