"""The supervised method: its losses from their formulas, which candidate learns, learnt weights, averages, clicks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from helpers.methods import SUPERVISED, generator, some_batch, supervised
from helpers.tiny import SIDE, tiny_data, tiny_sam
from helpers.training import run
from lesionsam import losses
from lesionsam.losses import MASK_LOSSES, hard_iou
from lesionsam.methods.base import Term
from lesionsam.methods.grid import known_masks, to_grid
from lesionsam.methods.supervised import LOG_WEIGHTS, MaskDraws, Supervised
from lesionsam.models.decoder import decode_groups
from lesionsam.models.sam import encode
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.training.gradients import total_loss
from lesionsam.training.optimizer import parameter_groups
from lesionsam.training.state import load_best
from lesionsam.types import Prompts

DRAWS = MaskDraws(box_jitter=0.1, max_points=3, point_jitter=2.0, negative=0.3)
FROM_MASKS = {"from_masks": DRAWS, "prompts": {"box": 0.4, "points": 0.4, "box+points": 0.2}}


def values(terms: dict[str, Term]) -> dict[str, float]:
    return {name: term.value.item() for name, term in terms.items()}


def gradient_of(method: Supervised, value: torch.Tensor) -> dict[str, float]:
    """Name -> largest gradient of every trained parameter."""
    names = [name for name, p in method.model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, trained_parameters(method.model), allow_unused=True, retain_graph=True)
    return {name: 0.0 if g is None else float(g.abs().max()) for name, g in zip(names, found, strict=True)}


def test_focal_is_torchvisions_for_masks_of_0_and_1_and_linear_between() -> None:
    y = 3 * torch.randn(4, 6, 6, generator=generator())
    m = (torch.rand(4, 6, 6, generator=generator(1)) > 0.5).float()
    w = torch.ones_like(m)
    oracle = sigmoid_focal_loss(y, m, alpha=losses.FOCAL_ALPHA, gamma=losses.FOCAL_GAMMA, reduction="none")
    assert torch.allclose(losses.focal(y, m, w), oracle.mean((1, 2)), atol=1e-6)
    half = 0.5 * losses.focal(y, torch.zeros_like(m), w) + 0.5 * losses.focal(y, torch.ones_like(m), w)
    assert torch.allclose(losses.focal(y, torch.full_like(m, 0.5), w), half, atol=1e-6)
    assert torch.isfinite(losses.focal(torch.full_like(y, 1e4), 1 - m, w)).all()


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_every_loss_is_its_terms_by_the_formulas_and_each_lives(loss: str, tmp_path: Path) -> None:
    method, batch = supervised(loss=loss), some_batch()
    terms, monitors = method.losses(batch, generator())
    y, _, rows = method.decode(batch, generator())
    m, _ = known_masks(batch, y.shape[-1])
    y, m, w = y[:, 0].double(), m[rows].double(), to_grid(batch.valid, y.shape[-1])[rows].double()
    p = torch.sigmoid(y)
    ce = -(m * p.log() + (1 - m) * (1 - p).log())
    a, g = losses.FOCAL_ALPHA, losses.FOCAL_GAMMA
    focal = -(a * m * (1 - p) ** g * p.log() + (1 - a) * (1 - m) * p**g * (1 - p).log())
    inner = (w * p * m).sum((1, 2))
    formulas = {
        "bce": ((w * ce).sum((1, 2)) / w.sum((1, 2))).mean(),
        "focal": ((w * focal).sum((1, 2)) / w.sum((1, 2))).mean(),
        "dice": (1 - (2 * inner + 1) / ((w * p).sum((1, 2)) + (w * m).sum((1, 2)) + 1)).mean(),
    }
    weights = {
        "dice_bce": {"bce": 2, "dice": 1},
        "dice": {"dice": 1},
        "bce": {"bce": 1},
        "focal": {"focal": 1},
        "focal_dice": {"focal": 20, "dice": 1},
    }[loss]
    assert {name: term.weight for name, term in terms.items()} == weights
    for name in weights:
        assert terms[name].value.item() == pytest.approx(formulas[name].item(), rel=1e-5)
        assert max(gradient_of(method, terms[name].value).values()) > 0
    assert not monitors["iou"].requires_grad


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_the_iou_head_is_told_the_true_iou_of_each_token(kind: str) -> None:
    method, batch = supervised(iou_loss=kind, candidates="three"), some_batch()
    terms, _ = method.losses(batch, generator())
    y, predicted, rows = method.decode(batch, generator())
    assert y.shape[1] == predicted.shape[1] == 4
    m, w = known_masks(batch, SIDE)[0][rows], to_grid(batch.valid, SIDE)[rows]
    true = torch.stack([hard_iou(y[:, k], m, w) for k in range(4)], 1)
    oracle = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind](predicted, true)
    assert terms["iou"].value.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert terms["iou"].weight == 0.5
    gradients = gradient_of(method, terms["iou"].value)
    assert max(v for name, v in gradients.items() if "iou_prediction_head" in name) > 0
    assert not any(v for name, v in gradients.items() if "output_hypernetworks_mlps" in name), "truth is no target"


def test_of_three_candidates_the_best_alone_learns_beside_the_single_mask() -> None:
    batch = some_batch(1)
    method = supervised(candidates="three", loss="dice", prompts={"box": 1.0}, prompts_per_image=1)
    y, _, rows = method.decode(batch, generator())
    m, w = known_masks(batch, SIDE)[0][rows], to_grid(batch.valid, SIDE)[rows]
    by_token = [losses.dice(y[:, k], m, w).item() for k in range(4)]
    best = min((1, 2, 3), key=lambda k: by_token[k])
    term = method.losses(batch, generator())[0]["dice"].value
    assert term.item() == pytest.approx(by_token[0] + by_token[best], rel=1e-5)
    learning = {
        int(name.split("mlps.")[1].split(".")[0])
        for name, v in gradient_of(method, term).items()
        if "output_hypernetworks_mlps" in name and v > 0
    }
    assert learning == {0, best}


def test_one_mask_is_the_single_one_and_its_iou_alone() -> None:
    gradients = gradient_of(method := supervised(), method.losses(some_batch(), generator())[0]["bce"].value)
    assert not any(v for name, v in gradients.items() if "mlps.0." not in name and "hypernetworks" in name)


def test_learnt_weights_are_exponentials_with_the_gradient_of_the_formula() -> None:
    method, batch = supervised(learned_weights=True, iou_loss="mse"), some_batch()
    log_weights = method.learner.log_weights
    assert log_weights is not None
    with torch.no_grad():
        log_weights.copy_(torch.tensor([0.5, -1.0, 0.2]))
    terms, monitors = method.losses(batch, generator())
    assert list(terms) == ["bce", "dice", "iou", "weighting"]
    plain = values(supervised(iou_loss="mse").losses(batch, generator())[0])
    for (name, own), s in zip({"bce": 2.0, "dice": 1.0, "iou": 0.5}.items(), (0.5, -1.0, 0.2), strict=True):
        assert terms[name].value.item() == pytest.approx(plain[name], rel=1e-5)
        assert torch.as_tensor(terms[name].weight).item() == pytest.approx(own * math.exp(s), rel=1e-5)
    total = total_loss(terms)
    wanted = [
        2 * math.exp(0.5) * plain["bce"] - 1,
        math.exp(-1.0) * plain["dice"] - 1,
        0.5 * math.exp(0.2) * plain["iou"] - 1,
    ]
    assert torch.autograd.grad(total, log_weights, retain_graph=True)[0].tolist() == pytest.approx(wanted, rel=1e-4)
    assert monitors.keys() == {"weight_bce", "weight_dice", "weight_iou"}


def test_learnt_weights_move_at_their_own_rate_undecayed_and_come_back(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int, rate: float = 0.05) -> Supervised:
        method = supervised(learned_weights=True)
        rates = {"loss_weights": (LOG_WEIGHTS, rate), "rest": ("", 0.0)}
        groups = parameter_groups(method.model, rates, separate=["loss_weights"])
        assert [g.name for g in groups if g.separate] == ["loss_weights"]
        run(
            method,
            tiny_data(8),
            folder,
            groups=groups,
            epochs=epochs,
            clip=1e-9,
            weight_decay=0.9,
            evaluate=lambda epoch: {"objective": float(epoch)},
        )
        return method

    method = train(tmp_path / "a", 2)
    moved = method.learner.log_weights
    assert moved is not None
    # AdamW's first steps are rate times the gradient's sign: four steps, no decay, and not held back by the clip.
    assert moved.abs().tolist() == pytest.approx([0.2, 0.2], abs=0.02)
    train(tmp_path / "b", 1)
    again = train(tmp_path / "b", 2).learner.log_weights
    assert again is not None
    assert torch.equal(again, moved)


@pytest.mark.parametrize("prompts", [{}, FROM_MASKS], ids=["boxes", "masks"])
def test_clicks_add_rounds_that_see_the_answer_before(prompts: dict[str, Any]) -> None:
    batch = some_batch()
    method = supervised(corrections=2, **prompts)
    y, predicted, rows = method.decode(batch, generator())
    assert y.shape == (4 * 2 * 3, 1, SIDE, SIDE)
    assert predicted.shape == (24, 1)
    assert torch.bincount(rows).tolist() == [6] * 4
    terms, _ = method.losses(batch, generator())
    assert all(math.isfinite(v) for v in values(terms).values())
    assert max(gradient_of(method, terms["bce"].value).values()) > 0


def test_a_click_makes_the_second_round_what_segment_anything_makes_of_it() -> None:
    """Round two by hand: the first box, its logits as mask prompt, and the one click."""
    batch = some_batch(1)
    method = supervised(corrections=1, prompts={"box": 1.0}, prompts_per_image=1)
    with torch.no_grad():
        y, _, _ = method.decode(batch, generator())

        features = encode(method.sam, method.sam.normalize(batch.images, batch.sizes))
        first, _ = decode_groups(method.sam, features, [(None, Prompts(boxes=batch.big_boxes))], slice(0, 1))
        assert torch.allclose(y[:1], first, atol=1e-4)
        assert batch.masks is not None
        wrong = ((F.interpolate(first, (SIDE, SIDE), mode="bilinear")[:, 0] > 0) != (batch.masks > 0.5)) & batch.valid
        found = []
        for row, column in wrong[0].nonzero().tolist():
            prompts = Prompts(
                torch.tensor([[[column, row]]]).float(),
                batch.masks[:, row, column][:, None].long(),
                batch.big_boxes,
                first,
            )
            found.append(decode_groups(method.sam, features, [(None, prompts)], slice(0, 1))[0])
        assert any(torch.allclose(y[1:], answer, atol=1e-4) for answer in found), "one of the wrong pixels was clicked"


def test_images_without_a_mask_take_no_part_and_are_not_clicked() -> None:
    batch = some_batch(2)
    assert batch.masks is not None
    masks = batch.masks.clone()
    masks[1] = float("nan")
    method = supervised(corrections=1, iou_loss="mse", candidates="three", **FROM_MASKS)
    total = total_loss(method.losses(replace(batch, masks=masks), generator())[0])
    total.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in method.model.parameters())
    nobody, _ = method.losses(replace(batch, masks=torch.full_like(masks, float("nan"))), generator())
    assert values(nobody) == {"bce": 0.0, "dice": 0.0, "iou": 0.0}


def test_the_average_is_the_closed_form_and_is_what_is_kept(tmp_path: Path) -> None:
    method = supervised(average=0.5)
    history = [{name: p.detach().clone() for name, p in method.model.named_parameters()}]
    after = method.after_step

    def noted(taken: bool | torch.Tensor = True) -> None:
        history.append({name: p.detach().clone() for name, p in method.model.named_parameters()})
        after(taken)

    method.after_step = noted
    run(method, tiny_data(8), tmp_path, epochs=1)
    assert len(history) == 3
    averages = dict(method.kept.named_parameters())
    for name, p in averages.items():
        closed = 0.25 * history[0][name] + 0.25 * history[1][name] + 0.5 * history[2][name]
        assert torch.allclose(p, closed, atol=1e-6), name
    load_best(tmp_path, method.model)
    assert all(torch.equal(p, averages[name]) for name, p in method.model.named_parameters())
    assert any(not torch.allclose(history[2][name], p, atol=1e-5) for name, p in method.model.named_parameters())


def test_without_an_average_what_is_kept_is_what_trains() -> None:
    method = supervised()
    assert method.kept is method.model
    assert method.teacher is None


def test_a_frozen_model_teaches_only_what_may_learn() -> None:
    sam = tiny_sam()
    select_trainable(sam, encoder="none", train_decoder=False, train_prompt_encoder=True)
    method = Supervised(sam, SUPERVISED)
    assert all(name.startswith("sam.prompt_encoder.") for name, p in method.model.named_parameters() if p.requires_grad)
    assert max(gradient_of(method, method.losses(some_batch(), generator())[0]["bce"].value).values()) > 0


def test_a_term_that_depends_on_nothing_that_trains_is_an_error_at_once(tmp_path: Path) -> None:
    """The head that predicts the IoU is frozen, so that its term has no gradient at all."""
    from lesionsam.errors import UserError

    sam = tiny_sam()
    select_trainable(sam, encoder="none", train_decoder=True, train_prompt_encoder=False)
    for name, p in sam.mask_decoder.named_parameters():
        p.requires_grad_("output_hypernetworks_mlps" in name)
    method = Supervised(sam, replace(SUPERVISED, iou_loss="mse"))
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError, match=r"the term `iou` is switched on \(weight 0.5\) but depends on nothing"):
            run(method, tiny_data(4), tmp_path, epochs=1)
