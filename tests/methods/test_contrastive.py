"""The methods: the published losses from their formulas, the targets, the gate, the contrast, and what reaches what."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.methods import CPU, generator, options, some_batch, supervised
from helpers.tiny import SIDE, tiny_data, tiny_sam
from helpers.training import run
from lesionsam.boxes.prior import ellipse_prior
from lesionsam.config.load import Config, default_values, validate
from lesionsam.config.presets import preset_values
from lesionsam.experiment.build import build_method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.methods.grid import known_masks, to_grid
from lesionsam.methods.prompting import draw_kinds
from lesionsam.methods.targets import ellipse_logits, placebo_target
from lesionsam.models.checkpoint import save_sam
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.prompts import draw_prompts
from lesionsam.training.gradients import step_generator
from lesionsam.types import Batch


def contrastive(seed: int = 0, decoder: bool = True, **changes: Any) -> Contrastive:
    sam, reference = tiny_sam(seed, sharpness=20), tiny_sam(seed, sharpness=20)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=0, train_decoder=decoder)
    torch.manual_seed(seed)
    return Contrastive(sam, reference.requires_grad_(False), options(**changes))


# ---- the published recipe --------------------------------------------------------------------------------------------


def published_config() -> Config:
    values = preset_values("published", default_values())
    return validate(values)


def published(tmp_path: Path, **changes: Any) -> Contrastive:
    """The published preset's method on the tiny SAM, through `build_method`; the student is off the reference."""
    save_sam(tiny_sam(0, sharpness=20), tmp_path / "sam.safetensors", name="compact")
    config = published_config()
    sam = tiny_sam(0, sharpness=20)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=0, train_decoder=config.model.train_decoder)
    method, _ = build_method(config, sam, tmp_path / "sam.safetensors", tiny_data(4), CPU)
    assert isinstance(method, Contrastive)
    with torch.no_grad():
        for p in trained_parameters(sam):
            p.add_(0.02 * torch.randn(p.shape, generator=generator(7)))
    method.options = options(method.options, **changes)
    method.model.train()
    return method


def test_the_published_preset_is_the_published_recipe(tmp_path: Path) -> None:
    found = asdict(published(tmp_path).options)
    wanted = {
        "pos_samples": 256,
        "neg_samples": 1024,
        "temperature": 0.1,
        "entropy_thresh": 0.2,
        "ema_decay": 0.999,
        "weights": {"contrast": 1.0, "distil": 0.1, "pseudo": 0.0, "projection": 0.0},
        "num_points": 10,
        "teacher_prompt": "ring",
        "gate_region": "image",
        "trust_empty": True,
        "missed_core": "negative",
        "certain_background": False,
        "random_fallback": True,
        "head_norm": "batch",
        "head_ema": False,
        "target": "teacher",
        "placebo": "none",
    }
    assert {key: found[key] for key in wanted} == wanted
    config = published_config()
    assert config.train.lr_encoder == 2e-6
    assert config.train.clip == 1.0
    assert config.train.epochs == 30
    assert config.train.batch_size == 4
    assert not config.model.train_decoder


