"""Run the loop on a small method, stop it in the middle, compare weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.methods import DEFAULT, options
from helpers.tiny import tiny_sam
from lesionsam.data.augment import Augmentation
from lesionsam.data.dataset import LesionDataset
from lesionsam.methods.base import Method, Term
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.trainable import select_trainable
from lesionsam.training.loop import Settings, fit
from lesionsam.training.optimizer import parameter_groups
from lesionsam.training.state import Progress

CPU = torch.device("cpu")
SETTINGS = Settings(
    epochs=3,
    batch_size=4,
    accumulate=1,
    clip=1.0,
    precision="fp32",
    seed=0,
    patience=0,
    schedule=lambda step: 1.0,
    augmentation=Augmentation(flips=True),
    weight_decay=0.01,
    betas=(0.9, 0.999),
)


def contrastive(**changes: Any) -> Contrastive:
    """A small method that trains the last block, the decoder and a head with batch norm, for its buffers."""
    sam, reference = tiny_sam(sharpness=20), tiny_sam(sharpness=20)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=1, train_decoder=True)
    torch.manual_seed(0)
    extra = {"contrast": 0.5, "distil": 0.1, "target": "fused", "teacher_weight": 0.3, "ramp_steps": 5}
    changes = extra | {"head_norm": "batch"} | changes
    return Contrastive(sam, reference, options(DEFAULT, entropy_thresh=0.6931, **changes))


def run(method: Method, data: LesionDataset, folder: Path, **changes: Any) -> Progress:
    """Train; changes are settings of the run (see `Settings`) or arguments of `fit`."""
    own = {name: changes.pop(name) for name in list(changes) if name in SETTINGS.__dataclass_fields__}
    arguments: dict[str, Any] = {
        "groups": parameter_groups(method.model, {"all": ("", 1e-3)}),
        "log": lambda values, step: None,
        "evaluate": lambda epoch: {"objective": [0.1, 0.3, 0.2, 0.2, 0.1][epoch - 1]},
        "folder": folder,
        "say": lambda line: None,
    }
    return fit(method, data, settings=replace(SETTINGS, **own), **arguments | changes)


def weights(method: Method) -> dict[str, torch.Tensor]:
    """Student and teacher, parameters and buffers."""
    teacher = method.teacher
    averages = {} if teacher is None else {f"teacher.{n}": v.clone() for n, v in teacher.module.state_dict().items()}
    return {n: v.clone() for n, v in method.model.state_dict().items()} | averages


def differing(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


class Stop(RuntimeError):
    pass


def stop_at(condition: Callable[[Mapping[str, float], int], bool]) -> Callable[[Mapping[str, float], int], None]:
    def log(values: Mapping[str, float], step: int) -> None:
        if condition(values, step):
            raise Stop

    return log


class Mean(Method):
    """A method whose loss is a mean over images, without anything drawn."""

    def __init__(self, poison: Callable[[int], float] = lambda call: 0.0, dead: bool = False) -> None:
        torch.manual_seed(0)
        self.model: torch.nn.Module = torch.nn.Linear(3, 1)
        self.kept = self.model
        self.calls, self.poison, self.dead = 0, poison, dead
        self.after, self.numbers = 0, []

    def losses(self, batch: Any, generator: torch.Generator) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        self.calls += 1
        self.numbers.append(torch.rand(1, generator=generator).item())
        means = batch.images.float().mean((2, 3)) / 255
        value = ((self.model(means)[:, 0] - batch.sizes[:, 0] / 32) ** 2).mean()
        terms = {"mask": Term(value + self.poison(self.calls), 1.0)}
        return terms | ({"pseudo": Term(value * 0, 0.5)} if self.dead else {}), {}

    def after_step(self, taken: bool | torch.Tensor = True) -> None:
        self.after += int(taken)
