"""Memory: what a step is said to take, against what torch's own storages take."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.methods import DEFAULT, SUPERVISED, options
from lesionsam.config.load import Config, default_text, default_values, validate
from lesionsam.config.presets import apply_preset
from lesionsam.experiment.resources import answers_per_image, memory_of, parts_that_fit
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.methods.supervised import Supervised
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.memory import held_bytes, predict_step
from lesionsam.models.sam import Sam, build_sam
from lesionsam.models.teacher import Teacher
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.training.gradients import autocast, total_loss
from lesionsam.types import Batch

CPU = torch.device("cpu")
BELOW, ABOVE = 1.0, 1.35  # the prediction over what is measured: rather too much than too little
WIDE = CompactArchitecture(
    image_size=256, patch_size=16, width=192, depth=4, num_heads=3, prompt_width=256, decoder_mlp=512
)


class Storages(TorchDispatchMode):
    """Bytes of all storages alive, counted operation by operation: exact, whatever the allocator and others do."""

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0
        self.count(there)

    def count(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    weakref.finalize(storage, self.gone, key, size)
        self.peak = max(self.peak, self.now)

    def gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves(out))
        return out


def some_batch(count: int, side: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    big, small = torch.tensor([[0.2, 0.2, 0.8, 0.8]]) * side, torch.tensor([[0.4, 0.4, 0.6, 0.6]]) * side
    return Batch(
        ids=tuple(map(str, range(count))),
        index=torch.arange(count),
        images=torch.randint(0, 255, (count, 3, side, side), generator=draw, dtype=torch.uint8),
        sizes=torch.full((count, 2), side),
        big_boxes=big.repeat(count, 1),
        small_boxes=small.repeat(count, 1),
        valid=torch.ones(count, side, side, dtype=torch.bool),
        prior=torch.randn(count, side, side, generator=draw),
        masks=torch.rand(count, side, side, generator=draw).round(),
    )


def all_modules(method: Method) -> list[torch.nn.Module]:
    teacher = method.teacher
    return [method.model] if teacher is None else [method.model, teacher.module]


def measured(method: Method, batch: Batch, precision: str) -> int:
    """Peak of the second step, when AdamW has its moments."""
    modules = all_modules(method)
    own = [value for module in modules for value in [*module.parameters(), *module.buffers()]]
    optimizer = torch.optim.AdamW(trained_parameters(method.model), lr=1e-4)
    storages = Storages([*own, *(v for v in vars(batch).values() if isinstance(v, torch.Tensor))])
    with storages:
        for _ in range(2):
            optimizer.zero_grad()
            with autocast(CPU, precision):
                terms, _ = method.losses(batch, torch.Generator().manual_seed(0))
            total_loss(terms).backward()
            del terms
            optimizer.step()
            method.after_step()
    return storages.peak


def sam_of(architecture: CompactArchitecture, last_k: int) -> Sam:
    torch.manual_seed(0)
    sam = build_sam("compact", architecture=architecture)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=last_k, train_decoder=True)
    return sam


def method_of(name: str, sam: Sam) -> Method:
    if name == "supervised":
        return Supervised(sam, SUPERVISED)
    changes = {"target": "fused", "teacher_weight": 0.3, "contrast": 0.02} if name == "taught" else {"target": "prior"}
    return Contrastive(sam, None, options(DEFAULT, entropy_thresh=0.7, **changes))


@pytest.mark.parametrize(
    ("architecture", "last_k", "batch_size", "precision", "name"),
    [
        (CompactArchitecture(), 0, 4, "fp32", "taught"),
        (CompactArchitecture(), 2, 8, "bf16", "supervised"),
        (WIDE, 2, 2, "fp32", "prior"),
        (WIDE, 2, 2, "bf16", "taught"),
    ],
)
def test_prediction_agrees_with_torchs_storages(
    architecture: CompactArchitecture, last_k: int, batch_size: int, precision: str, name: str
) -> None:
    sam = sam_of(architecture, last_k)
    method = method_of(name, sam)
    step = predict_step(
        sam,
        held=held_bytes(all_modules(method)),
        batch_size=batch_size,
        answers=2,
        precision=precision,
        device="cpu",
        teacher=method.teacher is not None,
    )
    peak = measured(method, some_batch(batch_size, architecture.image_size), precision)
    assert BELOW <= step.total / peak <= ABOVE, f"{step} against {peak} bytes"


def test_what_is_held_counts_shared_storage_once() -> None:
    layer = torch.nn.Linear(10, 5, bias=False)  # 50 numbers of 4 bytes
    frozen = torch.nn.Linear(10, 5, bias=False).requires_grad_(False)
    assert held_bytes([layer]) == 200 * 4
    assert held_bytes([layer, layer]) == 200 * 4
    assert held_bytes([frozen, Teacher(frozen, 0.9).module]) == 200, "a frozen part is the student's own"
    assert held_bytes([layer, Teacher(layer, 0.9).module]) == 200 * 4 + 200


def config(batch_size: int) -> Config:
    values = default_values()
    values["train"]["batch_size"] = batch_size
    return validate(values)


def test_batches_are_made_in_parts_where_memory_is_short() -> None:
    sam = sam_of(CompactArchitecture(), 0)
    method, lines = method_of("prior", sam), []

    def parts(there: int) -> int:
        return parts_that_fit(config(16), sam, method, CPU, lines.append, there)

    def need(size: int) -> int:
        held = held_bytes(all_modules(method))
        return predict_step(
            sam, held=held, batch_size=size, answers=2, precision="fp32", device="cpu", teacher=False
        ).total

    assert [parts(need(16)), parts(need(16) - 1), parts(need(4)), parts(1000)] == [1, 2, 4, 16]
    assert lines[0] == f"memory: a step of 16 images takes about {need(16) / 1e9:.1f} of {need(16) / 1e9:.1f} GB"
    assert lines[2].endswith(
        "so they are computed in 4 parts, as with train.batch_size 4 and train.accumulate 4 times as large"
    )
    assert lines[3].endswith("it may not fit")
    method.smallest_batch = 2
    assert parts(1000) == 8, "a placebo keeps two images together"


def test_what_is_there_holds_at_least_this_process() -> None:
    assert memory_of(CPU) > 50e6


@pytest.mark.parametrize(("name", "gigabytes"), [("8gb", 8), ("12gb", 12), ("16gb", 16), ("24gb", 24), ("cpu", 8)])
@pytest.mark.parametrize("edition", ["isic2016", "isic2018"])
def test_presets_for_memory_fit_with_a_quarter_to_spare(name: str, gigabytes: int, edition: str) -> None:
    """ViT-B's shapes without its numbers; what a preset changes is how eight images are made, never how many."""
    text, before = apply_preset(f"{edition}-vit-b", default_text())
    _, after = apply_preset(f"vit-b-{name}", text)
    t = after.train
    assert t.batch_size * t.accumulate == before.train.batch_size * before.train.accumulate == 8
    assert after.model.model_copy(update={"image_size": 0}) == before.model
    with torch.device("meta"):
        sam = build_sam("vit_b", image_size=after.model.image_size)
    k = getattr(after.model, "unfreeze_last_k", 0)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=k, train_decoder=True)
    held = held_bytes([sam, Teacher(sam, 0.99).module])
    step = predict_step(
        sam,
        held=held,
        batch_size=t.batch_size,
        answers=answers_per_image(after),
        precision=t.precision,
        device="cpu" if name == "cpu" else "cuda",
        teacher=True,
    )
    assert 1.25 * step.total < gigabytes * 1e9
    assert step.held > 4 * 90e6, "ViT-B has 94 million parameters"
