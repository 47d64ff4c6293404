"""Gradients of a step: parts count as one large batch, whatever the gate and missing masks leave out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.methods import DEFAULT, options, supervised
from helpers.tiny import tiny_data, tiny_sam
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.trainable import select_trainable
from lesionsam.training.gradients import Part, StepValues, add_gradients, term_shares
from lesionsam.types import Batch

BOX_ONLY = {"box": 1.0}  # no random draw: the same prompt however the images are split


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Eight lesions, some with neighbours, three without a mask."""
    whole = tiny_data(8, with_others=True).batch(range(8))
    assert whole.masks is not None
    masks = whole.masks.clone()
    masks[[0, 1, 5]] = float("nan")
    return replace(whole, masks=masks)


def contrastive(**changes: Any) -> Contrastive:
    """Every term, nothing drawn: all cells are sampled, no negatives are shared."""
    sam, reference = tiny_sam(sharpness=20), tiny_sam(seed=1, sharpness=20)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=1, train_decoder=True)
    torch.manual_seed(0)
    weights = {"contrast": 1.0, "distil": 0.5, "pseudo": 1.0, "projection": 0.5}
    settings = {"prompts": BOX_ONLY, "prompts_per_image": 1, "teacher_prompt": "box", "in_batch": False}
    return Contrastive(sam, reference, options(DEFAULT, **weights | settings | changes))


def entropies(method: Contrastive, batch: Batch) -> torch.Tensor:
    _, f_t, _ = method.encode(batch)
    return method.target(batch, f_t, method.teacher_prompts(batch, torch.Generator()))[1]


def computed(method: Method, parts: list[Batch]) -> tuple[StepValues, dict[str, torch.Tensor]]:
    method.model.train()
    scaler = torch.amp.GradScaler(enabled=False)
    found = add_gradients(method, [Part(part, 0) for part in parts], precision="fp32", scaler=scaler)
    return found, {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}


def by_true_masks() -> Method:
    return supervised(prompts=BOX_ONLY, prompts_per_image=1, iou_loss="mse")


def by_target(kind: str, batch: Batch) -> Method:
    changes: dict[str, Any] = {"target": kind} | ({"teacher_weight": 0.3} if kind == "fused" else {})
    found = entropies(contrastive(**changes), batch).sort().values
    return contrastive(**changes, entropy_thresh=float(found[2:4].mean()))  # three of the eight are trusted


@pytest.mark.parametrize("kind", ["prior", "fused", "supervised"])
@pytest.mark.parametrize("sizes", [(1, 5, 2), (1,) * 8], ids=str)
def test_parts_of_any_size_are_the_large_batch(kind: str, sizes: tuple[int, ...], batch: Batch) -> None:
    def method() -> Method:
        return by_true_masks() if kind == "supervised" else by_target(kind, batch)

    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [batch[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    whole, expected = computed(method(), [batch])
    split, gradients = computed(method(), parts)
    if kind != "supervised":
        assert float(whole.means["trusted"]) == 3 / 8, "the gate leaves images out"
    assert gradients.keys() == expected.keys()
    joined, wanted = (torch.cat([grads[name].flatten() for name in expected]) for grads in (gradients, expected))
    assert float((joined - wanted).norm() / wanted.norm()) < 1e-5
    for name, value in (*whole.losses.items(), *whole.means.items()):
        found = (split.losses | split.means)[name]  # type: ignore[operator]
        assert float(found) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_a_part_in_which_nothing_counts_has_no_share(batch: Batch) -> None:
    shares = term_shares(by_true_masks(), [Part(batch[:2], 0), Part(batch[2:], 0)], "fp32")
    assert [float(share["dice"]) for share in shares] == [0.0, 1.0]
    assert [share[""] for share in shares] == [0.25, 0.75]