def recompute(method: Contrastive, batch: Batch, seed: int) -> dict[str, float]:
    """Section 2 of the method's description image by image, in fp64 where it sums, without the package's batched code.

    With fewer pixels than `pos_samples` and `neg_samples` every candidate is taken, so that nothing but the ring points
    is drawn.
    """
    o, cells, batch_size = method.options, SIDE // 4, len(batch.ids)
    teacher = method.teacher
    assert teacher is not None
    assert method.reference is not None
    teacher_sam: Any = teacher.module.get_submodule("sam")
    points = draw_prompts(
        "ring", batch.big_boxes, batch.small_boxes, num_points=o.num_points, generator=generator(seed)
    ).points
    assert points is not None
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    features: dict[str, list[torch.Tensor]] = {"student": [], "teacher": [], "reference": []}
    images = []
    for k in range(batch_size):
        height, width = batch.sizes[k].tolist()
        normalised = (batch.images[k, :, :height, :width].float() - mean[:, None, None]) / std[:, None, None]
        images.append(F.pad(normalised, (0, SIDE - width, 0, SIDE - height))[None])
        for name, sam in (("student", method.sam), ("teacher", teacher_sam), ("reference", method.reference)):
            features[name].append(sam.image_encoder(images[k]))

    def decoded(sam: Any, k: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """segment_anything's own decoder, one image: (4H', 4W') logits and the predicted IoU."""
        sparse, dense = sam.prompt_encoder(
            points=(points[k : k + 1], torch.ones(1, o.num_points)), boxes=None, masks=None
        )
        low_res, predicted = sam.mask_decoder(
            image_embeddings=features[name][k],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return low_res[0, 0], predicted[0, 0]

    # The head's batch norm takes its statistics from the whole batch, student and teacher apart.
    z, z_t = (method.head(torch.cat(features[name])) for name in ("student", "teacher"))
    contrasts, ious, masks, trusted = [], [], [], []
    for k in range(batch_size):
        height, width = batch.sizes[k].tolist()
        low_res, _ = decoded(teacher_sam, k, "teacher")
        logits = F.interpolate(low_res[None, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0]
        p = torch.sigmoid(logits.double())[:height, :width].clamp(1e-12, 1 - 1e-12)
        entropy = float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())
        trusted.append(entropy <= o.entropy_thresh)
        soft = F.avg_pool2d(torch.sigmoid(logits)[None], SIDE // (4 * cells))[0]  # at the decoder's resolution

        student, predicted = decoded(method.sam, k, "student")
        scale = SIDE // (4 * cells)
        truth = F.avg_pool2d(batch.masks[k][None], scale)[0] if batch.masks is not None else soft
        part = torch.zeros(SIDE, SIDE)
        part[:height, :width] = 1
        part = F.avg_pool2d(part[None], scale)[0].bool()
        a, b = (student > 0)[part], (soft > 0.5)[part]
        ious.append(float((predicted - (a & b).sum() / (a | b).sum().clamp(min=1)) ** 2))
        q, t = torch.sigmoid(student.double())[part], truth.double()[part]
        cross = -(t * q.log() + (1 - t) * (1 - q).log()).mean()
        masks.append(float(cross + 1 - (2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1)))

        anchors, missed, overflow, everything = [], [], [], []
        for row in range(cells):
            for column in range(cells):
                x, y = (column + 0.5) * 4, (row + 0.5) * 4
                if x >= width or y >= height:
                    continue
                small, big = (
                    bool(box[0] <= x < box[2] and box[1] <= y < box[3])
                    for box in (batch.small_boxes[k], batch.big_boxes[k])
                )
                pseudo = float(torch.sigmoid(logits)[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].mean()) > 0.5
                everything.append((row, column))
                anchors += [(row, column)] if pseudo and small else []
                missed += [(row, column)] if small and not pseudo else []
                overflow += [(row, column)] if pseudo and not big else []
        negatives = missed + overflow or everything
        values = []
        for row, column in anchors:
            anchor, positive = z[k, :, row, column].double(), z_t[k, :, row, column].double()
            near = math.exp(float(anchor @ positive) / o.temperature)
            far = sum(math.exp(float(anchor @ z[k, :, r, c].double()) / o.temperature) for r, c in negatives)
            values.append(-math.log(near / (near + far)))
        contrasts.append(float(np.mean(values)) if values else None)
    counted = [value for value, ok in zip(contrasts, trusted, strict=True) if ok and value is not None]
    gaps = torch.cat([a - b for a, b in zip(features["student"], features["reference"], strict=True)]).square().mean(1)
    cell = SIDE // gaps.shape[-1]
    shares = [  # of each cell's pixels, how many are image and no other lesion
        [
            [float(v[r : r + cell, c : c + cell].double().mean()) for c in range(0, SIDE, cell)]
            for r in range(0, SIDE, cell)
        ]
        for v in batch.valid
    ]
    distil = (gaps * torch.tensor(shares)).sum() / np.sum(shares)
    return {
        "mask": float(np.mean(masks)),
        "iou": float(np.mean(ious)),
        "distil": float(distil),
        "contrast": float(np.mean(counted)) if counted else 0.0,
        "trusted": float(np.mean(trusted)),
    }


@pytest.mark.parametrize(("threshold", "share"), [(0.6931, 1.0), ("middle", 0.5), (0.0, 0.0)])
def test_the_published_losses_equal_the_formulas(tmp_path: Path, threshold: float | str, share: float) -> None:
    batch = some_batch(4)
    method = published(tmp_path)
    if threshold == "middle":
        _, f_t, _ = method.encode(batch)
        prompts = draw_prompts("ring", batch.big_boxes, batch.small_boxes, num_points=10, generator=generator(3))
        threshold = float(method.target(batch, f_t, prompts)[1].sort().values[1:3].mean())
    method = published(tmp_path, entropy_thresh=threshold)
    with torch.no_grad():
        wanted = recompute(published(tmp_path, entropy_thresh=threshold), batch, seed=3)
    terms, monitors = method.losses(batch, generator(3))
    assert list(terms) == ["contrast", "distil"]
    for name, value in ({n: t.value for n, t in terms.items()} | monitors).items():
        if name not in wanted:
            continue
        assert value.item() == pytest.approx(wanted[name], rel=2e-4, abs=2e-6), name
    assert wanted["trusted"] == share
    assert float(monitors["trusted"]) == share
    assert (wanted["contrast"] > 0.1) is (share > 0)
    assert {name: term.weight for name, term in terms.items()} == {"contrast": 1.0, "distil": 0.1}
    assert not any(value.requires_grad for value in monitors.values())


def test_an_image_without_negatives_is_contrasted_with_random_pixels_its_anchors_among_them(tmp_path: Path) -> None:
    batch, found = some_batch(2), []
    for cell in range(SIDE // 4 - 2):  # big box: the whole image, so no overflow; core: one cell, so none of it missed
        low = torch.tensor([[4.0 * cell, 8.0]] * 2)
        boxes = {"small_boxes": torch.cat([low, low + 4], 1), "big_boxes": torch.tensor([[0.0, 0, SIDE, SIDE]] * 2)}
        with torch.no_grad():
            wanted = recompute(published(tmp_path, entropy_thresh=0.6931), replace(batch, **boxes), seed=3)["contrast"]
        method = published(tmp_path, entropy_thresh=0.6931)
        value = method.losses(replace(batch, **boxes), generator(3))[0]["contrast"].value.item()
        assert value == pytest.approx(wanted, rel=2e-4, abs=2e-6)
        found.append(value)
    # Some cell is pseudo mask; its anchor is among its own negatives, so that its loss is at least ln 2 or nearly so.
    assert max(found) > 0.5


def test_distillation_skips_padding() -> None:
    method, batch = contrastive(distil=1.0), some_batch()
    with torch.no_grad():
        for p in method.sam.image_encoder.parameters():
            p.add_(0.02)
    valid = torch.ones_like(batch.valid)
    valid[:, SIDE // 2 :] = False
    f, _, f_r = method.encode(batch)
    assert f_r is not None
    wanted = (f - f_r)[:, :, : f.shape[2] // 2].square().mean()
    found = method.losses(replace(batch, valid=valid), generator())[0]["distil"].value
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert not torch.allclose(found, (f - f_r).square().mean(), rtol=1e-3)


def test_distillation_starts_at_zero_and_grows_as_the_student_leaves_the_pretrained_features(tmp_path: Path) -> None:
    value = contrastive(distil=1.0).losses(some_batch(), generator())[0]["distil"].value
    assert value.item() < 1e-12, "but for rounding: what has a gradient may be computed in another way"
    value = published(tmp_path).losses(some_batch(), generator())[0]["distil"].value
    assert value.item() > 1e-4


# ---- targets and placebos --------------------------------------------------------------------------------------------


def test_the_ellipse_of_a_batch_is_the_ellipse_of_each_image() -> None:
    batch = some_batch()
    found = ellipse_logits(batch.big_boxes, SIDE)
    for k in range(4):
        one = ellipse_prior(batch.big_boxes[k].numpy(), (SIDE, SIDE))
        inside = one > -3
        assert found[k].numpy()[inside] == pytest.approx(one[inside], abs=1e-4)


def test_the_placebo_other_is_the_next_images_target() -> None:
    logits = torch.randn(3, SIDE, SIDE, generator=generator())
    found = placebo_target(logits, torch.zeros(3, 4), warp=False)
    assert torch.equal(found, logits[[1, 2, 0]])


def test_the_warped_placebo_puts_the_next_images_ellipse_on_this_images_box() -> None:
    batch = some_batch(3)
    logits = ellipse_logits(batch.big_boxes, SIDE)
    found = placebo_target(logits, batch.big_boxes, warp=True)
    inside = torch.tensor(np.stack([ellipse_prior(b.numpy(), (SIDE, SIDE)) > -3 for b in batch.big_boxes]))
    error = (found - logits)[inside].abs()
    assert error.median() < 0.02, "an ellipse warped onto a box is that box's ellipse"
    assert error.max() < 0.5
    other = placebo_target(logits, batch.big_boxes, warp=False)
    assert (other - logits)[inside].abs().median() > 0.05
    for k in range(3):
        assert bool((found[k][~inside[k]] == logits[k].min()).all())


def test_a_warp_onto_its_own_box_changes_nothing_inside() -> None:
    logits, box = torch.randn(2, SIDE, SIDE, generator=generator()), torch.tensor([[4.0, 6.0, 20.0, 30.0]] * 2)
    found = placebo_target(logits, box, warp=True)
    assert torch.allclose(found[0, 6:30, 4:20], logits[1, 6:30, 4:20], atol=1e-4)


def test_a_placebo_needs_another_image() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        placebo_target(torch.zeros(1, 8, 8), torch.zeros(1, 4), warp=False)


def target_of(method: Contrastive, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, f_t, _ = method.encode(batch)
    prompts = draw_prompts("box+core", batch.big_boxes, batch.small_boxes, num_points=10, generator=generator())
    return method.target(batch, f_t, prompts)


def test_the_priors_target_is_its_sigmoid_inside_the_big_box() -> None:
    batch = some_batch()
    assert batch.prior is not None
    m, _, _ = target_of(contrastive(offset=0.2), batch)
    for k in range(4):
        wanted = torch.sigmoid(3 * (batch.prior[k] + 0.2))
        x0, y0, x1, y1 = batch.big_boxes[k].tolist()
        for row in range(SIDE):
            for column in range(SIDE):
                if not (y0 <= row + 0.5 < y1 and x0 <= column + 0.5 < x1):
                    wanted[row, column] = 0
        assert torch.allclose(m[k], to_grid(wanted[None], SIDE)[0], atol=1e-5)


def test_the_teachers_share_rises_with_the_steps_taken() -> None:
    batch = some_batch()
    constant = {v: target_of(contrastive(target="fused", teacher_weight=v), batch)[0] for v in (0.2, 0.4)}
    prior = target_of(contrastive(target="prior"), batch)[0]
    rising = contrastive(target="fused", teacher_weight=0.4, ramp_steps=4)
    assert torch.allclose(target_of(rising, batch)[0], prior, atol=1e-5)
    for _ in range(2):
        rising.after_step()
    rising.teacher = contrastive(target="fused").teacher  # the averages as they were: only the share is looked at
    assert torch.allclose(target_of(rising, batch)[0], constant[0.2], atol=1e-5)
    for _ in range(7):
        rising.after_step()
    assert torch.allclose(target_of(rising, batch)[0], constant[0.4], atol=1e-5)
    assert rising.student.num_steps == 9


def test_fusing_lies_between_prior_and_teacher_and_each_target_is_its_own() -> None:
    batch = some_batch()
    found = {
        kind: target_of(contrastive(target=kind, teacher_weight=0.3), batch)[0]
        for kind in ("prior", "teacher", "fused", "ellipse")
    }
    x0, y0, x1, y1 = (int(v) for v in batch.big_boxes[0].tolist())
    prior, teacher, fused = (
        torch.logit(found[k][0, y0 + 1 : y1, x0 + 1 : x1].double(), eps=1e-9) for k in ("prior", "teacher", "fused")
    )
    usable = (teacher.abs() < 12) & (prior.abs() < 12)
    assert usable.any()
    assert torch.allclose(fused[usable], (0.7 * prior + 0.3 * teacher)[usable], atol=1e-2)
    kinds = list(found)
    assert all((found[a] - found[b]).abs().max() > 0.05 for a in kinds for b in kinds if a < b)


# ---- the gate --------------------------------------------------------------------------------------------------------


def with_prior(prior: torch.Tensor) -> Batch:
    batch = some_batch(2)
    return replace(
        batch,
        prior=prior,
        sizes=torch.full((2, 2), SIDE),
        valid=torch.ones(2, SIDE, SIDE, dtype=torch.bool),
        big_boxes=torch.tensor([[8.0, 8.0, 24.0, 24.0]] * 2),
        small_boxes=torch.tensor([[14.0, 14.0, 18.0, 18.0]] * 2),
    )


def test_the_gate_averages_over_its_region() -> None:
    batch = with_prior(torch.zeros(2, SIDE, SIDE))  # entropy ln 2 in the big box, which is a quarter of the image
    _, in_box, trusted = target_of(contrastive(gate_region="big_box", entropy_thresh=0.5), batch)
    assert in_box.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert trusted.tolist() == [False, False]
    _, in_image, trusted = target_of(contrastive(gate_region="image", entropy_thresh=0.5, trust_empty=True), batch)
    assert in_image.tolist() == pytest.approx([math.log(2) / 4] * 2, abs=1e-5)
    assert trusted.tolist() == [True, True]


def test_an_empty_target_passes_the_published_gate_only() -> None:
    batch = with_prior(torch.stack([torch.full((SIDE, SIDE), -5.0), torch.full((SIDE, SIDE), 5.0)]))
    assert target_of(contrastive(trust_empty=True), batch)[2].tolist() == [True, True]
    assert target_of(contrastive(trust_empty=False), batch)[2].tolist() == [False, True]


def test_padding_and_other_lesions_take_no_part_in_the_gate() -> None:
    prior = torch.full((2, SIDE, SIDE), 5.0)
    prior[:, :, :16] = 0  # uncertain on the left
    batch = with_prior(prior)
    valid = batch.valid.clone()
    valid[0, :, :16] = False
    _, entropy, _ = target_of(contrastive(), replace(batch, valid=valid))
    assert entropy[0] < 1e-4
    assert entropy[1] == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_untrusted_images_teach_nothing() -> None:
    batch = with_prior(torch.stack([torch.zeros(SIDE, SIDE), torch.full((SIDE, SIDE), 5.0)]))
    method = contrastive(entropy_thresh=0.2)
    terms, monitors = method.losses(batch, generator())
    full = terms["pseudo"].value
    assert float(monitors["trusted"]) == 0.5
    other = replace(
        batch, prior=torch.stack([torch.randn(SIDE, SIDE, generator=generator()) * 0.01, torch.full((SIDE, SIDE), 5.0)])
    )
    assert torch.equal(method.losses(other, generator())[0]["pseudo"].value, full)
    untrusted = method.losses(replace(batch, prior=torch.zeros(2, SIDE, SIDE)), generator())[0]["pseudo"].value
    assert untrusted.item() == 0


# ---- the contrast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missed_core", ["ignore", "positive", "negative"])
@pytest.mark.parametrize("certain_background", [True, False])
def test_anchors_are_not_among_their_negatives(
    missed_core: str, certain_background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[torch.Tensor, ...]] = []

    def spy(candidates: torch.Tensor, count: int, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen.append((candidates,))
        keys = torch.where(candidates, uniforms + 1, torch.zeros_like(uniforms)).topk(
            min(count, candidates.shape[1]), dim=1
        )
        return keys.indices, keys.values > 0.5

    monkeypatch.setattr("lesionsam.methods.contrastive.sample_pixels", spy)
    thin = torch.tensor([[14.2, 8.0, 17.8, 24.0], [3.0, 3.0, 4.9, 4.9], [8.0, 8.0, 24.0, 24.0], [3.5, 3.0, 12.0, 30.0]])
    core = torch.tensor(
        [[14.3, 10.0, 15.9, 12.0], [3.1, 3.1, 3.6, 3.6], [12.0, 12.0, 20.0, 20.0], [3.6, 9.0, 3.9, 9.5]]
    )
    batch = replace(some_batch(4), big_boxes=thin, small_boxes=core)
    method = contrastive(
        contrast=1.0,
        target="teacher",
        missed_core=missed_core,
        certain_background=certain_background,
        entropy_thresh=0.6931,
        trust_empty=True,
    )
    method.losses(batch, generator())
    (anchors,), (beyond,), (missed,) = chosen
    assert bool(anchors.any())
    assert not bool((anchors & beyond).any())
    assert not bool((anchors & missed).any())
    assert bool(missed.any()) is False or missed_core == "negative"
    assert not bool((~batch.valid.view(4, 8, 4, 8, 4).any(4).any(2).flatten(1) & (anchors | beyond)).any()), "padding"


def test_contrast_falls_as_the_student_agrees_with_the_teacher() -> None:
    method = contrastive(contrast=1.0, entropy_thresh=0.6931)
    batch = some_batch()
    optimizer = torch.optim.Adam(trained_parameters(method.model), lr=2e-3)
    values = []
    for _ in range(25):
        value = method.losses(batch, generator())[0]["contrast"].value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


# ---- what reaches what -----------------------------------------------------------------------------------------------


def gradients(method: Contrastive, name: str) -> set[str]:
    """Parts of the student that a term's gradient reaches."""
    value = method.losses(some_batch(), generator())[0][name].value
    named = [(n, p) for n, p in method.model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    reached = {n for (n, _), g in zip(named, found, strict=True) if g is not None and bool((g != 0).any())}
    return {
        part
        for part in ("image_encoder", "mask_decoder", "prompt_encoder", "head.project", "head.embed")
        if any(part in n for n in reached)
    }


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("pseudo", {"image_encoder", "mask_decoder", "prompt_encoder"}),
        ("projection", {"image_encoder", "mask_decoder", "prompt_encoder"}),
        ("contrast", {"image_encoder", "head.project", "head.embed"}),
        ("distil", {"image_encoder"}),
    ],
)
def test_each_term_reaches_what_it_should(term: str, parts: set[str]) -> None:
    method = contrastive(contrast=1.0, distil=1.0, pseudo=1.0, projection=1.0, entropy_thresh=0.6931)
    with torch.no_grad():  # the student has moved, or distillation has no gradient yet
        for p in trained_parameters(method.sam):
            p.mul_(1.02)
    assert gradients(method, term) == parts


def test_no_gradient_reaches_teacher_or_reference(tmp_path: Path) -> None:
    method = contrastive(contrast=1.0, distil=1.0, pseudo=1.0, projection=1.0, target="fused", teacher_weight=0.5)
    torch.stack([t.value for t in method.losses(some_batch(), generator())[0].values()]).sum().backward()
    assert method.teacher is not None
    assert method.reference is not None
    for module in (method.teacher.module, method.reference):
        assert all(p.grad is None for p in module.parameters())


def test_the_frozen_prefix_gives_the_same_losses_as_the_whole_pass() -> None:
    results = []
    for last_k in (0, 1):
        method = contrastive(contrast=1.0, distil=1.0, target="fused", teacher_weight=0.3, entropy_thresh=0.6931)
        if last_k:
            sam, reference = tiny_sam(0, sharpness=20), tiny_sam(0, sharpness=20)
            select_trainable(sam, encoder="blocks", unfreeze_last_k=1, train_decoder=True)
            torch.manual_seed(0)
            method = Contrastive(sam, reference, method.options)
            assert method.frozen_blocks == 1
        results.append({n: t.value.item() for n, t in method.losses(some_batch(), generator())[0].items()})
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def fused(share: float) -> Contrastive:
    """Fused target and contrast, the student off its teacher; `share` of the steps ask the teacher's encoder."""
    method = contrastive(target="fused", teacher_weight=0.5, contrast=1.0, entropy_thresh=0.6931, teacher_share=share)
    with torch.no_grad():
        for p in trained_parameters(method.sam):
            p.add_(0.02 * torch.randn(p.shape, generator=generator(7)))
    method.model.train()
    return method


def test_without_the_teachers_pass_the_students_features_stand_in() -> None:
    method, batch = fused(0.0), some_batch()
    f, f_t, _ = method.encode(batch, asks_teacher=method.draws_teacher(generator()))
    assert f_t is not None
    assert torch.equal(f_t, f)
    assert not f_t.requires_grad
    asked = fused(1.0)
    assert asked.encode_teacher(batch) is not None
    assert not torch.allclose(f, asked.encode_teacher(batch))  # pyright: ignore[reportArgumentType]
    assert method.losses(batch, generator())[0]["pseudo"].value != asked.losses(batch, generator())[0]["pseudo"].value


def test_the_teachers_share_of_the_steps_is_drawn_from_the_steps_generator() -> None:
    drawn = [fused(0.25).draws_teacher(step_generator(0, number)) for number in range(400)]
    assert drawn == [fused(0.25).draws_teacher(step_generator(0, number)) for number in range(400)]
    assert sum(drawn) / 400 == pytest.approx(0.25, abs=0.07)  # three standard deviations of a binomial share
    before = generator()
    assert fused(1.0).draws_teacher(before)
    assert torch.equal(before.get_state(), generator().get_state()), "nothing is drawn where nothing is chosen"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_batch_in_parts_counts_what_its_losses_count(share: float) -> None:
    batch = some_batch(6)
    for seed in range(4):  # steps with and without the teacher's pass
        method = fused(share)
        counts, (_, monitors) = method.counts(batch, generator(seed)), method.losses(batch, generator(seed))
        assert counts["pseudo"] / 6 == pytest.approx(float(monitors["trusted"]))


def test_padding_and_other_lesions_take_no_part_in_the_two_box_term() -> None:
    method = contrastive(projection=1.0)
    batch = tiny_data(3, with_others=True).batch(range(3))
    y = torch.randn(3, SIDE, SIDE, generator=generator())
    loud = y.clone()
    loud[~batch.valid] = 50.0
    rows = torch.arange(3)
    assert bool((~batch.valid[:, :5, :6]).all()), "the other lesion lies in the corner"
    assert torch.allclose(method.projection(loud, batch, rows), method.projection(y, batch, rows), atol=1e-3)
    loud[:, 0, 20] = 50.0  # a pixel that counts, beyond the big box
    assert bool((method.projection(loud, batch, rows) > method.projection(y, batch, rows) + 0.1).all())


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", [True, False])
def test_whatever_the_masks_hold_the_contrastive_method_trains_the_same(tmp_path: Path, monitor: bool) -> None:
    data, trained, seen = tiny_data(8), [], []
    noise = np.random.default_rng(0).integers(0, 2, data.frames.masks.shape, dtype=np.uint8)
    for name, masks in (("true", data.frames.masks), ("noise", noise), ("unknown", np.full_like(noise, 255))):
        data.frames = replace(data.frames, masks=masks)
        method = contrastive(
            contrast=0.5,
            distil=0.1,
            projection=0.1,
            target="fused",
            teacher_weight=0.3,
            monitor_masks=monitor,
            entropy_thresh=0.6931,
        )
        rows: list[dict[str, float]] = []
        run(
            method,
            data,
            tmp_path / name,
            epochs=2,
            weight_decay=0.0,
            evaluate=lambda epoch: {"objective": 0.0},
            log=lambda values, step, rows=rows: rows.append(dict(values)),
        )
        trained.append(method.model.state_dict())
        seen.append([row.get("mask") for row in rows])
    for other in trained[1:]:
        assert all(torch.equal(value, other[key]) for key, value in trained[0].items())
    if monitor:
        assert seen[0] != seen[1], "the monitor did see them"
        assert seen[2][0] == 0
    else:
        assert all(value is None for value in seen[0])


def test_a_supervised_run_does_depend_on_the_masks() -> None:
    method, batch = supervised(), some_batch()
    assert batch.masks is not None
    first = method.losses(batch, generator())[0]["bce"].value
    second = method.losses(replace(batch, masks=1 - batch.masks), generator())[0]["bce"].value
    assert first.item() != second.item()


def test_images_without_a_mask_take_no_part_in_a_supervised_loss() -> None:
    batch = some_batch(2)
    assert batch.masks is not None
    masks = batch.masks.clone()
    masks[1] = float("nan")
    _, known = known_masks(replace(batch, masks=masks), SIDE)
    assert known.tolist() == [True, False]
    method = supervised()
    value = method.losses(replace(batch, masks=masks), generator())[0]["bce"].value
    assert math.isfinite(value.item())
    value.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in method.model.parameters())
    nobody = method.losses(replace(batch, masks=torch.full_like(masks, float("nan"))), generator())[0]["bce"].value
    assert nobody.item() == 0


# ---- prompts of mixed kinds ------------------------------------------------------------------------------------------


def test_kinds_are_drawn_in_their_shares() -> None:
    shares = {"ring": 0.25, "centre": 0.25, "box": 0.5, "box+core": 0.0}
    counts = dict.fromkeys(shares, 0)
    for step in range(200):
        kinds = draw_kinds(shares, 8, step_generator(0, step))
        assert kinds.count("box") == 4, "stratified: half of each batch"
        for kind in kinds:
            counts[kind] += 1
    assert counts == {"ring": 400, "centre": 400, "box": 800, "box+core": 0}
    rare = [draw_kinds({"ring": 0.1, "box": 0.9}, 1, step_generator(0, step))[0] for step in range(1000)]
    assert 60 < rare.count("ring") < 140
    first = [draw_kinds(shares, 8, step_generator(0, step))[0] for step in range(200)]
    assert len(set(first)) == 3, "an image gets each kind in turn"
